"""Curves while something trains: lines of JSON always, TensorBoard or Weights & Biases if asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_text

Vis = Literal["none", "tensorboard", "wandb"]
"""Besides the lines of JSON."""


class CurveLog:
    """Writes numbers by step while they are made; of several processes, the first one's.

    Args:
        folder: Where ``curves.jsonl`` and TensorBoard's files go.
        vis: What else to write to.
        project: Name of the project in Weights & Biases.
        config: Shown beside the run there; JSON-able.
        start: Steps taken already: lines of later steps, which a killed run left, are dropped.

    Raises:
        UserError: If the package that ``vis`` needs is missing, or the folder cannot be written to.
    """

    def __init__(self, folder: Path, vis: Vis, project: str, config: Mapping[str, Any], start: int = 0):
        self._path = folder / "curves.jsonl"
        self._board: Any = None
        self._run: Any = None
        atomic_write_text(self._path, "".join(line + "\n" for line in _lines_until(self._path, start)))
        try:
            if vis == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else None)
            elif vis == "wandb":
                import wandb  # type: ignore[import-not-found]

                self._run = wandb.init(project=project, dir=str(folder), config=dict(config))
        except ImportError:
            raise UserError(f"--vis {vis} needs the package {vis}: install it with pip.") from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers.

        Args:
            step: Steps taken.
            values: By name; ``group/name`` puts diagrams of a group beside each other.

        Raises:
            UserError: If the disk refuses.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"Cannot write {self._path} ({error.strerror}): free space there.") from None
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._run is not None:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends what was opened."""
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()


def _lines_until(path: Path, start: int) -> list[str]:
    """Returns whole lines of steps up to ``start``; the last may have been cut off by a kill."""
    kept = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return kept
    for line in lines:
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return kept
