"""A user's own data: folders of photos and truth, procedural rooms, scenes in nerfstudio's format."""

import json
from pathlib import Path
from typing import Optional

import numpy as np

from fit3d_ns.errors import UserError
from probe.datasets.checks import spread
from probe.datasets.choice import DataChoice
from probe.datasets.pairing import pair_folders, read_lines
from probe.datasets.posed_scene import PosedScene, read_posed_scene
from probe.datasets.samples import IGNORE, LabelRule, ProbeData, Sample, read_index

TRAIN_SHARE, TEST_SHARE = 0.70, 0.25
"""Of a single scene, by time; the frames between are left out, because they show what both sides show."""
_TEST_ROOMS = 0.25
_LABELS_SEARCHED = 500


def folder(choice: DataChoice) -> ProbeData:
    """``SPLIT/`` photos beside ``SPLITannot/`` (segmentation) or ``SPLITdepth/``, for train, test and maybe val."""
    suffix = "annot" if choice.kind == "segmentation" else "depth"
    layout = f"DATA/{{train,test}}/ photos beside DATA/{{train,test}}{suffix}/ PNGs of the same names; val is optional"
    splits: dict[str, list[Sample]] = {}
    for split in ("train", "test", "val"):
        if split != "val" or (choice.data / "val").is_dir():
            splits[split] = pair_folders(choice.data / split, choice.data / f"{split}{suffix}", layout)
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
    )


def rooms(choice: DataChoice) -> ProbeData:
    """Rooms of ``fit3d-rooms``, split by room; or a single scene in nerfstudio's format, split by time."""
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
        target: Optional[Path] = getattr(frame, field)
        if target is None:
            key = f"{field}_file_path"
            raise UserError(f"The frame {frame.image.name} of {scene.name} in {data} has no {key} in transforms.json.")
        samples.append(Sample(frame.image, target, f"{scene.name}_{frame.image.stem}", frame.intrinsics))
    return samples


def _class_table(
    data: Path, scene: str, samples: list[Sample]
) -> tuple[tuple[str, ...], Optional[tuple[tuple[int, int, int], ...]]]:
    for path in (data / "classes.json", data / scene / "classes.json"):
        if path.is_file():
            try:
                table = json.loads(path.read_text())
                names = tuple(str(entry["name"]) for entry in table)
                return names, tuple(tuple(int(value) for value in entry["color"]) for entry in table)  # type: ignore
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} is damaged: expected a list of id, name and color.") from None
    return _numbered(samples), None


def _class_names(choice: DataChoice, samples: list[Sample]) -> tuple[str, ...]:
    if choice.class_names is not None:
        return tuple(read_lines(choice.class_names, "--class-names"))
    path = choice.data / "classes.txt"
    return tuple(read_lines(path, "--data")) if path.is_file() else _numbered(samples)


def _numbered(samples: list[Sample]) -> tuple[str, ...]:
    """Names classes by number, as many as the training labels use."""
    largest = 0
    for sample in spread(samples, _LABELS_SEARCHED):
        values = read_index(sample.target)
        largest = max(largest, int(np.max(values, where=values != IGNORE, initial=0)))
        if largest > IGNORE:
            raise UserError(
                f"{sample.target} holds the label {largest}, but class ids lie below {IGNORE}, which marks ignored "
                "pixels: give it class ids instead of instance ids."
            )
    return tuple(f"class {index}" for index in range(largest + 1))
