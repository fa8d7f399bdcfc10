"""Writes tables of numbers, one row a point, as PLY files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Num
from torch import Tensor

from fit3d_ns.errors import UserError
from fit3d_ns.files import atomic_path

_ROWS_PER_CALL = 2**18
"""Rows that go to the disk at once, which bounds the memory: 130 MB for a splat with 64 features."""


@dataclass(frozen=True)
class Columns:
    """Columns of a PLY file that lie side by side.

    Attributes:
        names: Their k names.
        values: [N, k], on any device; uint8 becomes ``uchar``, everything else ``float``.
    """

    names: Sequence[str]
    values: Num[Tensor, "N k"]


def write_ply_table(
    path: Path, columns: Sequence[Columns], rows: Int[Tensor, "M"], comments: Iterable[str] = ()
) -> None:
    """Writes columns as a binary little-endian PLY file of vertices, whole or not at all.

    Args:
        path: The file; what stands there is replaced.
        columns: In the order of the file.
        rows: Rows to write, in this order.
        comments: Lines for the header.

    Raises:
        UserError: If there is no row, or the file cannot be written.
    """
    if len(rows) == 0:
        raise UserError(f"No Gaussian is left to write to {path}: all are invisible, not finite or not selected.")
    kinds = ["u1" if block.values.dtype == torch.uint8 else "<f4" for block in columns]
    layout = np.dtype(
        [(str(number), kind, (len(block.names),)) for number, (kind, block) in enumerate(zip(kinds, columns))]
    )
    header = ["ply", "format binary_little_endian 1.0", *(f"comment {comment}" for comment in comments)]
    header.append(f"element vertex {len(rows)}")
    for kind, block in zip(kinds, columns):
        header += [f"property {'uchar' if kind == 'u1' else 'float'} {name}" for name in block.names]
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(("\n".join([*header, "end_header"]) + "\n").encode("ascii"))
        for chosen in rows.split(_ROWS_PER_CALL):
            table = np.empty(len(chosen), layout)
            for number, block in enumerate(columns):
                table[str(number)] = block.values.detach()[chosen.to(block.values.device)].cpu().numpy()
            file.write(table.view(np.uint8).data)
