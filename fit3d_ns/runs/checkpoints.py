"""Checkpoints of a run: found, and read without running code from them."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.compat import register_safe_globals
from fit3d_ns.runs.names import CHECKPOINTS, CONFIG, DECODER, FEATURES
from fit3d_ns.support.errors import UserError

_CHECKPOINT = re.compile(r"step-(\d+)\.ckpt")


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """Finds the checkpoint that a user means.

    Args:
        path: A checkpoint, a run's ``config.yml``, a run folder, or its ``nerfstudio_models`` folder.
        step: The step wanted; the newest if ``None``.

    Returns:
        Path of the checkpoint.

    Raises:
        UserError: If there is none there.
    """
    path = path.expanduser()
    if path.suffix == ".ckpt":
        if not path.is_file():
            raise UserError(f"The checkpoint {path} does not exist: check the path.")
        return path
    folder = path.parent if path.name == CONFIG else path
    if (folder / CHECKPOINTS).is_dir():
        folder = folder / CHECKPOINTS
    found = {int(match[1]): file for file in folder.glob("*.ckpt") if (match := _CHECKPOINT.fullmatch(file.name))}
    if not found:
        raise UserError(f"{folder} holds no checkpoint (step-*.ckpt): name the folder of a run that saved one.")
    if step is None:
        return found[max(found)]
    if step not in found:
        steps = ", ".join(str(known) for known in sorted(found))
        raise UserError(f"{folder} holds no checkpoint of step {step}, only of {steps}: change --load-step.")
    return found[step]


def run_folder(checkpoint: Path) -> Path:
    """Returns the run that a checkpoint belongs to: the folder that holds ``config.yml``."""
    return checkpoint.absolute().parent.parent


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Reads a nerfstudio checkpoint, memory-mapped and with torch's restricted loader.

    Args:
        checkpoint: Path of a ``step-*.ckpt``.

    Returns:
        nerfstudio's dictionary: ``step``, ``pipeline`` (tensors by name), ``optimizers``, ``schedulers``.

    Raises:
        UserError: If the file is damaged, or holds anything but tensors and plain values.
    """
    register_safe_globals()
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a different kind for each sort of damage
        raise UserError(
            f"The checkpoint {checkpoint} cannot be read ({refusal_reason(error)}): use another checkpoint of that run."
        ) from error
    if not isinstance(state, dict) or "pipeline" not in state:
        raise UserError(f"{checkpoint} is not a nerfstudio checkpoint: it holds no `pipeline` entry.")
    return state


def refusal_reason(error: Exception) -> str:
    """Says why torch's restricted loader gave a file up, without torch's advice to load it unrestricted.

    Args:
        error: What ``torch.load(..., weights_only=True)`` raised.
    """
    asked_for = re.search(r"GLOBAL (\S+)", str(error))
    if asked_for is not None:
        return f"it asks for `{asked_for[1]}`, which is neither a tensor nor a plain value, and was not loaded"
    return f"it is damaged or was not written by torch, {type(error).__name__}"


def check_features(state: Mapping[str, Tensor], dim: int, width: int) -> None:
    """Checks that a model's part of a checkpoint has the features that are asked for.

    Args:
        state: Tensors by their names in the model.
        dim: Channels D on every Gaussian.
        width: Channels C of the teacher.

    Raises:
        UserError: If it has no features, or features of another dimension or width.
    """
    features, weight = state.get(f"gauss_params.{FEATURES}"), state.get(f"{DECODER}.weight")
    if features is None or weight is None:
        raise UserError(
            "The checkpoint holds no lifted features (a plain splatfacto run?): to add features to it, train with "
            "--pipeline.model.init-from instead of --load-dir."
        )
    if features.shape[1] != dim:
        raise UserError(
            f"The checkpoint's features have {features.shape[1]} dimensions, but --pipeline.model.feature-dim is "
            f"{dim}: use the same value."
        )
    if weight.shape[0] != width:
        raise UserError(
            f"The checkpoint was trained with a teacher of {weight.shape[0]} channels, but "
            f"--pipeline.datamanager.backbone has {width}: use the same teacher."
        )
