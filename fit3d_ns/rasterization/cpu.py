"""The CPU backend: gsplat's rasterisation, differentiable, without a GPU.

The rules are those of gsplat 1.4: EWA projection with a blur of ``eps2d``, a square of three standard deviations
matched to tiles, alpha = min(0.999, opacity * exp(-sigma)), nothing below 1/255, and a pixel is closed by the first
Gaussian that would leave it a transmittance of 1e-4 or less, which is not drawn. gsplat 1.5 draws Gaussians out to 3.33
standard deviations, so alphas below 0.011 at their rims differ from it.
"""

import functools
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.rasterization.blending import BlendGaussians, list_tiles
from fit3d_ns.rasterization.projection import project_gaussians
from fit3d_ns.rasterization.spherical_harmonics import spherical_harmonics_colors


def rasterize_on_cpu(
    means: Tensor,  # [N, 3]
    quats: Tensor,  # [N, 4]
    scales: Tensor,  # [N, 3]
    opacities: Tensor,  # [N]
    colors: Tensor,  # [(V,) N, X], or [(V,) N, K, 3] with sh_degree
    viewmats: Tensor,  # [V, 4, 4]
    Ks: Tensor,  # [V, 3, 3]
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
    eps2d: float,
    sh_degree: int | None,
    tile_size: int,
    render_mode: str,
    absgrad: bool,
    rasterize_mode: str,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Rasterises on the CPU, as `fit3d_ns.rasterization.rasterize` says.

    Args:
        means: [N, 3] centres.
        quats: [N, 4] rotations (w, x, y, z), of any length.
        scales: [N, 3] standard deviations along the axes.
        opacities: [N] in [0, 1].
        colors: [(V,) N, X], or coefficients [(V,) N, K, 3] with ``sh_degree``.
        viewmats: [V, 4, 4] world to camera, OpenCV axes.
        Ks: [V, 3, 3] intrinsics, pixels.
        width: Of the images, pixels.
        height: Of the images, pixels.
        near_plane: Least depth that is seen.
        far_plane: Largest depth that is seen.
        eps2d: Added to the diagonal of projected covariances, squared pixels.
        sh_degree: Degree of the spherical harmonics; None for plain colours.
        tile_size: Side of a tile, pixels.
        render_mode: ``RGB``, ``ED`` or ``RGB+ED``.
        absgrad: Whether absolute gradients of the projected centres are kept.
        rasterize_mode: ``classic`` or ``antialiased``.

    Returns:
        Images [V, H, W, X], opacity [V, H, W, 1] and gsplat's ``info``.
    """
    num_views = len(viewmats)
    projected = project_gaussians(
        means,
        quats,
        scales,
        viewmats,
        Ks,
        width,
        height,
        near_plane=near_plane,
        far_plane=far_plane,
        eps2d=eps2d,
    )
    means2d, conics, depths = projected.means2d, projected.conics, projected.depths
    view_opacities = opacities.expand(num_views, -1)  # [V, N]
    if rasterize_mode == "antialiased":
        view_opacities = view_opacities * projected.compensations
    view_opacities = view_opacities.contiguous()

    if sh_degree is not None:
        colors = spherical_harmonics_colors(sh_degree, means, colors, viewmats, projected.radii > 0)  # [V, N, 3]
    if render_mode == "ED":
        colors = depths[..., None]  # [V, N, 1]
    elif render_mode == "RGB+ED":
        colors = torch.cat([colors.expand(num_views, -1, -1), depths[..., None]], dim=-1)  # [V, N, X + 1]

    tiles = [list_tiles(means2d[v], projected.radii[v], depths[v], width, height, tile_size) for v in range(num_views)]
    render, alpha = BlendGaussians.apply(
        means2d, conics, view_opacities, colors.contiguous(), tiles, width, height, absgrad
    )  # [V, H, W, X], [V, H, W, 1]
    if render_mode in ("ED", "RGB+ED"):
        render = torch.cat([render[..., :-1], render[..., -1:] / alpha.clamp_min(1e-10)], dim=-1)

    info = {
        "camera_ids": None,
        "gaussian_ids": None,
        "radii": torch.stack([projected.radii] * 2, dim=-1) if _radii_have_two_axes() else projected.radii,
        "means2d": means2d,
        "depths": depths,
        "conics": conics,
        "opacities": view_opacities,
        "width": width,
        "height": height,
        "n_cameras": num_views,
        "tile_size": tile_size,
        "tile_width": tiles[0].tile_width,
        "tile_height": tiles[0].tile_height,
    }
    return render, alpha, info


@functools.cache
def _radii_have_two_axes() -> bool:
    """Whether the installed gsplat's strategies read radii as [V, N, 2], which they do from 1.5 on."""
    try:
        major, minor = importlib.metadata.version("gsplat").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (1, 5)
