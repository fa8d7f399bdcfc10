"""The truth of a photo, read for each patch as a whole: no pixel stands for its neighbours."""

from __future__ import annotations

import numpy as np


def majority_labels(labels: np.ndarray, grid: tuple[int, int], num_classes: int, ignore: int = 255) -> np.ndarray:
    """Returns the class that most of a patch's labelled pixels have.

    Args:
        labels: Class ids [H, W]; whatever is not below ``num_classes`` counts as not labelled.
        grid: Patches (h, w) that cover the photo evenly; a pixel belongs to the patch that holds its centre.
        num_classes: Classes K.
        ignore: What is returned for a patch without a labelled pixel.

    Returns:
        int64 [h, w]; of two classes as frequent as each other, the lower.
    """
    cells = patch_numbers(labels.shape, grid)
    known = (labels >= 0) & (labels < num_classes)
    votes = np.bincount(
        cells[known] * num_classes + labels[known].astype(np.int64), minlength=grid[0] * grid[1] * num_classes
    ).reshape(*grid, num_classes)
    return np.where(votes.any(-1), votes.argmax(-1), ignore)


def patch_means(values: np.ndarray, valid: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean of a patch's valid pixels.

    Args:
        values: Numbers [H, W] or [H, W, T], such as log depth or normals; not read where they are not valid.
        valid: Bool [H, W].
        grid: As for `majority_labels`.

    Returns:
        Means float64 [h, w] or [h, w, T], 0 where no pixel is valid; and the shares of valid pixels [h, w].
    """
    cells = patch_numbers(valid.shape, grid)
    count = grid[0] * grid[1]
    counts = np.bincount(cells[valid], minlength=count)
    columns = values.reshape(*valid.shape, int(np.prod(values.shape[2:])))[valid].astype(np.float64)  # [M, T]
    sums = np.stack([np.bincount(cells[valid], column, count) for column in columns.T], -1)
    means = (sums / np.maximum(counts, 1)[:, None]).reshape(*grid, *values.shape[2:])
    return means, (counts / np.maximum(np.bincount(cells.ravel(), minlength=count), 1)).reshape(grid)


def patch_numbers(size: tuple[int, ...], grid: tuple[int, int]) -> np.ndarray:
    """Returns the number of the patch that each pixel's centre lies in, int64 [H, W], row by row.

    Args:
        size: Height and width of the truth, pixels.
        grid: Height and width of the grid, patches.
    """
    rows, columns = (((2 * np.arange(pixels) + 1) * cells) // (2 * pixels) for pixels, cells in zip(size, grid))
    return rows[:, None] * grid[1] + columns
