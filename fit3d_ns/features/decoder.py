"""The decoder of a scene: rendered low-dimensional features to the backbone's width."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.features.grid import FeatureGrid


class FeatureDecoder(nn.Module):
    """One bias-free 3x3 convolution, as in FiT3D (section 3.1 of the paper; padding 1, default initialisation).

    Args:
        low_dim: Channels of the rendered map, D.
        width: Channels of the backbone, C.
        generator: Source of the initial weights. The global random state is left as it was, so that a scene trains
            to the same geometry with and without features.
    """

    def __init__(self, low_dim: int, width: int, generator: torch.Generator | None = None):
        super().__init__()
        bound = (low_dim * 9) ** -0.5  # torch's default for Conv2d
        weight = torch.empty(width, low_dim, 3, 3).uniform_(-bound, bound, generator=generator)
        self.weight = nn.Parameter(weight)

    @property
    def low_dim(self) -> int:
        """Channels of the rendered map, D."""
        return self.weight.shape[1]

    @property
    def width(self) -> int:
        """Channels of the backbone, C."""
        return self.weight.shape[0]

    def forward(self, low: Float[Tensor, "*B D H W"]) -> Float[Tensor, "*B C H W"]:
        """Decodes every pixel of a rendered map."""
        return torch.nn.functional.conv2d(low, self.weight, padding=1)

    def decode_patches(
        self,
        low: Float[Tensor, "D H W"],
        feature_grid: FeatureGrid,
        grid: tuple[int, int],
        offset: tuple[float, float] = (0.0, 0.0),
    ) -> Float[Tensor, "C h w"]:
        """Decodes a rendered map on the patch grid only.

        Equals decoding every pixel and sampling the result with ``feature_grid`` (see ``FeatureGrid.windows``).

        Args:
            low: Rendered map, of ``feature_grid.render_size``.
            feature_grid: The rule it was rendered with.
            grid: Height and width of the patch grid.
            offset: Shift of the sampling points, in patches (y, x); see ``FeatureGrid.windows``.
        """
        windows = feature_grid.windows(low, grid, offset).flatten(0, 1)
        return torch.einsum("ck,khw->chw", self.weight.flatten(1), windows)
