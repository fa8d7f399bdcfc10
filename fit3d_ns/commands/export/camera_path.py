"""The views that maps and videos are rendered from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.camera_paths import get_path_from_json
from nerfstudio.cameras.camera_utils import focus_of_attention
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor

from fit3d_ns.data.poses import check_poses
from fit3d_ns.runs.bundle import BundleCameras, BundleView
from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.json_files import read_json

_INNER_SHARE = 0.7
"""Share of the photos that the orbit keeps within, along each of its axes."""
_ALL_AROUND = 0.5
"""Photos stand all around what they look at if the mean of the unit vectors to them is shorter than this: 0 for a full
circle, 0.64 for half of one, 1 for a single direction."""
_PARALLEL = 1e-4
"""Mean squared sine of the angle to a common direction below which photos look at no point in particular."""


@dataclass(frozen=True)
class CameraPath:
    """Pinhole cameras at full size, one for each frame."""

    cameras: Cameras
    """In nerfstudio's convention (camera to world, OpenGL axes)."""
    names: Sequence[str]
    """For humans, one for each."""
    seconds: float | None = None
    """Length of a video, where the path says so."""

    def __len__(self) -> int:
        return len(self.names)

    def camera(self, index: int, device: torch.device | str) -> Cameras:
        """Returns one camera on a device, of shape [1] as models take it.

        Args:
            index: From 0, along the path.
            device: Of the model.
        """
        return self.cameras[index : index + 1].to(device)


def path_along_views(views: Sequence[BundleView], cameras: BundleCameras, split: str) -> CameraPath:
    """Takes the cameras of photos.

    Args:
        views: All views of a scene.
        cameras: Theirs, in the same order.
        split: ``train`` or ``eval``.

    Returns:
        Their cameras, in their order.

    Raises:
        UserError: If the split has no view.
    """
    rows = [index for index, view in enumerate(views) if view.split == split]
    if not rows:
        raise UserError(f"The scene has no {split} views: choose another --camera-path.")
    sizes = [(views[row].photo.height, views[row].photo.width) for row in rows]
    poses = _camera_to_worlds(cameras.viewmats[rows])
    return CameraPath(_cameras(poses, cameras.Ks[rows], sizes), [views[row].name for row in rows])


def orbit(views: Sequence[BundleView], cameras: BundleCameras, frames: int) -> CameraPath:
    """Returns a closed ellipse through the space that the photos were taken from, seen from which the scene turns.

    The ellipse is level and lies within where most of the photos stand: around an object it is the photographer's
    round, in a room it stays clear of the walls, and where all photos face one way it is a sway before the scene. All
    cameras look at the point that the photos look at.

    Args:
        views: All views of a scene.
        cameras: Theirs, in the same order; the first training view's intrinsics are those of the path.
        frames: Number of cameras.
    """
    rows = [index for index, view in enumerate(views) if view.split == "train"]
    poses = _camera_to_worlds(cameras.viewmats[rows])
    positions = poses[:, :3, 3]
    up = torch.nn.functional.normalize(poses[:, :3, 1].mean(0), dim=0)
    focus = _focus(poses)
    offsets = positions - focus
    heights = offsets @ up
    level = offsets - heights[:, None] * up
    middle = level.mean(0)
    if torch.nn.functional.normalize(level, dim=1).mean(0).norm() < _ALL_AROUND:
        middle = torch.zeros(3)  # photos from all sides: right around the focus
    first, second = _level_axes(level - middle, middle, up)
    # Never quite zero, so that photos taken on one spot become a pan.
    lengths = [torch.quantile(((level - middle) @ axis).abs(), _INNER_SHARE) for axis in (first, second)]
    lengths = [length.clamp_min(1e-3) for length in lengths]
    if middle.any():  # photos from one side: not closer to what they look at than half way
        lengths[0] = torch.minimum(lengths[0], middle.norm() / 2)
    angles = torch.arange(frames) / frames * 2 * torch.pi
    ring = angles.cos()[:, None] * lengths[0] * first + angles.sin()[:, None] * lengths[1] * second
    eyes = focus + middle + heights.median() * up + ring
    turned = _looking_at(focus, eyes, up)
    photo = views[rows[0]].photo
    intrinsics = cameras.Ks[rows[:1]].expand(frames, 3, 3)
    names = [f"orbit {angle:.1f} degrees" for angle in torch.rad2deg(angles).tolist()]
    return CameraPath(_cameras(turned, intrinsics, [(photo.height, photo.width)] * frames), names)


