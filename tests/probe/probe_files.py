"""What the tests of the probes write: photos and PNGs; and the name of the backbone they all take."""

from pathlib import Path

import numpy as np
from PIL import Image

TINY = "test_vit"
"""A timm ViT of 64 channels with patches of 16 pixels, made for tests."""


def save_photo(path: Path, size: tuple[int, int] = (40, 56), seed: int = 0) -> None:
    """Writes a photo of random blocks, [height, width]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((size[1], size[0]), Image.Resampling.NEAREST).save(path, quality=95)


def save_png(path: Path, values: np.ndarray) -> None:
    """Writes an index or depth PNG; uint8 or uint16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
