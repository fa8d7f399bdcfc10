"""Changes of colour, drawn on the CPU for each sample and applied to whole batches on the device."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from probe.recipes import DepthRecipe


def draw_distortion(rng: np.random.Generator) -> np.ndarray:
    """Draws one sample's photometric distortion, each part with probability one half.

    Returns:
        float32 [5]: brightness added (of 255), contrast factor, whether contrast comes last, saturation factor, hue
        turn in degrees.
    """
    brightness = rng.uniform(-32, 32) if rng.random() < 0.5 else 0.0
    contrast_last = float(rng.random() < 0.5)
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    # OpenCV counts hue in steps of 2 degrees, and the reference draws from -18 to 17 of them.
    hue = 2.0 * float(rng.integers(-18, 18)) if rng.random() < 0.5 else 0.0
    return np.array([brightness, contrast, contrast_last, saturation, hue], np.float32)


def distort(images: Float[Tensor, "B 3 H W"], parameters: Float[Tensor, "B 5"]) -> Float[Tensor, "B 3 H W"]:
    """Applies mmsegmentation's PhotoMetricDistortion.

    The reference rounds to 8 bits after every step; this does not.

    Args:
        images: RGB in [0, 255].
        parameters: From `draw_distortion`.

    Returns:
        RGB in [0, 255].
    """
    brightness, contrast, last, saturation, hue = (parameters[:, k, None, None, None] for k in range(5))
    images = (images + brightness).clamp(0, 255)
    images = torch.where(last > 0, images, (images * contrast).clamp(0, 255))
    images = _turn_colors(images, saturation, hue)
    return torch.where(last > 0, (images * contrast).clamp(0, 255), images)


def draw_color_change(rng: np.random.Generator, recipe: DepthRecipe) -> np.ndarray:
    """Draws one sample's change of gamma and channel gains, with probability one half.

    Returns:
        float32 [4]: gamma, gain of red, green, blue.
    """
    if rng.random() >= 0.5:
        return np.ones(4, np.float32)
    gamma, brightness = rng.uniform(0.9, 1.1), rng.uniform(*recipe.brightness)
    return np.array([gamma, *(brightness * rng.uniform(0.9, 1.1, 3))], np.float32)


def change_colors(images: Float[Tensor, "B 3 H W"], parameters: Float[Tensor, "B 4"]) -> Float[Tensor, "B 3 H W"]:
    """Applies gamma, on values in [0, 255] as the references do, and gains.

    Args:
        images: RGB in [0, 255].
        parameters: From `draw_color_change`.

    Returns:
        RGB in [0, 255].
    """
    gamma, gains = parameters[:, :1, None, None], parameters[:, 1:, None, None]
    return (images.pow(gamma) * gains).clamp(0, 255)


def _turn_colors(images: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Scales saturation and turns hue in HSV."""
    value, strongest = images.max(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    red, green, blue = images.unbind(1)
    span = chroma[:, 0].clamp_min(1e-6)
    sectors = torch.stack([(green - blue) / span, (blue - red) / span + 2, (red - green) / span + 4], 1)
    sector = sectors.gather(1, strongest) + hue / 60
    # Chroma is value times saturation, and saturation must not pass 1.
    chroma = torch.minimum(chroma * saturation, value)
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device)[None, :, None, None]
    place = (offsets + sector) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)
