"""Least squares of rendered features against teacher maps, by weighted aggregation and truncated refinement.

Minimised is ``sum_p w_p |B_p - (A x)_p|^2`` over all patches of all training views. Aggregation is one step from zero
of the simultaneous iterative reconstruction technique (SIRT), preconditioned by ``D = A^T w``::

    x_0 = D^-1 A^T w B            x_{k+1} = x_k + D^-1 A^T w (B - A x_k)

The exact minimum is neither wanted nor stable: ``A^T A`` is badly conditioned, and views do not agree. Stopping after
few steps is the regulariser (semi-convergence). All sums stream over views, so memory does not grow with their number.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fit3d_ns.lifting.operator import FeatureOperator, PatchCamera
from fit3d_ns.support.samples import batches_of_like

NEIGHBOURS = 4
"""Seen Gaussians whose features are averaged, by one over their distance."""
SEEN = 1e-4
"""Least total contribution, in patches, of a Gaussian to all training views that counts as seen."""
ROBUST_FLOOR = 0.1
"""Residuals below this share of the features' size are weighted alike: absolute values, rounded off near zero."""

Advance = Callable[[int], None]


@dataclass(frozen=True)
class LiftView:
    """A view whose map is read when it is needed.

    Attributes:
        camera: Where it was taken from.
        load: Returns the map to fit, [X, h, w], on the operator's device.
        weights: [h, w] share of each patch that counts, in [0, 1]; all of it if None.
    """

    camera: PatchCamera
    load: Callable[[], Float[Tensor, "X h w"]]
    weights: Float[Tensor, "h w"] | None = None


@dataclass(frozen=True)
class Aggregate:
    """What one pass over all views gathers.

    Attributes:
        values: [N, X] weighted mean of the patches that a Gaussian contributes to; 0 where it is not seen.
        coverage: [N] its total contribution, in patches (the diagonal of ``D``).
        variance: [N] weighted mean squared distance, over all channels, of those patches from ``values``: how much the
            views disagree about it.
    """

    values: Float[Tensor, "N X"]
    coverage: Float[Tensor, "N"]
    variance: Float[Tensor, "N"]

    @property
    def seen(self) -> Bool[Tensor, "N"]:
        """Gaussians that the training views see."""
        return self.coverage > SEEN


