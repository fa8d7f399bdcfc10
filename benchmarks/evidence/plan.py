"""All steps of the evidence, with what each needs."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.evidence.config import EvidenceConfig
from benchmarks.evidence.measuring import Measuring
from benchmarks.evidence.pieces import Piece, Records, run_command
from benchmarks.evidence.students import Commands, Student, all_students, without_last_frames


def scene_folders(config: EvidenceConfig) -> dict[str, Path]:
    """Returns the scenes by name, the one that matches are counted on without its last frames.

    Args:
        config: The user's choices.
    """
    scenes = {}
    for path in config.scenes:
        scenes[path.name] = path
        if path.absolute() == config.match.absolute():
            kept = config.output / "scenes" / path.name
            scenes[path.name] = without_last_frames(path, config.match_frames, kept)
    return scenes


class Plan:
    """Everything that is to be made.

    Args:
        config: The user's choices.
        records: Of the pieces.
    """

    def __init__(self, config: EvidenceConfig, records: Records) -> None:
        self._config = config
        self.scenes = scene_folders(config)
        self.students = all_students(config, tuple(self.scenes))
        self._commands = Commands(config, self.scenes)
        self._measuring = Measuring(config, self._commands, tuple(self.scenes), records)
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads)}
        self._commands_on = [0] * config.devices  # running commands by GPU
        self._choosing = threading.Lock()
        self.pieces: list[Piece] = []
        self._add_geometry()
        ranks = {student.name: 10 * (1 + number) for number, student in enumerate(self.students)}
        lifts: set[str] = set()
        for student in self.students:
            rank = ranks[student.name]
            if student.round > 1 and student.lift not in lifts:
                lifts.add(student.lift)
                self._add_lift(student, rank)
            self._add_student(student, rank)
            self._add_measuring(student, rank)
        self._add("development/original", "development", "measuring", self._measuring.original_development, (), 5, 1)
        self._add(
            "test/original", "test", "measuring", self._measuring.original_test, ("development/original",), 5, 10**6
        )

    def _add(
        self,
        name: str,
        stage: str,
        lane: str,
        work: Callable[[], dict[str, Any]],
        needs: tuple[str, ...],
        seconds: float,
        rank: int,
    ) -> None:
        self.pieces.append(Piece(name, stage, lane, work, needs, seconds, rank))

    def _run(self, name: str, command: list[str | Path]) -> dict[str, Any]:
        with self._least_busy_device() as device:
            return run_command(command, self._commands.log(name), {**self._environment, **device})

    @contextmanager
    def _least_busy_device(self) -> Iterator[dict[str, str]]:
        if self._config.devices == 1:
            yield {}
            return
        with self._choosing:
            device = self._commands_on.index(min(self._commands_on))
            self._commands_on[device] += 1
        try:
            yield {"CUDA_VISIBLE_DEVICES": str(device)}
        finally:
            with self._choosing:
                self._commands_on[device] -= 1

    def _add_geometry(self) -> None:
        seconds = self._config.geometry_steps * 0.06 / len(self.scenes)
        for scene in self.scenes:
            name = f"geometry/{scene}"

            def train(name: str = name, scene: str = scene) -> dict[str, Any]:
                shutil.rmtree(self._commands.geometry_run(scene), ignore_errors=True)  # of a run that was stopped
                return self._run(name, self._commands.geometry(scene))

            self._add(name, "geometry", "scene", train, (), seconds, 0)
        needs = tuple(f"geometry/{scene}" for scene in self.scenes)
        self._add(
            "bundles/original",
            "lifts",
            "light",
            lambda: self._run("bundles/original", self._commands.bundles("original")),
            needs,
            20,
            0,
        )

    def _add_lift(self, student: Student, rank: int) -> None:
        lift = student.lift
        before = next(other for other in self.students if other == replace(student, round=student.round - 1))
        name = f"lifts/{lift}"

        def make() -> dict[str, Any]:
            return self._run(name, self._commands.lift(lift, self._commands.teacher(before)))

        self._add(name, "lifts", "scene", make, (f"students/{before.name}",), 12 + 3 * len(self.scenes), rank)

        def bundle() -> dict[str, Any]:
            made = self._run(f"bundles/{lift}", self._commands.bundles(lift))
            shutil.rmtree(self._config.output / "lifts" / lift)  # the bundles hold all that is needed from here on
            return made

        self._add(f"bundles/{lift}", "lifts", "light", bundle, (name,), 20, rank)

    def _add_student(self, student: Student, rank: int) -> None:
        name = f"students/{student.name}"

        def train() -> dict[str, Any]:
            folder = self._commands.student_folder(student)
            shutil.rmtree(folder, ignore_errors=True)
            made = self._run(name, self._commands.student(student))
            for checkpoint in folder.glob("checkpoint*"):
                shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
            return made

        seconds = 10 + 0.008 * (student.steps or 3000 * (len(student.scenes) / len(self.scenes)) ** 0.5)
        self._add(name, "students", "student", train, (f"bundles/{student.lift}",), seconds, rank)

    def _add_measuring(self, student: Student, rank: int) -> None:
        needs = (f"students/{student.name}", "development/original")
        measuring = self._measuring
        seconds = 6.0 * len(measuring.amounts(student))
        self._add(
            f"development/{student.name}",
            "development",
            "measuring",
            lambda: measuring.development(student),
            needs,
            seconds,
            rank,
        )
        self._add(
            f"test/{student.name}",
            "test",
            "measuring",
            lambda: measuring.test(student),
            (*needs, "test/original"),
            5,
            10**6 + rank,
        )
