"""A user's own data: folders of photos and truth, procedural rooms, scenes in nerfstudio's format."""

import logging
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fit3d_ns.data.photos.picture_files import open_labels
from fit3d_ns.data.poses import check_poses
from fit3d_ns.data.scene_file import frame_lens, read_scene_file
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.json_files import UNREADABLE, read_json
from fit3d_ns.support.samples import evenly_spaced
from probe.data.base import IGNORE, LabelRule, ProbeData, Sample
from probe.data.choice import DataChoice
from probe.data.pairing import left_out_note, pair_folders, read_lines

_LOGGER = logging.getLogger(__name__)
_DEPTH_UNIT = 0.001
"""nerfstudio's default for `depth_unit_scale_factor`: millimetres."""
_OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclass(frozen=True)
class PosedFrame:
    """One photo of a scene."""

    image: Path
    """The photo."""
    depth: Path | None
    """PNG of depths; None where there is none."""
    semantics: Path | None
    """PNG of class ids; None where there is none."""
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
    """Of the scene's folder."""
    frames: tuple[PosedFrame, ...]
    """In the order of the file."""
    depth_scale: float
    """PNG units in a metre."""


def read_posed_scene(folder: Path) -> PosedScene:
    """Reads transforms.json; opens no picture.

    Args:
        folder: The scene.

    Returns:
        Its frames.

    Raises:
        UserError: If the file is missing or malformed, a pose is none, or a lens is not a pinhole without distortion.
    """
    path = folder / "transforms.json"
    content = read_scene_file(path)
    entries = content["frames"]
    names = [entry["file_path"] for entry in entries]
    poses = check_poses([entry["transform_matrix"] for entry in entries], names, str(path))
    for remark in poses.remarks:
        _LOGGER.warning(remark)
    frames = tuple(_frame(content, entry, pose, folder, path) for entry, pose in zip(entries, poses.matrices))
    unit = content.get("depth_unit_scale_factor", _DEPTH_UNIT)
    if isinstance(unit, bool) or not isinstance(unit, (int, float)) or not 0 < unit < math.inf:
        raise UserError(f"depth_unit_scale_factor of {path} is {unit!r}, no unit of length in metres: mend it.")
    return PosedScene(folder.name, frames, 1.0 / unit)


def _frame(content: dict[str, Any], entry: dict[str, Any], pose: np.ndarray, folder: Path, path: Path) -> PosedFrame:
    lens = frame_lens(content, entry, path)
    if lens.distorts:
        raise UserError(
            f"{entry['file_path']} in {path} was taken by a lens with distortion: undistort the photos first (for "
            "example with COLMAP's image_undistorter)."
        )
    depth, semantics = entry.get("depth_file_path"), entry.get("semantics_file_path")
    return PosedFrame(
        image=folder / entry["file_path"],
        depth=folder / depth if depth else None,
        semantics=folder / semantics if semantics else None,
        intrinsics=(lens.fx, lens.fy, lens.cx, lens.cy),
        size=(lens.height, lens.width),
        viewmat=np.linalg.inv(pose @ _OPENGL_TO_OPENCV),
    )


TRAIN_SHARE, TEST_SHARE = 0.70, 0.25
"""Of a single scene, by time; the frames between are left out, because they show what both sides show."""
_TEST_ROOMS = 0.25
_LABELS_SEARCHED = 500


def folder(choice: DataChoice) -> ProbeData:
    """Pairs ``SPLIT/`` photos with ``SPLITannot/`` (segmentation) or ``SPLITdepth/``, for train, test and maybe val.

    Args:
        choice: The folder and how to read it.

    Returns:
        Training and test samples.
    """
    suffix = "annot" if choice.kind == "segmentation" else "depth"
    layout = f"DATA/{{train,test}}/ photos beside DATA/{{train,test}}{suffix}/ PNGs of the same names; val is optional"
    splits: dict[str, list[Sample]] = {}
    left_out: Counter[str] = Counter()
    for split in ("train", "test", "val"):
        if split != "val" or (choice.data / "val").is_dir():
            targets = choice.data / f"{split}{suffix}"
            splits[split] = pair_folders(choice.data / split, targets, layout, left_out)
    name = choice.data.resolve().name
    if choice.kind != "segmentation":
        return ProbeData(
            name,
            choice.kind,
            splits["train"],
            splits["test"],
            splits.get("val"),
            depth_scale=choice.depth_scale or 1000.0,
            max_depth=choice.max_depth or 10.0,
            notes=left_out_note(left_out),
        )
    classes = _class_names(choice, splits["train"])
    return ProbeData(
        name,
        "segmentation",
        splits["train"],
        splits["test"],
        splits.get("val"),
        classes,
        labels=LabelRule(len(classes)),
        notes=left_out_note(left_out),
    )


