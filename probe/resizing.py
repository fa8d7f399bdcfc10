"""Bilinear resizing of feature and logit maps."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resize_maps(maps: Float[Tensor, "B K h w"], size: tuple[int, ...]) -> Float[Tensor, "B K H W"]:
    """Resizes maps bilinearly (half-pixel centres, no antialiasing), as torch's ``interpolate`` does.

    By two matrix products instead: the backward pass of ``interpolate`` adds in no fixed order on CUDA, so that
    repeated runs differ, and is slower.

    Args:
        maps: To resize.
        size: (H, W).

    Returns:
        The maps at that size, equal to torch's to rounding.
    """
    height, width = maps.shape[-2:]
    if (height, width) == tuple(size):
        return maps
    rows = _weights(height, size[0], maps.device, maps.dtype)
    columns = _weights(width, size[1], maps.device, maps.dtype)
    return rows @ (maps @ columns.T)


@lru_cache(maxsize=64)
def _weights(source: int, target: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "target source"]:
    """What each source cell contributes to each target cell along one axis."""
    identity = torch.eye(source, dtype=dtype)[None]
    return F.interpolate(identity, size=target, mode="linear", align_corners=False)[0].T.contiguous().to(device)
