"""Metrics over a whole data set, exact whatever the number of processes.

The classes are the references' metrics, averaged over photos for depth and normals. The functions below them keep sums
photo by photo, from which scores over all pixels of any choice of photos follow, as a bootstrap needs them.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from probe.data.base import IGNORE

DEPTH_METRICS = ("rmse", "abs_rel", "sq_rel", "rmse_log", "log10", "d1", "d2", "d3")
NORMAL_METRICS = ("mean_angle", "rmse_angle", "below_11", "below_22", "below_30")
_NORMAL_LIMITS = (11.25, 22.5, 30.0)


class SegmentationMetric(MulticlassConfusionMatrix):
    """Confusion matrix of all pixels with a label, and what follows from it."""

    def __init__(self, num_classes: int) -> None:
        """Starts with no pixel seen.

        Args:
            num_classes: Class ids run from 0 to one less.
        """
        # Checking the values would look for the distinct ones of every photo and row.
        super().__init__(num_classes, ignore_index=IGNORE, validate_args=False)

    def scores(self) -> dict[str, Any]:
        """Computes the scores over all processes.

        Returns:
            ``miou``, ``macc`` and ``aacc`` in [0, 1], and ``iou``, a list with one value per class. A class that occurs
            neither in truth nor in prediction has no IoU (NaN) and is left out of the mean; one that is only predicted
            has IoU 0 and no accuracy: mmsegmentation's rules.
        """
        matrix = self.compute().double()
        hits, truth, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        iou = hits / (truth + predicted - hits)
        return {
            "miou": float(iou.nanmean()),
            "macc": float((hits / truth).nanmean()),
            "aacc": float(hits.sum() / truth.sum()),
            "iou": iou.tolist(),
        }


class _MeanOverImages(Metric):
    """Sums per-image values in float64, with the number of images that had any."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self.add_state("total", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.set_dtype(torch.float64)

    def add(self, scores: dict[str, Tensor]) -> None:
        """Adds one image's scores, each a single number."""
        self.total += torch.stack([scores[name] for name in self.names]).to(self.total)
        self.count += 1

    def compute(self) -> Tensor:
        """Returns the means in the order of ``names``; NaN without an image."""
        return self.total / self.count

    def scores(self) -> dict[str, Any]:
        """Computes the means over all processes, by name."""
        return dict(zip(self.names, self.compute().tolist()))


class DepthMetric(_MeanOverImages):
    """Depth errors of each image, averaged over images; an image without a valid pixel does not count.

    With d the prediction and t the truth, in metres: ``rmse`` sqrt(mean (d-t)^2), ``abs_rel`` mean |d-t|/t, ``sq_rel``
    mean (d-t)^2/t, ``rmse_log`` sqrt(mean (ln d - ln t)^2), ``log10`` mean |log10 d - log10 t|, and ``d1``..``d3`` the
    share of pixels with max(d/t, t/d) below 1.25, 1.25^2, 1.25^3.
    """

    def __init__(self) -> None:
        """Starts with no image seen."""
        super().__init__(DEPTH_METRICS)

    def update(self, depth: Float[Tensor, "H W"], truth: Float[Tensor, "H W"], valid: Tensor) -> None:
        """Adds an image.

        Args:
            depth: Predicted, metres, above 0.
            truth: Metres.
            valid: [H, W] bool: pixels that count.
        """
        if bool(valid.any()):
            self.add(depth_scores(depth_sums(depth, truth, valid)))


class NormalMetric(_MeanOverImages):
    """Angles between predicted and true normals, in degrees, per image and averaged over images.

    ``mean_angle``, ``rmse_angle`` and the share of pixels below 11.25, 22.5 and 30 degrees.
    """

    def __init__(self) -> None:
        """Starts with no image seen."""
        super().__init__(NORMAL_METRICS)

    def update(self, normals: Float[Tensor, "3 H W"], truth: Float[Tensor, "3 H W"], valid: Tensor) -> None:
        """Adds an image.

        Args:
            normals: Predicted unit vectors.
            truth: Unit vectors where ``valid``.
            valid: [H, W] bool: pixels that count.
        """
        if bool(valid.any()):
            self.add(normal_scores(normal_sums(normals, truth, valid)))


def segmentation_sums(
    prediction: Int[Tensor, "H W"], truth: Int[Tensor, "H W"], num_classes: int
) -> Float[Tensor, " S"]:
    """Counts a photo's pixels by class: those predicted rightly, those predicted, those that are it.

    Args:
        prediction: Class ids.
        truth: Class ids, and 255 where a pixel does not count.
        num_classes: Classes K.

    Returns:
        float64 [3 K].
    """
    known = truth != IGNORE
    found, wanted = prediction[known].long(), truth[known].long()
    counts = [torch.bincount(ids, minlength=num_classes) for ids in (found[found == wanted], found, wanted)]
    return torch.cat(counts).double()


