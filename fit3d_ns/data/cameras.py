"""Lenses: what a camera file says of them, and photos undistorted by it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from fit3d_ns.compat import nerfstudio_needed

_PERSPECTIVE = 1
"""nerfstudio's ``CameraType.PERSPECTIVE``."""


@dataclass(frozen=True)
class Lens:
    """The distorting lens of a photo, as nerfstudio describes it; undistorting gives what the bundle's camera sees."""

    camera_type: int
    """nerfstudio's ``CameraType``."""
    fx: float
    """Focal length of the distorted photo, pixels."""
    fy: float
    """Likewise, vertical."""
    cx: float
    """Principal point of the distorted photo, pixels, pixel centres at +0.5."""
    cy: float
    """Likewise, vertical."""
    width: int
    """Width of the distorted photo, pixels."""
    height: int
    """Height of the distorted photo, pixels."""
    distortion: tuple[float, ...]
    """nerfstudio's distortion parameters."""
    fisheye_crop_radius: float | None = None
    """Only of nerfstudio's FISHEYE624 cameras, pixels."""


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
    """Undistorts a photo by nerfstudio's own function, so that its pixels are those that a scene was trained on.

    Args:
        image: [H, W, c] 8-bit or float32, of the lens's size.
        lens: Of the photo.
        mask: What of the photo counts; None for all.
    """
    with nerfstudio_needed("Photos of a distorting lens"):
        from nerfstudio.cameras.cameras import Cameras
        from nerfstudio.data.datamanagers.full_images_datamanager import _undistort_image

    distortion = torch.tensor(lens.distortion, dtype=torch.float32)
    metadata = None if lens.fisheye_crop_radius is None else {"fisheye_crop_radius": lens.fisheye_crop_radius}
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
        metadata=metadata,
    )[0]
    intrinsics = camera.get_intrinsics_matrices().numpy()
    data = {} if mask is None else {"mask": torch.from_numpy(mask)}
    K, undistorted, valid = _undistort_image(camera, distortion.numpy(), data, image, intrinsics)
    return Undistorted(undistorted, None if valid is None else valid.numpy(), K)
