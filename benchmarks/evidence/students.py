"""The students of the evidence: what each learns from, and the commands that make it."""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.config import EvidenceConfig, Kind
from fit3d_ns.backbones.students.result_folder import WEIGHTS_NAME
from fit3d_ns.support.files import atomic_write_json


@dataclass(frozen=True)
class Student:
    """One training.

    Attributes:
        kind: Its targets.
        scenes: Names of its scenes.
        round: From 1; the teacher of later rounds is the averaged student of the one before.
        seed: Of views and mirroring.
        steps: Optimizer steps of two views; None for as many as the recipe takes.
    """

    kind: Kind
    scenes: tuple[str, ...]
    round: int
    seed: int
    steps: int | None = None

    @property
    def name(self) -> str:
        """Unique among all students."""
        steps = "" if self.steps is None else f"-{self.steps}steps"
        return f"{self.kind}-{len(self.scenes)}scenes-round{self.round}-seed{self.seed}{steps}"

    @property
    def lift(self) -> str:
        """Name of the lift whose bundles it learns from."""
        if self.round == 1:
            return "original"
        return f"{self.kind}-round{self.round}-seed{self.seed}"


def order_of_scenes(scenes: Sequence[str], seeds: Sequence[int], seed: int) -> list[str]:
    """Returns the scenes in the order in which a seed's curve takes them: every seed starts elsewhere in the list.

    Args:
        scenes: Names of all.
        seeds: All that are used.
        seed: One of them.
    """
    start = list(seeds).index(seed) * len(scenes) // len(seeds)
    return [*scenes[start:], *scenes[:start]]


def all_students(config: EvidenceConfig, scenes: Sequence[str]) -> list[Student]:
    """Returns every student, the most important first.

    Args:
        config: The user's choices.
        scenes: Names of all scenes, in the order of the curve.
    """
    every = tuple(scenes)

    def rounds(kind: Kind, first: int, last: int, seeds: Sequence[int]) -> list[Student]:
        return [Student(kind, every, number, seed) for number in range(first, last + 1) for seed in seeds]

    students = rounds("lifted", 1, config.rounds, config.seeds)
    controls: list[Kind] = [kind for kind in ("control-shift", "control", "control-blur") if kind in config.kinds]
    for kind in controls:
        students += rounds(kind, 1, min(1, config.control_rounds), config.seeds)
    for number in sorted({number for number in config.curve if number < len(every)}):
        for kind in config.curve_kinds:
            if kind in config.kinds:
                for seed in config.seeds:
                    chosen = tuple(order_of_scenes(every, config.seeds, seed)[:number])
                    students.append(Student(kind, chosen, 1, seed))
    students += [Student("lifted", every, 1, config.seeds[0], steps) for steps in config.other_steps]
    for kind in controls:
        students += rounds(kind, 2, config.control_rounds, config.seeds)
    return students


def without_last_frames(scene: Path, num_frames: int, folder: Path) -> Path:
    """Writes a scene that refers to another's photos, all but the last frames; leaves out measured depth.

    Args:
        scene: In nerfstudio's format.
        num_frames: So many frames are left out, the last by their file names.
        folder: Where the new scene goes.

    Returns:
        The new scene.
    """
    meta: dict[str, Any] = json.loads((scene / "transforms.json").read_text())
    frames = sorted(meta["frames"], key=lambda frame: frame["file_path"])
    kept = frames[: len(frames) - num_frames] if num_frames else frames
    for frame in kept:
        frame["file_path"] = str((scene / frame["file_path"]).absolute())
        frame.pop("depth_file_path", None)
    meta["frames"] = kept
    if "ply_file_path" in meta:
        meta["ply_file_path"] = str((scene / meta["ply_file_path"]).absolute())
    atomic_write_json(folder / "transforms.json", meta)
    return folder


