"""Blending of projected Gaussians into pixels as one differentiable torch operation on the CPU."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fit3d_ns.rasterization import kernels
from fit3d_ns.rasterization.kernel_runner import compile_kernels, run_parts

_GAUSSIANS_PER_CHUNK = 2048


@dataclass(frozen=True)
class TileLists:
    """Which Gaussians every tile of one view looks at, near to far.

    M visible Gaussians, I intersections of a Gaussian and a tile.
    """

    tile_size: int
    """Side of a tile, pixels."""
    tile_width: int
    """Tiles in a row."""
    tile_height: int
    """Rows of tiles."""
    order: np.ndarray
    """Indices of the visible Gaussians by depth, then by index. [M] int64"""
    bounds: np.ndarray
    """First column, first row, end column, end row of the tiles each one meets. [M, 4] int32"""
    tile_starts: np.ndarray
    """Where each tile's list starts in `entries`, and the total. [tile_height * tile_width + 1] int64"""
    slot_starts: np.ndarray
    """Where each Gaussian's gradient slots start, one slot per row of tiles, and the total. [M + 1] int64"""
    entries: np.ndarray
    """Positions in `order`. [I] int32"""


def list_tiles(means2d: Tensor, radii: Tensor, depths: Tensor, width: int, height: int, tile_size: int) -> TileLists:
    """Sorts the visible Gaussians of one view into tiles by the square of their radius.

    Args:
        means2d: [N, 2] pixels.
        radii: 0 for a culled Gaussian. [N] int32 pixels.
        depths: [N]
        width: Image width in pixels.
        height: Image height in pixels.
        tile_size: Side of a tile in pixels.

    Returns:
        The tile lists.
    """
    compile_kernels(means2d.dtype)
    tile_width, tile_height = -(-width // tile_size), -(-height // tile_size)
    visible = np.flatnonzero(radii.numpy() > 0)  # [M]
    nearest_first = np.argsort(depths.detach().numpy()[visible], kind="stable")  # [M]
    order = visible[nearest_first].astype(np.int64, copy=False)  # [M]
    bounds = np.empty((len(order), 4), np.int32)
    tile_starts = np.zeros(tile_height * tile_width + 1, np.int64)
    slot_starts = np.empty(len(order) + 1, np.int64)
    kernels.tile_bounds(
        order,
        means2d.detach().numpy(),
        radii.numpy(),
        tile_size,
        tile_width,
        tile_height,
        bounds,
        tile_starts,
        slot_starts,
    )
    entries = np.empty(tile_starts[-1], np.int32)
    kernels.fill_tiles(bounds, tile_width, tile_starts, entries)
    return TileLists(tile_size, tile_width, tile_height, order, bounds, tile_starts, slot_starts, entries)


class BlendGaussians(torch.autograd.Function):
    """Front-to-back blending with the analytic gradient.

    Bitwise equal results for any number of threads: a band of tiles is one thread's work, and the gradient that a
    Gaussian collects in each band lies in a slot of its own until all slots are summed, top to bottom of the image.
    """

    @staticmethod
    def forward(ctx, means2d, conics, opacities, colors, tiles, width, height, absgrad):
        """Blends every view.

        Args:
            ctx: Autograd context.
            means2d: [V, N, 2] pixels. With ``absgrad`` the backward pass sets its attribute ``absgrad``, the sum over
                pixels of the gradient's absolute value, as gsplat does.
            conics: Upper triangle of the inverse 2D covariance. [V, N, 3]
            opacities: [V, N]
            colors: [N, X] or [V, N, X]
            tiles: One `TileLists` per view.
            width: Image width in pixels.
            height: Image height in pixels.
            absgrad: Whether to compute the absolute gradient.

        Returns:
            Render [V, height, width, X] and alpha [V, height, width, 1].
        """
        num_views, channels, dtype = len(tiles), colors.shape[-1], means2d.dtype
        render = torch.zeros(num_views, height, width, channels, dtype=dtype)  # [V, H, W, X]
        transmittance = torch.ones(num_views, height, width, dtype=dtype)  # [V, H, W]
        last_entry = torch.full((num_views, height, width), -1, dtype=torch.int64)  # [V, H, W]
        tables = []
        for v, lists in enumerate(tiles):
            table = np.empty((len(lists.order), kernels.GAUSSIAN_COLUMNS), render.numpy().dtype)
            kernels.pack_gaussians(lists.order, means2d[v].numpy(), conics[v].numpy(), opacities[v].numpy(), table)
            tables.append(table)
            run_parts(
                kernels.blend_band,
                lists.tile_height,
                lists.tile_size,
                lists.tile_width,
                lists.tile_starts,
                lists.entries,
                lists.order,
                table,
                _of_view(colors, v).numpy(),
                render[v].numpy(),
                transmittance[v].numpy(),
                last_entry[v].numpy(),
            )
        ctx.save_for_backward(means2d, colors, transmittance, last_entry)
        ctx.tiles, ctx.tables, ctx.absgrad = tiles, tables, absgrad
        return render, (1 - transmittance)[..., None]

    @staticmethod
    @once_differentiable
    def backward(ctx, *output_gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of means2d, conics, opacities and colors, as far as they are asked for."""
        render_gradient, alpha_gradient = output_gradients
        means2d, colors, transmittance, last_entry = ctx.saved_tensors
        with_geometry, with_colors = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[3]
        render_gradient = render_gradient.contiguous()
        # Transmittance enters the loss through alpha = 1 - T.
        behind = (-transmittance * alpha_gradient[..., 0]).contiguous()  # [V, H, W]
        geometry = means2d.new_zeros(*means2d.shape[:2], kernels.GRADIENT_COLUMNS) if with_geometry else None
        color_gradient = torch.zeros_like(colors) if with_colors else None
        for v, lists in enumerate(ctx.tiles):
            num_slots = int(lists.slot_starts[-1])
            geometry_slots = means2d.new_zeros(num_slots * with_geometry, kernels.GRADIENT_COLUMNS)  # [S or 0, 8]
            color_slots = means2d.new_zeros(num_slots * with_colors, colors.shape[-1])  # [S or 0, X]
            run_parts(
                kernels.blend_band_backward,
                lists.tile_height,
                lists.tile_size,
                lists.tile_width,
                lists.tile_starts,
                lists.entries,
                lists.order,
                lists.bounds,
                lists.slot_starts,
                ctx.tables[v],
                _of_view(colors, v).numpy(),
                transmittance[v].numpy(),
                last_entry[v].numpy(),
                render_gradient[v].numpy(),
                behind[v].numpy(),
                geometry_slots.numpy(),
                color_slots.numpy(),
            )
            if geometry is not None:
                _gather(lists, geometry_slots, geometry[v])
            if color_gradient is not None:
                _gather(lists, color_slots, _of_view(color_gradient, v))
        gradients: list[Tensor | None] = [None] * 8
        if geometry is not None:
            gradients[0], gradients[1], gradients[2] = geometry[..., 0:2], geometry[..., 2:5], geometry[..., 5]
            if ctx.absgrad:
                means2d.absgrad = geometry[..., 6:8].contiguous()
        gradients[3] = color_gradient
        return tuple(gradients)


def _of_view(colors: Tensor, view: int) -> Tensor:
    return colors if colors.dim() == 2 else colors[view]


def _gather(lists: TileLists, slots: Tensor, gradient: Tensor) -> None:
    run_parts(
        kernels.gather_slots,
        -(-len(lists.order) // _GAUSSIANS_PER_CHUNK),
        _GAUSSIANS_PER_CHUNK,
        lists.order,
        lists.slot_starts,
        slots.numpy(),
        gradient.numpy(),
    )
