"""Features for Gaussians that no training view sees."""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

NEIGHBOURS = 4
"""Seen Gaussians whose features are averaged, by one over their distance."""


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
