"""Writes a lifted scene as a nerfstudio run, and knows one that is finished."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fit3d_ns.lifting.lift import Lift
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.pipeline import Fit3DPipeline
from fit3d_ns.runs.names import CHECKPOINTS, CONFIG, COORDINATES, RECORD
from fit3d_ns.runs.record import write_record
from fit3d_ns.support.errors import UserError, first_line
from fit3d_ns.support.files import atomic_path
from fit3d_ns.support.html_report import Report
from fit3d_ns.trainer import Fit3DTrainerConfig


def finished_request(folder: Path) -> dict[str, Any] | None:
    """Returns what a finished lift in a folder was asked for; None if there is no finished one.

    Args:
        folder: Of the run.

    Raises:
        UserError: If the folder holds a run that was not lifted.
    """
    if not (folder / CONFIG).is_file():
        return None
    try:
        request = json.loads((folder / RECORD).read_text())["request"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds a run that fit3d-lift did not write: choose another --suffix or --output-dir."
        ) from error
    return request if any((folder / CHECKPOINTS).glob("step-*.ckpt")) else None


def write_run(
    pipeline: Fit3DPipeline,
    config: Fit3DTrainerConfig,
    step: int,
    lift: Lift,
    settings: LiftSettings,
    report: Report,
    provenance: dict[str, Any],
) -> Path:
    """Writes everything that nerfstudio's commands need to open the scene.

    ``config.yml`` comes last: without it a folder is no run, so a kill at any moment leaves a whole run or none.

    Args:
        pipeline: With the lifted model.
        config: Of the run; names its folder.
        step: Number of the last training step that the geometry has behind it.
        lift: The outcome.
        settings: The user's choices.
        report: About it.
        provenance: What was asked for and where the geometry came from, as plain JSON values.

    Returns:
        Path of ``config.yml``.

    Raises:
        UserError: If the disk is full or the folder cannot be written to.
    """
    folder = config.get_base_dir()
    checkpoint = config.get_checkpoint_dir() / f"step-{step:09d}.ckpt"
    # No optimizer state: a run that is trained on starts its optimizers anew.
    state = {"step": step, "pipeline": pipeline.state_dict(), "optimizers": {}, "schedulers": {}, "scalers": {}}
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        # The temporary files are those of a process that was killed while it wrote this run.
        leftovers = [*checkpoint.parent.glob("step-*.ckpt"), *folder.rglob(".*.tmp")]
        for old in [folder / CONFIG, folder / RECORD, *leftovers]:
            old.unlink(missing_ok=True)
        _check_space(folder, state["pipeline"])
        with atomic_path(folder / COORDINATES) as temporary:
            pipeline.datamanager.train_dataparser_outputs.save_dataparser_transform(temporary)
        with atomic_path(checkpoint) as temporary:
            torch.save(state, temporary)
        write_record(folder, lift, settings, report, provenance)
        config.save_config()
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        for written in (folder / CONFIG, folder / RECORD, checkpoint):  # nothing without the rest
            with suppress(OSError):
                written.unlink()
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"The run {folder} cannot be written ({first_line(error)}): free some space there, or choose "
            "another --output-dir."
        ) from error
    return folder / CONFIG


def _check_space(folder: Path, state: dict[str, Any]) -> None:
    needed = sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, torch.Tensor))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The run needs {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB left: free some space, or "
            "choose another --output-dir."
        )