def segmentation_scores(sums: Float[Tensor, "*choices S"]) -> dict[str, Tensor]:
    """Computes what `SegmentationMetric` does from sums over photos.

    Args:
        sums: Of `segmentation_sums`, over any photos.

    Returns:
        ``miou``, ``macc``, ``aacc`` [*choices] and ``iou`` [*choices, K].
    """
    hits, predicted, truth = sums.unflatten(-1, (3, -1)).unbind(-2)
    iou = hits / (truth + predicted - hits)
    return {
        "miou": iou.nanmean(-1),
        "macc": (hits / truth).nanmean(-1),
        "aacc": hits.sum(-1) / truth.sum(-1),
        "iou": iou,
    }


def depth_sums(
    depth: Float[Tensor, "H W"], truth: Float[Tensor, "H W"], valid: Bool[Tensor, "H W"]
) -> Float[Tensor, " S"]:
    """Sums a photo's depth errors over its pixels.

    Args:
        depth: Predicted, metres, above 0.
        truth: Metres.
        valid: Which pixels count.

    Returns:
        float64: the number of pixels, then the sums behind each of `DEPTH_METRICS`.
    """
    d, t = depth[valid].double(), truth[valid].double()
    log_error, ratio = d.log() - t.log(), torch.maximum(d / t, t / d)
    values = [torch.ones_like(d), (d - t).square(), (d - t).abs() / t, (d - t).square() / t, log_error.square()]
    values += [log_error.abs() / math.log(10), *((ratio < 1.25**power).double() for power in (1, 2, 3))]
    return torch.stack([value.sum() for value in values])


def depth_scores(sums: Float[Tensor, "*choices S"]) -> dict[str, Tensor]:
    """Computes `DEPTH_METRICS` over all pixels from `depth_sums` over any photos.

    Args:
        sums: Of `depth_sums`, added over photos.

    Returns:
        By name, of the shape ``choices``.
    """
    scores = dict(zip(DEPTH_METRICS, (sums[..., 1:] / sums[..., :1]).unbind(-1)))
    return {name: value.sqrt() if name in ("rmse", "rmse_log") else value for name, value in scores.items()}


def normal_sums(
    normals: Float[Tensor, "3 H W"], truth: Float[Tensor, "3 H W"], valid: Bool[Tensor, "H W"]
) -> Float[Tensor, " S"]:
    """Sums a photo's angles over its pixels.

    Args:
        normals: Predicted unit vectors.
        truth: Unit vectors.
        valid: Which pixels count.

    Returns:
        float64: the number of pixels, then the sums behind each of `NORMAL_METRICS`.
    """
    cosine = (normals[:, valid].double() * truth[:, valid].double()).sum(0).clamp(-1, 1)
    angle = torch.rad2deg(torch.arccos(cosine))
    values = [torch.ones_like(angle), angle, angle.square(), *((angle < limit).double() for limit in _NORMAL_LIMITS)]
    return torch.stack([value.sum() for value in values])


def normal_scores(sums: Float[Tensor, "*choices S"]) -> dict[str, Tensor]:
    """Computes `NORMAL_METRICS` over all pixels from `normal_sums` over any photos.

    Args:
        sums: Of `normal_sums`, added over photos.

    Returns:
        By name, of the shape ``choices``.
    """
    scores = dict(zip(NORMAL_METRICS, (sums[..., 1:] / sums[..., :1]).unbind(-1)))
    return {name: value.sqrt() if name == "rmse_angle" else value for name, value in scores.items()}


def evaluation_mask(truth: Float[Tensor, "H W"], min_depth: float, max_depth: float, crop: str) -> Int[Tensor, "H W"]:
    """Returns the pixels that a depth metric counts.

    Args:
        truth: Metres; 0 where there is none.
        min_depth: Least depth, exclusive.
        max_depth: Cap, exclusive.
        crop: ``none``; ``nyu_eigen``: rows 45 to 470 and columns 41 to 600 of 640x480 pixels; ``garg``: shares .408 to
            .992 of the height and .036 to .964 of the width.

    Returns:
        [H, W] bool.
    """
    mask = (truth > min_depth) & (truth < max_depth)
    if crop == "none":
        return mask
    height, width = truth.shape
    inside = torch.zeros_like(mask)
    if crop == "nyu_eigen":
        inside[45:471, 41:601] = True
    else:
        top, bottom = int(0.40810811 * height), int(0.99189189 * height)
        inside[top:bottom, int(0.03594771 * width) : int(0.96405229 * width)] = True
    return mask & inside
