"""Whose features a run has, and which of them a user means."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fit3d_ns.backbones.students.result_folder import CARD_NAME, WEIGHTS_NAME, read_card
from fit3d_ns.runs.checkpoints import read_extra_state
from fit3d_ns.runs.names import HASH_LETTERS


@dataclass(frozen=True)
class RunTeacher:
    """The teacher of a run's features, as far as the run tells."""

    name: str
    """As the user named the backbone."""
    weights: Path | None
    """Local weights, absolute; None for those of the hub."""
    fine_tuned: bool
    """Whether a card beside the weights says that fit3d-distill wrote them."""
    weights_sha256: str | None
    """Hash of its tensors; None if the checkpoint does not tell."""

    @staticmethod
    def of(datamanager: Any, checkpoint: Path) -> "RunTeacher":
        """Returns the teacher of a run.

        Args:
            datamanager: The configuration of its data manager.
            checkpoint: Its checkpoint, or that of a lift.

        Raises:
            UserError: If the checkpoint cannot be read.
        """
        weights = datamanager.backbone_weights
        weights = None if weights is None else Path(weights).expanduser().absolute()
        fine_tuned = weights is not None and weights.with_name(CARD_NAME).is_file()
        identity = read_extra_state(checkpoint).get("teacher_identity") or {}
        return RunTeacher(datamanager.backbone, weights, fine_tuned, identity.get("weights_sha256"))

    @property
    def full_name(self) -> str:
        """Its name and the beginning of its hash, if that is known; so are lifts of fine-tuned teachers named."""
        return teacher_name(self.name, self.weights_sha256)

    @property
    def label(self) -> str:
        """What to name it by."""
        return self.full_name if self.fine_tuned else teacher_name(self.name)


def teacher_name(backbone: str, weights_sha256: str | None = None) -> str:
    """Returns the name of a teacher, fit for a folder.

    Args:
        backbone: As the user named it; a timm id may hold slashes and colons.
        weights_sha256: Hash of its tensors, where the name alone does not tell them.
    """
    name = re.sub(r"[^\w.-]+", "-", backbone)
    return f"{name}-{weights_sha256[:HASH_LETTERS]}" if weights_sha256 else name


def different_teachers(teachers: Collection[RunTeacher]) -> list[str]:
    """Returns the names of those teachers that differ, as far as runs tell, sorted.

    Args:
        teachers: Of any runs; one whose weights are not known is taken for one of the same name.
    """
    known = {teacher.weights_sha256: teacher for teacher in teachers if teacher.weights_sha256 is not None}
    names = [teacher.label for teacher in known.values()]
    found = {teacher.full_name if names.count(teacher.label) > 1 else teacher.label for teacher in known.values()}
    return sorted(found | {t.label for t in teachers if t.weights_sha256 is None and t.label not in names})


def named_teacher(named: str) -> Callable[[RunTeacher], bool]:
    """Returns what tells whether a teacher is the one that a user names.

    Args:
        named: A backbone that was not fine-tuned, by its name; or a fine-tuned one: a folder that fit3d-distill wrote,
            a file in it, or the name that lifts of it carry.

    Raises:
        UserError: If the folder's card is damaged.
    """
    path = Path(named).expanduser().absolute()
    if not path.exists():
        return lambda teacher: teacher_name(named) in (teacher.label, teacher.full_name)
    weights = path / WEIGHTS_NAME if path.is_dir() else path
    sha256 = None
    if weights.with_name(CARD_NAME).is_file():
        sha256 = read_card(weights.parent).get("weights_sha256" if weights.name == WEIGHTS_NAME else "student_sha256")

    def is_named(teacher: RunTeacher) -> bool:
        if sha256 is None or teacher.weights_sha256 is None:
            return teacher.weights == weights
        return teacher.weights_sha256 == sha256

    return is_named
