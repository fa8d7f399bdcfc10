"""Part of a scene: a box, chosen Gaussians, or both."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fit3d_ns.viewer.feature_space import FeatureSpace


@dataclass(frozen=True)
class GaussianSelection:
    """Chosen Gaussians, where splatfacto expects a crop box.

    Attributes:
        chosen: [N], in the order of the model's Gaussians.
        box: A crop box that they must lie in as well.
    """

    chosen: Bool[Tensor, "N"]
    box: Any | None = None

    def within(self, points: Float[Tensor, "N 3"]) -> Bool[Tensor, "N"]:
        """Returns which Gaussians are shown.

        Args:
            points: Centres of all Gaussians.
        """
        return self.chosen if self.box is None else self.chosen & self.box.within(points).reshape(-1)


def similarity(coordinates: Float[Tensor, "*shape K"], query: Float[Tensor, "C"], space: FeatureSpace) -> Tensor:
    """Returns cosines between decoded features and a query.

    Args:
        coordinates: Features in the space's coordinates.
        query: A feature of the backbone's width.
        space: Of the scene's decoder.

    Returns:
        [*shape] in [-1, 1]; 0 for features that are zero or not finite.
    """
    lengths = coordinates.norm(dim=-1) * query.norm()
    cosines = coordinates @ space.narrow(query) / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    return torch.nan_to_num(cosines, nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)