def rooms(choice: DataChoice) -> ProbeData:
    """Splits rooms of ``fit3d-rooms`` by room, or a single scene in nerfstudio's format by time.

    Args:
        choice: The folder and how to read it.

    Returns:
        Training and test samples.
    """
    scenes = _scenes(choice.data)
    field = "semantics" if choice.kind == "segmentation" else "depth"
    samples = [_frames(scene, field, choice.data) for scene in scenes]
    if len(scenes) > 1:
        held_out = max(1, round(len(scenes) * _TEST_ROOMS))
        train = [sample for room in samples[:-held_out] for sample in room]
        test = [sample for room in samples[-held_out:] for sample in room]
        note = f"Trained on {len(scenes) - held_out} rooms, tested on {held_out} not seen in training."
    else:
        count = len(samples[0])
        train = samples[0][: round(count * TRAIN_SHARE)]
        test = samples[0][count - round(count * TEST_SHARE) :]
        note = "One scene only, split by time: the result is within-scene."
    classes, colors = (), None
    if choice.kind == "segmentation":
        classes, colors = _class_table(choice.data, scenes[0].name, [*train, *test])
    return ProbeData(
        choice.data.resolve().name,
        choice.kind,
        train,
        test,
        classes=classes,
        colors=colors,
        labels=LabelRule(len(classes)) if classes else None,
        depth_scale=choice.depth_scale or scenes[0].depth_scale,
        max_depth=choice.max_depth or 10.0,
        fit="target_to_image",
        notes=(note,),
    )


def _scenes(data: Path) -> list[PosedScene]:
    if (data / "transforms.json").is_file():
        return [read_posed_scene(data)]
    folders = sorted(path.parent for path in data.glob("*/transforms.json") if not path.parent.name.startswith("."))
    if not folders:
        raise UserError(
            f"{data} holds no rooms: give a folder made by fit3d-rooms (DATA/room_000/transforms.json, ...), or one "
            "scene in nerfstudio's format."
        )
    scenes = [read_posed_scene(path) for path in folders]
    if len({scene.depth_scale for scene in scenes}) > 1:
        raise UserError(f"The scenes of {data} differ in depth_unit_scale_factor: probe them one by one.")
    return scenes


def _frames(scene: PosedScene, field: str, data: Path) -> list[Sample]:
    samples = []
    for frame in scene.frames:
        target: Path | None = getattr(frame, field)
        if target is None:
            key = f"{field}_file_path"
            raise UserError(f"The frame {frame.image.name} of {scene.name} in {data} has no {key} in transforms.json.")
        samples.append(Sample(frame.image, target, f"{scene.name}_{frame.image.stem}", frame.intrinsics))
    return samples


def _class_table(
    data: Path, scene: str, samples: list[Sample]
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...] | None]:
    for path in (data / "classes.json", data / scene / "classes.json"):
        if path.is_file():
            try:
                table = read_json(path)
                names = tuple(str(entry["name"]) for entry in table)
                return names, tuple(tuple(int(value) for value in entry["color"]) for entry in table)  # type: ignore
            except (*UNREADABLE, ValueError, KeyError, TypeError):
                raise UserError(f"{path} is damaged: expected a list of id, name and color.") from None
    return _numbered(samples), None


def _class_names(choice: DataChoice, samples: list[Sample]) -> tuple[str, ...]:
    if choice.class_names is not None:
        names = tuple(read_lines(choice.class_names, "--class-names"))
        if len(names) < 2:
            raise UserError(f"{choice.class_names} names {len(names)} class: give one name a line with --class-names.")
        return names
    path = choice.data / "classes.txt"
    return tuple(read_lines(path, "--data")) if path.is_file() else _numbered(samples)


def _numbered(samples: list[Sample]) -> tuple[str, ...]:
    """Names classes by number, as many as the training labels use."""
    largest = 0
    for sample in evenly_spaced(samples, _LABELS_SEARCHED):
        values = open_labels(sample.target)
        largest = max(largest, int(np.max(values, where=values != IGNORE, initial=0)))
        if largest > IGNORE:
            raise UserError(
                f"{sample.target} holds the label {largest}, but class ids lie below {IGNORE}, which marks ignored "
                "pixels: give it class ids instead of instance ids."
            )
    return tuple(f"class {index}" for index in range(largest + 1))
