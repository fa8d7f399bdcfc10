"""Cross-entropy at the labels' resolution that never stores logits there: what makes a table of many rows affordable.

Sixteen photos of 512x512 pixels and 150 classes are 2.5 GB of logits, which a row of the table would write and read ten
times over in each step. Between four neighbouring patch centres (a cell) all pixels mix the same four logits, so that
both the loss and its gradient are sums over the pixels of a cell, which torch.compile turns into few kernels.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probe.datasets.samples import IGNORE
from probe.fusing import can_fuse, fused
from probe.losses import cross_entropy
from probe.resizing import resize_maps

Labels = Int[Tensor, "B H W"]


def full_resolution_cross_entropy(logits: Float[Tensor, "B K h w"], labels: Labels) -> Float[Tensor, ""]:
    """Cross-entropy of bilinearly upsampled logits: ``cross_entropy(resize_maps(logits, labels.shape[1:]), labels)``.

    Where kernels can be fused (`can_fuse`), without logits at the labels' resolution; elsewhere as it is written. Both
    add in a fixed order.

    Args:
        logits: On the patch grid.
        labels: Class ids; `IGNORE` where there are none.

    Returns:
        The mean over all pixels, the ignored ones included.
    """
    if can_fuse(logits.device):
        return cell_cross_entropy(logits, labels)
    return cross_entropy(resize_maps(logits, (labels.shape[-2], labels.shape[-1])), labels)


class Cells(NamedTuple):
    """The pixels between neighbouring patch centres along one axis, in columns of equal length."""

    pixels: Int[Tensor, "cells P"]
    """Their numbers; those behind the last of a cell are any."""
    inside: Tensor
    """[cells, P] bool: whether there is such a pixel."""
    fractions: Float[Tensor, "cells P"]
    """How far they lie from the first centre to the second, in [0, 1)."""


def cell_cross_entropy(logits: Float[Tensor, "B K h w"], labels: Labels) -> Float[Tensor, ""]:
    """`full_resolution_cross_entropy` cell by cell, which is worth its while only where it is compiled."""
    rows = _cells(logits.shape[2], labels.shape[1], logits.device)
    columns = _cells(logits.shape[3], labels.shape[2], logits.device)
    outside = ~(rows.inside[:, None, :, None] & columns.inside[None, :, None, :])
    of_cells = labels[:, rows.pixels[:, None, :, None], columns.pixels[None, :, None, :]].masked_fill(outside, IGNORE)
    # Beyond the outermost centres the outermost logits go on, as with torch's interpolate.
    # (F.pad does the same, but its gradient adds in no fixed order.)
    wide = torch.cat([logits[..., :1], logits, logits[..., -1:]], 3)
    centres = torch.cat([wide[:, :, :1], wide, wide[:, :, -1:]], 2).permute(0, 2, 3, 1).contiguous()
    total = _CellLoss.apply(centres, of_cells, rows.fractions, columns.fractions)
    return total / labels.numel()


class _CellLoss(torch.autograd.Function):
    """Sum of the losses of all pixels, as a function of the logits at patch centres [B, h+2, w+2, K]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, centres: Tensor, labels: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor:
        total, normalizers = fused(_losses_of_cells, centres.device)(centres, labels, rows, columns)
        ctx.save_for_backward(centres, labels, rows, columns, normalizers)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        centres = ctx.saved_tensors[0]
        height, width = centres.shape[1] - 1, centres.shape[2] - 1
        parts = fused(_gradients_of_cells, centres.device)(*ctx.saved_tensors)
        gradient = torch.zeros_like(centres)
        for (top, left), part in zip(_CORNERS, parts):
            gradient[:, top : top + height, left : left + width] += part
        return gradient * grad_output, None, None, None


_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def _corner_weights(rows: Tensor, columns: Tensor) -> list[Tensor]:
    """What each of the four corners of a cell counts for its pixels, [cells_y, cells_x, P_y, P_x] each."""
    down, right = rows[:, None, :, None], columns[None, :, None, :]
    return [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right]


def _upsample(centres: Tensor, weights: list[Tensor]) -> Tensor:
    """Logits [B, cells_y, cells_x, P_y, P_x, K] of all pixels: only ever an intermediate of a fused kernel."""
    height, width = centres.shape[1] - 1, centres.shape[2] - 1
    corners = [centres[:, top : top + height, left : left + width] for top, left in _CORNERS]
    first, *others = [weight[..., None] * corner[:, :, :, None, None] for weight, corner in zip(weights, corners)]
    return sum(others, first)


def _losses_of_cells(centres: Tensor, labels: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses, and each pixel's log of the sum of exponentials."""
    weights = _corner_weights(rows, columns)
    logits = _upsample(centres, weights)
    normalizers = logits.logsumexp(-1)
    chosen = torch.arange(centres.shape[-1], device=centres.device) == labels[..., None]
    picked = torch.where(chosen, logits, 0.0).sum(-1)
    return torch.where(labels != IGNORE, normalizers - picked, 0.0).sum(), normalizers


def _gradients_of_cells(
    centres: Tensor, labels: Tensor, rows: Tensor, columns: Tensor, normalizers: Tensor
) -> tuple[Tensor, ...]:
    """Gradient of the sum with respect to the four corners of each cell, [B, cells_y, cells_x, K] each."""
    weights = _corner_weights(rows, columns)
    chosen = torch.arange(centres.shape[-1], device=centres.device) == labels[..., None]
    softmax = (_upsample(centres, weights) - normalizers[..., None]).exp()
    slope = torch.where((labels != IGNORE)[..., None], softmax - chosen.to(softmax.dtype), 0.0)
    return tuple((weight[..., None] * slope).sum((3, 4)) for weight in weights)


@lru_cache(maxsize=64)
def _cells(centres: int, length: int, device: torch.device) -> Cells:
    """Sorts ``length`` pixels into the cells between ``centres`` patch centres, one more at either end."""
    positions = (torch.arange(length, dtype=torch.float64) + 0.5) * centres / length - 0.5
    cells = positions.floor().long() + 1
    counts = cells.bincount(minlength=centres + 1)
    starts = counts.cumsum(0) - counts
    pixels = starts[:, None] + torch.arange(int(counts.max()))
    inside = pixels < (starts + counts)[:, None]
    pixels = pixels.clamp(max=length - 1)
    fractions = (positions - positions.floor()).float()[pixels]
    return Cells(pixels.to(device), inside.to(device), fractions.to(device))