class Commands:
    """The product's commands, and where they write.

    Args:
        config: The user's choices.
        scenes: Folders of the scenes by name.
    """

    def __init__(self, config: EvidenceConfig, scenes: dict[str, Path]) -> None:
        self._config = config
        self._scenes = scenes
        self._root = config.output.absolute()

    def geometry(self, scene: str) -> list[str | Path]:
        """Returns the command that trains a scene and lifts the original's features onto it.

        Args:
            scene: Its name.
        """
        config = self._config
        never = str(config.geometry_steps + 1)
        command: list[str | Path] = [shutil.which("ns-train") or "ns-train", "fit3d-splat"]
        command += ["--data", self._scenes[scene].absolute(), "--output-dir", self._root / "geometry"]
        command += ["--experiment-name", scene, "--timestamp", "geometry", "--vis", "tensorboard"]
        command += ["--viewer.quit-on-train-completion", "True", "--logging.local-writer.enable", "False"]
        command += ["--max-num-iterations", str(config.geometry_steps), "--machine.device-type", config.device]
        for name in ("image", "batch", "all-images"):
            command += [f"--steps-per-eval-{name}", never]
        command += ["--pipeline.model.features", "lift"]
        command += self._backbone("--pipeline.datamanager.", config.backbone_weights)
        return command

    def geometry_run(self, scene: str) -> Path:
        """Returns the folder of a scene's run.

        Args:
            scene: Its name.
        """
        return self._root / "geometry" / scene / "fit3d-splat" / "geometry"

    def lift(self, lift: str, teacher: Path) -> list[str | Path]:
        """Returns the command that lifts the features of a student onto all scenes' geometry.

        Args:
            lift: Its name.
            teacher: Weights of the student.
        """
        command: list[str | Path] = [sys.executable, "-m", "fit3d_ns.commands.lift.cli"]
        command += ["--runs", self._root / "geometry", "--name", lift]
        command += ["--output-dir", self._root / "lifts" / lift, "--no-evaluate"]
        if not lift.startswith("lifted"):
            command += ["--refinements", "0"]  # of a control's lift only the basis is used
        command += self._backbone("--", teacher)
        return command

    def bundles(self, lift: str) -> list[str | Path]:
        """Returns the command that makes the bundles of a lift.

        Args:
            lift: Its name.
        """
        runs = self._root / ("geometry" if lift == "original" else f"lifts/{lift}")
        command: list[str | Path] = [sys.executable, "-m", "distill", "--runs", runs, "--bundles-only"]
        return [*command, "--bundle-dir", self._root / "bundles" / lift]

    def bundle(self, lift: str, scene: str) -> Path:
        """Returns a bundle's folder.

        Args:
            lift: Its name.
            scene: Name of the scene.
        """
        run = "geometry" if lift == "original" else f"geometry-{lift}"
        return self._root / "bundles" / lift / f"{scene}-{run}"

    def student(self, student: Student) -> list[str | Path]:
        """Returns the command that trains a student by the automatic recipe, from the original, whatever its teacher.

        Args:
            student: What it learns from.
        """
        config = self._config
        command: list[str | Path] = [sys.executable, "-m", "distill", "--output-dir", self.student_folder(student)]
        command += ["--bundles", *(self.bundle(student.lift, scene) for scene in student.scenes)]
        command += ["--targets", student.kind, "--seed", str(student.seed), "--interpolate", str(config.interpolate)]
        if student.round > 1 and config.backbone_weights is not None:
            command += ["--original-weights", config.backbone_weights.absolute()]
        if steps := student.steps or config.steps:
            command += ["--steps", str(steps)]
        command += ["--report-views", "1", "--report-scenes", "0", "--save-every", "1000000", "--device", config.device]
        # Several share the GPU.
        command += ["--scene-memory", "4", "--photo-memory", "4", "--cache-dir", self._root / "photos"]
        return command

    def student_folder(self, student: Student) -> Path:
        """Returns where a student is written.

        Args:
            student: What it learns from.
        """
        return self._root / "students" / student.name

    def teacher(self, student: Student) -> Path:
        """Returns the weights of a student averaged with the original, which teach the next round.

        Args:
            student: Of the round before.
        """
        return self.student_folder(student) / WEIGHTS_NAME

    def log(self, name: str) -> Path:
        """Returns where a command's output goes.

        Args:
            name: Of a piece.
        """
        return self._root / "logs" / f"{name.replace('/', '-')}.log"

    def _backbone(self, prefix: str, weights: Path | None) -> list[str | Path]:
        flags: list[str | Path] = [f"{prefix}backbone", self._config.backbone]
        if weights is not None:
            flags += [f"{prefix}backbone-weights", weights.absolute()]
        return flags
