"""nerfstudio's ``transforms.json``: read once, so that nothing which it says of a camera is left out.

Each key that describes a camera may stand at the top or in a frame, and the frame's own wins. nerfstudio's readers
know some keys in one place only (https://github.com/nerfstudio-project/nerfstudio/issues/2061), and take the top's
where both are given. Imports neither nerfstudio nor torch, so that every command can ask.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fit3d_ns.support.errors import DamagedFile, UserError, first_line
from fit3d_ns.support.json_files import read_json

COEFFICIENTS: tuple[str, ...] = ("k1", "k2", "k3", "k4", "p1", "p2")
"""nerfstudio's order of distortion coefficients."""
LENS_KEYS = (
    *("fl_x", "fl_y", "x_fov", "y_fov", "camera_angle_x", "camera_angle_y", "cx", "cy", "w", "h"),
    *("camera_model", "is_fisheye", "fisheye_crop_radius", "distortion_params", *COEFFICIENTS, "k5", "k6"),
)
"""What describes a camera, at the top or in a frame."""
SCENE_KEYS = (
    *("applied_transform", "applied_scale", "orientation_override", "ply_file_path", "aabb_scale"),
    *("train_filenames", "val_filenames", "test_filenames", "depth_unit_scale_factor"),
)
"""What holds for a whole scene, and has no meaning in a frame."""
FISHEYE624 = "FISHEYE624"
_FISHEYE = "OPENCV_FISHEYE"
_PERSPECTIVE = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV")
CAMERA_MODELS = (*_PERSPECTIVE, _FISHEYE, FISHEYE624)
"""Camera models whose photos can be undistorted, by nerfstudio's and COLMAP's names."""
_WIDEST = 7.5
"""Width of a photo over its focal length, of which a perspective camera has an angle of view of 150 degrees."""
_STRONGEST = 5.0
"""By how much a lens may move the corners of a photo without a word."""


@dataclass(frozen=True)
class FrameLens:
    """The camera of one frame."""

    model: str
    """One of `CAMERA_MODELS`."""
    fx: float
    """Focal length, pixels, positive."""
    fy: float
    """Vertical focal length, pixels."""
    cx: float
    """Principal point, pixels, pixel centres at +0.5."""
    cy: float
    """Principal point from the top, pixels, pixel centres at +0.5."""
    width: int
    """Width of the photo, pixels."""
    height: int
    """Height of the photo, pixels."""
    distortion: tuple[float, ...] = (0.0,) * len(COEFFICIENTS)
    """Coefficients in the order of `COEFFICIENTS`; 12 of nerfstudio's own for ``FISHEYE624``."""
    fisheye_crop_radius: float | None = None
    """Radius of the valid circle of a ``FISHEYE624`` photo, pixels."""

    @property
    def distorts(self) -> bool:
        """Whether a photo of this camera differs from a pinhole's: a fisheye's does, whatever its coefficients."""
        return self.model not in _PERSPECTIVE or any(self.distortion)

    def oddity(self) -> str | None:
        """Returns a clause on what is possible, but rarely meant; None if nothing is odd."""
        across, down = max(self.cx, self.width - self.cx) / self.fx, max(self.cy, self.height - self.cy) / self.fy
        corner = math.hypot(across, down)
        if not (0 <= self.cx <= self.width and 0 <= self.cy <= self.height):
            size = f"{self.width}x{self.height}"
            return f"the principal point ({self.cx:g}, {self.cy:g}) lies outside the photo of {size} pixels"
        if self.model in _PERSPECTIVE and self.width / self.fx > _WIDEST:
            angle = math.degrees(2 * math.atan(0.5 * self.width / self.fx))
            return f"a focal length of {self.fx:g} pixels makes an angle of view of {angle:.0f} degrees"
        if self.model != FISHEYE624:
            k1, k2, k3, k4 = self.distortion[:4]
            r = min(corner, math.pi / 2) if self.model == _FISHEYE else corner
            factor = 1 + k1 * r**2 + k2 * r**4 + k3 * r**6 + k4 * r**8
            if not 0.1 <= factor <= _STRONGEST:
                return f"the distortion moves corners of the photo to {factor:.3g} times their distance from the middle"
        return None


