"""Checkpoints of a training: whole or absent, read without running code, pruned."""

import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fit3d_ns.support.errors import DamagedFile, UserError, first_line
from fit3d_ns.support.files import atomic_path
from fit3d_ns.support.json_files import build
from fit3d_ns.support.tensor_files import is_finite
from fit3d_ns.support.torch_files import read_torch

SCHEMA = 3
"""2 also held the state of random generators, from which nothing draws: order and mirroring follow from the seed."""
FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d+)\.pt")


def check_writable(output_dir: Path) -> None:
    """Makes a training's folder and checks that files can be written there.

    Args:
        output_dir: Of the training.

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
    """Returns the checkpoints of a training, oldest first.

    Args:
        output_dir: Of the training.
    """
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
        state = read_torch(path)
        if isinstance(state, dict) and state.get("schema") == 2:
            state = {**{name: value for name, value in state.items() if name != "random"}, "schema": SCHEMA}
        if not isinstance(state, dict) or state.get("schema") != SCHEMA:
            raise UserError(f"{path} is not a checkpoint that this version of fit3d-distill wrote: start anew.")
        _check_state(state)
    except (FileNotFoundError, DamagedFile) as error:
        raise UserError(
            f"The checkpoint {path} cannot be read ({error}): delete it to go on from the one before, or start anew in "
            "another --output-dir."
        ) from error
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


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds; tensors are looked at one by one."""

    schema: int
    step: int
    num_steps: int
    settings: dict[str, Any]
    block_bytes: int | None
    model: dict[str, Any]
    optimizer: dict[Any, Any]
    average: dict[str, Any] | None
    losses: Any
    validation: Any
    curve: Any

    def __post_init__(self) -> None:
        if not 0 <= self.step <= self.num_steps:
            raise ValueError(f"step is {self.step}, not from 0 to {self.num_steps}")
        if not isinstance(self.settings.get("student"), dict):
            raise ValueError("settings.student is no dictionary")
        pairs = isinstance(self.losses, list) and all(_is_pair(entry) for entry in self.losses)
        measured = isinstance(self.validation, list) and all(
            len(entry) == 2 and isinstance(entry[1], dict) for entry in self.validation
        )
        if not pairs or not measured or not _is_pair(self.curve):
            raise ValueError("losses, validation or curve are no lists of pairs")


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(x, (int, float)) for x in value)


def _check_state(state: dict[Any, Any]) -> None:
    """Refuses a state that no training can go on from."""
    build(_State, state)
    for name, holder in (("model", state["model"]), ("average", state["average"] or {})):
        for key, tensor in holder.items():
            if not isinstance(tensor, torch.Tensor) or not is_finite(tensor):
                raise DamagedFile(f"{name}.{str(key)[:60]} is no tensor of finite numbers")
    for key, moments in state["optimizer"].items():
        values = list(moments.values()) if isinstance(moments, dict) else [None]
        for value in values:
            if not isinstance(value, (torch.Tensor, int, float)) or not is_finite(torch.as_tensor(value)):
                raise DamagedFile(f"optimizer.{key} holds no finite numbers")
