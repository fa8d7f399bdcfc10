"""The CUDA backend: gsplat, asked for as many channels in one launch as pays."""

import functools
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from fit3d_ns.support.errors import UserError

# Measured with 64 to 384 channels: launches of 64 are the fastest forward and backward; one of 128 or more is slower.
_CHANNELS_PER_LAUNCH = 64
_COMPILED_CHANNELS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65)
"""Channels of one launch, up to 65, that every version has kernels for: 1.4 and 1.5 pad all others to a power of two,
1.6 raises (`GSPLAT_NUM_CHANNELS` in its `cuda/csrc/Config.h`)."""


def rasterize_on_cuda(
    colors: Tensor,
    sh_degree: int | None,
    render_mode: str,
    channel_chunk: int | None,
    tile_size: int,
    **arguments: Any,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Rasterises with gsplat, as `fit3d_ns.rasterization.rasterize` says.

    Channels are padded to a number that every version of gsplat has kernels for. Each channel is blended on its own,
    so what is asked for comes out the same.

    Args:
        colors: [(V,) N, X], or coefficients [(V,) N, K, 3] with ``sh_degree``.
        sh_degree: Degree of the spherical harmonics; None for plain colours.
        render_mode: ``RGB``, ``ED`` or ``RGB+ED``.
        channel_chunk: Channels of one launch; None for as many as pays.
        tile_size: Side of a tile, pixels.
        **arguments: The others, handed on.

    Returns:
        Images [V, H, W, X], opacity [V, H, W, 1] and gsplat's ``info``.

    Raises:
        UserError: gsplat or its CUDA kernels cannot be loaded.
    """
    rasterization = load_gsplat()
    num_values = 3 if sh_degree is not None else colors.shape[-1]
    with_depth = render_mode == "RGB+ED"
    padding = 0
    if channel_chunk is None:
        channel_chunk, padding = split_channels(num_values + with_depth)
    if padding and sh_degree is None and render_mode != "ED":
        colors = F.pad(colors, (0, padding))  # [(V,) N, X + padding]
    render, alpha, info = rasterization(
        colors=colors,
        sh_degree=sh_degree,
        render_mode=render_mode,
        channel_chunk=channel_chunk,
        tile_size=available_tile_size(tile_size),
        **arguments,
    )
    if padding and sh_degree is None and render_mode != "ED":
        values, depth = render[..., :num_values], render[..., num_values + padding :]
        render = torch.cat([values, depth], -1) if with_depth else values  # [V, H, W, X (+ 1)]
    return render, alpha, info


def split_channels(channels: int) -> tuple[int, int]:
    """Chooses launches: one up to 64 channels plus depth, launches of 64 above that.

    Args:
        channels: To render, depth included.

    Returns:
        The channels of a launch, and how many to add so that every launch has a number of `_COMPILED_CHANNELS`.
    """
    if channels <= _COMPILED_CHANNELS[-1]:
        padded = _next_compiled(channels)
        return padded, padded - channels
    remainder = channels % _CHANNELS_PER_LAUNCH
    return _CHANNELS_PER_LAUNCH, _next_compiled(remainder) - remainder if remainder else 0


def _next_compiled(channels: int) -> int:
    return next(number for number in _COMPILED_CHANNELS if number >= channels)


@functools.cache
def available_tile_size(tile_size: int) -> int:
    """Returns the side of a tile, pixels, with which the installed gsplat renders what was asked for.

    gsplat 1.6 has kernels for 4 and 16 only. From 1.5 on a Gaussian ends where its alpha falls below 1/255, so tiles of
    another side give the same render; 1.4 cuts it off at three standard deviations, rounded up to tiles, and has
    kernels for every side.

    Args:
        tile_size: As the feature grid says.
    """
    if tile_size in (4, 16) or Version(version("gsplat")).release < (1, 6):
        return tile_size
    return 4 if tile_size < 16 else 16


@functools.cache
def load_gsplat() -> Callable:
    """Returns gsplat's rasterization, its kernels built or loaded.

    Raises:
        UserError: gsplat or its CUDA kernels cannot be loaded; the sentence says what to install.
    """
    remedy = (
        "install a gsplat wheel built for this torch and CUDA (docs.gsplat.studio), or the CUDA toolkit (nvcc) and "
        "ninja so that gsplat can build them, or run on the CPU with `--machine.device-type cpu`"
    )
    try:
        from gsplat.cuda import _backend
        from gsplat.rendering import rasterization
    except Exception as error:  # whatever a failing build or a binary for another torch raises
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"gsplat's CUDA kernels cannot be loaded ({reason}): {remedy}.") from error
    if _backend._C is None:
        raise UserError(f"gsplat's CUDA kernels are not built: {remedy}.")
    return rasterization
