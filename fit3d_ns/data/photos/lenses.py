"""Lenses: what a camera file says of them, and photos undistorted by it."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from fit3d_ns.compat import nerfstudio_needed

_PERSPECTIVE = 1
"""nerfstudio's ``CameraType.PERSPECTIVE``."""
_FISHEYE = 2
"""nerfstudio's ``CameraType.FISHEYE``."""
_FISHEYE624 = 9
"""nerfstudio's ``CameraType.FISHEYE624``."""
_UNDISTORTED = {_PERSPECTIVE: 6, _FISHEYE: 6, _FISHEYE624: 12}
"""The camera types that are undistorted, and their numbers of distortion parameters."""

_MOST_ZOOM = 20
"""By which undistorting may enlarge or shrink the middle of a photo: far more than any real lens needs."""


@dataclass(frozen=True)
class Lens:
    """The distorting lens of a photo, as nerfstudio describes it; undistorting gives what the bundle's camera sees."""

    camera_type: int
    """nerfstudio's ``CameraType``."""
    fx: float
    """Focal length of the distorted photo, pixels."""
    fy: float
    """Vertical focal length, pixels."""
    cx: float
    """Principal point of the distorted photo, pixels, pixel centres at +0.5."""
    cy: float
    """Principal point from the top, pixels, pixel centres at +0.5."""
    width: int
    """Width of the distorted photo, pixels."""
    height: int
    """Height of the distorted photo, pixels."""
    distortion: tuple[float, ...]
    """nerfstudio's distortion parameters."""
    fisheye_crop_radius: float | None = None
    """Only of nerfstudio's FISHEYE624 cameras, pixels."""

    def __post_init__(self) -> None:
        """Refuses what no lens can be."""
        if self.camera_type not in _UNDISTORTED:
            raise ValueError(f"camera_type is {self.camera_type}, none of {', '.join(map(str, _UNDISTORTED))}")
        for name in ("fx", "fy", "width", "height"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, not positive")
        count = _UNDISTORTED[self.camera_type]
        if len(self.distortion) != count:
            raise ValueError(f"distortion has {len(self.distortion)} numbers instead of {count}")
        radius = self.fisheye_crop_radius
        if self.camera_type == _FISHEYE624 and (radius is None or radius <= 0):
            raise ValueError(f"fisheye_crop_radius is {radius}, not positive")


def lenses_of(cameras: Any) -> list[Lens | None]:
    """Returns the lens of each of nerfstudio's cameras, None for pinholes.

    A fisheye is none, whatever its coefficients: those of an ideal one are zero.

    Args:
        cameras: nerfstudio's ``Cameras`` of V views, before nerfstudio undistorted anything (it overwrites them).
    """
    parameters = cameras.distortion_params
    if parameters is None:
        parameters = torch.zeros(len(cameras), 6)
    metadata = cameras.metadata or {}
    lenses: list[Lens | None] = []
    for index in range(len(cameras)):
        pinhole = int(cameras.camera_type[index]) == _PERSPECTIVE
        if pinhole and not bool(parameters[index].any()):
            lenses.append(None)
            continue
        values = {name: float(getattr(cameras, name)[index]) for name in ("fx", "fy", "cx", "cy")}
        lenses.append(
            Lens(
                camera_type=int(cameras.camera_type[index]),
                width=int(cameras.width[index]),
                height=int(cameras.height[index]),
                distortion=tuple(float(value) for value in parameters[index]),
                fisheye_crop_radius=metadata.get("fisheye_crop_radius"),
                **values,
            )
        )
    return lenses


def leaves_a_photo(lens: Lens) -> bool:
    """Returns whether anything to look at is left of a photo once it is undistorted.

    Args:
        lens: Of the photo. Coefficients that no lens has turn the picture into a point, or far beyond its frame.
    """
    import cv2

    K = np.array([[lens.fx, 0, lens.cx - 0.5], [0, lens.fy, lens.cy - 0.5], [0, 0, 1]])
    size, distortion = (lens.width, lens.height), np.array(lens.distortion, dtype=np.float64)
    if lens.camera_type == _PERSPECTIVE:
        k1, k2, k3, _, p1, p2 = distortion
        made, (_, _, width, height) = cv2.getOptimalNewCameraMatrix(K, np.array([k1, k2, p1, p2, k3]), size, 0)
    elif lens.camera_type == _FISHEYE:
        made = cv2.fisheye.estimateNewCameraMatrixForUndistortRectify(K, distortion[:4], size, np.eye(3), balance=0)
        width, height = size
    else:
        return True
    zoom = np.array([made[0, 0] / lens.fx, made[1, 1] / lens.fy])
    return bool(min(width, height) > 0 and (zoom > 1 / _MOST_ZOOM).all() and (zoom < _MOST_ZOOM).all())


@dataclass(frozen=True)
class Undistorted:
    """A photo as a pinhole camera sees it."""

    image: np.ndarray
    """[H, W, c], of the photo's own type."""
    mask: Bool[np.ndarray, "H W 1"] | None
    """What of it counts; None where all does."""
    K: Float[np.ndarray, "3 3"]
    """Intrinsics of the pinhole, pixels, pixel centres at +0.5."""


def undistort(image: np.ndarray, lens: Lens, mask: Bool[np.ndarray, "H W 1"] | None = None) -> Undistorted:
    """Undistorts a photo by nerfstudio's own function, so that its pixels are those of a splatfacto run.

    ``FISHEYE624`` photos are the exception, see `_undistort_fisheye624`.

    Args:
        image: [H, W, c] 8-bit or float32, of the lens's size.
        lens: Of the photo.
        mask: What of the photo counts; None for all.

    Returns:
        The picture of a pinhole camera, its intrinsics, and the mask turned likewise.
    """
    with nerfstudio_needed("Photos of a distorting lens"):
        from nerfstudio.cameras.cameras import Cameras
        from nerfstudio.data.datamanagers.full_images_datamanager import _undistort_image

    if lens.camera_type == _FISHEYE624:
        return _undistort_fisheye624(image, lens, mask)
    distortion = torch.tensor(lens.distortion, dtype=torch.float32)
    camera = Cameras(
        camera_to_worlds=torch.eye(4)[None, :3],
        fx=lens.fx,
        fy=lens.fy,
        cx=lens.cx,
        cy=lens.cy,
        width=lens.width,
        height=lens.height,
        distortion_params=distortion[None],
        camera_type=torch.tensor([[lens.camera_type]]),
    )[0]
    intrinsics = camera.get_intrinsics_matrices().numpy()

    def straightened(picture: np.ndarray) -> tuple[Any, np.ndarray, Any]:
        return _undistort_image(camera, distortion.numpy(), {}, picture, intrinsics.copy())  # it changes intrinsics

    K, undistorted, _ = straightened(image)
    if mask is None:
        return Undistorted(undistorted, None, K)
    # As a picture, since nerfstudio lets everything count into which a little of the mask is blended.
    _, shown, _ = straightened(mask.astype(np.uint8) * 255)
    return Undistorted(undistorted, shown.reshape(*undistorted.shape[:2], 1) >= 128, K)


def _undistort_fisheye624(image: np.ndarray, lens: Lens, mask: Bool[np.ndarray, "H W 1"] | None) -> Undistorted:
    """Undistorts the valid circle of a photo to a square of its diameter.

    The same picture as nerfstudio's `_undistort_image` wants to make, which takes rows for columns where the principal
    point is not on the diagonal, and its circle from the middle of the photo (version 1.1.5).
    """
    import cv2
    from nerfstudio.cameras.camera_utils import fisheye624_project, fisheye624_unproject_helper

    assert lens.fisheye_crop_radius is not None
    radius, center = lens.fisheye_crop_radius, np.array([lens.cx, lens.cy])
    params = torch.tensor([lens.fx, lens.fy, *center, *lens.distortion], dtype=torch.float32)[None]  # [1, 16]
    rim = center + radius * np.array([[0, -1], [0, 1], [-1, 0], [1, 0]])  # [4, 2]
    top, bottom, left, right = torch.nn.functional.normalize(
        fisheye624_unproject_helper(torch.tensor(rim, dtype=torch.float32)[None], params)[0], dim=-1
    )
    angle = float(torch.maximum(torch.acos(top @ bottom), torch.acos(left @ right)))
    size = int(2 * radius)
    focal = size / (2 * math.tan(angle / 2))
    K = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], dtype=np.float32)
    steps = (torch.arange(size) + 0.5 - size / 2) / focal
    y, x = torch.meshgrid(steps, steps, indexing="ij")  # [h, w]
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1)  # [h, w, 3]
    seen = fisheye624_project(rays.reshape(1, -1, 3), params).reshape(size, size, 2).numpy()
    columns, rows = seen[..., 0] - 0.5, seen[..., 1] - 0.5  # OpenCV counts from the middle of the first pixel
    valid = np.linalg.norm(seen - center, axis=-1) < radius
    valid &= (columns >= 0) & (rows >= 0) & (columns <= lens.width - 1) & (rows <= lens.height - 1)
    if mask is not None:
        shown = cv2.remap(mask.astype(np.uint8) * 255, columns, rows, interpolation=cv2.INTER_LINEAR)
        valid &= shown.reshape(size, size) >= 128
    return Undistorted(cv2.remap(image, columns, rows, interpolation=cv2.INTER_LINEAR), valid[..., None], K)
