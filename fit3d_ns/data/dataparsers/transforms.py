"""Formats that are a ``transforms.json`` or a variant of it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs
from nerfstudio.data.dataparsers.blender_dataparser import Blender
from nerfstudio.data.dataparsers.instant_ngp_dataparser import InstantNGP
from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio
from nerfstudio.data.dataparsers.scannetpp_dataparser import ScanNetpp
from torch import Tensor

from fit3d_ns.data.dataparsers.base import LENS, SceneReader, make_cameras
from fit3d_ns.data.layouts import layout_advice
from fit3d_ns.data.photos.picture_files import picture_size
from fit3d_ns.data.photos.view_files import SmallerCopies, whole_path_copies
from fit3d_ns.data.points.seed_points import read_colmap_points, read_point_cloud
from fit3d_ns.data.scene_file import LENS_KEYS, FrameLens, frame_lens, odd_lenses, read_scene_file
from fit3d_ns.data.splits import SPLITS, check_listed, complete_lists, list_remarks
from fit3d_ns.support.errors import UserError

_LISTS = {split: f"{split}_filenames" for split in SPLITS}
_OLD_TRANSFORM = [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0]]
"""nerfstudio's applied_transform of scenes that were processed before it was written down."""


class TransformsReader(SceneReader):
    """Reads formats that are a ``transforms.json`` or a variant of it."""

    _module = ""
    """The dataparser's module, which calls nerfstudio's ``load_from_json``."""
    _has_lists = False
    """Whether the dataparser reads ``train_filenames`` and its like."""

    def _read(self, split: str, **kwargs: Any) -> DataparserOutputs:
        self._content: dict[str, Any] = {}
        with patch.object(sys.modules[self._module], "load_from_json", self._load):
            outputs = self._generate(split, **kwargs)
        by_file = {self._file(frame): frame for frame in self._frames(self._content)}
        frames = [by_file[Path(name)] for name in outputs.image_filenames]
        lenses = [frame[LENS] for frame in frames]
        poses = self._poses(outputs, frames)
        outputs.cameras = make_cameras(poses, lenses, outputs.cameras, str(self._path), self._downscale())
        return outputs

    def _load(self, path: Path) -> dict[str, Any]:
        """Stands for nerfstudio's ``load_from_json``: gives what the dataparser understands."""
        self._path = path = self._path_of(Path(path))
        if not path.is_file() and (advice := layout_advice(self._data)) is not None:
            raise UserError(f"The scene {self._data} {advice}.")
        content = read_scene_file(path)
        self._check_lists(content, path)
        frames = self._frames(content)
        for key in ("mask_path", "depth_file_path"):
            _check_all_or_none(frames, key, path)
        self._prepare(content, frames)
        matrices = self._near(
            [frame["transform_matrix"] for frame in frames], [frame["file_path"] for frame in frames], str(path)
        )
        for frame, matrix in zip(frames, matrices):
            frame["transform_matrix"] = matrix
            frame[LENS] = frame_lens(content, frame, path, lambda frame=frame: self._photo_size(frame))
        self._say(odd_lenses([frame[LENS] for frame in frames], [frame["file_path"] for frame in frames], str(path)))
        # The dataparser only has to get through; its cameras are replaced.
        lens: FrameLens = frames[0][LENS]
        for values in (content, *frames):
            for key in LENS_KEYS:
                values.pop(key, None)
        content.update(fl_x=lens.fx, fl_y=lens.fy, cx=lens.cx, cy=lens.cy, w=lens.width, h=lens.height)
        content["camera_angle_x"] = 1.0
        self._content = content
        return content

    def _path_of(self, path: Path) -> Path:
        return path

    def _frames(self, content: dict[str, Any]) -> list[dict[str, Any]]:
        return content["frames"]

    def _prepare(self, content: dict[str, Any], frames: list[dict[str, Any]]) -> None:
        """Completes a file for its dataparser."""

    def _check_lists(self, content: dict[str, Any], path: Path) -> None:
        given = {split: content.get(key) for split, key in _LISTS.items()}
        lists = complete_lists(given, _LISTS, str(path))
        if lists and not self._has_lists:
            key = next(key for key in _LISTS.values() if key in content)
            raise UserError(
                f"{path} names {key}, which the dataparser {type(self._parser).__name__} does not heed: use "
                "nerfstudio-data, or remove the list."
            )
        known = [frame["file_path"] for frame in content["frames"]]
        check_listed(given, known, _LISTS, str(path))
        self._say(list_remarks(lists, known, str(path)))
        content.update({_LISTS[split]: listed for split, listed in lists.items()})

    def _folder(self) -> Path:
        return self._data.parent if self._data.suffix == ".json" else self._data

    def _file(self, frame: dict[str, Any]) -> Path:
        """The photo that the dataparser names for a frame."""
        return self._folder() / frame["file_path"]

    def _photo_size(self, frame: dict[str, Any]) -> tuple[int, int]:
        """Width and height of a photo as a viewer shows it."""
        height, width = picture_size(self._file(frame))
        return width, height

    def _poses(self, outputs: DataparserOutputs, frames: list[dict[str, Any]]) -> Tensor:
        """[V, 3, 4] float32, in the coordinates of the training."""
        return outputs.cameras.camera_to_worlds

    def _downscale(self) -> float:
        return 1.0


