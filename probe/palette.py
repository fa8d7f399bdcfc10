"""Colours of classes and depths in pictures."""

import colorsys

import numpy as np


def class_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """Returns colours that neighbours in the list of classes can be told apart by: hues a golden angle apart."""
    colors = []
    for index in range(count):
        hue = (index * 0.618034) % 1.0
        saturation, value = (0.75, 0.55, 0.9)[index % 3], (0.95, 0.75, 0.6)[(index // 3) % 3]
        colors.append(tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value)))
    return tuple(colors)


def depth_colors(depth: np.ndarray, max_depth: float) -> np.ndarray:
    """Colours depth [H, W] in metres by its logarithm, near bright; black where there is none.

    Returns:
        uint8 [H, W, 3].
    """
    import matplotlib as mpl

    nearest = max_depth / 40
    share = np.log(np.clip(depth, nearest, max_depth) / nearest) / np.log(max_depth / nearest)
    colors = mpl.colormaps["magma"](1 - share)[..., :3]
    return np.where((depth > 0)[..., None], np.round(colors * 255), 0).astype(np.uint8)
