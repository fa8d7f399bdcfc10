"""Linear probes that are solved instead of trained: logistic regression by L-BFGS, ridge regression in closed form.

Both problems are convex, and both are stated so that the width of the features plays no part: tokens are standardised
with the mean and standard deviation of the training patches and divided by the square root of their channels, so that
a token's mean squared norm is one. Features beside themselves are then the same problem as the features alone, and
what is left between their scores is what the solver has not reached.

Nothing here keeps features. Ridge regression needs one pass over them, whose sums (`GramSums`) hold for every decay;
logistic regression needs one pass an evaluation, in batches that may come from memory or from disk. Under
torch.distributed every process passes over its own share, and sums are taken over all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.support.processes import sum_over_processes

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Starts a pass over training patches: tokens [P, C] of any floating type with class ids int64 [P], any P."""

LOGISTIC_DECAYS = (1e-4, 1e-5, 1e-6, 1e-7)
"""Weights of half the squared norm of the classifier beside the mean cross-entropy."""
RIDGE_DECAYS = tuple(10.0**power for power in range(-7, 0))
"""Weights of the squared norm of the map beside the mean squared error."""

_CHUNK = 32_768
"""Patches multiplied at once on a CPU, 50 MB at 384 channels; a GPU takes whole batches."""
_CURVATURE_STRIDE = 8
"""One patch of this many is looked at for the curvature, which only steers."""
_ABSENT = -1e4
"""Logit of a class that no training patch has. Finite, because maps are resized by matrix products."""


class LinearMap(NamedTuple):
    """An affine map of raw, unstandardised tokens."""

    weight: Float[Tensor, "K C"]
    bias: Float[Tensor, " K"]

    def __call__(self, tokens: Float[Tensor, "B C h w"]) -> Float[Tensor, "B K h w"]:
        """Returns logits, log depth or normals on the patch grid, in float32."""
        weight = self.weight.float()
        return torch.einsum("kc,bchw->bkhw", weight, tokens.float()) + self.bias.float()[:, None, None]