class NerfstudioReader(TransformsReader):
    """Reads nerfstudio's own format.

    Args:
        parser: nerfstudio's dataparser of ``transforms.json``.
        seeds: Whether points are wanted that Gaussians start from.
    """

    _module = Nerfstudio.__module__
    _has_lists = True
    _finds_copies = False

    def __init__(self, parser: DataParser, seeds: bool) -> None:
        super().__init__(parser, seeds)
        self._parser._load_3D_points = self._load_points

    def _prepare(self, content: dict[str, Any], frames: list[dict[str, Any]]) -> None:
        if not any(key in values for key in ("fl_x", "fl_y") for values in (content, *frames)):
            raise UserError(
                f"{self._path} gives angles of view instead of focal lengths (fl_x), as instant-ngp's files do: end "
                "the command with `instant-ngp-data`."
                if any(key in content for key in ("camera_angle_x", "x_fov"))
                else f"fl_x is missing in {self._path}, at the top and in the frames: add the focal length in pixels."
            )
        self._find_copies(frames)
        model = self._data / "colmap/sparse/0"
        if "ply_file_path" not in content and model.exists():
            # nerfstudio would ask whether it may convert the model's points.
            content["ply_file_path"] = str(model.absolute())

    def _find_copies(self, frames: list[dict[str, Any]]) -> None:
        """Lets smaller copies be found by whole paths; once, for the scene does not change between two splits."""
        if not self._finds_copies:
            named = {key: [Path(frame[key]) for frame in frames if key in frame] for key in ("file_path", "mask_path")}
            photos, masks = (SmallerCopies(self._folder(), paths) for paths in named.values())
            self._parser._get_fname = whole_path_copies(self._parser, photos, masks)
            self._finds_copies = True

    def _file(self, frame: dict[str, Any]) -> Path:
        return Path(self._parser._get_fname(Path(frame["file_path"]), self._folder()))

    def _photo_size(self, frame: dict[str, Any]) -> tuple[int, int]:
        width, height = super()._photo_size(frame)
        factor = int(self._parser.downscale_factor or 1)
        return width * factor, height * factor

    def _downscale(self) -> float:
        return float(self._parser.downscale_factor or 1)

    def _applied(self) -> np.ndarray:
        model = self._data / "colmap/sparse/0"
        return np.array(
            self._content.get("applied_transform", _OLD_TRANSFORM if model.exists() else np.eye(4)[:3]),
            dtype=np.float64,
        )

    def _read_points(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        if not path.is_dir():
            return super()._read_points(path)
        if not any((path / f"points3D{suffix}").is_file() for suffix in (".bin", ".txt")):
            return np.zeros((0, 3)), np.zeros((0, 3), np.uint8)  # nobody named any
        positions, colors = read_colmap_points(path)
        applied = self._applied()
        return positions @ applied[:, :3].T + applied[:, 3], colors


class InstantNGPReader(TransformsReader):
    """Reads instant-ngp's format: angles of view, one camera, photos named without a suffix."""

    _module = InstantNGP.__module__

    def _file(self, frame: dict[str, Any]) -> Path:
        path = super()._file(frame)
        named = path if path.exists() else path.parent / f"{path.name}.png"
        if not named.exists():
            raise UserError(f"The photo {path} is missing: restore it, or remove it from {self._path}.")
        return named

    def _prepare(self, content: dict[str, Any], frames: list[dict[str, Any]]) -> None:
        for frame in frames:
            self._file(frame)  # the dataparser would leave out what is missing

    def _poses(self, outputs: DataparserOutputs, frames: list[dict[str, Any]]) -> Tensor:
        # The dataparser takes a list of one view for an index (numpy and a tensor of one number).
        poses = np.array([frame["transform_matrix"] for frame in frames]).reshape(-1, 4, 4).astype(np.float32)
        poses[:, :3, 3] *= self._parser.config.scene_scale
        return torch.from_numpy(poses[:, :3])


class BlenderReader(TransformsReader):
    """Reads the format of NeRF's synthetic scenes: a file for each split.

    Args:
        parser: nerfstudio's dataparser of NeRF's synthetic scenes.
        seeds: Whether points are wanted that Gaussians start from.
    """

    _module = Blender.__module__

    def __init__(self, parser: DataParser, seeds: bool) -> None:
        super().__init__(parser, seeds)
        self._parser._load_3D_points = self._load_points

    def _path_of(self, path: Path) -> Path:
        names = {split: f"transforms_{split}.json" for split in SPLITS}
        files = {split: path.parent / name for split, name in names.items()}
        found = {split: [name] for split, name in names.items() if files[split].is_file()}
        # A file without poses is none: whoever wants nothing held out can name the training views there again.
        remedy = "add one of them, with at least one view (a copy of the first, where nothing is to be held out)"
        complete_lists(found, names, str(path.parent), remedy)
        if path.is_file() or not found:
            return path
        return files["test" if path.name == names["val"] else "val"]

    def _file(self, frame: dict[str, Any]) -> Path:
        return self._data / (frame["file_path"].replace("./", "") + ".png")

    def _read_points(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        return read_point_cloud(path, "--ply-path None")

    def _near(self, matrices: Sequence[Any], names: Sequence[str], source: str) -> np.ndarray:
        """Each split has a file of its own, but all are of one scene."""
        every, place = [], {}
        for split in SPLITS:
            path = self._data / f"transforms_{split}.json"
            if path.is_file():
                frames = read_scene_file(path)["frames"]
                place[path] = slice(len(every), len(every) + len(frames))
                every += frames
        poses = super()._near(
            [frame["transform_matrix"] for frame in every], [frame["file_path"] for frame in every], str(self._data)
        )
        return poses[place[self._path]]


class ScanNetppReader(TransformsReader):
    """Reads ScanNet++'s format: held-out views in a list of their own."""

    _module = ScanNetpp.__module__

    def _frames(self, content: dict[str, Any]) -> list[dict[str, Any]]:
        return [*content["frames"], *content.setdefault("test_frames", [])]

    def _file(self, frame: dict[str, Any]) -> Path:
        return self._data / self._parser.config.images_dir / frame["file_path"]


def _check_all_or_none(frames: Sequence[dict[str, Any]], key: str, path: Path) -> None:
    """Refuses a key that some frames have and others lack: it is not said what holds for the others."""
    without = [frame["file_path"] for frame in frames if key not in frame]
    if 0 < len(without) < len(frames):
        raise UserError(
            f"{len(without)} of {len(frames)} frames in {path} have no {key}, {without[0]} first, and the others have "
            "one: give it to all frames (an all-white mask where the whole photo counts), or to none."
            if key == "mask_path"
            else f"{len(without)} of {len(frames)} frames in {path} have no {key}, {without[0]} first, and the others "
            "have one: give it to all frames, or to none."
        )
