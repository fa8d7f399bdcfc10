"""COLMAP's camera models (https://colmap.github.io/cameras.html) as lenses, or refused by name."""

import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from fit3d_ns.data.scene_file import FrameLens
from fit3d_ns.support.errors import UserError, first_line

_MODELS: dict[str, tuple[str, str]] = {
    "SIMPLE_PINHOLE": ("OPENCV", "f cx cy"),
    "PINHOLE": ("OPENCV", "fx fy cx cy"),
    "SIMPLE_RADIAL": ("OPENCV", "f cx cy k1"),
    "RADIAL": ("OPENCV", "f cx cy k1 k2"),
    "OPENCV": ("OPENCV", "fx fy cx cy k1 k2 p1 p2"),
    "SIMPLE_RADIAL_FISHEYE": ("OPENCV_FISHEYE", "f cx cy k1"),
    "RADIAL_FISHEYE": ("OPENCV_FISHEYE", "f cx cy k1 k2"),
    "OPENCV_FISHEYE": ("OPENCV_FISHEYE", "fx fy cx cy k1 k2 k3 k4"),
}
"""Models that can be undistorted: nerfstudio's name of the formula, and COLMAP's order of parameters."""


@contextmanager
def named_tables(folder: Path) -> Iterator[None]:
    """Makes nerfstudio's readers of cameras and images name the table that they cannot read.

    Args:
        folder: The model.

    Raises:
        UserError: If there are no cameras; in the block, in place of whatever those readers raise.
    """
    if not any((folder / name).exists() for name in ("cameras.txt", "cameras.bin")):
        raise UserError(
            f"{folder} holds neither cameras.bin nor cameras.txt: restore them, or compute the poses again."
        )
    from nerfstudio.data.utils import colmap_parsing_utils as colmap

    cameras: set[int] = set()

    def reading(read: Callable[[Any], dict], check: Callable[[Path, dict], None]) -> Callable[[Any], dict]:
        def named(path: Any) -> dict:
            try:
                found = read(path)
                if Path(path).name == "images.txt":
                    found = {key: found[key]._replace(name=name) for key, name in _whole_names(path).items()}
                if not found:
                    raise ValueError("it is empty")
            except Exception as error:  # struct.error, IndexError, ValueError, MemoryError ... of nerfstudio's readers
                raise UserError(
                    f"{path} cannot be read ({first_line(error)}): restore it, or compute the poses again."
                ) from error
            check(Path(path), found)
            return found

        return named

    def check_images(path: Path, found: dict) -> None:
        for image in found.values():
            if image.camera_id not in cameras:
                raise UserError(
                    f"{image.name} in {path} has the camera {image.camera_id}, which {path.with_stem('cameras').name} "
                    "beside it does not hold: restore both, or compute the poses again."
                )
            numbers = [*image.qvec, *image.tvec]
            if not np.isfinite(numbers).all() or not np.any(image.qvec):
                raise UserError(
                    f"The pose of {image.name} in {path} is not finite: remove that image, or pose it anew."
                )

    with ExitStack() as stack:
        for kind, check in (("cameras", lambda _, found: cameras.update(found)), ("images", check_images)):
            for form in ("text", "binary"):
                name = f"read_{kind}_{form}"
                stack.enter_context(patch.object(colmap, name, reading(getattr(colmap, name), check)))
        yield


def _whole_names(path: Any) -> dict[int, str]:
    """Names of a text model's images, which end with the line; nerfstudio's reader ends them at the first blank."""
    names = {}
    with open(path) as file:
        for line in map(str.strip, file):
            if line and not line.startswith("#"):
                words = line.split(maxsplit=9)
                names[int(words[0])] = words[9]
                next(file, None)  # its points
    return names


def check_camera_models(folder: Path) -> None:
    """Checks that a binary model holds no camera of a kind that nerfstudio's reader cannot step over.

    Args:
        folder: The model. Models as text are read with their models' names, see `colmap_lens`.

    Raises:
        UserError: Naming the camera.
    """
    path = folder / "cameras.bin"
    if (folder / "cameras.txt").exists() or not path.is_file():
        return
    from nerfstudio.data.utils.colmap_parsing_utils import read_cameras_binary

    try:
        read_cameras_binary(path)
    except KeyError as error:
        raise _refusal(f"A camera of {path}", f"the model number {error.args[0]}") from error
    except (AssertionError, OSError, struct.error, MemoryError, OverflowError):
        return  # said when the model is read


def colmap_lens(camera: Any, folder: Path) -> FrameLens:
    """Returns the lens of one of COLMAP's cameras.

    Args:
        camera: nerfstudio's ``colmap_parsing_utils.Camera``.
        folder: The model, for sentences.

    Raises:
        UserError: Naming the camera, if its photos cannot be undistorted or a parameter is out of range.
    """
    name = f"Camera {camera.id} of {folder}"
    if camera.model not in _MODELS:
        raise _refusal(name, f"the model {camera.model}")
    model, order = _MODELS[camera.model]
    keys, params = order.split(), np.asarray(camera.params, dtype=np.float64)
    if len(params) != len(keys):
        raise UserError(f"{name} has {len(params)} parameters, and {camera.model} has {len(keys)} ({order}): mend it.")
    values = dict(zip(keys, params.tolist()))
    for key, value in values.items():
        if not np.isfinite(value) or (key.startswith("f") and value <= 0):
            raise UserError(f"{key} of {name} is {value:g}: mend it, or compute the poses again.")
    if not (1 <= camera.width < 2**31 and 1 <= camera.height < 2**31):
        raise UserError(f"{name} says that its photos are {camera.width}x{camera.height} pixels: mend it.")
    coefficients = [values.get(key, 0.0) for key in ("k1", "k2", "k3", "k4", "p1", "p2")]
    return FrameLens(
        model=model,
        fx=values.get("f", values.get("fx", 0.0)),
        fy=values.get("f", values.get("fy", 0.0)),
        cx=values["cx"],
        cy=values["cy"],
        width=int(camera.width),
        height=int(camera.height),
        distortion=tuple(coefficients),
    )


def _refusal(name: str, model: str) -> UserError:
    return UserError(
        f"{name} has {model}, whose photos cannot be undistorted here: undistort them first with `colmap "
        "image_undistorter`, and train on what it writes."
    )
