"""The size at which an image enters a backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from fit3d_ns.support.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float

DEFAULT_MAX_SIZE = 868
"""Long side in pixels, about the size at which the paper fed its photos (62 patches of 14)."""


def input_size(height: int, width: int, patch_size: int, max_size: int | None = DEFAULT_MAX_SIZE) -> tuple[int, int]:
    """Chooses the size that an image is resized to: multiples of the patch size, aspect kept within half a patch.

    The image is only ever shrunk as a whole, never enlarged beyond the nearest multiple of the patch size.

    Args:
        height: Image height H, pixels.
        width: Image width W, pixels.
        patch_size: Side of a patch, pixels.
        max_size: Upper limit of the long side, pixels; None or 0 keeps the image's own size.

    Returns:
        (H', W'), both multiples of ``patch_size``, neither above ``max_size``.

    Raises:
        UserError: If the image, or ``max_size``, is smaller than one patch.
    """
    if min(height, width) < patch_size:
        raise UserError(
            f"An image of {height}x{width} pixels is smaller than one patch ({patch_size}x{patch_size}) of the "
            "backbone: use larger images, or a smaller downscale factor."
        )
    long_side = max(height, width)
    long_patches = _nearest(long_side / patch_size)
    scale = 1.0
    if max_size:
        if max_size < patch_size:
            raise UserError(f"The size limit of {max_size} pixels is smaller than one patch of {patch_size} pixels.")
        limit = max_size // patch_size
        if long_patches > limit:
            long_patches = limit
            scale = min(1.0, limit * patch_size / long_side)
    short_patches = min(max(1, _nearest(min(height, width) * scale / patch_size)), long_patches)
    rows, columns = (short_patches, long_patches) if height <= width else (long_patches, short_patches)
    return rows * patch_size, columns * patch_size


def patch_grid(height: int, width: int, patch_size: int, max_size: int | None = DEFAULT_MAX_SIZE) -> tuple[int, int]:
    """Returns the patch grid (h, w) of an image that is fed at its `input_size`; errors likewise.

    Args:
        height: Of the image, pixels.
        width: Of the image, pixels.
        patch_size: Side of a patch, pixels.
        max_size: Limit of the longer side, pixels; None for no limit.
    """
    input_height, input_width = input_size(height, width, patch_size, max_size)
    return input_height // patch_size, input_width // patch_size


def resize_to_patches(
    images: Float[Tensor, "B 3 H W"], patch_size: int, max_size: int | None = DEFAULT_MAX_SIZE
) -> Float[Tensor, "B 3 H2 W2"]:
    """Resizes images to their `input_size`, bilinear and antialiased.

    Args:
        images: Batch ``[B, 3, H, W]``, any range.
        patch_size: Side of a patch, pixels.
        max_size: See `input_size`.

    Returns:
        Batch ``[B, 3, H', W']``; the input itself where nothing changes.

    Raises:
        UserError: See `input_size`.
    """
    height, width = images.shape[-2:]
    size = input_size(height, width, patch_size, max_size)
    if size == (height, width):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def _nearest(value: float) -> int:
    # round() would send 2.5 and 3.5 to even numbers, so that neighbouring sizes round in opposite directions.
    return int(value + 0.5)
