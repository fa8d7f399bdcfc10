"""Losses of the linear probes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from probe.datasets.samples import IGNORE

_LOG_OFFSET = 1e-3
_MEAN_WEIGHT = 0.15


def cross_entropy(logits: Float[Tensor, "B K *place"], labels: Int[Tensor, "B *place"]) -> Float[Tensor, ""]:
    """Cross-entropy summed over labelled pixels and divided by the number of all pixels, the ignored ones included.

    mmsegmentation's default (``avg_non_ignore=False``), and so the paper's: batches with many ignored pixels weigh
    less.
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

    Source: Eigen et al. 2014 as used by AdaBins and DINOv2.
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
    """Mean absolute difference of neighbouring log-depth errors, at strides 1, 2, 4, 8, over pairs of valid pixels.

    Each image has its own mean, and images without such pairs count as 0.

    The references' version takes its differences along batch and channel instead of rows and columns, so that it is
    zero, with zero gradient, for up to two images; this one does what was meant, and no published recipe uses it.
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
    """Mean of 1 - cosine over each image's pixels with a normal (a vector that is not zero), then over images."""
    valid = truth.square().sum(1) > 0.25
    cosine = F.cosine_similarity(normals, truth, dim=1)
    return (((1 - cosine) * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp_min(1)).mean()
