"""Photos with poses and depth, in nerfstudio's format: transforms.json beside the files that it names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np

from fit3d_ns.errors import UserError

_DEPTH_UNIT = 0.001
"""nerfstudio's default for `depth_unit_scale_factor`: millimetres."""
_OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True)
class PosedFrame:
    """One photo of a scene."""

    image: Path
    depth: Optional[Path]
    semantics: Optional[Path]
    intrinsics: tuple[float, float, float, float]
    """fx, fy, cx, cy in pixels, pixel centres at +0.5."""
    size: tuple[int, int]
    """Height and width that the intrinsics refer to, pixels."""
    viewmat: np.ndarray
    """[4, 4] world to camera, OpenCV axes."""


@dataclass(frozen=True)
class PosedScene:
    """A scene: its frames in the order of the file, and the depths' unit."""

    name: str
    frames: tuple[PosedFrame, ...]
    depth_scale: float
    """PNG units in a metre."""


def read_posed_scene(folder: Path) -> PosedScene:
    """Reads transforms.json; opens no picture.

    Args:
        folder: The scene.

    Returns:
        Its frames.

    Raises:
        UserError: If the file is missing, malformed, or the lens is not a pinhole without distortion.
    """
    path = folder / "transforms.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        frames = tuple(_frame(content, entry, folder, path) for entry in content["frames"])
        scale = 1.0 / float(content.get("depth_unit_scale_factor", _DEPTH_UNIT))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}: give a scene in nerfstudio's format.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no scene in nerfstudio's format ({type(error).__name__}: {error}).") from None
    if not frames:
        raise UserError(f"{path} lists no frames.")
    return PosedScene(folder.name, frames, scale)


def _frame(content: dict[str, Any], entry: dict[str, Any], folder: Path, path: Path) -> PosedFrame:
    def value(name: str) -> float:
        return float(entry.get(name, content[name]) if name not in entry else entry[name])

    distortion = [float(entry.get(name, content.get(name, 0.0))) for name in ("k1", "k2", "k3", "k4", "p1", "p2")]
    if any(distortion) or "FISHEYE" in str(entry.get("camera_model", content.get("camera_model", ""))):
        raise UserError(
            f"{path} describes a lens with distortion: undistort the photos first (for example with COLMAP)."
        )
    pose = np.asarray(entry["transform_matrix"], dtype=np.float64)
    if pose.shape != (4, 4):
        raise ValueError(f"transform_matrix of shape {pose.shape}")
    depth, semantics = entry.get("depth_file_path"), entry.get("semantics_file_path")
    return PosedFrame(
        image=folder / entry["file_path"],
        depth=folder / depth if depth else None,
        semantics=folder / semantics if semantics else None,
        intrinsics=(value("fl_x"), value("fl_y"), value("cx"), value("cy")),
        size=(int(value("h")), int(value("w"))),
        viewmat=np.linalg.inv(pose @ _OPENGL_TO_OPENCV),
    )
