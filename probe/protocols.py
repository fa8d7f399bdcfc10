"""Named, versioned protocols: everything that a published number depends on, besides backbone, data and seed."""

from dataclasses import dataclass, replace
from typing import Literal

from fit3d_ns.support.errors import UserError
from probe.data.choice import Kind
from probe.solvers.logistic import LOGISTIC_DECAYS
from probe.solvers.ridge import RIDGE_DECAYS


@dataclass(frozen=True)
class Optimization:
    """How heads are trained: AdamW on each alone."""

    iterations: int
    """Steps."""
    batch_size: int
    """Samples per step over all processes: with fewer GPUs the number of samples stays."""
    learning_rates: tuple[float, ...]
    """With several, one head is trained for each, and the best on held-out training samples is reported."""
    weight_decay: float
    """Of AdamW."""
    schedule: Literal["poly", "cosine"]
    """To 0 linearly, or to a share of 1e-8 along a cosine."""
    warmup_share: float
    """Share of the iterations in which the learning rate rises linearly."""
    warmup_ratio: float
    """Of the scheduled learning rate, at the first step."""
    clip: float | None = None
    """Largest norm of a head's gradient."""
    beta1_cycle: bool = False
    """Whether Adam's first beta goes .95 -> .85 -> .95, turning at 30 %."""


@dataclass(frozen=True)
class SegmentationRecipe:
    """Linear segmentation: batch norm and a 1x1 convolution on the last layer's normed tokens."""

    name: str
    """Of the protocol, with its version."""
    optimization: Optimization
    """How heads are trained."""
    short_side: int = 512
    """Pixels of the shorter side of a scaled photo, as far as the long side allows."""
    long_side: int = 2048
    """Most pixels of the longer side of a scaled photo."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    """Random factor of both sides, in training."""
    crop: int = 512
    """Side of a training crop, pixels."""
    max_class_share: float = 0.75
    """A crop in which one class takes more is drawn again, up to 10 times."""
    window: int = 512
    """Side of the windows that test photos are cut into, pixels."""
    stride: int = 341
    """From window to window, pixels."""


@dataclass(frozen=True)
class DepthRecipe:
    """Linear depth: a 1x1 convolution on the last layer's tokens, before the final norm, and its cls."""

    name: str
    """Of the protocol, with its version."""
    optimization: Optimization
    """How heads are trained."""
    train_window: tuple[int, int, int, int] | None = None
    """Top, bottom, left, right of the part of a photo that is trained on, pixels."""
    kitti_window: bool = False
    """Whether photos are cut to the 352x1216 pixels at the bottom centre, in training and test."""
    crop: tuple[int, int] | None = None
    """Height, width of a training crop, pixels; None: 13/15 of the photo's height and 17/20 of its width."""
    brightness: tuple[float, float] = (0.75, 1.25)
    """Least and largest random factor of the colours."""
    evaluation_crop: Literal["none", "nyu_eigen", "garg"] = "none"
    """Part of a test photo that is scored."""
    num_bins: int = 256
    """Depths whose weighted mean is the prediction."""
    upsample: int = 4
    """Factor by which logits are enlarged before they become depth."""
    min_depth: float = 1e-3
    """Metres; nearer depth is neither predicted nor scored."""
    loss_group: int = 2
    """Samples over which one value of the scale-invariant loss is taken: it is no mean over samples, and the paper's
    is taken on each GPU's two."""
    gradient_loss: float = 0.0
    """Weight of a multi-scale gradient loss in log depth. The reference's is zero, whatever its weight says."""
    sigma_warmup: int = 100
    """Steps in which the loss has no variance term."""


@dataclass(frozen=True)
class NormalsRecipe:
    """Linear normals: depth's head with three outputs, on crops that are mirrored but not rotated.

    No normal is known at the edges that a rotation brings in, and the flip is enough of a change of geometry.
    """

    name: str
    """Of the protocol, with its version."""
    optimization: Optimization
    """How heads are trained."""
    brightness: tuple[float, float] = (0.75, 1.25)
    """Least and largest random factor of the colours."""


@dataclass(frozen=True)
class FastRecipe:
    """Heads on features cached once: no crop, scale or colour augmentation, loss on a sample of the pixels."""

    name: str
    """Of the protocol, with its version."""
    optimization: Optimization
    """How heads are trained."""
    long_side: int = 518
    """Every photo is resized to one size with this long side, pixels."""
    positions: int = 384
    """Pixels of each photo that a step sees."""
    flip: bool = True
    """Whether the mirrored photos are cached and trained on too."""


