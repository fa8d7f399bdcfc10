"""Colour profiles that pictures carry: applied as viewers do, so that photos are sRGB."""

from functools import lru_cache
from io import BytesIO
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms

_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
"""Colour spaces of profiles that fit a picture's mode, as ICC names them."""
_STEPS = (0, 36, 73, 109, 146, 182, 219, 255)
_INVISIBLE = 2
"""Of 255: a profile that changes no colour by more is sRGB, in whichever way it was written."""


def to_srgb(picture: Image.Image) -> Image.Image:
    """Returns a picture in sRGB.

    Profiles that are damaged, or are of another colour space than the picture, say nothing, and viewers leave them out.

    Args:
        picture: Decoded, of any mode, with its profile in ``info``.

    Returns:
        RGB or RGBA where a profile was applied, else the picture itself.
    """
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    if picture.mode in ("P", "PA") or (picture.mode == "RGB" and "transparency" in picture.info):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    alpha = picture.getchannel("A") if picture.mode in ("RGBA", "LA") else None
    colors = picture if alpha is None else picture.convert(picture.mode.removesuffix("A"))
    transform = _transform(bytes(profile), colors.mode)
    if transform is None:
        return picture
    converted = transform.apply(colors)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@lru_cache(maxsize=8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Returns what leads from a profile to sRGB; None where it says nothing, or is sRGB."""
    try:
        opened = ImageCms.ImageCmsProfile(BytesIO(profile))
        if cast(Any, opened.profile).xcolor_space != _SPACES.get(mode):
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.ImageCmsTransform(opened, srgb, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    channels = len(mode) if mode == "RGB" else 1
    samples = np.stack(np.meshgrid(*[np.array(_STEPS, np.uint8)] * channels), axis=-1).reshape(1, -1, channels)
    before = Image.fromarray(samples if channels > 1 else samples[..., 0], mode)
    change = np.asarray(transform.apply(before)).astype(int) - np.asarray(before.convert("RGB"))
    return transform if np.abs(change).max() > _INVISIBLE else None
