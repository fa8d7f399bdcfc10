"""Multinomial logistic regression, by L-BFGS to its optimum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fit3d_ns.support.processes import sum_over_processes
from probe.solvers.ridge import Choice, GramSums, LinearMap, pieces, unstandardized

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Starts a pass over training patches: tokens [P, C] of any floating type with class ids int64 [P], any P."""
LOGISTIC_DECAYS = (1e-4, 1e-5, 1e-6, 1e-7)
"""Weights of half the squared norm of the classifier beside the mean cross-entropy."""
_CURVATURE_STRIDE = 8
"""One patch of this many is looked at for the curvature, which only steers."""
_ABSENT = -1e4
"""Logit of a class that no training patch has. Finite, because maps are resized by matrix products."""


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
        raw = start.weight.to(mean)[seen]  # [k, C]
        weight = torch.where(scale > 0, raw / scale, 0.0)
        bias = start.bias.to(mean)[seen] + raw @ mean  # [k]
        curvature, bias_curvature = _curvature(batches, weight, bias, mean, scale, axes)
    stretch = (curvature + decay).rsqrt()  # [k, C]
    bias_stretch = bias_curvature.clamp_min(1e-12).rsqrt()  # [k]
    # [k, C + 1]
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
    return LogisticFit(unstandardized(full_weight, full_bias, mean, scale), loss, evaluations)


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

    Returns:
        The chosen decay, its map, and every decay's score.
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

    Returns:
        The classifier, its loss, and the passes that the last fit took.
    """
    last: LinearMap | None = None
    for rough in sorted({decay, *(one for one in decays if one > decay)}, reverse=True):
        last = fit_logistic(batches, sums, rough, last, 10 * tolerance, advance=advance).linear
    return fit_logistic(batches, sums, decay, last, tolerance, advance=advance)


def _curvature(
    batches: Batches, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, axes: Tensor
) -> tuple[Tensor, Tensor]:
    """Estimates the diagonal of the mean cross-entropy's Hessian, [k, C] along the axes and [k] of the biases."""
    linear = unstandardized(weight, bias, mean, scale)
    weight32, bias32 = linear.weight.float().T.contiguous(), linear.bias.float()  # [C, k], [k]
    turn = (scale[:, None] * axes).float()  # [C, C]
    offset = (mean * scale @ axes).float()  # [C]
    total, bias_total, count = torch.zeros_like(weight), torch.zeros_like(bias), weight.new_zeros(1)
    for tokens, _ in batches():
        for piece in pieces(tokens):
            x = tokens[piece][::_CURVATURE_STRIDE].float()  # [p, C]
            shares = torch.addmm(bias32, x, weight32).softmax(1)  # [p, k]
            slopes = shares * (1 - shares)  # [p, k]
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
    linear = unstandardized(weight, bias, mean, scale)
    weight32, bias32 = linear.weight.float().T.contiguous(), linear.bias.float()  # [C, k], [k]
    for tokens, labels in batches():
        for piece in pieces(tokens):
            x = tokens[piece].float()  # [p, C]
            label = place[labels[piece]][:, None]  # [p, 1]
            log_shares = F.log_softmax(torch.addmm(bias32, x, weight32), 1)  # [p, k]
            total -= log_shares.gather(1, label).double().sum()
            # [p, k]
            residual = log_shares.exp_().scatter_add_(1, label, x.new_full((), -1).expand(label.shape))
            weight_gradient += residual.T @ x
            bias_gradient += residual.double().sum(0)
    weight_gradient = (weight_gradient - torch.outer(bias_gradient, mean)) * scale
    flat = torch.cat([total, weight_gradient.flatten(), bias_gradient])
    sum_over_processes(flat)
    total, weight_gradient, bias_gradient = flat.split([1, weight.numel(), bias.numel()])
    return total[0], weight_gradient.view_as(weight), bias_gradient
