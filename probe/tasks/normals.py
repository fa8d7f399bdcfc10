"""Surface normals from depth."""

import numpy as np

_MAX_RELATIVE_STEP = 0.05
"""Largest change of depth between neighbours, as a share of the depth, that is taken for a surface and not an edge."""


def normals_from_depth(depth: np.ndarray, intrinsics: tuple[float, float, float, float]) -> np.ndarray:
    """Computes normals as cross products of central differences of the points that a depth map shows.

    Args:
        depth: [H, W], z-depth in metres, 0 where there is none.
        intrinsics: fx, fy, cx, cy in pixels of the map, pixel centres at +0.5.

    Returns:
        float32 [H, W, 3], unit vectors towards the camera in OpenCV axes (x right, y down, z forward); zero at the
        border, beside missing depth and across edges.
    """
    fx, fy, cx, cy = intrinsics
    rows, columns = np.mgrid[: depth.shape[0], : depth.shape[1]]
    points = np.stack([(columns + 0.5 - cx) / fx * depth, (rows + 0.5 - cy) / fy * depth, depth], -1).astype(np.float64)
    normals = np.zeros((*depth.shape, 3), np.float32)
    if min(depth.shape) < 3:
        return normals
    across = points[1:-1, 2:] - points[1:-1, :-2]
    down = points[2:, 1:-1] - points[:-2, 1:-1]
    normal = np.cross(down, across)
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    around = np.stack([depth[1:-1, 2:], depth[1:-1, :-2], depth[2:, 1:-1], depth[:-2, 1:-1], depth[1:-1, 1:-1]])
    smooth = (around.min(0) > 0) & (np.ptp(around, axis=0) <= _MAX_RELATIVE_STEP * around[-1])
    unit = normal / np.maximum(length, 1e-12)
    normals[1:-1, 1:-1] = np.where(smooth[..., None] & (length > 1e-12), unit, 0.0)
    return normals
