"""Losses of the linear probes."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fit3d_ns.support.compiling import can_compile
from probe.data.base import IGNORE
from probe.heads import resize_maps

_LOG_OFFSET = 1e-3
_MEAN_WEIGHT = 0.15


def cross_entropy(logits: Float[Tensor, "B K *place"], labels: Int[Tensor, "B *place"]) -> Float[Tensor, ""]:
    """Returns the cross-entropy of labelled pixels, divided by the number of all pixels, the ignored ones included.

    mmsegmentation's default (``avg_non_ignore=False``), and so the paper's: batches with many ignored pixels weigh
    less.

    Args:
        logits: Of K classes.
        labels: Class ids; `IGNORE` where there are none.
    """
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum") / labels.numel()


def scale_invariant(
    depth: Float[Tensor, "B *place"], truth: Float[Tensor, "B *place"], group: int, variance: bool = True
) -> Float[Tensor, ""]:
    """Scale-invariant log loss sqrt(var(g) + .15 mean(g)^2) over valid pixels, g = log(depth + eps) - log(truth + eps).

    Args:
        depth: Predicted, metres, above 0.
        truth: Metres, 0 where there is none.
        group: Images that one value is taken over; the values are averaged. Groups with less than two valid pixels
            count as 0, so that the mean over several processes is that over one.
        variance: Whether the variance counts; the references leave it out in the first 100 steps.

    Returns:
        The mean over groups.

    FeatureSource: Eigen et al. 2014 as used by AdaBins and DINOv2.
    """
    # Sums under a mask instead of indexing, which would make a GPU wait at every group.
    valid = (truth > 0).flatten(1).to(depth.dtype)
    difference = torch.log(depth.flatten(1) + _LOG_OFFSET) - torch.log(truth.flatten(1).clamp_min(0) + _LOG_OFFSET)
    groups = torch.arange(len(depth), device=depth.device) // group
    empty = depth.new_zeros(-(-len(depth) // group))
    count = empty.index_add(0, groups, valid.sum(1))
    mean = empty.index_add(0, groups, (difference * valid).sum(1)) / count.clamp_min(1)
    square = _MEAN_WEIGHT * mean.square()
    if variance:
        centred = (difference - mean[groups][:, None]) * valid
        square = square + empty.index_add(0, groups, centred.square().sum(1)) / (count - 1).clamp_min(1)
    enough = (count >= 2).to(depth.dtype)
    # The root of exactly 0 has no gradient.
    return (square.clamp_min(1e-12).sqrt() * enough).mean()


def log_gradient(depth: Float[Tensor, "B H W"], truth: Float[Tensor, "B H W"], scales: int = 4) -> Float[Tensor, ""]:
    """Returns the mean absolute difference of neighbouring log-depth errors over pairs of valid pixels.

    Each image has its own mean, and images without such pairs count as 0.

    The references' version takes its differences along batch and channel instead of rows and columns, so that it is
    zero, with zero gradient, for up to two images; this one does what was meant, and no published recipe uses it.

    Args:
        depth: Predicted, metres, above 0.
        truth: Metres, 0 where there is none.
        scales: How many strides: 1, 2, 4, 8 ...
    """
    total = depth.sum() * 0.0
    valid = truth > 0
    error = torch.where(
        valid, torch.log(depth + _LOG_OFFSET) - torch.log(truth.clamp_min(0) + _LOG_OFFSET), torch.zeros_like(depth)
    )
    for scale in range(scales):
        stride = 2**scale
        coarse, known = error[:, ::stride, ::stride], valid[:, ::stride, ::stride]
        for dim in (1, 2):
            if coarse.shape[dim] < 2:
                continue
            both = known.narrow(dim, 1, known.shape[dim] - 1) & known.narrow(dim, 0, known.shape[dim] - 1)
            change = coarse.diff(dim=dim).abs() * both
            total = total + (change.sum((1, 2)) / both.sum((1, 2)).clamp_min(1)).mean()
    return total / scales


def normal_distance(normals: Float[Tensor, "B 3 *place"], truth: Float[Tensor, "B 3 *place"]) -> Float[Tensor, ""]:
    """Returns the mean of 1 - cosine over each image's pixels with a normal, then over images.

    Args:
        normals: Predicted, of any length.
        truth: Unit vectors; zero where there are none.
    """
    valid = truth.square().sum(1) > 0.25
    cosine = F.cosine_similarity(normals, truth, dim=1)
    return (((1 - cosine) * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp_min(1)).mean()


Function = TypeVar("Function", bound=Callable)

_KEEP_NOTHING: dict[str, Any] = {"realize_reads_threshold": 1000, "realize_opcount_threshold": 1000}
"""Recompute what has been read or computed cheaply, instead of storing it between kernels."""


@lru_cache(maxsize=32)
def compiled(function: Function, device: torch.device) -> Function:
    """Returns a function's compiled version where there can be one, else the function itself.

    Args:
        function: Of tensors on the device and of plain values. It is compiled anew for each shape of its arguments (a
            few seconds), hence only meant for training, where shapes stay.
        device: Where its tensors are.
    """
    if not can_compile(device):
        return function
    return cast(Function, torch.compile(function, dynamic=False, options=_KEEP_NOTHING))


_FEW_CLASSES = 16
"""Up to here upsampled logits are faster: 1.0 against 1.7 ms of 11 classes, 1.7 against 1.4 ms of 21, on an H200."""
Labels = Int[Tensor, "B H W"]


def full_resolution_cross_entropy(logits: Float[Tensor, "B K h w"], labels: Labels) -> Float[Tensor, ""]:
    """Cross-entropy of bilinearly upsampled logits: ``cross_entropy(resize_maps(logits, labels.shape[1:]), labels)``.

    Of many classes, where kernels can be compiled, without logits at the labels' resolution; elsewhere as it is
    written. Both add in a fixed order.

    Args:
        logits: On the patch grid.
        labels: Class ids; `IGNORE` where there are none.

    Returns:
        The mean over all pixels, the ignored ones included.
    """
    if logits.shape[1] > _FEW_CLASSES and can_compile(logits.device):
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
    """Returns `full_resolution_cross_entropy`, computed cell by cell: worth its while only where it is compiled.

    Args:
        logits: On the patch grid.
        labels: Class ids; `IGNORE` where there are none.
    """
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
        total, normalizers = compiled(_losses_of_cells, centres.device)(centres, labels, rows, columns)
        ctx.save_for_backward(centres, labels, rows, columns, normalizers)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        centres = ctx.saved_tensors[0]
        height, width = centres.shape[1] - 1, centres.shape[2] - 1
        parts = compiled(_gradients_of_cells, centres.device)(*ctx.saved_tensors)
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
