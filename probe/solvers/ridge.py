"""Sums of products of tokens, and ridge regression from them in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.support.processes import sum_over_processes

RIDGE_DECAYS = tuple(10.0**power for power in range(-7, 0))
"""Weights of the squared norm of the map beside the mean squared error."""

_CHUNK = 32_768
"""Patches multiplied at once on a CPU, 50 MB at 384 channels; a GPU takes whole batches."""


class LinearMap(NamedTuple):
    """An affine map of raw, unstandardised tokens."""

    weight: Float[Tensor, "K C"]
    """[K, C]."""
    bias: Float[Tensor, " K"]
    """[K]."""

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
        for piece in pieces(tokens):
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
        """Returns the sums of linearly mapped tokens, such as one half of them or the sum of two halves.

        Args:
            matrix: [C2, C], by which tokens are multiplied.
        """
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
        xx = (self.xx / self.count - torch.outer(mean, mean)) * torch.outer(scale, scale)  # [C, C]
        xy = (self.xy / self.count - torch.outer(mean, self.y / self.count)) * scale[:, None]  # [C, T]
        return xx, xy


def fit_ridge(sums: GramSums, decay: float) -> LinearMap:
    """Solves ridge regression: the mean squared error plus ``decay`` times the squared norm, the bias not decayed.

    Args:
        sums: Of the training patches.
        decay: Above 0.

    Returns:
        The map, float64.
    """
    mean, scale = sums.standardization()  # [C] each
    xx, xy = sums.covariance()  # [C, C], [C, T]
    xx.diagonal().add_(decay)
    solution = torch.cholesky_solve(xy, torch.linalg.cholesky(xx))  # [C, T]
    return unstandardized(solution.T, sums.y / sums.count, mean, scale)


def mean_squared_error(sums: GramSums, linear: LinearMap) -> float:
    """Returns the error of a map on the patches of some sums, averaged over patches, summed over targets.

    Args:
        sums: Of the patches, with their truth.
        linear: The map that is judged.
    """
    weight, bias = linear.weight.to(sums.xx), linear.bias.to(sums.xx)
    explained = (weight.T * (sums.xy - 0.5 * sums.xx @ weight.T - torch.outer(sums.x, bias))).sum()  # of [C, K]
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


def pieces(tokens: Tensor) -> list[slice]:
    """Returns the parts of tokens [P, C] that are multiplied at once.

    Args:
        tokens: [P, C]; whole on CUDA, in parts of bounded size on the CPU.
    """
    size = len(tokens) if tokens.is_cuda else _CHUNK
    return [slice(start, start + size) for start in range(0, len(tokens), max(1, size))]


def unstandardized(weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> LinearMap:
    """Turns a map [K, C] of standardised tokens into one of raw tokens.

    Args:
        weight: [K, C], of standardised tokens.
        bias: [K], likewise.
        mean: [C], of the tokens.
        scale: [C], by which centred tokens are multiplied.

    Returns:
        The same map of raw tokens.
    """
    weight = weight * scale
    return LinearMap(weight, bias - weight @ mean)
