"""Principal components of features: one shared basis for looking at maps and for lifting them.

Lifting is linear, so projecting the teacher's maps before lifting equals projecting the lifted maps afterwards; a
basis of 64 directions is therefore all that a scene needs to carry, whatever the backbone's width. For pictures the
first three directions become red, green and blue, with ranges fixed once, so that several maps can be compared.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.support.errors import UserError

_ROWS_PER_STEP = 16384
"""Rows converted to float64 at a time, which bounds the memory of `FeatureCovariance.add`."""

_PERCENTILES = (0.01, 0.99)
"""Share of the features below the darkest and below the brightest value of a colour channel."""

_CONSTANT = 1e-5
"""A colour channel whose range is below this share of the features' size is rounding noise, not a direction."""


@dataclass(frozen=True)
class PCABasis:
    """Orthonormal directions of feature space, ordered by how much of the features they hold.

    Attributes:
        mean: [C] float32, subtracted before projecting; zeros for an uncentred basis.
        components: [dim, C] float32, orthonormal rows; in each row the entry largest in magnitude is positive.
        explained_variance: [dim] float32, mean squared projection on each row, falling.
        total_variance: Mean squared length of the features (after subtracting ``mean``).
    """

    mean: Float[Tensor, "C"]
    components: Float[Tensor, "dim C"]
    explained_variance: Float[Tensor, "dim"]
    total_variance: float

    @property
    def explained_fraction(self) -> float:
        """Share of the total variance that the components hold, in [0, 1]; 1 where there is no variance at all."""
        if self.total_variance <= 0:
            return 1.0
        return min(1.0, float(self.explained_variance.double().sum()) / self.total_variance)

    def project(self, x: Float[Tensor, "*shape C"]) -> Float[Tensor, "*shape dim"]:
        """Returns the coordinates of ``x`` in this basis, in float32 (float64 for a float64 input).

        Args:
            x: Features, channels last.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (x.to(dtype) - self.mean.to(dtype)) @ self.components.to(dtype).T

    def to(self, device: torch.device | str) -> "PCABasis":
        """Returns the same basis with its tensors on ``device``.

        Args:
            device: A CPU or CUDA device.
        """
        return PCABasis(
            self.mean.to(device), self.components.to(device), self.explained_variance.to(device), self.total_variance
        )


class FeatureCovariance:
    """First and second moments of features, summed in float64 as they stream by.

    Memory is two [C, C] matrices however many features are added, and the sums do not depend on how the features are
    cut into calls beyond float64 rounding.
    """

    def __init__(self, num_channels: int, device: torch.device | str = "cpu") -> None:
        """Starts empty.

        Args:
            num_channels: C, the width of the features.
            device: Where the sums live; features from elsewhere are moved there.
        """
        self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self._sum = torch.zeros(num_channels, dtype=torch.float64, device=device)
        self._second_moment = torch.zeros(num_channels, num_channels, dtype=torch.float64, device=device)

    def add(self, features: Float[Tensor, "M C"], weights: Float[Tensor, "M"] | None = None) -> None:
        """Adds M features.

        Args:
            features: [M, C] of any float dtype. NaN and infinity are reported by `basis`, so that adding never waits
                for the GPU.
            weights: [M] how much each feature counts, at least 0; all 1 if None.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if features.ndim != 2 or features.shape[1] != self._sum.shape[0]:
            raise ValueError(f"expected features [M, {self._sum.shape[0]}], got {list(features.shape)}")
        if weights is not None and weights.shape != features.shape[:1]:
            raise ValueError(f"expected weights [{features.shape[0]}], got {list(weights.shape)}")
        features = features.detach()
        for start in range(0, features.shape[0], _ROWS_PER_STEP):
            rows = features[start : start + _ROWS_PER_STEP].to(self._sum)  # [m, C]
            if weights is None:
                self._weight += rows.shape[0]
                weighted = rows
            else:
                row_weights = weights.detach()[start : start + _ROWS_PER_STEP].to(self._sum)  # [m]
                self._weight += row_weights.sum()
                weighted = rows * row_weights[:, None]
            self._sum += weighted.sum(0)
            self._second_moment.addmm_(weighted.T, rows)

    def basis(self, dim: int, centred: bool = True) -> PCABasis:
        """Returns the ``dim`` orthonormal directions that hold most of the features seen so far.

        Args:
            dim: Number of directions, 1 to C. Directions beyond the rank of the features are orthonormal but arbitrary.
            centred: True subtracts the mean first (principal components, for pictures). False takes the directions of
                the raw second moment (the right singular vectors of the feature matrix), which is the best basis where
                a linear map without bias, such as the decoder of a scene, must bring the features back.

        Returns:
            The basis, on the device of the sums.

        Raises:
            UserError: If no features were added, if they hold NaN or infinity, or if ``dim`` is out of range.
        """
        num_channels = self._sum.shape[0]
        if not 1 <= dim <= num_channels:
            raise UserError(f"A feature basis can have 1 to {num_channels} dimensions here, not {dim}.")
        # On the CPU, because its eigensolver gives the same vectors on every machine with the same libraries.
        weight, total, moment = float(self._weight), self._sum.cpu(), self._second_moment.cpu()
        if not (torch.isfinite(moment).all() and torch.isfinite(total).all()):
            raise UserError("The features hold NaN or infinite values: check the backbone's weights and its dtype.")
        if weight <= 0:
            raise UserError("There are no features to take a basis from: every view is empty or masked out.")
        mean = total / weight if centred else torch.zeros_like(total)
        moment = moment / weight - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh((moment + moment.T) / 2)  # [C], [C, C]: rising
        values = values.flip(0)[:dim].clamp_min(0)
        components = vectors.T.flip(0)[:dim]  # [dim, C]
        largest = components.abs().argmax(1, keepdim=True)
        components = components * components.gather(1, largest).sign()
        device = self._sum.device
        return PCABasis(
            mean=mean.float().to(device),
            components=components.float().contiguous().to(device),
            explained_variance=values.float().to(device),
            total_variance=max(0.0, float(moment.trace())),
        )


