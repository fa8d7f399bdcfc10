"""Poses judged as a set, in double precision; imports neither nerfstudio nor torch, so that every command can ask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fit3d_ns.support.errors import UserError

_TOLERANCE = 1e-3
"""How far a rotation may be from orthonormal, and a common scale from 1 or from another frame's, without a word."""
_NO_SPREAD = 1e-9
"""Positions whose extent is below this share of their distance from the origin differ by rounding only."""
_ONE_VIEW = 100.0
"""How many times farther than all others a single view may be from the middle of a scene."""
_FAR = 4.0
"""Distance of the origin, in extents of the scene, from which float32 would lose more than two bits of a position."""
_VERY_FAR = 1e4
"""Distance of the origin, in extents of the scene, from which a scene cannot be trained in its file's coordinates."""


@dataclass(frozen=True)
class Poses:
    """Poses of a scene's views, all of them rigid."""

    matrices: np.ndarray
    """[V, 4, 4] camera to world, float64."""
    remarks: tuple[str, ...] = ()
    """What had to be mended, a sentence each."""

    def origin(self, centred_later: bool) -> np.ndarray:
        """Returns the point to be subtracted before positions are rounded to float32.

        Args:
            centred_later: Whether the reader puts the origin among the views anyway. If not, the coordinates of the
                file are kept as long as a scene can be trained in them.

        Returns:
            [3] float64: zeros where the origin is near enough, the middle of the positions otherwise.
        """
        positions = self.matrices[:, :3, 3]  # [V, 3]
        middle = np.median(positions, axis=0)  # [3]
        extent = float(np.linalg.norm(positions - middle, axis=1).max())
        far = _FAR if centred_later else _VERY_FAR
        return middle if float(np.linalg.norm(middle)) > far * extent else np.zeros(3)


def check_poses(matrices: Sequence[Any], names: Sequence[str], source: str, distinct: bool = True) -> Poses:
    """Reads poses and judges them together.

    Args:
        matrices: Camera to world of each view as a file gives it, [3, 4] or [4, 4], nested lists or arrays.
        names: What the views are called in sentences, as many.
        source: File or scene they come from, for sentences.
        distinct: Whether the positions have to differ, as those of photos; a camera path may turn on the spot.

    Returns:
        The poses as 4x4 matrices; a scale that all rotations have in common is divided out.

    Raises:
        UserError: Naming the first view whose pose is no finite rigid motion of a right-handed camera, or whose
            position makes all others one point; or if all views are at one place.
    """
    poses = np.stack([_matrix(values, name, source) for values, name in zip(matrices, names)])  # [V, 4, 4]
    remarks: list[str] = []
    scales = np.cbrt(np.linalg.det(poses[:, :3, :3]))  # [V]
    _check_rotations(poses, scales, names, source)
    common = float(np.median(scales))
    odd = int(np.abs(scales / common - 1.0).argmax())
    if abs(scales[odd] / common - 1.0) > _TOLERANCE:
        raise UserError(
            f"The rotation of {names[odd]} in {source} is scaled by {scales[odd]:.4g}, that of other views by "
            f"{common:.4g}: mend or remove that view."
        )
    if abs(common - 1.0) > _TOLERANCE:
        poses[:, :3, :3] /= scales[:, None, None]
        remarks.append(f"The rotations in {source} are scaled by {common:.4g}, which is divided out.")
    if distinct:
        _check_positions(poses[:, :3, 3], names, source)
    return Poses(poses, tuple(remarks))


def _matrix(values: Any, name: str, source: str) -> np.ndarray:
    try:
        matrix = np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        matrix = np.zeros(0)
    if matrix.shape == (3, 4):
        matrix = np.vstack([matrix, [0.0, 0.0, 0.0, 1.0]])
    if matrix.shape != (4, 4):
        raise UserError(
            f"The pose of {name} in {source} is not a matrix of 3x4 or 4x4 numbers: mend it, or remove that view."
        )
    if not np.isfinite(matrix).all():
        raise UserError(f"The pose of {name} in {source} is not finite (NaN or infinite): remove or mend that view.")
    if np.abs(matrix[3] - [0.0, 0.0, 0.0, 1.0]).max() > _TOLERANCE:
        last = ", ".join(f"{value:g}" for value in matrix[3])
        raise UserError(
            f"The pose of {name} in {source} ends with the row {last} instead of 0, 0, 0, 1: give camera-to-world "
            "matrices, row by row."
        )
    return matrix


def _check_rotations(poses: np.ndarray, scales: np.ndarray, names: Sequence[str], source: str) -> None:
    for pose, scale, name in zip(poses, scales, names):
        rotation = pose[:3, :3]
        error = np.abs(rotation.T @ rotation / scale**2 - np.eye(3)).max() if scale != 0 else np.inf
        if not error <= _TOLERANCE:
            raise UserError(
                f"The pose of {name} in {source} is no rotation (its axes are not orthonormal): mend or remove that "
                "view."
            )
        if scale < 0:
            raise UserError(
                f"The pose of {name} in {source} is mirrored (its rotation has the determinant -1): export the cameras "
                "in a right-handed system (x right, y up, looking along -z)."
            )


def _check_positions(positions: np.ndarray, names: Sequence[str], source: str) -> None:
    """Refuses positions [V, 3] without a spread, or whose spread is the work of one view."""
    num_views = len(positions)
    if num_views < 2:
        return
    distances = np.linalg.norm(positions - np.median(positions, axis=0), axis=1)  # [V]
    if distances.max() <= _NO_SPREAD * np.abs(positions).max():
        raise UserError(
            f"All {num_views} views of {source} were taken at one place, which gives no depth: take photos from "
            "different places, or check how the poses were exported."
        )
    if num_views < 4:
        return
    farthest = int(distances.argmax())
    others = np.delete(positions, farthest, axis=0)
    middle = np.median(others, axis=0)
    extent = float(np.linalg.norm(others - middle, axis=1).max())
    distance = float(np.linalg.norm(positions[farthest] - middle))
    if distance <= _ONE_VIEW * extent:
        return
    if extent <= _NO_SPREAD * np.abs(positions).max():
        raise UserError(
            f"All views of {source} but {names[farthest]} were taken at one place, which gives no depth: check how the "
            "poses were exported."
        )
    raise UserError(
        f"The view {names[farthest]} of {source} lies {distance / extent:,.0f} times as far from the others as these "
        "from each other: mend its pose or remove it."
    )
