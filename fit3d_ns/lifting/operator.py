"""The renderer of a feature grid as a linear operator, and its adjoint.

With geometry fixed, one number per Gaussian and channel goes in and one per patch and channel comes out:
``(A x)_p = sum_i a_pi x_i``, where ``a_pi`` is how much Gaussian ``i`` contributes to patch ``p`` under the grid's rule
(render size, antialiasing, pooling). Where the rule reads single points, 4 x 4 points a patch take the patch's place.
``A x`` is a rasterisation. ``A^T y`` is the gradient of ``<A x, y>`` with respect to ``x``, which every differentiable
rasteriser has; no kernel of our own is needed, and the same code runs on gsplat and on the CPU backend.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.features.decoder import FeatureDecoder
from fit3d_ns.features.grid import FeatureGrid
from fit3d_ns.features.rendering import Geometry, decode_views, render_features
from fit3d_ns.lifting.memory import rendering_budget

_SAMPLES = {"area": 1, "bilinear": 4}
"""Points per patch and side at which a rule's render is compared with the teacher. Averages need one; where a rule
reads single points, what lies between them counts too, as in FiT3D's loss at every pixel."""
_COPIES = 4
"""Copies of values and render that one view holds at most: gsplat's own of the values, the renders of its launches put
together, and the gradients of all of them."""


@dataclass(frozen=True)
class PatchCamera:
    """A pinhole camera and the patch grid of the teacher's map of its photo.

    Attributes:
        viewmat: [4, 4] world to camera, OpenCV axes.
        K: [3, 3] intrinsics in pixels of the photo, pixel centres at +0.5.
        image_size: (H, W) of the photo in pixels.
        grid: (h, w) of the teacher's map in patches.
    """

    viewmat: Float[Tensor, "4 4"]
    K: Float[Tensor, "3 3"]
    image_size: tuple[int, int]
    grid: tuple[int, int]


class Linearization(NamedTuple):
    """``A x`` for some views, and ``A^T`` of the same views."""

    maps: Float[Tensor, "B X Sh Sw"]
    """[B, X, Sh, Sw], ``A x``, detached."""
    adjoint: Callable[[Float[Tensor, "B X Sh Sw"]], Float[Tensor, "N X"]]
    """Takes maps [B, X, Sh, Sw] to ``A^T`` of them, [N, X]; may be called once."""