class LiftSolver:
    """Solves for per-Gaussian values from the maps of many views.

    Args:
        operator: The renderer.
        views: Training views.
        channels: Channels X of the maps.
        views_per_batch: Most views rendered in one call.
        advance: Called with the number of views done, for a progress bar.
    """

    def __init__(
        self,
        operator: FeatureOperator,
        views: Sequence[LiftView],
        channels: int,
        views_per_batch: int = 8,
        advance: Advance = lambda count: None,
    ) -> None:
        self.operator = operator
        self.channels = channels
        self._batches = batches_of_like(
            views,
            kind=lambda view: (view.camera.image_size, view.camera.grid),
            size=lambda view: operator.batch_size(view.camera, channels + 2, views_per_batch),
        )
        self._advance = advance
        self._zeros = operator.geometry.means.new_zeros(1, 1)

    def aggregate(self) -> Aggregate:
        """Takes the weighted mean over all views (one pass).

        Returns:
            Means, total weights and variances of all Gaussians.
        """
        # One column more gathers the weights themselves, one the squared length of what is averaged.
        sums = self._no_values(self.channels + 2)  # [N, X + 2]
        for cameras, maps, weights in self._stream():
            squared = maps.square().sum(1, keepdim=True)  # [B, 1, Sh, Sw]
            gathered = torch.cat([maps, torch.ones_like(squared), squared], dim=1) * weights  # [B, X + 2, Sh, Sw]
            start = self._zeros.expand(len(self.operator.geometry), self.channels + 2)
            sums += self.operator.linearize(cameras, start).adjoint(gathered)
        coverage = sums[:, -2].clone()  # [N]
        means = _divide(sums, coverage)
        values = means[:, :-2].contiguous()
        variance = (means[:, -1] - values.square().sum(1)).clamp_min(0)  # [N]
        return Aggregate(values, coverage, variance)

    def refine(self, values: Float[Tensor, "N X"], coverage: Float[Tensor, "N"]) -> Float[Tensor, "N X"]:
        """Takes one step ``x + D^-1 A^T w (B - A x)`` (one pass).

        Args:
            values: [N, X] the solution so far.
            coverage: [N] of ``aggregate``.

        Returns:
            [N, X], the next solution.
        """
        sums = self._no_values(self.channels)  # [N, X]
        for cameras, maps, weights in self._stream():
            rendered = self.operator.linearize(cameras, values)
            sums += rendered.adjoint((maps - rendered.maps) * weights)
        return values + _divide(sums, coverage)

    def reweight(
        self, values: Float[Tensor, "N X"], scale: float, from_zero: bool
    ) -> tuple[Float[Tensor, "N X"], Float[Tensor, "N"]]:
        """Takes one step of iteratively re-weighted least squares (one pass).

        Each patch counts by one over the length of its residual, as minimising ``sum_p w_p |B_p - (A x)_p|`` demands
        (an L1 norm over patches, which does not depend on the basis of the channels).

        Args:
            values: [N, X] the solution so far, whose residuals give the weights.
            scale: Typical length of a feature: residuals below a tenth of it are weighted alike.
            from_zero: Aggregate anew with these weights, instead of refining ``values`` with them.

        Returns:
            The new values, and the coverage under the new weights.
        """
        sums = self._no_values(self.channels + 1)  # [N, X + 1]
        for cameras, maps, weights in self._stream():
            padded = torch.cat([values, values.new_zeros(len(values), 1)], dim=1)
            rendered = self.operator.linearize(cameras, padded)
            residual = maps - rendered.maps[:, :-1]  # [B, X, Sh, Sw]
            size = residual.norm(dim=1, keepdim=True) / max(scale, 1e-12)  # [B, 1, Sh, Sw]
            robust = weights / size.clamp_min(ROBUST_FLOOR)
            gathered = torch.cat([maps if from_zero else residual, torch.ones_like(size)], dim=1) * robust
            sums += rendered.adjoint(gathered)
        coverage = sums[:, -1].clone()
        change = _divide(sums[:, :-1], coverage)
        return (change if from_zero else values + change), coverage

    def _no_values(self, channels: int) -> Float[Tensor, "N X"]:
        return self._zeros.new_zeros(len(self.operator.geometry), channels)

    def _stream(self) -> Iterator[tuple[list[PatchCamera], Float[Tensor, "B X Sh Sw"], Float[Tensor, "B 1 Sh Sw"]]]:
        for batch in self._batches:
            maps = torch.stack([view.load() for view in batch]).to(self._zeros)  # [B, X, h, w]
            weights = self.operator.upsample_weights(stack_weights(batch, maps))  # [B, 1, Sh, Sw]
            yield [view.camera for view in batch], self.operator.upsample(maps), weights
            self._advance(len(batch))


def stack_weights(batch: Sequence[LiftView], maps: Float[Tensor, "B X h w"]) -> Float[Tensor, "B 1 h w"]:
    """Returns the patch weights of a batch, like ``maps`` in type and place; 1 where a view has none.

    Args:
        batch: B views.
        maps: [B, X, h, w], theirs.
    """
    ones = maps.new_ones(maps.shape[2:])
    return torch.stack([ones if view.weights is None else view.weights.to(maps) for view in batch])[:, None]


def _divide(sums: Float[Tensor, "N X"], coverage: Float[Tensor, "N"]) -> Float[Tensor, "N X"]:
    """``D^-1`` times sums; 0 for Gaussians that are not seen."""
    seen = coverage > SEEN
    return torch.where(seen[:, None], sums / torch.where(seen, coverage, 1.0)[:, None], 0.0)


def fill_unseen(
    values: Float[Tensor, "N D"], means: Float[Tensor, "N 3"], seen: Bool[Tensor, "N"]
) -> Float[Tensor, "N D"]:
    """Gives unseen Gaussians the mean of their nearest seen neighbours.

    Args:
        values: [N, D] features.
        means: [N, 3] centres.
        seen: [N] whether a Gaussian's features come from views.

    Returns:
        A new tensor; the input itself if all, or none, are seen.
    """
    if bool(seen.all()) or not bool(seen.any()):
        return values
    from scipy.spatial import KDTree

    positions, known = means.detach().cpu().numpy(), seen.cpu().numpy()
    distance, index = KDTree(positions[known]).query(positions[~known], k=min(NEIGHBOURS, int(known.sum())), workers=-1)
    distance, index = (np.asarray(array).reshape(len(positions[~known]), -1) for array in (distance, index))
    weights = torch.from_numpy(1.0 / np.maximum(distance, 1e-12)).to(values)  # [unseen, NEIGHBOURS]
    neighbours = values[seen][torch.from_numpy(index).to(values.device)]  # [unseen, NEIGHBOURS, D]
    filled = values.clone()
    filled[~seen] = (neighbours * (weights / weights.sum(1, keepdim=True))[..., None]).sum(1)
    return filled