def path_from_file(path: Path) -> CameraPath:
    """Reads a ``camera_path.json`` as nerfstudio's viewer writes it and ``ns-render camera-path`` reads it.

    Args:
        path: The file.

    Returns:
        Its cameras.

    Raises:
        UserError: If it cannot be read, holds no camera, or cameras that are not perspective.
    """
    try:
        stored = read_json(path.expanduser())
    except FileNotFoundError as error:
        raise UserError(
            f"The camera path {path} cannot be read (there is none): --camera-path takes orbit, train, "
            "eval or a camera_path.json of nerfstudio's viewer."
        ) from error
    except DamagedFile as error:
        raise UserError(f"The camera path {path} is damaged ({error}): save it again in the viewer.") from error
    try:
        if stored.get("camera_type", "perspective") != "perspective":
            raise UserError(
                f"The cameras of {path} are {stored['camera_type']}, and Gaussians are rendered in perspective: save "
                "the path again with perspective cameras."
            )
        frames = stored["camera_path"]
        names = [f"frame {number}" for number in range(len(frames))]
        matrices = [np.reshape(frame["camera_to_world"], (4, 4)) for frame in frames]
        for frame, pose in zip(frames, check_poses(matrices, names, str(path), distinct=False).matrices):
            frame["camera_to_world"] = pose.ravel().tolist()
        cameras = get_path_from_json(stored)
        seconds = None if stored.get("seconds") is None else float(stored["seconds"])
        whole = bool(torch.isfinite(cameras.camera_to_worlds).all()) and bool(torch.isfinite(cameras.fx).all())
        usable = whole and (seconds is None or seconds > 0)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is no camera path of nerfstudio, or holds no camera ({error}): save one in the viewer."
        ) from error
    if not usable:
        raise UserError(f"The camera path {path} holds a number that is not finite, or lasts no time: save it again.")
    return CameraPath(cameras, names, seconds)


def _focus(poses: Float[Tensor, "V 4 4"]) -> Float[Tensor, "3"]:
    """The point that the cameras look at; before their middle where they look nowhere in particular."""
    middle = poses[:, :3, 3].mean(0)
    spread = (poses[:, :3, 3] - middle).norm(dim=1).max()
    directions = poses[:, :3, 2]
    across = torch.eye(3) - (directions[:, :, None] * directions[:, None, :]).mean(0)
    if bool(torch.linalg.eigvalsh(across)[0] > _PARALLEL):
        focus = focus_of_attention(poses, middle)
        if bool((focus - middle).norm() < 5 * spread + 1e-3):
            return focus
    return middle - directions.mean(0) * spread.clamp_min(1.0)


def _looking_at(
    focus: Float[Tensor, "3"], eyes: Float[Tensor, "V 3"], up: Float[Tensor, "3"]
) -> Float[Tensor, "V 3 4"]:
    """Camera-to-world, nerfstudio's axes, of level cameras that look at one point."""
    backward = torch.nn.functional.normalize(eyes - focus, dim=1)
    right = torch.nn.functional.normalize(torch.linalg.cross(up.expand_as(backward), backward), dim=1)
    return torch.stack([right, torch.linalg.cross(backward, right), backward, eyes], dim=2)


def _level_axes(
    offsets: Float[Tensor, "V 3"], middle: Float[Tensor, "3"], up: Float[Tensor, "3"]
) -> tuple[Float[Tensor, "3"], Float[Tensor, "3"]]:
    """Two level unit vectors: towards ``middle``, or along most of ``offsets`` where that is zero, and across."""
    longest = torch.linalg.svd(torch.cat([offsets, torch.zeros(3, 3)]), full_matrices=False)[2][0]
    for direction in (middle, longest, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])):
        first = direction - (direction @ up) * up
        if first.norm() > 1e-3 * direction.norm():
            break
    first = first / first.norm()
    return first, torch.linalg.cross(up, first)


def _camera_to_worlds(viewmats: Float[Tensor, "V 4 4"]) -> Float[Tensor, "V 4 4"]:
    """From OpenCV's world-to-camera to nerfstudio's camera-to-world, whose cameras look along -z with y up."""
    return torch.linalg.inv(viewmats.double()).float() * torch.tensor([1.0, -1.0, -1.0, 1.0])


def _cameras(poses: Float[Tensor, "V 4 4"], intrinsics: Float[Tensor, "V 3 3"], sizes: Sequence[Any]) -> Cameras:
    heights, widths = torch.tensor(sizes).T
    return Cameras(
        camera_to_worlds=poses[:, :3],
        fx=intrinsics[:, 0, 0, None],
        fy=intrinsics[:, 1, 1, None],
        cx=intrinsics[:, 0, 2, None],
        cy=intrinsics[:, 1, 2, None],
        width=widths[:, None],
        height=heights[:, None],
        camera_type=CameraType.PERSPECTIVE,
    )
