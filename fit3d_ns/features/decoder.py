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
        """Decodes every pixel of a rendered map.

        Args:
            low: Rendered features [.., D, H, W].

        Returns:
            [.., C, H, W], float32.
        """
        return torch.nn.functional.conv2d(low, self.weight, padding=1)


def decode_patches(
    low: Float[Tensor, "*V D H W"],
    kernel: Float[Tensor, "C D 3 3"],
    feature_grid: FeatureGrid,
    grid: tuple[int, int],
    offset: tuple[float, float] = (0.0, 0.0),
) -> Float[Tensor, "*V C h w"]:
    """Decodes rendered maps on the patch grid only.

    Equals decoding every pixel and sampling the result with ``feature_grid`` (see ``FeatureGrid.windows``).

    Args:
        low: [D, H, W] or [V, D, H, W], one rendered map or several, of ``feature_grid.render_size``.
        kernel: [C, D, 3, 3], the decoder's.
        feature_grid: The rule that they were rendered with.
        grid: Height h and width w of the patch grid.
        offset: Shift of the sampling points, in patches (y, x); see ``FeatureGrid.windows``.

    Returns:
        [C, h, w] or [V, C, h, w].
    """
    # Sampling treats channels alike and apart, so views may stand in line with them.
    windows = feature_grid.windows(low.reshape(-1, *low.shape[-2:]), grid, offset)  # [V D, 9, h, w]
    windows = windows.reshape(*low.shape[:-3], kernel[0].numel(), -1)  # [*V, D 9, h w]
    return torch.matmul(kernel.flatten(1), windows).unflatten(-1, grid)
