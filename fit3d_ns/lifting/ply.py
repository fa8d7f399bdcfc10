"""Reads the PLY files in which 3D Gaussian Splatting programs exchange their scenes."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fit3d_ns.errors import UserError

_TYPES = {
    **{name: "f4" for name in ("float", "float32")},
    **{name: "f8" for name in ("double", "float64")},
    **{name: "u1" for name in ("uchar", "uint8")},
    **{name: "i1" for name in ("char", "int8")},
    **{name: "u2" for name in ("ushort", "uint16")},
    **{name: "i2" for name in ("short", "int16")},
    **{name: "u4" for name in ("uint", "uint32")},
    **{name: "i4" for name in ("int", "int32")},
}
_COLUMNS = {
    "means": ("x", "y", "z"),
    "scales": ("scale_0", "scale_1", "scale_2"),
    "quats": ("rot_0", "rot_1", "rot_2", "rot_3"),
    "opacities": ("opacity",),
    "features_dc": ("f_dc_0", "f_dc_1", "f_dc_2"),
}


def read_ply(path: Path) -> dict[str, Tensor]:
    """Reads Gaussians as 3DGS, gsplat and ``ns-export gaussian-splat`` write them.

    Args:
        path: A PLY file, ASCII or binary.

    Returns:
        Splatfacto's parameters: ``means`` [N, 3], ``scales`` [N, 3] (logarithms), ``quats`` [N, 4] (wxyz),
        ``opacities`` [N, 1] (logits), ``features_dc`` [N, 3], ``features_rest`` [N, K, 3], all float32.

    Raises:
        UserError: If the file is missing, damaged, or lacks a column.
    """
    try:
        with open(path, "rb") as file:
            layout, count, dtype = _read_header(file, path)
            if layout == "ascii":
                rows = np.loadtxt(file, max_rows=count, ndmin=2, dtype=np.float64)
                table = {name: rows[:, column] for column, name in enumerate(dtype.names or ())}
            else:
                data = file.read(count * dtype.itemsize)
                vertices = np.frombuffer(data, dtype.newbyteorder("<" if "little" in layout else ">"))
                table = {name: vertices[name] for name in dtype.names or ()}
    except OSError as error:
        raise UserError(f"The file {path} cannot be read ({error.strerror or error}): check --ply.") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"The file {path} is damaged ({error}): export it again.") from error
    lengths = {len(column) for column in table.values()}
    if lengths != {count} or count == 0:
        raise UserError(f"The file {path} is truncated, or holds no Gaussians: export it again.")
    return _parameters(table, count, path)


def _read_header(file: Any, path: Path) -> tuple[str, int, np.dtype]:
    """Layout, number of vertices and their columns; the file then stands at the first vertex."""
    if file.readline().strip() != b"ply":
        raise UserError(f"{path} is no PLY file: name one that a Gaussian splatting program exported.")
    layout, count, columns, element = "", 0, [], None
    while (line := file.readline()) and line.strip() != b"end_header":
        words = line.decode("ascii", "replace").split()
        if words[:1] == ["format"]:
            layout = words[1]
        elif words[:1] == ["element"]:
            if element is None and words[1] != "vertex":
                raise UserError(f"{path} does not begin with vertices: it is no file of Gaussians.")
            element = words[1]
            count = int(words[2]) if element == "vertex" else count
        elif words[:1] == ["property"] and element == "vertex":
            if words[1] not in _TYPES:
                raise UserError(f"{path} has a column of the type `{words[1]}`: it is no file of Gaussians.")
            columns.append((words[2], _TYPES[words[1]]))
    if layout not in ("ascii", "binary_little_endian", "binary_big_endian") or not columns:
        raise UserError(f"The header of {path} is damaged: export the file again.")
    return layout, count, np.dtype(columns)


def _parameters(table: dict[str, np.ndarray], count: int, path: Path) -> dict[str, Tensor]:
    missing = [name for names in _COLUMNS.values() for name in names if name not in table]
    if missing:
        raise UserError(
            f"{path} lacks the columns {', '.join(missing)}: it is no file of Gaussians (a point cloud?); export one "
            "with `ns-export gaussian-splat` or take the point_cloud.ply of 3DGS."
        )
    rest = sorted((name for name in table if name.startswith("f_rest_")), key=lambda name: int(name.split("_")[-1]))
    bands = len(rest) // 3 + 1
    if len(rest) % 3 or math.isqrt(bands) ** 2 != bands:
        raise UserError(f"{path} has {len(rest)} f_rest columns, which is no whole degree of spherical harmonics.")
    parameters = {name: _stack(table, columns) for name, columns in _COLUMNS.items()}
    # The file holds all red coefficients, then all green, then all blue.
    colors = _stack(table, rest).reshape(count, 3, bands - 1) if rest else torch.zeros(count, 3, 0)
    return {**parameters, "features_rest": colors.transpose(1, 2).contiguous()}


def _stack(table: dict[str, np.ndarray], names: Any) -> Tensor:
    return torch.from_numpy(np.stack([table[name].astype(np.float32) for name in names], axis=1))


def sh_degree(parameters: dict[str, Tensor]) -> int:
    """Returns the degree of the spherical harmonics in ``features_rest``."""
    return math.isqrt(parameters["features_rest"].shape[1] + 1) - 1
