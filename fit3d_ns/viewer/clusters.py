"""Groups of Gaussians with similar features."""

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

UNASSIGNED = -1
"""Label of a Gaussian without a feature."""


def fit_clusters(
    coordinates: Float[Tensor, "M K"], weights: Float[Tensor, "M"], count: int
) -> Float[Tensor, "count K"]:
    """Finds centres by k-means over directions of features, the same for the same input.

    Args:
        coordinates: Features; their lengths do not matter.
        weights: How much each counts, at least 0.
        count: Centres wanted; fewer come back where there are fewer features.

    Returns:
        Centres of unit length, that of the greatest weight first.
    """
    # Imported here: it takes a while, and only who looks at clusters needs it.
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    points = torch.nn.functional.normalize(coordinates.float(), dim=1).cpu().numpy()
    shares = weights.double().cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct features than clusters
        means = KMeans(min(count, len(points)), n_init=4, random_state=0)  # type: ignore[arg-type]
        means.fit(points, sample_weight=shares)
    labels = torch.from_numpy(means.labels_).long()
    sizes = torch.zeros(len(means.cluster_centers_), dtype=torch.float64)
    order = sizes.index_add(0, labels, torch.from_numpy(shares)).argsort(descending=True, stable=True)
    centres = torch.from_numpy(means.cluster_centers_).float()[order]
    return torch.nn.functional.normalize(centres, dim=1).to(coordinates.device)


def assign_clusters(coordinates: Float[Tensor, "N K"], centres: Float[Tensor, "count K"]) -> Int[Tensor, "N"]:
    """Returns the number of each feature's nearest centre, by angle; `UNASSIGNED` where it is zero or not finite.

    Args:
        coordinates: Features.
        centres: Of `fit_clusters`.
    """
    labels = (coordinates @ centres.T).argmax(1)
    known = coordinates.any(1) & torch.isfinite(coordinates).all(1)
    return torch.where(known, labels, UNASSIGNED)


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
    """Returns indices of Gaussians that count, all of them or an even sample, the same at every call.

    Args:
        weights: [N], how much each counts; 0 for not at all.
    """
    rows = weights.nonzero().squeeze(-1)
    if len(rows) <= _MOST_GAUSSIANS:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:_MOST_GAUSSIANS]
    return rows[chosen.sort().values.to(rows.device)]
