"""Scores students and their averages with the original, in this process, with all data loaded once."""

import copy
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.evidence.config import EvidenceConfig
from benchmarks.evidence.labelled import CAMVID_SIZE, NYU_SIZE, Labelled, LastFrames, read_labelled
from benchmarks.evidence.pieces import Records
from benchmarks.evidence.students import Commands, Student
from benchmarks.evidence.unlabelled import HeldOutScenes
from distill.evaluation import Averages
from fit3d_ns.backbones import Backbone, BackboneSpec, load_backbone
from fit3d_ns.backbones.students.result_folder import STUDENT_NAME, WEIGHTS_NAME, read_card


class Measuring:
    """Loads what it needs when it is first asked.

    Args:
        config: The user's choices.
        commands: Knows where things are.
        scenes: Names of all scenes.
        records: Where the decays are read that were chosen for the original.
    """

    def __init__(self, config: EvidenceConfig, commands: Commands, scenes: tuple[str, ...], records: Records) -> None:
        self._config = config
        self._commands = commands
        self._scenes = scenes
        self._records = records
        self._device = torch.device("cuda", 0) if config.device == "cuda" else torch.device("cpu")
        self._lift: tuple[str, HeldOutScenes] | None = None

    def amounts(self, student: Student) -> tuple[float, ...]:
        """Returns the shares of a student that are measured.

        Args:
            student: Says its kind.
        """
        return self._config.amounts if student.kind == "lifted" else self._config.control_amounts

    def original_development(self) -> dict[str, Any]:
        """Chooses the probes' decay for the original, and scores it for further choices.

        Returns:
            Decays, mIoU by decay, and scores.
        """
        scores = self._labelled.choose_decays(self._original, self._config.decays)
        decays = {name: max(by_decay, key=by_decay.__getitem__) for name, by_decay in scores.items()}
        by_decay = {name: {str(decay): value for decay, value in values.items()} for name, values in scores.items()}
        labelled = self._labelled.score(self._original, "development", decays)
        return {"decays": decays, "miou_by_decay": by_decay, "labelled": labelled}

    def original_test(self) -> dict[str, Any]:
        """Scores the original for the final table.

        Returns:
            Its scores.
        """
        return {"labelled": self._labelled.score(self._original, "test", self._decays)}

    def development(self, student: Student) -> dict[str, Any]:
        """Scores all averages of a student on what choices may be made on, with labels and without.

        Args:
            student: That was trained.

        Returns:
            Scores by amount.
        """
        held_out = self._held_out(student.lift if student.kind == "lifted" else "original")
        averages, rows = self._averages(student), []
        for amount in self.amounts(student):
            backbone = averages.take(amount)
            parts: dict[str, dict[str, Any]] = {"training": {}, "validation": {}}
            for scene, values in held_out.measure(backbone).items():
                parts["training" if scene in student.scenes else "validation"][scene] = values
            labelled = self._labelled.score(backbone, "development", self._decays)
            rows.append({"amount": amount, "labelled": labelled, "unlabelled": parts})
        return {**self._describe(student), "original": held_out.measure(self._original), "rows": rows}

    def test(self, student: Student) -> dict[str, Any]:
        """Scores a student for the final table: averaged by the amount fixed beforehand; of round 1 also as it is.

        Args:
            student: That was trained.

        Returns:
            Scores by amount.
        """
        averages, rows = self._averages(student), []
        for amount in (self._config.interpolate, 1.0)[: 2 if student.round == 1 else 1]:
            labelled = self._labelled.score(averages.take(amount), "test", self._decays)
            rows.append({"amount": amount, "labelled": labelled})
        return {**self._describe(student), "rows": rows}

    def _describe(self, student: Student) -> dict[str, Any]:
        return {
            "kind": student.kind,
            "scenes": list(student.scenes),
            "round": student.round,
            "seed": student.seed,
            "steps": read_card(self._commands.student_folder(student))["steps"],
        }

    @cached_property
    def _decays(self) -> dict[str, float]:
        return self._records.read("development/original")["decays"]

    @cached_property
    def _original(self) -> Backbone:
        weights = self._config.backbone_weights
        return load_backbone(BackboneSpec(self._config.backbone, weights), self._device).requires_grad_(False)

    @cached_property
    def _labelled(self) -> Labelled:
        config, device = self._config, self._device
        return Labelled(
            read_labelled(config.nyu, NYU_SIZE, device, depth=True),
            read_labelled(config.camvid, CAMVID_SIZE, device, depth=False),
            LastFrames(config.match, config.match_frames, config.match_step, device),
        )

    def _held_out(self, lift: str) -> HeldOutScenes:
        if self._lift is None or self._lift[0] != lift:
            config, self._lift = self._config, None  # frees the last one's memory
            bundles = [self._commands.bundle(lift, scene) for scene in self._scenes]
            cache, views = config.output / "photos", config.held_out_views
            self._lift = (lift, HeldOutScenes(bundles, self._original, self._device, views, cache))
        return self._lift[1]

    def _averages(self, student: Student) -> Averages:
        folder = self._commands.student_folder(student)
        weights = folder / STUDENT_NAME
        weights = load_file(weights if weights.is_file() else folder / WEIGHTS_NAME)
        return Averages(copy.deepcopy(self._original), weights, self._original.model.state_dict())
