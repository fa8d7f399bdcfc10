"""Where the teacher's views of a scene disagree."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.lifting.lift import project, teacher_basis
from fit3d_ns.lifting.operator import FeatureOperator
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.lifting.solver import SEEN, LiftSolver, LiftView
from fit3d_ns.model import Fit3DSplatModel

_PERCENTILES = (0.02, 0.98)
"""Share of what the training views see that is shown in the darkest colour, and in all but the brightest."""


@dataclass(frozen=True)
class Disagreement:
    """How much views disagree about each Gaussian.

    Attributes:
        values: [N] standard deviation of the features that the views give it, feature units; 0 where it is not seen.
        lowest: What is shown as 0, the same in all views.
        highest: What is shown as 1.
    """

    values: Float[Tensor, "N"]
    lowest: float
    highest: float

    @classmethod
    def of(cls, variance: Float[Tensor, "N"], coverage: Float[Tensor, "N"]) -> "Disagreement":
        """Returns it from the sums of the lifting solver (`fit3d_ns.lifting.solver.Aggregate`).

        Args:
            variance: [N], of a Gaussian's feature over views.
            coverage: [N], total weight of a Gaussian in all views, patches.
        """
        seen = (coverage > SEEN) & torch.isfinite(variance)
        values = torch.where(seen, variance.float().clamp_min(0).sqrt(), 0.0)
        if not bool(seen.any()):
            return cls(values, 0.0, 1.0)
        ordered, order = values[seen].sort()
        share = coverage[seen][order].double().cumsum(0) / coverage[seen].double().sum()
        lowest, highest = (float(ordered[int((share < limit).sum())]) for limit in _PERCENTILES)
        return cls(values, lowest, highest)

    def shade(self, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Returns rendered values with `lowest` as 0 and `highest` as 1.

        Args:
            values: Rendered, of any shape, in the unit of `values`.
        """
        return (values - self.lowest) / max(self.highest - self.lowest, 1e-30)


@torch.no_grad()
def view_disagreement(model: Fit3DSplatModel, views: Sequence[LiftView]) -> Disagreement:
    """Goes through all training views twice: for a basis of their features, and for the spread about their mean.

    Args:
        model: The geometry.
        views: Training views with the teacher's maps.

    Returns:
        Of all Gaussians.
    """
    device = model.means.device
    dim = model.config.feature_dim
    basis = teacher_basis(views, model.fit3d_decoder.width, dim, device)
    operator = FeatureOperator(model.geometry, model.feature_grid)
    batch = LiftSettings().views_per_batch
    aggregate = LiftSolver(operator, project(views, basis), dim, batch).aggregate()
    return Disagreement.of(aggregate.variance, aggregate.coverage)
