"""Frozen backbones and the rows of the table that are made of them."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.backbones import (
    ASSEMBLIES,
    Assembly,
    Backbone,
    BackboneOutput,
    BackboneSpec,
    assemble,
    assembled_width,
    find_fine_tuned,
    flags_named,
    load_backbone,
    load_fine_tuned,
    needs_original,
    needs_tuned,
)
from fit3d_ns.support.errors import UserError

Precision = Literal["fp32", "bf16"]
CONTROL = "control"


@dataclass(frozen=True)
class Row:
    """A row of the table: an assembly, and which fine-tuned backbone it takes."""

    name: str
    assembly: Assembly
    partner: str | None = None
    """``tuned`` or ``control``; None where only the original is taken."""


def choose_rows(assemblies: Sequence[str] | None, tuned: bool, control: bool) -> tuple[Row, ...]:
    """Returns the rows of the table.

    Args:
        assemblies: The user's choice; None: all that can be made.
        tuned: Whether a fine-tuned backbone is given.
        control: Whether one that was distilled without 3D is given, which gets the same rows.

    Returns:
        Rows in the order of `ASSEMBLIES`, those of the control at the end.

    Raises:
        UserError: If an assembly is unknown, named twice, or needs a fine-tuned backbone that is not given.
    """
    chosen = list(assemblies) if assemblies else [name for name in ASSEMBLIES if tuned or not needs_tuned(name)]
    if len(set(chosen)) < len(chosen):
        raise UserError("--assemblies names a row twice: name each once.")
    for name in chosen:
        if name not in ASSEMBLIES:
            raise UserError(f"--assemblies {name} is unknown: choose from {', '.join(ASSEMBLIES)}.")
        if needs_tuned(name) and not tuned:
            raise UserError(f"--assemblies {name} needs a fine-tuned backbone: give one with --tuned PATH.")
    if control and not tuned:
        raise UserError("--control compares with a fine-tuned backbone: give that with --tuned PATH.")
    rows = [Row(name, name, "tuned" if needs_tuned(name) else None) for name in ASSEMBLIES if name in chosen]
    if control:
        for row in [row for row in rows if row.partner]:
            name = CONTROL if row.assembly == "tuned" else f"{CONTROL}_{row.assembly}"
            rows.append(Row(name, row.assembly, CONTROL))
    return tuple(rows)


def choose_untrained_rows(assemblies: Sequence[str] | None, tuned: bool, control: bool, probe: str) -> tuple[Row, ...]:
    """Returns the rows of a probe that trains nothing; arguments and errors as for `choose_rows`.

    By default without `linear`, which is trained, and `duplicate`, whose cosines are the original's.

    Raises:
        UserError: If `linear` is asked for.
    """
    if assemblies and "linear" in assemblies:
        raise UserError(f"--assemblies linear is trained with a head, and {probe} trains none: leave it out.")
    names = ("original", "tuned", "add", "concat") if tuned else ("original",)
    return choose_rows(assemblies or names, tuned, control)


class FrozenBackbones:
    """The original and the fine-tuned backbones, run once per batch whatever the number of rows."""

    def __init__(self, backbones: dict[str, Backbone], precision: Precision) -> None:
        """Takes backbones by their names ``original``, ``tuned``, ``control``; they must share width and patch size."""
        self._backbones = backbones
        self._precision = precision
        first = next(iter(backbones.values()))
        self.info = first.info
        self.names = tuple(backbones)
        self.identities = {name: backbone.identity for name, backbone in backbones.items()}
        for backbone in backbones.values():
            backbone.requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, BackboneOutput]:
        """Computes the features of images in [0, 1] of any size.

        Images are padded evenly on all sides to multiples of the patch size with the mean colour, which is zero for
        the network (DINOv2's CenterPadding); the border stays in the token map.
        """
        first = next(iter(self._backbones.values()))
        padded = centre_pad(images, self.info.patch_size, first.mean)
        reduced = self._precision == "bf16" and images.is_cuda
        with torch.autocast("cuda", torch.bfloat16) if reduced else nullcontext():
            outputs = {name: backbone(padded) for name, backbone in self._backbones.items()}
        return {
            name: BackboneOutput(tokens.float(), None if cls is None else cls.float())
            for name, (tokens, cls) in outputs.items()
        }


def row_features(row: Row, features: dict[str, BackboneOutput]) -> BackboneOutput:
    """Assembles a row's features."""
    return assemble(row.assembly, features.get("original"), features[row.partner] if row.partner else None)


def row_width(row: Row, width: int) -> int:
    """Returns the channels of a row's patch tokens, given the backbone's."""
    return assembled_width(row.assembly, width)


def centre_pad(
    images: Float[Tensor, "B 3 H W"], patch_size: int, fill: Float[Tensor, "1 3 1 1"]
) -> Float[Tensor, "B 3 H2 W2"]:
    """Pads images to multiples of the patch size, half on each side, with a colour."""
    height, width = images.shape[-2:]
    (top, rows), (left, columns) = even_padding(height, patch_size), even_padding(width, patch_size)
    if not rows and not columns:
        return images
    padded = fill.expand(images.shape[0], -1, height + rows, width + columns).clone()
    padded[..., top : top + height, left : left + width] = images
    return padded


def even_padding(side: int, patch_size: int) -> tuple[int, int]:
    """Returns the pixels that `centre_pad` puts before a side, and before and after together."""
    total = -side % patch_size
    return total // 2, total


def load_backbones(
    spec: BackboneSpec,
    tuned: str | Path | None,
    control: str | Path | None,
    rows: Sequence[Row],
    precision: Precision,
    device: torch.device,
) -> FrozenBackbones:
    """Loads the backbones that some rows take.

    Args:
        spec: The original.
        tuned: A fine-tuned backbone of the same architecture: whatever `find_fine_tuned` finds.
        control: Those of a backbone distilled without 3D.
        rows: Rows of the table.
        precision: ``bf16`` runs the backbones in bfloat16 on CUDA.
        device: Where they go.

    Returns:
        The backbones.

    Raises:
        UserError: If weights are missing, damaged or of another architecture.
    """
    partners = {row.partner for row in rows}
    backbones: dict[str, Backbone] = {}
    if any(needs_original(row.assembly) for row in rows):
        with flags_named("--backbone", "--backbone-weights", "--layer"):
            backbones["original"] = load_backbone(spec, device)
    for name, path in (("tuned", tuned), (CONTROL, control)):
        if name in partners and path is not None:
            flag = f"--{name}"
            with flags_named("--backbone", flag, "--layer"):
                backbones[name] = load_fine_tuned(find_fine_tuned(path, flag), spec, device)
    return FrozenBackbones(backbones, precision)
