"""The CPU backend: gsplat's rasterisation, differentiable, without a GPU.

The rules are those of gsplat 1.4: EWA projection with a blur of ``eps2d``, a square of three standard deviations
matched to tiles, alpha = min(0.999, opacity * exp(-sigma)), nothing below 1/255, and a pixel is closed by the first
Gaussian that would leave it a transmittance of 1e-4 or less, which is not drawn. gsplat 1.5 draws Gaussians out to 3.33
standard deviations, so alphas below 0.011 at their rims differ from it.
"""

import functools
import importlib.metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fit3d_ns.rasterization.blending import BlendGaussians, TileLists, list_tiles
from fit3d_ns.rasterization.projection import project_gaussians
from fit3d_ns.rasterization.spherical_harmonics import spherical_harmonics_colors


def rasterize_on_cpu(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
    radius_clip: float,
    eps2d: float,
    sh_degree: int | None,
    tile_size: int,
    backgrounds: Tensor | None,
    render_mode: str,
    absgrad: bool,
    rasterize_mode: str,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Rasterises on the CPU; arguments and returns are those of `fit3d_ns.rasterization.rasterize`."""
    number_of_views = len(viewmats)
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
        radius_clip=radius_clip,
        eps2d=eps2d,
    )
    means2d, conics, depths = projected.means2d, projected.conics, projected.depths
    view_opacities = opacities.expand(number_of_views, -1)
    if rasterize_mode == "antialiased":
        view_opacities = view_opacities * projected.compensations
    view_opacities = view_opacities.contiguous()

    if sh_degree is not None:
        colors = spherical_harmonics_colors(sh_degree, means, colors, viewmats, projected.radii > 0)
    if render_mode in ("D", "ED"):
        colors = depths[..., None]
        backgrounds = None if backgrounds is None else backgrounds.new_zeros(number_of_views, 1)
    elif render_mode in ("RGB+D", "RGB+ED"):
        colors = torch.cat([colors.expand(number_of_views, -1, -1), depths[..., None]], dim=-1)
        if backgrounds is not None:
            backgrounds = torch.cat([backgrounds, backgrounds.new_zeros(number_of_views, 1)], dim=-1)

    tiles = [
        list_tiles(means2d[v], projected.radii[v], depths[v], width, height, tile_size) for v in range(number_of_views)
    ]
    render, alpha = BlendGaussians.apply(
        means2d, conics, view_opacities, colors.contiguous(), backgrounds, tiles, width, height, absgrad
    )
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
        "n_cameras": number_of_views,
        "tile_size": tile_size,
        **_tile_information(tiles, len(means)),
    }
    return render, alpha, info


def _tile_information(tiles: list[TileLists], number_of_gaussians: int) -> dict[str, Any]:
    """Gsplat's ``tile_width``, ``tile_height``, ``isect_offsets`` and ``flatten_ids``."""
    offsets, flatten_ids, intersections = [], [], 0
    for v, lists in enumerate(tiles):
        offsets.append(lists.tile_starts[:-1].reshape(lists.tile_height, lists.tile_width) + intersections)
        flatten_ids.append(lists.order[lists.entries] + v * number_of_gaussians)
        intersections += len(lists.entries)
    return {
        "tile_width": tiles[0].tile_width,
        "tile_height": tiles[0].tile_height,
        "isect_offsets": torch.from_numpy(np.stack(offsets).astype(np.int32)),
        "flatten_ids": torch.from_numpy(np.concatenate(flatten_ids).astype(np.int32)),
    }


@functools.cache
def _radii_have_two_axes() -> bool:
    """Whether the installed gsplat's strategies read radii as [V, N, 2], which they do from 1.5 on."""
    try:
        major, minor = importlib.metadata.version("gsplat").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (1, 5)
