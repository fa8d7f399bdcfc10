"""Checkpoints of a training: whole or absent, read without running code, pruned."""

import random
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fit3d_ns.runs.checkpoints import refusal_reason
from fit3d_ns.support.errors import UserError, first_line
from fit3d_ns.support.files import atomic_path

SCHEMA = 2
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d+)\.pt")


def check_writable(output_dir: Path) -> None:
    """Makes a training's folder and checks that files can be written there.

    Raises:
        UserError: If not.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise UserError(
            f"The folder {output_dir} cannot be written to ({error.strerror}): choose another --output-dir."
        ) from error


def check_space(output_dir: Path, checkpoint_bytes: int, result_bytes: int, keep: int) -> None:
    """Checks that checkpoints and result have room.

    Args:
        output_dir: The training's folder.
        checkpoint_bytes: Size of one checkpoint.
        result_bytes: Size of the weights that are written at the end.
        keep: Newest checkpoints that stay; one more exists while it is written.

    Raises:
        UserError: If they have not.
    """
    missing = max(keep + 1 - len(list_checkpoints(output_dir)), 1)
    needed, free = missing * checkpoint_bytes + result_bytes, shutil.disk_usage(output_dir).free
    if needed > free:
        raise UserError(
            f"Checkpoints and weights need {needed / 1e9:.2f} GB and {output_dir} has {free / 1e9:.2f} GB left: free "
            "some space, choose another --output-dir, or lower --keep-checkpoints."
        )


def save_checkpoint(output_dir: Path, state: Mapping[str, Any], keep: int) -> Path:
    """Writes a checkpoint and removes old ones.

    Args:
        output_dir: The training's folder.
        state: Tensors and plain values, with ``step``, the number of steps taken.
        keep: Newest checkpoints that stay, at least one.

    Returns:
        The checkpoint's path.

    Raises:
        UserError: If the disk refuses; older checkpoints stay then.
    """
    path = output_dir / FOLDER / f"step-{state['step']:08d}.pt"
    with atomic_path(path) as temporary:
        try:
            torch.save({"schema": SCHEMA, **state}, temporary)
        except RuntimeError as error:  # torch's writer wraps the operating system's error
            raise OSError(first_line(error)) from error
    for old in list_checkpoints(output_dir)[: -max(keep, 1)]:
        old.unlink(missing_ok=True)
    return path


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the checkpoints of a training, oldest first."""
    found = {
        int(match[1]): path for path in (output_dir / FOLDER).glob("*.pt") if (match := _NAME.fullmatch(path.name))
    }
    return [found[step] for step in sorted(found)]


def load_checkpoint(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reads a checkpoint and checks that it continues this very training.

    Args:
        path: The checkpoint.
        settings: Everything that decides the result; must equal the checkpoint's ``settings``.

    Returns:
        The state that was saved.

    Raises:
        UserError: If it is damaged, holds more than tensors and plain values, or belongs to other settings.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different kind for each sort of damage
        raise UserError(
            f"The checkpoint {path} cannot be read ({refusal_reason(error)}): delete it to go on from the one before, "
            "or start anew in another --output-dir."
        ) from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        raise UserError(f"{path} is not a checkpoint that this version of fit3d-distill wrote: start anew.")
    saved = state["settings"]
    before, now = saved.get("student", {}), settings["student"]
    if before != now:
        name = next(name for name in (*now, *before) if before.get(name) != now.get(name))
        raise UserError(
            f"The checkpoint {path} is of another backbone ({name}: {before.get(name)}, now {now.get(name)}): resume "
            "with the same, or use another --output-dir."
        )
    differing = [name for name in settings if saved.get(name) != settings[name]]
    if differing:
        name = differing[0]
        shown = "" if isinstance(settings[name], (list, dict)) else f" ({saved.get(name)}, now {settings[name]})"
        raise UserError(
            f"The checkpoint {path} was made with other settings, {', '.join(differing)}{shown}: resume with the "
            "same, or use another --output-dir."
        )
    return state


def random_state() -> dict[str, Any]:
    """Returns the state of all random generators, as tensors and plain values."""
    kind, values, gauss = random.getstate()
    numpy_kind, numpy_keys, *numpy_rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [kind, list(values), gauss],
        "numpy": [numpy_kind, np.asarray(numpy_keys).tolist(), *numpy_rest],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Puts back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    cuda: torch.Tensor | None = state["cuda"]
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    kind, values, gauss = state["python"]
    random.setstate((kind, tuple(values), gauss))
    numpy_kind, numpy_keys, *numpy_rest = state["numpy"]
    np.random.set_state((numpy_kind, np.asarray(numpy_keys, dtype=np.uint32), *numpy_rest))
