"""The CUDA backend: gsplat, asked for as many channels in one launch as pays."""

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fit3d_ns.support.errors import UserError

# Measured with 64 to 384 channels: launches of 64 are the fastest forward and backward; one of 128 or more is slower.
_CHANNELS_PER_LAUNCH = 64
_GSPLAT_DEFAULT = 32


def rasterize_on_cuda(
    colors: Tensor, sh_degree: int | None, render_mode: str, channel_chunk: int | None, **arguments
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Rasterises with gsplat; arguments and returns are those of `fit3d_ns.rasterization.rasterize`.

    Raises:
        UserError: gsplat or its CUDA kernels cannot be loaded.
    """
    if channel_chunk is None:
        channels = 3 if sh_degree is not None else colors.shape[-1]
        channel_chunk = channels_per_launch(channels + (render_mode == "RGB+ED"))
    return load_gsplat()(
        colors=colors, sh_degree=sh_degree, render_mode=render_mode, channel_chunk=channel_chunk, **arguments
    )


def channels_per_launch(channels: int) -> int:
    """The channel chunk for so many channels: one launch up to 64 channels plus depth, launches of 64 above that."""
    if channels <= _CHANNELS_PER_LAUNCH + 1:
        return max(_GSPLAT_DEFAULT, channels)
    return _CHANNELS_PER_LAUNCH


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
