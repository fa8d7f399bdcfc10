"""The only place where features are rendered: values of Gaussians into views, by the rule of a feature grid.

Training, lifting, the viewer, exports and distillation render here, so what one of them fits is what the others read.
No gradient reaches geometry or cameras (FiT3D, section 3.1: features must not move the geometry), and what the
rasteriser notes for densification is dropped.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fit3d_ns.features.decoder import decode_patches
from fit3d_ns.features.grid import FeatureGrid
from fit3d_ns.rasterization import rasterize


@dataclass(frozen=True)
class Geometry:
    """Gaussians without their colours, in the units of the rasteriser.

    Attributes:
        means: [N, 3] centres in world coordinates.
        quats: [N, 4] rotations as wxyz quaternions of any length but zero.
        scales: [N, 3] standard deviations along the axes, world units, positive.
        opacities: [N] in [0, 1].
    """

    means: Float[Tensor, "N 3"]
    quats: Float[Tensor, "N 4"]
    scales: Float[Tensor, "N 3"]
    opacities: Float[Tensor, "N"]

    def __len__(self) -> int:
        return self.means.shape[0]

    def __getitem__(self, rows: Bool[Tensor, "N"] | slice) -> "Geometry":
        """Returns the Gaussians that a mask or a slice chooses."""
        return Geometry(self.means[rows], self.quats[rows], self.scales[rows], self.opacities[rows])

    def detach(self) -> "Geometry":
        """Returns the same tensors without gradients."""
        return Geometry(self.means.detach(), self.quats.detach(), self.scales.detach(), self.opacities.detach())


def viewmats_of(camera_to_worlds: Float[Tensor, "V 3 4"]) -> Float[Tensor, "V 4 4"]:
    """Returns world-to-camera matrices as rasterisers take them.

    Args:
        camera_to_worlds: [V, 3, 4] rigid poses as nerfstudio has them, OpenGL axes (x right, y up, z backward).

    Returns:
        [V, 4, 4] with OpenCV axes (x right, y down, z forward), in the type and place of the poses.
    """
    right, up, backward, position = camera_to_worlds.unbind(-1)  # [V, 3] each
    rotation = torch.stack([right, -up, -backward], dim=-2)  # [V, 3, 3]
    translation = -rotation @ position[..., None]  # [V, 3, 1]
    last_row = torch.zeros_like(camera_to_worlds[..., :1, :])  # [V, 1, 4]
    last_row[..., 3] = 1.0
    return torch.cat([torch.cat([rotation, translation], dim=-1), last_row], dim=-2)


def render_features(
    geometry: Geometry,
    values: Float[Tensor, "N X"],
    viewmats: Float[Tensor, "V 4 4"],
    Ks: Float[Tensor, "V 3 3"],
    image_size: tuple[int, int],
    render_size: tuple[int, int],
    feature_grid: FeatureGrid,
    visible: Bool[Tensor, "N"] | None = None,
) -> tuple[Float[Tensor, "V X H W"], Float[Tensor, "V 1 H W"]]:
    """Renders values of the Gaussians into views of one size, by a feature grid's rule.

    Args:
        geometry: N Gaussians; no gradient reaches them.
        values: [N, X] what to blend, on a zero background. Differentiable.
        viewmats: [V, 4, 4] world to camera, OpenCV axes.
        Ks: [V, 3, 3] intrinsics in pixels of ``image_size``, pixel centres at +0.5.
        image_size: Height and width of the photos in pixels.
        render_size: Height H and width W of the maps in pixels.
        feature_grid: The rule.
        visible: [N] which Gaussians are there; all of them if None.

    Returns:
        Blended values [V, X, H, W], not divided by opacity (as FiT3D), and opacity [V, 1, H, W] in [0, 1].
    """
    if visible is not None:
        geometry, values = geometry[visible], values[visible]
    return _rasterize(geometry, values, viewmats, Ks, image_size, render_size, feature_grid, "RGB")


@torch.no_grad()
def render_depth(
    geometry: Geometry,
    viewmats: Float[Tensor, "V 4 4"],
    Ks: Float[Tensor, "V 3 3"],
    image_size: tuple[int, int],
    render_size: tuple[int, int],
    feature_grid: FeatureGrid,
) -> tuple[Float[Tensor, "V 1 H W"], Float[Tensor, "V 1 H W"]]:
    """Renders the depth at which features are seen.

    Args:
        geometry: N Gaussians.
        viewmats: [V, 4, 4] world to camera, OpenCV axes.
        Ks: [V, 3, 3] intrinsics in pixels of ``image_size``, pixel centres at +0.5.
        image_size: Height and width of the photos in pixels.
        render_size: Height H and width W of the maps in pixels.
        feature_grid: The rule.

    Returns:
        Expected z-depth [V, 1, H, W] in world units, and opacity [V, 1, H, W] in [0, 1].
    """
    any_value = geometry.opacities[:, None]  # [N, 1]: the rasteriser wants colours, and ignores them
    return _rasterize(geometry, any_value, viewmats, Ks, image_size, render_size, feature_grid, "ED")


def decode_views(
    geometry: Geometry,
    features: Float[Tensor, "N D"],
    decoder: Float[Tensor, "C D 3 3"],
    viewmats: Float[Tensor, "V 4 4"],
    Ks: Float[Tensor, "V 3 3"],
    image_size: tuple[int, int],
    grid: tuple[int, int],
    feature_grid: FeatureGrid,
    offset: tuple[float, float] = (0.0, 0.0),
) -> tuple[Float[Tensor, "V C h w"], Float[Tensor, "V 1 H W"]]:
    """Renders features and decodes them on the teacher's patch grid, for views of one size.

    Args:
        geometry: N Gaussians; no gradient reaches them.
        features: [N, D] low-dimensional features. Differentiable.
        decoder: [C, D, 3, 3] kernel of the scene's decoder. Differentiable.
        viewmats: [V, 4, 4] world to camera, OpenCV axes.
        Ks: [V, 3, 3] intrinsics in pixels of ``image_size``, pixel centres at +0.5.
        image_size: Height and width of the photos in pixels.
        grid: Height h and width w of the teacher's map in patches.
        feature_grid: The rule.
        offset: Shift of the sampling points in patches (y, x), each in [-0.5, 0.5].

    Returns:
        Decoded maps [V, C, h, w], and the opacity [V, 1, H, W] in [0, 1] of the renders that they come from.
    """
    render_size = feature_grid.render_size(image_size, grid)
    low, alpha = render_features(geometry, features, viewmats, Ks, image_size, render_size, feature_grid)
    return decode_patches(low, decoder, feature_grid, grid, offset), alpha


def _rasterize(
    geometry: Geometry,
    values: Float[Tensor, "N X"],
    viewmats: Float[Tensor, "V 4 4"],
    Ks: Float[Tensor, "V 3 3"],
    image_size: tuple[int, int],
    render_size: tuple[int, int],
    feature_grid: FeatureGrid,
    render_mode: Any,
) -> tuple[Float[Tensor, "V X H W"], Float[Tensor, "V 1 H W"]]:
    (height, width), fixed = render_size, geometry.detach()
    if len(fixed) == 0:  # gsplat's kernels do not take an empty scene
        return values.new_zeros(len(viewmats), values.shape[1], height, width), values.new_zeros(
            len(viewmats), 1, height, width
        )
    # By Python numbers: a tensor of the two factors would make a GPU wait for its upload.
    intrinsics = Ks.detach().clone()  # [V, 3, 3]
    intrinsics[:, 0] *= width / image_size[1]
    intrinsics[:, 1] *= height / image_size[0]
    render, alpha, _ = rasterize(
        means=fixed.means,
        quats=fixed.quats,
        scales=fixed.scales,
        opacities=fixed.opacities,
        colors=values,
        viewmats=viewmats.detach(),
        Ks=intrinsics,
        width=width,
        height=height,
        tile_size=feature_grid.tile_size,
        render_mode=render_mode,
        rasterize_mode=feature_grid.rasterize_mode,
    )
    return render.permute(0, 3, 1, 2), alpha.permute(0, 3, 1, 2)  # [V, X, H, W], [V, 1, H, W]
