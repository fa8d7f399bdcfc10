"""Frozen backbones and the rows of the table that are made of them."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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
    load_backbone,
    load_fine_tuned,
    needs_original,
    needs_tuned,
)
from fit3d_ns.support.errors import UserError, flags_are
from probe.features.partners import TUNED, Partner, check_original

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Row:
    """A row of the table: an assembly, and which fine-tuned backbone it takes."""

    name: str
    """Unique in the table."""
    assembly: Assembly
    """How features are put together."""
    partner: str | None = None
    """Name of the fine-tuned backbone, or of its group; None where only the original is taken."""


def choose_rows(assemblies: Sequence[Assembly] | None, partners: Sequence[Partner]) -> tuple[Row, ...]:
    """Returns the rows of the table.

    Args:
        assemblies: The user's choice; None: all that can be made.
        partners: The fine-tuned backbones.

    Returns:
        Rows in the order of `ASSEMBLIES` for the original and each group of fine-tuned backbones, one after the other.

    Raises:
        UserError: If an assembly is unknown, named twice, or needs a fine-tuned backbone that is not given.
    """
    groups = list(dict.fromkeys(partner.group for partner in partners))
    chosen = list(assemblies) if assemblies else [name for name in ASSEMBLIES if groups or not needs_tuned(name)]
    if len(set(chosen)) < len(chosen):
        raise UserError("--assemblies names a row twice: name each once.")
    for name in chosen:
        if name not in ASSEMBLIES:
            raise UserError(f"--assemblies {name} is unknown: choose from {', '.join(ASSEMBLIES)}.")
        if needs_tuned(name) and not groups:
            raise UserError(f"--assemblies {name} needs a fine-tuned backbone: give one with --tuned PATH.")
    ordered: list[Assembly] = [name for name in ASSEMBLIES if name in chosen]
    rows = [Row(name, name) for name in ordered if not needs_tuned(name)]
    for group in groups:
        for name in ordered:
            if needs_tuned(name):
                alone = group if name == "tuned" else f"{group}_{name}"
                rows.append(Row(name if group == TUNED else alone, name, group))
    return tuple(rows)


def choose_untrained_rows(
    assemblies: Sequence[Assembly] | None, partners: Sequence[Partner], probe: str
) -> tuple[Row, ...]:
    """Returns the rows of a probe that trains nothing; errors as of `choose_rows`.

    By default without `linear`, which is trained, and `duplicate`, whose cosines are the original's.

    Args:
        assemblies: The user's choice; None for all that can be made.
        partners: All fine-tuned backbones.
        probe: Which probe, for the sentence.

    Raises:
        UserError: If `linear` is asked for.
    """
    if assemblies and "linear" in assemblies:
        raise UserError(f"--assemblies linear is trained with a head, and {probe} trains none: leave it out.")
    names = ("original", "tuned", "add", "concat") if partners else ("original",)
    return choose_rows(assemblies or names, partners)


class FrozenBackbones:
    """The original and the fine-tuned backbones, run once per batch whatever the number of rows."""

    def __init__(self, backbones: dict[str, Backbone], precision: Precision) -> None:
        """Takes backbones by name, ``original`` or a partner's; they must share width and patch size.

        Args:
            backbones: By name, ``original`` or a partner's; they share width and patch size.
            precision: Of their computation on CUDA.
        """
        self._backbones = backbones
        self._precision: Precision = precision
        first = next(iter(backbones.values()))
        self.info = first.info
        self.names = tuple(backbones)
        self.identities = {name: backbone.identity for name, backbone in backbones.items()}
        for backbone in backbones.values():
            backbone.requires_grad_(False)

    def one_by_one(self) -> list[tuple[str, "FrozenBackbones"]]:
        """Returns each backbone alone, with its name."""
        return [(name, FrozenBackbones({name: one}, self._precision)) for name, one in self._backbones.items()]

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
    """Assembles a row's features.

    Args:
        row: Of the table.
        features: Of each backbone by name.

    Returns:
        Of the row's width.
    """
    return assemble(row.assembly, features.get("original"), features[row.partner] if row.partner else None)


def row_width(row: Row, width: int) -> int:
    """Returns the channels of a row's patch tokens, given the backbone's.

    Args:
        row: Of the table.
        width: Channels C of a backbone.
    """
    return assembled_width(row.assembly, width)


def centre_pad(
    images: Float[Tensor, "B 3 H W"], patch_size: int, fill: Float[Tensor, "1 3 1 1"]
) -> Float[Tensor, "B 3 H2 W2"]:
    """Pads images to multiples of the patch size, half on each side, with a colour.

    Args:
        images: RGB, any range.
        patch_size: Of the backbone, pixels.
        fill: The colour, in the images' range.

    Returns:
        Images whose sides are multiples of the patch size.
    """
    height, width = images.shape[-2:]
    (top, rows), (left, columns) = even_padding(height, patch_size), even_padding(width, patch_size)
    if not rows and not columns:
        return images
    padded = fill.expand(images.shape[0], -1, height + rows, width + columns).clone()
    padded[..., top : top + height, left : left + width] = images
    return padded


def even_padding(side: int, patch_size: int) -> tuple[int, int]:
    """Returns the pixels that `centre_pad` puts before a side, and before and after together.

    Args:
        side: Pixels.
        patch_size: Of the backbone, pixels.
    """
    total = -side % patch_size
    return total // 2, total


def load_backbones(
    spec: BackboneSpec,
    partners: Sequence[Partner],
    rows: Sequence[Row],
    precision: Precision,
    device: torch.device,
) -> FrozenBackbones:
    """Loads the backbones that some rows take.

    Args:
        spec: The original.
        partners: Fine-tuned backbones of the same architecture.
        rows: Rows of the table.
        precision: ``bf16`` runs the backbones in bfloat16 on CUDA.
        device: Where they go.

    Returns:
        The backbones.

    Raises:
        UserError: If weights are missing, damaged, of another architecture, or fine-tuned from another original.
    """
    taken = {row.partner for row in rows}
    backbones: dict[str, Backbone] = {}
    if any(needs_original(row.assembly) for row in rows):
        with flags_are(backbone="--backbone", backbone_weights="--backbone-weights", backbone_layer="--layer"):
            backbones["original"] = load_backbone(spec, device)
    for partner in partners:
        if partner.group not in taken:
            continue
        if "original" in backbones:
            check_original(partner, backbones["original"].identity)
        with flags_are(backbone="--backbone", backbone_weights=f"--{partner.role}", backbone_layer="--layer"):
            backbones[partner.name] = load_fine_tuned(partner.found, spec, device)
    return FrozenBackbones(backbones, precision)