@dataclass
class GramSums:
    """Sums over patches of tokens x [C], targets y [T] and their products, in float64.

    Attributes:
        count: Number of patches, [].
        x: Sum of tokens, [C].
        y: Sum of targets, [T].
        xx: Sum of outer products of tokens, [C, C].
        xy: Likewise of tokens and targets, [C, T].
        yy: Sum of squared targets, [T].
    """

    count: Tensor
    x: Float[Tensor, " C"]
    y: Float[Tensor, " T"]
    xx: Float[Tensor, "C C"]
    xy: Float[Tensor, "C T"]
    yy: Float[Tensor, " T"]

    @classmethod
    def zeros(cls, width: int, num_targets: int, device: torch.device | str = "cpu") -> GramSums:
        """Returns the sums over no patches.

        Args:
            width: Channels C of a token.
            num_targets: Numbers T of a target; of class ids, the number of classes.
            device: Where they are summed.
        """
        shapes = ((), (width,), (num_targets,), (width, width), (width, num_targets), (num_targets,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, tokens: Float[Tensor, "P C"], targets: Tensor) -> None:
        """Adds patches.

        Args:
            tokens: Of any floating type.
            targets: Numbers [P, T], or class ids int64 [P], which count as one-hot.
        """
        for piece in _pieces(tokens):
            x, y = tokens[piece].double(), targets[piece]  # [p, C]
            y = (F.one_hot(y, self.y.shape[0]) if y.ndim == 1 else y).double()  # [p, T]
            self.count += len(x)
            self.x += x.sum(0)
            self.y += y.sum(0)
            self.xx += x.T @ x
            self.xy += x.T @ y
            self.yy += y.square().sum(0)

    def __add__(self, other: GramSums) -> GramSums:
        """Returns the sums over both sets of patches."""
        return GramSums(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def all_reduce(self) -> None:
        """Replaces the sums by those over the patches of all processes."""
        for one in fields(self):
            sum_over_processes(getattr(self, one.name))

    def of(self, matrix: Float[Tensor, "C2 C"]) -> GramSums:
        """Returns the sums of linearly mapped tokens, such as one half of them or the sum of two halves."""
        matrix = matrix.to(self.xx)
        return GramSums(self.count, matrix @ self.x, self.y, matrix @ self.xx @ matrix.T, matrix @ self.xy, self.yy)

    def standardization(self) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
        """Returns what is subtracted from tokens, and what they are then multiplied with.

        Raises:
            ValueError: If there are no patches, or a token was not finite.
        """
        if not self.count:
            raise ValueError("no patches to fit a linear map on")
        if not torch.isfinite(self.xx.diagonal()).all():
            raise ValueError("features that are not finite")
        mean = self.x / self.count
        square = self.xx.diagonal() / self.count
        variance = square - mean.square()
        # A channel whose variance drowns in rounding is constant, and takes no part.
        known = variance > 1e-10 * square
        scale = torch.where(known, variance.clamp_min(1e-300).rsqrt(), 0.0)
        return mean, scale / len(mean) ** 0.5

    def covariance(self) -> tuple[Float[Tensor, "C C"], Float[Tensor, "C T"]]:
        """Returns the covariances of standardised tokens with each other and with the targets."""
        mean, scale = self.standardization()
        xx = (self.xx / self.count - torch.outer(mean, mean)) * torch.outer(scale, scale)
        xy = (self.xy / self.count - torch.outer(mean, self.y / self.count)) * scale[:, None]
        return xx, xy


def fit_ridge(sums: GramSums, decay: float) -> LinearMap:
    """Solves ridge regression: the mean squared error plus ``decay`` times the squared norm, the bias not decayed.

    Args:
        sums: Of the training patches.
        decay: Above 0.

    Returns:
        The map, float64.
    """
    mean, scale = sums.standardization()
    xx, xy = sums.covariance()
    xx.diagonal().add_(decay)
    solution = torch.cholesky_solve(xy, torch.linalg.cholesky(xx))  # [C, T]
    return _unstandardized(solution.T, sums.y / sums.count, mean, scale)


def mean_squared_error(sums: GramSums, linear: LinearMap) -> float:
    """Returns the error of a map on the patches of some sums, averaged over patches, summed over targets."""
    weight, bias = linear.weight.to(sums.xx), linear.bias.to(sums.xx)
    explained = (weight.T * (sums.xy - 0.5 * sums.xx @ weight.T - torch.outer(sums.x, bias))).sum()
    rest = sums.yy.sum() - 2 * (bias @ sums.y) + sums.count * bias.square().sum()
    return float((rest - 2 * explained) / sums.count)


@dataclass(frozen=True)
class Choice:
    """A map and how its decay was chosen.

    Attributes:
        linear: Fitted to all training photos.
        decay: The chosen one.
        scores: What held-out photos said of each decay that was tried, the higher the better.
    """

    linear: LinearMap
    decay: float
    scores: dict[float, float]


def choose_ridge(training: GramSums, held_out: GramSums, decays: Sequence[float] = RIDGE_DECAYS) -> Choice:
    """Chooses the decay that predicts held-out photos best, and fits the map to training and held-out photos.

    Args:
        training: Sums over the patches of training photos.
        held_out: Sums over those of other training photos.
        decays: To choose from.

    Returns:
        The choice; its scores are negative mean squared errors.
    """
    scores = {decay: -mean_squared_error(held_out, fit_ridge(training, decay)) for decay in decays}
    decay = max(scores, key=scores.__getitem__)
    return Choice(fit_ridge(training + held_out, decay), decay, scores)


@dataclass(frozen=True)
class LogisticFit:
    """A solved logistic regression.

    Attributes:
        linear: The classifier, float64.
        loss: Mean cross-entropy of the training patches plus the decay's term.
        evaluations: Passes over the patches.
    """

    linear: LinearMap
    loss: float
    evaluations: int


def fit_logistic(
    batches: Batches,
    sums: GramSums,
    decay: float,
    start: LinearMap | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
    advance: Callable[[], None] = lambda: None,
) -> LogisticFit:
    """Solves multinomial logistic regression: mean cross-entropy plus ``decay`` / 2 times the squared norm.

    L-BFGS runs in coordinates in which the Hessian is near the identity: along the principal axes of the tokens,
    class by class, divided by the square root of the curvature at the start. It ends when no coordinate's gradient is
    above what would add up to the tolerance if the Hessian were the identity, half the squared gradient.

    Args:
        batches: This process's share of the training patches.
        sums: Of the same patches, over all processes, with their class ids as targets.
        decay: Above 0; the bias is not decayed.
        start: A classifier to start from, as of a stronger decay; it must know the classes that occur.
        tolerance: How far the loss may stay above its optimum, in nats; measured, not proven.
        max_iterations: Bound on the steps.
        advance: Called after every pass over the patches.

    Returns:
        The classifier. Classes without a training patch are never predicted.
    """
    mean, scale = sums.standardization()
    seen = sums.y > 0  # [K]
    place = torch.cumsum(seen, 0) - 1  # class id -> number among the k that occur
    shares = sums.y[seen] / sums.count  # [k]
    variances, axes = torch.linalg.eigh(sums.covariance()[0])  # [C], [C, C] columns
    if start is None:
        weight, bias = mean.new_zeros(len(shares), len(mean)), shares.log()
        bias_curvature = shares * (1 - shares)  # [k]
        curvature = torch.outer(bias_curvature, variances.clamp_min(0))  # [k, C]
    else:
        raw = start.weight.to(mean)[seen]
        weight = torch.where(scale > 0, raw / scale, 0.0)
        bias = start.bias.to(mean)[seen] + raw @ mean
        curvature, bias_curvature = _curvature(batches, weight, bias, mean, scale, axes)
    stretch = (curvature + decay).rsqrt()  # [k, C]
    bias_stretch = bias_curvature.clamp_min(1e-12).rsqrt()  # [k]
    unknowns = torch.cat([weight @ axes / stretch, (bias / bias_stretch)[:, None]], 1).requires_grad_()
    evaluations = 0

    def maps() -> tuple[Tensor, Tensor]:
        values = unknowns.detach()
        return (values[:, :-1] * stretch) @ axes.T, values[:, -1] * bias_stretch  # [k, C], [k]

    def closure() -> Tensor:
        nonlocal evaluations
        weight, bias = maps()
        loss, weight_gradient, bias_gradient = _cross_entropy(batches, weight, bias, mean, scale, place)
        loss = loss / sums.count + decay / 2 * weight.square().sum()
        weight_gradient = weight_gradient / sums.count + decay * weight
        bias_gradient = bias_gradient / sums.count
        unknowns.grad = torch.cat([weight_gradient @ axes * stretch, (bias_gradient * bias_stretch)[:, None]], 1)
        evaluations += 1
        advance()
        return loss

    optimizer = torch.optim.LBFGS(
        [unknowns],
        max_iter=max_iterations,
        max_eval=4 * max_iterations,
        tolerance_grad=(2 * tolerance / unknowns.numel()) ** 0.5,
        tolerance_change=tolerance / 1000,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(closure)  # type: ignore[arg-type]
    loss = float(closure())
    weight, bias = maps()
    full_weight = weight.new_zeros(len(seen), len(mean))
    full_bias = bias.new_full((len(seen),), _ABSENT)
    full_weight[seen], full_bias[seen] = weight, bias
    return LogisticFit(_unstandardized(full_weight, full_bias, mean, scale), loss, evaluations)


def choose_logistic(
    training: Batches,
    training_sums: GramSums,
    held_out: Batches,
    held_out_sums: GramSums,
    score: Callable[[LinearMap], float],
    decays: Sequence[float] = LOGISTIC_DECAYS,
    tolerance: float = 1e-5,
    advance: Callable[[], None] = lambda: None,
) -> Choice:
    """Chooses the decay that scores best on held-out photos, and fits to training and held-out photos.

    Decays are tried from the strongest on, each from the last's classifier and to ten times the tolerance; the first
    that scores below the best ends the search.

    Args:
        training: This process's share of the patches of training photos.
        training_sums: Sums over the same, over all processes.
        held_out: Likewise of other training photos.
        held_out_sums: Sums over the same, over all processes.
        score: What held-out photos say of a classifier, the higher the better; the same in all processes.
        decays: To choose from.
        tolerance: See `fit_logistic`.
        advance: Called after every pass over the patches.
    """
    scores: dict[float, float] = {}
    last: LinearMap | None = None
    for decay in sorted(decays, reverse=True):
        last = fit_logistic(training, training_sums, decay, last, 10 * tolerance, advance=advance).linear
        scores[decay] = score(last)
        if scores[decay] < max(scores.values()):
            break
    decay = max(scores, key=scores.__getitem__)

    def everything() -> Iterable[tuple[Tensor, Tensor]]:
        yield from training()
        yield from held_out()

    sums = training_sums + held_out_sums
    return Choice(approach_logistic(everything, sums, decay, decays, tolerance, advance).linear, decay, scores)


def approach_logistic(
    batches: Batches,
    sums: GramSums,
    decay: float,
    decays: Sequence[float] = LOGISTIC_DECAYS,
    tolerance: float = 1e-5,
    advance: Callable[[], None] = lambda: None,
) -> LogisticFit:
    """Fits to a given decay by way of the stronger ones, each from the last's classifier, roughly; then once more.

    Far from the optimum the curvature says little. This way it is looked at anew where it counts, and rows that state
    the same problem end at the same place.

    Args:
        batches: See `fit_logistic`.
        sums: See `fit_logistic`.
        decay: Of the result.
        decays: To come by, as far as they are stronger.
        tolerance: See `fit_logistic`.
        advance: Called after every pass over the patches.
    """
    last: LinearMap | None = None
    for rough in sorted({decay, *(one for one in decays if one > decay)}, reverse=True):
        last = fit_logistic(batches, sums, rough, last, 10 * tolerance, advance=advance).linear
    return fit_logistic(batches, sums, decay, last, tolerance, advance=advance)


def _curvature(
    batches: Batches, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, axes: Tensor
) -> tuple[Tensor, Tensor]:
    """Estimates the diagonal of the mean cross-entropy's Hessian, [k, C] along the axes and [k] of the biases."""
    linear = _unstandardized(weight, bias, mean, scale)
    weight32, bias32 = linear.weight.float().T.contiguous(), linear.bias.float()
    turn = (scale[:, None] * axes).float()  # [C, C]
    offset = (mean * scale @ axes).float()
    total, bias_total, count = torch.zeros_like(weight), torch.zeros_like(bias), weight.new_zeros(1)
    for tokens, _ in batches():
        for piece in _pieces(tokens):
            x = tokens[piece][::_CURVATURE_STRIDE].float()  # [p, C]
            shares = torch.addmm(bias32, x, weight32).softmax(1)  # [p, k]
            slopes = shares * (1 - shares)
            total += slopes.T @ (x @ turn - offset).square()
            bias_total += slopes.double().sum(0)
            count += len(x)
    flat = torch.cat([total.flatten(), bias_total, count])
    sum_over_processes(flat)
    total, bias_total, count = flat.split([weight.numel(), bias.numel(), 1])
    return total.view_as(weight) / count, bias_total / count


def _cross_entropy(
    batches: Batches, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, place: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums the cross-entropy [] and its gradients [k, C], [k] over the patches of all processes."""
    total = weight.new_zeros(1)
    weight_gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
    # Products in float32 on raw tokens, which is fast everywhere; sums over chunks in float64.
    linear = _unstandardized(weight, bias, mean, scale)
    weight32, bias32 = linear.weight.float().T.contiguous(), linear.bias.float()
    for tokens, labels in batches():
        for piece in _pieces(tokens):
            x = tokens[piece].float()  # [p, C]
            label = place[labels[piece]][:, None]  # [p, 1]
            log_shares = F.log_softmax(torch.addmm(bias32, x, weight32), 1)  # [p, k]
            total -= log_shares.gather(1, label).double().sum()
            residual = log_shares.exp_().scatter_add_(1, label, x.new_full((), -1).expand(label.shape))
            weight_gradient += residual.T @ x
            bias_gradient += residual.double().sum(0)
    weight_gradient = (weight_gradient - torch.outer(bias_gradient, mean)) * scale
    flat = torch.cat([total, weight_gradient.flatten(), bias_gradient])
    sum_over_processes(flat)
    total, weight_gradient, bias_gradient = flat.split([1, weight.numel(), bias.numel()])
    return total[0], weight_gradient.view_as(weight), bias_gradient


def _pieces(tokens: Tensor) -> list[slice]:
    size = len(tokens) if tokens.is_cuda else _CHUNK
    return [slice(start, start + size) for start in range(0, len(tokens), max(1, size))]


def _unstandardized(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> LinearMap:
    """Turns a map [K, C] of standardised tokens into one of raw tokens."""
    weight = weight * scale
    return LinearMap(weight, bias - weight @ mean)