def read_scene_file(path: Path) -> dict[str, Any]:
    """Reads a ``transforms.json`` (also ``transforms_train.json`` and its like) and checks its structure.

    Args:
        path: The file.

    Returns:
        Its content: an object with a list ``frames`` of objects that name a file and hold a pose. Names written with
        backslashes are given with slashes.

    Raises:
        UserError: If it is missing, no such file, or a frame lacks something or holds what is of the whole scene.
    """
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} cannot be read (there is no such file): restore it, or check --data.") from error
    except DamagedFile as error:
        raise UserError(
            f"{path} is not valid JSON ({first_line(error)}): mend it, or run ns-process-data again."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object with `frames`: mend it, or run ns-process-data again.")
    frames = content.get("frames")
    if not isinstance(frames, list) or not frames:
        fact = "no list" if frames and not isinstance(frames, list) else "empty"
        raise UserError(f"{path} holds no poses (`frames` is {fact}): run ns-process-data on the photos.")
    for key in ("frames", "test_frames"):
        for number, frame in enumerate(content.get(key) or []):
            _check_frame(content, frame, f"Frame {number} of {path}", path)
    if content.get("ply_file_path") is None:
        content.pop("ply_file_path", None)
    elif isinstance(content["ply_file_path"], str):
        content["ply_file_path"] = _slashes(content["ply_file_path"])
    else:
        raise UserError(f"ply_file_path of {path} is {_short(content['ply_file_path'])}, not a file's name: mend it.")
    for key in ("train_filenames", "val_filenames", "test_filenames"):
        if isinstance(content.get(key), list):
            content[key] = [_slashes(name) if isinstance(name, str) else name for name in content[key]]
    return content


def frame_lens(
    content: dict[str, Any], frame: dict[str, Any], path: Path, size: Callable[[], tuple[int, int]] | None = None
) -> FrameLens:
    """Returns the camera of a frame: what it says itself, and the top of the file for the rest.

    Args:
        content: The file's content.
        frame: One of its frames.
        path: The file, for sentences.
        size: Opens the photo and returns its width and height in pixels, where the file does not say. None: the
            file has to say it.

    Raises:
        UserError: Naming frame and key, if a value is missing, out of range or cannot be heeded.
    """
    read = _Reader(content, frame, f"{frame['file_path']} in {path}")
    model = read.model()
    distortion = read.distortion(model)
    shown = size() if size is not None and (read.number("w") is None or read.number("h") is None) else (None, None)
    width, height = read.pixels("w", shown[0]), read.pixels("h", shown[1])
    fx = read.focal_length("fl_x", "x_fov", "camera_angle_x", width)
    fy = read.focal_length("fl_y", "y_fov", "camera_angle_y", height)
    cx, cy = read.number("cx"), read.number("cy")
    return FrameLens(
        model=model,
        fx=read.required(fx, "fl_x"),
        fy=read.required(fx if fy is None else fy, "fl_y"),
        cx=width / 2 if cx is None else cx,
        cy=height / 2 if cy is None else cy,
        width=width,
        height=height,
        distortion=distortion,
        fisheye_crop_radius=read.crop_radius(model),
    )


def odd_lenses(lenses: Sequence[FrameLens], names: Sequence[str], source: str) -> list[str]:
    """Returns a sentence about the first view whose camera is probably not what was meant; none if all are ordinary.

    Args:
        lenses: Of all views of a scene.
        names: Of the views.
        source: File that describes them.
    """
    odd = [(name, what) for name, lens in zip(names, lenses) if (what := lens.oddity()) is not None]
    if not odd:
        return []
    others = f" ({len(odd)} of {len(lenses)} views have an odd camera)" if len(odd) > 1 else ""
    return [
        f"Of {odd[0][0]} in {source}, {odd[0][1]}{others}: check that focal length, principal point and photo are in "
        "the same pixels."
    ]


class _Reader:
    """Values of one frame, with sentences that name it."""

    def __init__(self, content: dict[str, Any], frame: dict[str, Any], name: str) -> None:
        self._levels = (content, frame)
        self._values = {**content, **frame}
        self._name = name

    def refuse(self, key: str, fact: str, remedy: str) -> UserError:
        return UserError(f"{key} of {self._name} {fact}: {remedy}")

    def number(self, key: str, values: dict[str, Any] | None = None) -> float | None:
        value = (self._values if values is None else values).get(key)
        if value is None:
            return None
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.refuse(key, f"is {_short(value)}, not a finite number", "mend it.")
        return number

    def required(self, value: float | None, key: str) -> float:
        if value is None:
            raise self.refuse(key, "is missing, in the frame and at the top of the file", "add it.")
        return value

    def pixels(self, key: str, shown: int | None) -> int:
        """Width or height; that of the photo where the file does not say."""
        value = self.number(key)
        value = self.required(shown if value is None else value, key)
        if value < 1 or value != int(value):
            raise self.refuse(key, f"is {value:g}, not a number of pixels", "mend it.")
        return int(value)

    def focal_length(self, key: str, degrees: str, radians: str, pixels: int) -> float | None:
        """In pixels, or from the angle of view; the frame's own kind wins over another kind at the top."""
        for values in (self._levels[1], self._levels[0]):
            value, field = self.number(key, values), self.number(degrees, values)
            if value is None and field is None:
                angle = self.number(radians, values)
            elif value is None and field is not None:
                angle, radians = math.radians(field), degrees
            else:
                angle = None
            if value is None and angle is not None:
                if not 0 < angle < math.pi:
                    raise self.refuse(radians, f"is {self._values[radians]}, no angle of view", "mend it.")
                value = 0.5 * pixels / math.tan(0.5 * angle)
            if value is not None:
                if value <= 0:
                    raise self.refuse(key, f"is {value:g}", "a focal length is positive; mend it.")
                return value
        return None

    def model(self) -> str:
        fisheye = self._values.get("is_fisheye")
        model = self._values.get("camera_model")
        if fisheye not in (None, True, False):
            raise self.refuse("is_fisheye", f"is {_short(fisheye)}", "write true or false.")
        if model is None:
            return _FISHEYE if fisheye else "OPENCV"
        if model not in CAMERA_MODELS:
            raise self.refuse(
                "camera_model",
                f"is {_short(model)}, whose photos cannot be undistorted here",
                f"undistort the photos first (for example with COLMAP's image_undistorter), or choose from "
                f"{', '.join(CAMERA_MODELS)}.",
            )
        if fisheye and model in _PERSPECTIVE:
            raise self.refuse("camera_model", f"is {model}, but is_fisheye is true", "correct one of them.")
        return model

    def distortion(self, model: str) -> tuple[float, ...]:
        count = 12 if model == FISHEYE624 else len(COEFFICIENTS)
        values = [0.0] * count
        for level in self._levels:
            listed = level.get("distortion_params")
            if listed is not None:
                if not isinstance(listed, list) or len(listed) != count:
                    raise self.refuse(
                        "distortion_params", f"is no list of {count} numbers", f"{model} cameras have that many."
                    )
                values = [self.number("distortion_params", {"distortion_params": v}) or 0.0 for v in listed]
            for index, key in enumerate(COEFFICIENTS):
                value = self.number(key, level)
                if value is None:
                    continue
                if count == len(COEFFICIENTS) and (listed is None or value == values[index]):
                    values[index] = value
                elif value != 0:
                    raise self.refuse(key, f"is {value:g} beside distortion_params", "leave one of them out.")
        self._check_used(model, values)
        return tuple(values)

    def _check_used(self, model: str, values: list[float]) -> None:
        """Refuses coefficients that the model has no use for."""
        unused = {_FISHEYE: ("p1", "p2"), FISHEYE624: ()}.get(model, ("k4",))
        named: dict[str, float] = dict(zip(COEFFICIENTS, values)) if model != FISHEYE624 else {}
        named.update({key: self.number(key) or 0.0 for key in ("k5", "k6")})
        for key in (*unused, "k5", "k6"):
            if named.get(key, 0.0) != 0.0:
                raise self.refuse(
                    key,
                    f"is {named[key]:g}, which a camera_model {model} does not have here",
                    "undistort the photos first (for example with COLMAP's image_undistorter).",
                )

    def crop_radius(self, model: str) -> float | None:
        radius = self.number("fisheye_crop_radius")
        if model in _PERSPECTIVE:
            return None  # nerfstudio's own rule: one file may describe fisheyes and other cameras
        if radius is None and model != FISHEYE624:
            return None
        if radius is None or radius <= 0:
            raise self.refuse("fisheye_crop_radius", f"is {radius}", f"{model} needs the radius of the valid circle.")
        if model != FISHEYE624:
            raise self.refuse(
                "fisheye_crop_radius", f"cannot be heeded for {model}", "leave it out, and mask the photos (mask_path)."
            )
        return radius


def _check_frame(content: dict[str, Any], frame: Any, name: str, path: Path) -> None:
    """Checks a frame's structure, and brings the names in it to slashes."""
    if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str) or not frame["file_path"]:
        raise UserError(f"{name} has no file_path: mend the file.")
    photo = frame["file_path"]
    if frame.get("transform_matrix") is None:
        raise UserError(f"The photo {photo} in {path} has no pose (transform_matrix): mend or remove it.")
    for key in SCENE_KEYS:
        if key in frame and frame[key] != content.get(key):
            raise UserError(
                f"{key} stands in the frame {photo} of {path}, but holds for a whole scene: move it to the top of the "
                "file."
            )
    for key, value in frame.items():
        if key.endswith("_path"):
            if not isinstance(value, str) or not value:
                raise UserError(f"{key} of {photo} in {path} is {_short(value)}, not a file's name: mend it.")
            frame[key] = _slashes(value)


def _slashes(name: str) -> str:
    return name.replace("\\", "/")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