class FeatureOperator:
    """``A`` and ``A^T`` for any views of a scene.

    Args:
        geometry: Of the scene; no gradient reaches it.
        feature_grid: The rule by which features are rendered for patches.
    """

    def __init__(self, geometry: Geometry, feature_grid: FeatureGrid) -> None:
        self.geometry = geometry.detach()
        self.feature_grid = feature_grid

    def batch_size(self, camera: PatchCamera, channels: int, most: int) -> int:
        """Returns how many views to render and bring back in one call.

        Args:
            camera: One of them.
            channels: Channels X that are rendered.
            most: Limit where memory is no obstacle.
        """
        height, width = self.feature_grid.render_size(camera.image_size, camera.grid)
        numbers = (len(self.geometry) + height * width) * channels * _COPIES
        budget = rendering_budget(self.geometry.means.device)
        return max(1, min(most, budget // (numbers * self.geometry.means.element_size())))

    @property
    def samples(self) -> int:
        """Points S per patch and side."""
        return _SAMPLES[self.feature_grid.pooling]

    @property
    def offsets(self) -> list[tuple[float, float]]:
        """The points of a patch, in patches (y, x) from its centre, row by row."""
        steps = [(index + 0.5) / self.samples - 0.5 for index in range(self.samples)]
        return [(y, x) for y in steps for x in steps]

    def upsample(self, teacher: Float[Tensor, "B X h w"]) -> Float[Tensor, "B X Sh Sw"]:
        """Brings teacher maps to the operator's points, as bilinear resizing to the image would.

        Args:
            teacher: [B, X, h, w] maps on the patch grid.

        Returns:
            [B, X, Sh, Sw], ``samples`` points a side of a patch.
        """
        if self.samples == 1:
            return teacher
        return F.interpolate(teacher, scale_factor=self.samples, mode="bilinear", align_corners=False)

    def upsample_weights(self, weights: Float[Tensor, "B 1 h w"]) -> Float[Tensor, "B 1 Sh Sw"]:
        """Shares the weight of each patch among its points.

        Args:
            weights: [B, 1, h, w] on the patch grid, in [0, 1].

        Returns:
            [B, 1, Sh, Sw]; those of a patch sum to its weight.
        """
        if self.samples == 1:
            return weights
        return F.interpolate(weights, scale_factor=self.samples, mode="nearest") / self.samples**2

    def linearize(self, cameras: Sequence[PatchCamera], values: Float[Tensor, "N X"]) -> Linearization:
        """Renders values for some views, ready to bring maps back.

        Args:
            cameras: B views of equal image size and grid.
            values: [N, X], one row per Gaussian.

        Returns:
            The rendered maps, detached, and the adjoint, which may be called once.
        """
        leaf = values.detach().requires_grad_()
        with torch.enable_grad():
            maps = self._sample(self.low_maps(cameras, leaf), cameras[0].grid)

        def adjoint(residual: Float[Tensor, "B X Sh Sw"]) -> Float[Tensor, "N X"]:
            return torch.autograd.grad(maps, leaf, residual)[0]

        return Linearization(maps.detach(), adjoint)

    @torch.no_grad()
    def render(self, cameras: Sequence[PatchCamera], values: Float[Tensor, "N X"]) -> Float[Tensor, "B X Sh Sw"]:
        """Returns ``A x``.

        Args:
            cameras: B views of equal image size and grid.
            values: [N, X], one row per Gaussian.
        """
        return self._sample(self.low_maps(cameras, values), cameras[0].grid)

    def adjoint(self, cameras: Sequence[PatchCamera], maps: Float[Tensor, "B X Sh Sw"]) -> Float[Tensor, "N X"]:
        """Returns ``A^T y``, summed over the views.

        Args:
            cameras: B views of equal image size and grid.
            maps: [B, X, Sh, Sw] at the operator's points.
        """
        zeros = maps.new_zeros(len(self.geometry), maps.shape[1])
        return self.linearize(cameras, zeros).adjoint(maps)

    def low_maps(self, cameras: Sequence[PatchCamera], values: Float[Tensor, "N X"]) -> Float[Tensor, "B X H W"]:
        """Renders values at the grid's render size, before they are brought onto patches.

        Args:
            cameras: B views of equal image size and grid.
            values: [N, X], one row per Gaussian.

        Returns:
            [B, X, H, W] at the grid's render size.
        """
        if len({(camera.image_size, camera.grid) for camera in cameras}) != 1:
            raise ValueError("views rendered together must share image size and patch grid")
        image_size, grid = cameras[0].image_size, cameras[0].grid
        render_size = self.feature_grid.render_size(image_size, grid)
        viewmats, Ks = _stacked(cameras, values)
        return render_features(self.geometry, values, viewmats, Ks, image_size, render_size, self.feature_grid)[0]

    @torch.no_grad()
    def decode(
        self, camera: PatchCamera, values: Float[Tensor, "N D"], decoder: FeatureDecoder
    ) -> Float[Tensor, "C h w"]:
        """Returns features on the teacher's patch grid, as evaluation and distillation read them.

        Args:
            camera: One view.
            values: [N, D] low-dimensional features, one row per Gaussian.
            decoder: Brings them to the backbone's width.
        """
        viewmats, Ks = _stacked([camera], values)
        maps, _ = decode_views(
            self.geometry, values, decoder.weight, viewmats, Ks, camera.image_size, camera.grid, self.feature_grid
        )
        return maps[0]

    def _sample(self, low: Float[Tensor, "B X H W"], grid: tuple[int, int]) -> Float[Tensor, "B X Sh Sw"]:
        """What a decoder with nothing but a centre tap sees: the middle ones of ``FeatureGrid.windows``."""
        if self.feature_grid.pooling == "area":
            assert self.feature_grid.supersample is not None
            return F.avg_pool2d(low, self.feature_grid.supersample)
        size = (grid[0] * self.samples, grid[1] * self.samples)
        return F.interpolate(low, size=size, mode="bilinear", align_corners=False)


def _stacked(cameras: Sequence[PatchCamera], like: Tensor) -> tuple[Float[Tensor, "B 4 4"], Float[Tensor, "B 3 3"]]:
    """Viewmats and intrinsics of views, in the type and place of a tensor."""
    viewmats = torch.stack([camera.viewmat for camera in cameras]).to(like)
    return viewmats, torch.stack([camera.K for camera in cameras]).to(like)