@dataclass(frozen=True)
class ColorBasis:
    """Colours for features, fixed once, so that the same feature has the same colour in every picture.

    Attributes:
        basis: Centred basis of min(3, C) directions: red, green, blue.
        low: [3] float32, projection shown as 0.
        high: [3] float32, projection shown as 1; where it equals ``low``, the channel is constant mid-grey.
    """

    basis: PCABasis
    low: Float[Tensor, "3"]
    high: Float[Tensor, "3"]

    @classmethod
    def fit(cls, features: Float[Tensor, "M C"], weights: Float[Tensor, "M"] | None = None) -> "ColorBasis":
        """Chooses directions and ranges (1st to 99th percentile) from the features given.

        Features with NaN or infinity are left out. All-zero or constant features, and none at all, are fine: everything
        is mid-grey then.

        Args:
            features: [M, C] of any float dtype, for example all patches of the teacher's maps of a scene.
            weights: [M] how much each feature counts (for Gaussians their opacities), at least 0; all 1 if None.

        Returns:
            The colour basis, on the device of ``features``.
        """
        features = features.detach()
        weights = torch.ones_like(features[:, 0], dtype=torch.float32) if weights is None else weights.detach().float()
        kept = torch.isfinite(features).all(1) & (weights > 0)  # [M]
        features, weights = features[kept], weights[kept]
        if features.shape[0] == 0:
            features, weights = features.new_zeros(1, features.shape[1]), weights.new_ones(1)
        covariance = FeatureCovariance(features.shape[1], features.device)
        covariance.add(features, weights)
        basis = covariance.basis(min(3, features.shape[1]))
        # Not torch.quantile: it refuses more than 16 million values and knows no weights.
        values, order = _pad_to_three(basis.project(features)).double().sort(0)  # [M, 3] each
        share = weights.double()[order].cumsum(0) / weights.double().sum()  # [M, 3]
        low, high = (
            values.gather(0, (share < percentile).sum(0, keepdim=True).clamp_max(len(values) - 1))[0].float()
            for percentile in _PERCENTILES
        )
        size = max(float(basis.mean.norm()), basis.total_variance**0.5)
        return cls(basis, low, torch.where(high - low > _CONSTANT * size, high, low))

    def to_rgb(self, features: Float[Tensor, "*shape C"]) -> Float[Tensor, "*shape 3"]:
        """Returns the colours of features, channels last: maps [h, w, C] and lists [N, C] alike.

        A feature that is exactly zero (nothing was rendered there, or nothing is trained yet) and one that holds NaN
        or infinity are mid-grey.

        Args:
            features: Channels last, of the basis's width.

        Returns:
            float32 in [0, 1], finite always.
        """
        features = features.detach().to(torch.promote_types(features.dtype, torch.float32))
        projected = _pad_to_three(self.basis.project(features)).float()  # [.., 3]
        span = self.high - self.low
        colors = torch.where(span > 0, (projected - self.low) / span.clamp_min(torch.finfo(torch.float32).tiny), 0.5)
        known = (features != 0).any(-1, keepdim=True) & torch.isfinite(features).all(-1, keepdim=True)
        return torch.where(known, colors, 0.5).nan_to_num(0.5).clamp(0, 1)

    def to(self, device: torch.device | str) -> "ColorBasis":
        """Returns the same colours with their tensors on ``device``.

        Args:
            device: A CPU or CUDA device.
        """
        return ColorBasis(self.basis.to(device), self.low.to(device), self.high.to(device))


def _pad_to_three(projected: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape 3"]:
    return torch.nn.functional.pad(projected, (0, 3 - projected.shape[-1]))
