"""Numbers as pictures: [H, W, 3], finite, in [0, 1]."""

import textwrap
from functools import lru_cache

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_INK, _PAPER = (235, 235, 235), (38, 42, 55)
_LUMINANCE = (0.299, 0.587, 0.114)
_HEAT_SHARE = 0.7
"""Share of the colour map in a heat map over a photo."""


def resize(maps: Float[Tensor, "X h w"], size: tuple[int, int]) -> Float[Tensor, "H W X"]:
    """Brings maps to a picture's size, bilinear, channels last.

    Args:
        maps: [X, h, w], channels first.
        size: Height H and width W, pixels.

    Returns:
        [H, W, X].
    """
    if tuple(maps.shape[1:]) != size:
        maps = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
    return maps.permute(1, 2, 0)


def over(
    picture: Float[Tensor, "H W 3"], alpha: Float[Tensor, "H W 1"], background: Float[Tensor, "H W 3"]
) -> Float[Tensor, "H W 3"]:
    """Puts a picture before a background; what is not finite in either becomes mid-grey.

    Args:
        picture: [H, W, 3] in [0, 1].
        alpha: [H, W, 1] in [0, 1].
        background: [H, W, 3] in [0, 1].

    Returns:
        [H, W, 3] in [0, 1], finite.
    """
    return (picture * alpha + background * (1 - alpha)).nan_to_num(0.5, 0.5, 0.5).clamp(0, 1)


def luminance(photo: Float[Tensor, "H W 3"]) -> Float[Tensor, "H W 3"]:
    """Returns a photo in shades of grey.

    Args:
        photo: [H, W, 3] in [0, 1].
    """
    grey = (photo * photo.new_tensor(_LUMINANCE)).sum(-1, keepdim=True)
    return grey.nan_to_num(0.5, 0.5, 0.5).clamp(0, 1).expand_as(photo)


def heat_over(
    photo: Float[Tensor, "H W 3"], values: Float[Tensor, "H W"], colormap: str = "turbo"
) -> Float[Tensor, "H W 3"]:
    """Returns values as colours over a photo in shades of grey.

    Args:
        photo: In [0, 1].
        values: In [0, 1]; beyond, the colours at the ends.
        colormap: Of matplotlib.
    """
    table = torch.from_numpy(mpl.colormaps[colormap](np.arange(256))[:, :3]).to(photo)
    colors = table[(values.nan_to_num(0, 0, 0).clamp(0, 1) * 255).round().long()]
    return _HEAT_SHARE * colors + (1 - _HEAT_SHARE) * luminance(photo)


def label_colors(labels: Int[Tensor, "H W"]) -> Float[Tensor, "H W 3"]:
    """Returns clearly different colours for up to 20 labels, grey for negative ones.

    Args:
        labels: [H, W], from 0; negative ones are of no group.
    """
    palette = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
    # Its strong colours first, then their pale partners.
    table = torch.tensor([*palette[0::2], *palette[1::2], (0.5, 0.5, 0.5)], device=labels.device)
    return table[torch.where(labels < 0, len(palette), labels % len(palette))]


@lru_cache(maxsize=16)
def _lettering(sentence: str, height: int, width: int) -> np.ndarray:
    image = Image.new("RGB", (width, height), _PAPER)
    size = max(8, min(20, width // 28))
    lines = textwrap.wrap(sentence, width=max(10, int(width * 0.9 / (size * 0.55))))
    ImageDraw.Draw(image).multiline_text(
        (width / 2, height / 2),
        "\n".join(lines),
        fill=_INK,
        font=ImageFont.load_default(size),
        anchor="mm",
        align="center",
        spacing=size // 2,
    )
    return np.asarray(image, dtype=np.float32) / 255


def lettering(sentence: str, like: Float[Tensor, "H W 3"]) -> Float[Tensor, "H W 3"]:
    """Returns a sentence as a picture.

    Args:
        sentence: What to say.
        like: A picture of the size and on the device wanted.
    """
    return torch.from_numpy(_lettering(sentence, like.shape[0], like.shape[1]).copy()).to(like)
