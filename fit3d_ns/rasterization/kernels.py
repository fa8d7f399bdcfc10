"""Numba kernels of the CPU backend: tile lists, blending, and the analytic gradient of blending.

Every kernel works on one view and one band (a row of tiles), releases the GIL and touches no memory of another
band, so bands may run on any number of threads with bitwise equal results. All kernels live in this one file because
Numba's disk cache notices changes of the file of the cached function only.

The arithmetic follows the array's dtype: float32 is the fast path, float64 serves gradient checks. Literals are
therefore wrapped in ``kind(...)``; a bare ``0.5`` would silently turn float32 arithmetic into float64.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

# Columns of the table that `pack_gaussians` writes, one row per visible Gaussian in depth order.
MEAN_X, MEAN_Y, CONIC_XX, CONIC_XY, CONIC_YY, OPACITY = 0, 1, 2, 3, 4, 5
# The ellipse outside which alpha is below 1/255: half its height, and what its extent along a pixel row needs.
HALF_HEIGHT, SHEAR, INVERSE_XX, REACH, DETERMINANT = 6, 7, 8, 9, 10
GAUSSIAN_COLUMNS = 11

# Columns of the geometry gradient of one Gaussian.
GRADIENT_COLUMNS = 8  # mean x, mean y, conic xx, xy, yy, opacity, |mean x|, |mean y|

ALPHA_MAX = 0.999
ALPHA_MIN = 1.0 / 255.0
TRANSMITTANCE_MIN = 1e-4

_OPTIONS = {"nogil": True, "error_model": "numpy"}


def _kernel(function: Callable) -> Any:
    """Compiles lazily, with the disk cache where a folder for it can be written."""
    try:
        return numba.njit(function, cache=True, **_OPTIONS)
    except RuntimeError:  # neither __pycache__ nor the user's cache folder can be written
        return numba.njit(function, **_OPTIONS)


@numba.njit(fastmath={"reassoc", "contract"}, **_OPTIONS)
def _dot(left, right):
    total = left.dtype.type(0)
    for k in range(left.shape[0]):
        total += left[k] * right[k]
    return total


@numba.njit(fastmath={"contract"}, **_OPTIONS)
def _add_scaled(target, scale, source):
    for k in range(source.shape[0]):
        target[k] += scale * source[k]


@numba.njit(**_OPTIONS)
def _falloff(gaussians, j, delta_x, delta_y):
    """Exponent sigma and exp(-sigma). Plain arithmetic, never contracted: both passes must take the same branches."""
    half = gaussians.dtype.type(0.5)
    sigma = (
        half * (gaussians[j, CONIC_XX] * delta_x * delta_x + gaussians[j, CONIC_YY] * delta_y * delta_y)
        + gaussians[j, CONIC_XY] * delta_x * delta_y
    )
    return sigma, math.exp(-sigma)


@numba.njit(**_OPTIONS)
def _row_range(gaussians, j, top, bottom):
    """Pixel rows in [top, bottom) that the ellipse of Gaussian j can reach."""
    half = gaussians.dtype.type(0.5)
    kind = gaussians.dtype.type
    centre = gaussians[j, MEAN_Y] - half
    reach = gaussians[j, HALF_HEIGHT]
    first = max(kind(top), np.ceil(centre - reach))
    last = min(kind(bottom - 1), np.floor(centre + reach))
    return int(first), int(last) + 1


@numba.njit(**_OPTIONS)
def _column_range(gaussians, j, delta_y, left, right):
    """Pixel columns in [left, right) that the ellipse of Gaussian j can reach in the row at distance delta_y."""
    kind = gaussians.dtype.type
    discriminant = gaussians[j, REACH] - gaussians[j, DETERMINANT] * delta_y * delta_y
    if discriminant < kind(0):
        return left, left
    centre = gaussians[j, MEAN_X] + gaussians[j, SHEAR] * delta_y - kind(0.5)
    half_width = math.sqrt(discriminant) * gaussians[j, INVERSE_XX]
    first = max(kind(left), np.ceil(centre - half_width))
    last = min(kind(right - 1), np.floor(centre + half_width))
    return int(first), int(last) + 1


@_kernel
def pack_gaussians(order, means2d, conics, opacities, gaussians):
    """Gathers the visible Gaussians in depth order and bounds the ellipse outside which alpha < 1/255.

    The bound is widened by more than the rounding error of sigma, so it never decides what is drawn: every pixel
    inside it is tested exactly.

    Args:
        order: Indices of the visible Gaussians, near to far. [M] int64
        means2d: [N, 2] pixels.
        conics: Upper triangle of the inverse 2D covariance. [N, 3] 1/pixels^2.
        opacities: [N]
        gaussians: Output table. [M, GAUSSIAN_COLUMNS]
    """
    kind = gaussians.dtype.type
    for j in range(order.shape[0]):
        g = order[j]
        xx, xy, yy = conics[g, 0], conics[g, 1], conics[g, 2]
        opacity = opacities[g]
        gaussians[j, MEAN_X] = means2d[g, 0]
        gaussians[j, MEAN_Y] = means2d[g, 1]
        gaussians[j, CONIC_XX] = xx
        gaussians[j, CONIC_XY] = xy
        gaussians[j, CONIC_YY] = yy
        gaussians[j, OPACITY] = opacity
        determinant = xx * yy - xy * xy
        if opacity < kind(0.99 * ALPHA_MIN):
            gaussians[j, HALF_HEIGHT] = kind(-1)  # no row at all
        elif xx > kind(0) and determinant > kind(0):
            limit = math.log(opacity / kind(ALPHA_MIN))
            limit += kind(1e-3) + kind(1e-5) * (kind(1) + abs(limit)) * xx * yy / determinant
            gaussians[j, SHEAR] = xy / xx
            gaussians[j, INVERSE_XX] = kind(1) / xx
            gaussians[j, REACH] = kind(2) * limit * xx
            gaussians[j, DETERMINANT] = determinant
            gaussians[j, HALF_HEIGHT] = math.sqrt(kind(2) * limit * xx / determinant) + kind(1e-3)
        else:  # degenerate in rounding: look at every pixel
            gaussians[j, SHEAR] = kind(0)
            gaussians[j, INVERSE_XX] = kind(1)
            gaussians[j, REACH] = kind(np.inf)
            gaussians[j, DETERMINANT] = kind(0)
            gaussians[j, HALF_HEIGHT] = kind(np.inf)


@_kernel
def tile_bounds(order, means2d, radii, tile_size, tile_width, tile_height, bounds, tile_starts, slot_starts):
    """Which tiles the square of each Gaussian's radius meets, and how long every list will be.

    Args:
        order: Indices of the visible Gaussians, near to far. [M] int64
        means2d: [N, 2] pixels.
        radii: [N] int32 pixels.
        tile_size: Side of a tile, in pixels.
        tile_width: Tiles in a row.
        tile_height: Rows of tiles.
        bounds: Output: first column, first row, end column, end row. [M, 4] int32
        tile_starts: Output: where each tile's list starts, and the total. [tile_height * tile_width + 1] int64, zeros
        slot_starts: Output: one gradient slot per Gaussian and row of tiles it meets. [M + 1] int64
    """
    kind = means2d.dtype.type
    size = kind(tile_size)
    slot_starts[0] = 0
    for j in range(order.shape[0]):
        g = order[j]
        x, y, radius = means2d[g, 0] / size, means2d[g, 1] / size, kind(radii[g]) / size
        left = int(min(max(np.floor(x - radius), kind(0)), kind(tile_width)))
        top = int(min(max(np.floor(y - radius), kind(0)), kind(tile_height)))
        right = int(min(max(np.ceil(x + radius), kind(0)), kind(tile_width)))
        bottom = int(min(max(np.ceil(y + radius), kind(0)), kind(tile_height)))
        bounds[j, 0], bounds[j, 1], bounds[j, 2], bounds[j, 3] = left, top, right, bottom
        slot_starts[j + 1] = slot_starts[j] + max(bottom - top, 0)
        for tile_y in range(top, bottom):
            for tile_x in range(left, right):
                tile_starts[tile_y * tile_width + tile_x + 1] += 1
    for tile in range(tile_starts.shape[0] - 1):
        tile_starts[tile + 1] += tile_starts[tile]


@_kernel
def fill_tiles(bounds, tile_width, tile_starts, entries):
    """Writes the tile lists, each in depth order because the Gaussians come in depth order.

    Args:
        bounds: From `tile_bounds`. [M, 4] int32
        tile_width: Tiles in a row.
        tile_starts: From `tile_bounds`. [tiles + 1] int64
        entries: Output: rows of the Gaussian table. [I] int32
    """
    cursor = tile_starts[:-1].copy()
    for j in range(bounds.shape[0]):
        for tile_y in range(bounds[j, 1], bounds[j, 3]):
            for tile_x in range(bounds[j, 0], bounds[j, 2]):
                tile = tile_y * tile_width + tile_x
                entries[cursor[tile]] = j
                cursor[tile] += 1


@_kernel
def blend_band(
    band, tile_size, tile_width, tile_starts, entries, order, gaussians, colors, render, transmittance, last_entry
):
    """Blends one row of tiles front to back.

    Args:
        band: Row of tiles.
        tile_size: Side of a tile, in pixels.
        tile_width: Tiles in a row.
        tile_starts: [tiles + 1] int64
        entries: [I] int32
        order: [M] int64
        gaussians: [M, GAUSSIAN_COLUMNS]
        colors: [N, X]
        render: Output, zeros. [H, W, X]
        transmittance: Output, ones: what is left behind the last blended Gaussian. [H, W]
        last_entry: Output, filled with -1: position in ``entries`` of the last blended Gaussian. [H, W] int64
    """
    kind = gaussians.dtype.type
    half, one = kind(0.5), kind(1)
    height, width = transmittance.shape
    top, bottom = band * tile_size, min((band + 1) * tile_size, height)
    is_open = np.empty((tile_size, tile_size), np.bool_)
    for tile_x in range(tile_width):
        left, right = tile_x * tile_size, min((tile_x + 1) * tile_size, width)
        n_open = (bottom - top) * (right - left)
        is_open[:] = True
        tile = band * tile_width + tile_x
        for entry in range(tile_starts[tile], tile_starts[tile + 1]):
            j = entries[entry]
            g = order[j]
            first_row, end_row = _row_range(gaussians, j, top, bottom)
            for y in range(first_row, end_row):
                delta_y = gaussians[j, MEAN_Y] - (kind(y) + half)
                first_column, end_column = _column_range(gaussians, j, delta_y, left, right)
                for x in range(first_column, end_column):
                    if not is_open[y - top, x - left]:
                        continue
                    sigma, falloff = _falloff(gaussians, j, gaussians[j, MEAN_X] - (kind(x) + half), delta_y)
                    alpha = min(kind(ALPHA_MAX), gaussians[j, OPACITY] * falloff)
                    if sigma < kind(0) or alpha < kind(ALPHA_MIN):
                        continue
                    next_transmittance = transmittance[y, x] * (one - alpha)
                    if next_transmittance <= kind(TRANSMITTANCE_MIN):
                        is_open[y - top, x - left] = False
                        n_open -= 1
                        continue
                    _add_scaled(render[y, x], alpha * transmittance[y, x], colors[g])
                    transmittance[y, x] = next_transmittance
                    last_entry[y, x] = entry
            if n_open == 0:
                break


@_kernel
def blend_band_backward(
    band,
    tile_size,
    tile_width,
    tile_starts,
    entries,
    order,
    bounds,
    slot_starts,
    gaussians,
    colors,
    transmittance,
    last_entry,
    render_gradient,
    behind_initial,
    geometry_slots,
    color_slots,
):
    """Walks one row of tiles back to front and sums each Gaussian's gradient over the band into its slot.

    Args:
        band: Row of tiles.
        tile_size: Side of a tile, in pixels.
        tile_width: Tiles in a row.
        tile_starts: [tiles + 1] int64
        entries: [I] int32
        order: [M] int64
        bounds: [M, 4] int32
        slot_starts: [M + 1] int64
        gaussians: [M, GAUSSIAN_COLUMNS]
        colors: [N, X]
        transmittance: From `blend_band`. [H, W]
        last_entry: From `blend_band`. [H, W] int64
        render_gradient: [H, W, X]
        behind_initial: Final transmittance times the loss gradient with respect to it. [H, W]
        geometry_slots: Output, zeros; no rows if no geometry gradient is wanted. [S or 0, GRADIENT_COLUMNS]
        color_slots: Output, zeros; no rows if no colour gradient is wanted. [S or 0, X]
    """
    kind = gaussians.dtype.type
    half, one, zero = kind(0.5), kind(1), kind(0)
    with_geometry = geometry_slots.shape[0] > 0
    with_colors = color_slots.shape[0] > 0
    height, width = transmittance.shape
    top, bottom = band * tile_size, min((band + 1) * tile_size, height)
    running = np.empty((tile_size, tile_size), gaussians.dtype)
    behind = np.empty((tile_size, tile_size), gaussians.dtype)
    for tile_x in range(tile_width):
        left, right = tile_x * tile_size, min((tile_x + 1) * tile_size, width)
        tile = band * tile_width + tile_x
        last_of_tile = np.int64(-1)
        for y in range(top, bottom):
            for x in range(left, right):
                running[y - top, x - left] = transmittance[y, x]
                behind[y - top, x - left] = behind_initial[y, x]
                last_of_tile = max(last_of_tile, last_entry[y, x])
        for entry in range(last_of_tile, tile_starts[tile] - 1, -1):
            j = entries[entry]
            g = order[j]
            slot = slot_starts[j] + band - bounds[j, 1]
            opacity = gaussians[j, OPACITY]
            mean_x, mean_y, xx, xy, yy, opacity_sum, abs_x, abs_y = zero, zero, zero, zero, zero, zero, zero, zero
            first_row, end_row = _row_range(gaussians, j, top, bottom)
            for y in range(first_row, end_row):
                delta_y = gaussians[j, MEAN_Y] - (kind(y) + half)
                first_column, end_column = _column_range(gaussians, j, delta_y, left, right)
                for x in range(first_column, end_column):
                    if entry > last_entry[y, x]:
                        continue
                    delta_x = gaussians[j, MEAN_X] - (kind(x) + half)
                    sigma, falloff = _falloff(gaussians, j, delta_x, delta_y)
                    alpha = min(kind(ALPHA_MAX), opacity * falloff)
                    if sigma < zero or alpha < kind(ALPHA_MIN):
                        continue
                    inverse = one / (one - alpha)
                    before = running[y - top, x - left] * inverse
                    running[y - top, x - left] = before
                    weight = alpha * before
                    if with_colors:
                        _add_scaled(color_slots[slot], weight, render_gradient[y, x])
                    if with_geometry:
                        shade = _dot(colors[g], render_gradient[y, x])
                        alpha_gradient = before * shade - inverse * behind[y - top, x - left]
                        behind[y - top, x - left] += weight * shade
                        if opacity * falloff <= kind(ALPHA_MAX):
                            sigma_gradient = -opacity * falloff * alpha_gradient
                            step_x = sigma_gradient * (
                                gaussians[j, CONIC_XX] * delta_x + gaussians[j, CONIC_XY] * delta_y
                            )
                            step_y = sigma_gradient * (
                                gaussians[j, CONIC_XY] * delta_x + gaussians[j, CONIC_YY] * delta_y
                            )
                            mean_x += step_x
                            mean_y += step_y
                            abs_x += abs(step_x)
                            abs_y += abs(step_y)
                            xx += half * sigma_gradient * delta_x * delta_x
                            xy += sigma_gradient * delta_x * delta_y
                            yy += half * sigma_gradient * delta_y * delta_y
                            opacity_sum += falloff * alpha_gradient
            if with_geometry:
                target = geometry_slots[slot]
                target[0] += mean_x
                target[1] += mean_y
                target[2] += xx
                target[3] += xy
                target[4] += yy
                target[5] += opacity_sum
                target[6] += abs_x
                target[7] += abs_y


@_kernel
def gather_slots(chunk, chunk_size, order, slot_starts, slots, gradient):
    """Adds the slots of each Gaussian of one chunk, top to bottom of the image, to its gradient.

    Args:
        chunk: Which chunk of the depth order.
        chunk_size: Gaussians in a chunk.
        order: [M] int64
        slot_starts: [M + 1] int64
        slots: [S, X]
        gradient: Accumulated in place. [N, X]
    """
    for j in range(chunk * chunk_size, min((chunk + 1) * chunk_size, order.shape[0])):
        target = gradient[order[j]]
        for slot in range(slot_starts[j], slot_starts[j + 1]):
            for k in range(slots.shape[1]):
                target[k] += slots[slot, k]
