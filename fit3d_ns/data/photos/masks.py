"""Masks and alpha: what of a photo counts, pixel by pixel and patch by patch."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor


def composite_on_black(image: UInt8[Tensor, "H W c"] | Float[Tensor, "H W c"]) -> UInt8[Tensor, "H W 3"]:
    """Returns a photo as the teacher sees it: 8-bit RGB, transparent parts black.

    Args:
        image: Photo with 3 or 4 channels, in [0, 255] (8 bit) or [0, 1] (float).
    """
    if image.dtype == torch.uint8 and image.shape[-1] == 3:
        return image
    values = image.float() / 255.0 if image.dtype == torch.uint8 else image
    if values.shape[-1] == 4:
        values = values[..., :3] * values[..., 3:]
    return (values * 255.0).round().clamp(0, 255).to(torch.uint8)


def patch_weights(batch: dict[str, Any], grid: tuple[int, int]) -> Float[Tensor, "h w"] | None:
    """Returns the share of each patch that the mask and the photo's alpha leave valid, or None where all is.

    Args:
        batch: A view, with ``image`` of shape [H, W, 3 or 4] and perhaps ``mask`` of shape [H, W, 1].
        grid: Height and width of the teacher's map in patches.
    """
    image = batch["image"]
    valid = None
    if image.shape[-1] == 4:
        alpha = image[..., 3].float()
        valid = alpha / 255.0 if image.dtype == torch.uint8 else alpha
    if "mask" in batch:
        mask = batch["mask"][..., 0].float().to(image.device)
        valid = mask if valid is None else valid * mask
    return None if valid is None else F.adaptive_avg_pool2d(valid[None, None], grid)[0, 0]
