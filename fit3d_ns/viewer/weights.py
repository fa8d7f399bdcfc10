"""How much each Gaussian counts where a scene is summed up."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MOST_GAUSSIANS = 2**16
"""Gaussians that clusters are fitted to; more of them change nothing that is visible."""


def visible_weights(
    opacities: Float[Tensor, "N 1"], scales: Float[Tensor, "N 3"], features: Float[Tensor, "N D"]
) -> Float[Tensor, "N"]:
    """Returns how much each Gaussian counts: its opacity times the area of its two longer axes.

    Args:
        opacities: Logits.
        scales: Logarithms of the standard deviations, world units.
        features: Gaussians whose feature is zero (never seen, nothing lifted yet) or not finite count nothing.

    Returns:
        At least 0; the sum is 1, or 0 if no Gaussian counts.
    """
    area = scales.detach().topk(2, dim=1).values.sum(1).exp()
    weights = opacities.detach().sigmoid().squeeze(-1) * area
    counts = features.detach().any(1) & torch.isfinite(features.detach()).all(1) & torch.isfinite(weights)
    weights = torch.where(counts, weights, 0.0)
    return weights / weights.sum().clamp_min(1e-30)


def sample_gaussians(weights: Float[Tensor, "N"]) -> Int[Tensor, "M"]:
    """Returns indices of Gaussians that count, all of them or an even sample, the same at every call."""
    rows = weights.nonzero().squeeze(-1)
    if len(rows) <= _MOST_GAUSSIANS:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_MOST_GAUSSIANS]
    return rows[chosen.sort().values.to(rows.device)]