@dataclass(frozen=True)
class ExactRecipe:
    """Linear maps of standardised features, cached once, that solve a convex problem: see `probe.solvers`."""

    name: str
    """Of the protocol, with its version."""
    decays: tuple[float, ...]
    """One is chosen for all rows, by the first of them, on held-out training photos."""
    long_side: int = 448
    """Every photo is resized to one size with this long side, pixels."""
    tolerance: float = 1e-5
    """Of the logistic regression's loss, nats."""
    held_out: int = 1000
    """Most training photos that the decay is chosen on."""
    resamples: int = 1000
    """Draws of test photos behind an interval."""


Recipe = SegmentationRecipe | DepthRecipe | NormalsRecipe

_NORMALS = "normals-{}-v2"
"""Version 1 divided the loss by the pixels of a batch, which several processes cannot share out."""
_SEGMENTATION = Optimization(40_000, 16, (1e-3,), 1e-4, "poly", 1500 / 40_000, 1e-6)
_DEPTH = Optimization(38_400, 16, (1e-4,), 1e-2, "cosine", 12_800 / 38_400, 1e-3, clip=35.0, beta1_cycle=True)
_FAST_SEGMENTATION = Optimization(2000, 8, (1e-3, 3e-3, 1e-2), 1e-4, "poly", 0.05, 1e-6)
_FAST_DEPTH = Optimization(2000, 8, (1e-3, 3e-3, 1e-2), 1e-2, "cosine", 0.1, 1e-3, clip=35.0)


def choose_recipe(kind: Kind, dataset: str) -> Recipe:
    """Returns the full protocol of a probe on a data set.

    Args:
        kind: Which probe.
        dataset: Name of the data set, as in `DataChoice`.
    """
    if kind == "segmentation":
        return SegmentationRecipe("segmentation-linear-v1", _SEGMENTATION)
    if kind == "normals":
        return NormalsRecipe(_NORMALS.format("linear"), replace(_DEPTH, learning_rates=(1e-3,)))
    name = "depth-linear-v1"
    if dataset == "nyuv2":
        return DepthRecipe(
            f"{name}/nyuv2", _DEPTH, train_window=(45, 472, 43, 608), crop=(416, 544), evaluation_crop="nyu_eigen"
        )
    if dataset == "scannet":
        return DepthRecipe(f"{name}/scannet", _DEPTH, crop=(416, 544), evaluation_crop="nyu_eigen")
    if dataset == "scannetpp":
        return DepthRecipe(f"{name}/scannetpp", _DEPTH, crop=(416, 544))
    if dataset == "kitti":
        return DepthRecipe(
            f"{name}/kitti",
            _DEPTH,
            kitti_window=True,
            crop=(352, 704),
            brightness=(0.9, 1.1),
            evaluation_crop="garg",
        )
    return DepthRecipe(name, _DEPTH)


def choose_fast_recipe(kind: Kind, long_side: int | None = None) -> FastRecipe:
    """Returns the fast protocol of a probe.

    Args:
        kind: Which probe.
        long_side: Of the photos, pixels; the protocol's own if None.
    """
    name = _NORMALS.format("fast") if kind == "normals" else f"{kind}-fast-v1"
    recipe = FastRecipe(name, _FAST_SEGMENTATION if kind == "segmentation" else _FAST_DEPTH)
    return replace(recipe, long_side=long_side or recipe.long_side)


def choose_exact_recipe(kind: Kind, long_side: int | None = None) -> ExactRecipe:
    """Returns the exact protocol of a probe.

    Version 1 chose a decay for each row, on single photos between the others: one student in three then came out 1.7
    points of mIoU worse than its fellows by that choice alone.

    Args:
        kind: Which probe.
        long_side: Of the photos, pixels; the protocol's own if None.
    """
    recipe = ExactRecipe(f"{kind}-exact-v2", LOGISTIC_DECAYS if kind == "segmentation" else RIDGE_DECAYS)
    return replace(recipe, long_side=long_side or recipe.long_side)


def override(
    optimization: Optimization,
    iterations: int | None,
    batch_size: int | None,
    learning_rates: tuple[float, ...] | None,
) -> Optimization:
    """Replaces what the user chose otherwise.

    Args:
        optimization: The protocol's.
        iterations: Steps; as the protocol says if None.
        batch_size: Samples of a step; as the protocol says if None.
        learning_rates: One head is trained for each; as the protocol says if None.

    Returns:
        With what was given in its place.

    Raises:
        UserError: If a value is not positive.
    """
    for flag, value in (("--iterations", iterations), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} is too small: at least 1.")
    if learning_rates is not None and (not learning_rates or min(learning_rates) <= 0):
        raise UserError("--learning-rates needs positive numbers.")
    if learning_rates is not None and len(set(learning_rates)) < len(learning_rates):
        raise UserError("--learning-rates names a value twice.")
    return replace(
        optimization,
        iterations=iterations or optimization.iterations,
        batch_size=batch_size or optimization.batch_size,
        learning_rates=learning_rates or optimization.learning_rates,
    )
