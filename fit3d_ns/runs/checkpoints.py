"""Checkpoints of a run: found, and read without running code from them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.compat import register_safe_globals
from fit3d_ns.runs.checkpoint_checks import check_state
from fit3d_ns.runs.names import (
    CHECKPOINTS,
    CONFIG,
    DECODER,
    DECODER_WEIGHT,
    EXTRA_STATE,
    FEATURES,
    GAUSSIANS,
    GEOMETRY,
    LIFTED,
    SPLAT,
)
from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.files import atomic_path, explain_unwritable
from fit3d_ns.support.tensor_files import TensorSpec, read_tensors
from fit3d_ns.support.torch_files import read_torch

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
    """Returns the run that a checkpoint belongs to: the folder that holds ``config.yml``.

    Args:
        checkpoint: Path of a checkpoint, in the folder ``nerfstudio_models`` of its run.
    """
    return checkpoint.absolute().parent.parent


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Reads a nerfstudio checkpoint, memory-mapped and with torch's restricted loader.

    That of a lift is completed: Gaussians come from the geometry that was lifted onto, features and decoder from the
    file beside it.

    Args:
        checkpoint: Path of a ``step-*.ckpt``.

    Returns:
        nerfstudio's dictionary: ``step``, ``pipeline`` (tensors by name), ``optimizers``, ``schedulers``.

    Raises:
        UserError: If a file is missing, damaged, holds anything but tensors and plain values, or does not belong to
            the others.
    """
    state = _read_alone(checkpoint)
    if GEOMETRY in state:
        state["pipeline"] = {**_gaussians(checkpoint, state[GEOMETRY]), **state["pipeline"], **_lifted(checkpoint)}
        try:
            check_state(state, checkpoint)
        except DamagedFile as error:
            raise UserError(f"{run_folder(checkpoint)} is damaged ({error}): lift again.") from error
    return state


def read_extra_state(checkpoint: Path) -> dict[str, Any]:
    """Reads what this package's pipeline keeps in a checkpoint beside tensors: the teacher's identity among it.

    Args:
        checkpoint: Path of a ``step-*.ckpt``.

    Returns:
        As ``Fit3DPipeline.get_extra_state`` made it; empty in a checkpoint of another method.

    Raises:
        UserError: As `read_checkpoint`, but for the files that a lift consists of.
    """
    return _read_alone(checkpoint)["pipeline"].get(EXTRA_STATE) or {}


def geometry_of(checkpoint: Path) -> Path:
    """Returns the file that holds the Gaussians of a checkpoint: itself, unless it is that of a lift.

    Args:
        checkpoint: Path of a ``step-*.ckpt``.

    Raises:
        UserError: As `read_extra_state`.
    """
    state = _read_alone(checkpoint)
    return _geometry_file(checkpoint, state[GEOMETRY]) if GEOMETRY in state else checkpoint


def geometry_reference(geometry: Path, checkpoint: Path, num_gaussians: int) -> dict[str, Any]:
    """Returns what the checkpoint of a lift says of its geometry.

    Args:
        geometry: A ``step-*.ckpt``, or safetensors by the names of a checkpoint.
        checkpoint: Where the lift's checkpoint will stand.
        num_gaussians: How many the geometry holds, N.
    """
    home = checkpoint.absolute().parents[4]  # RUN/lifts/METHOD/NAME/nerfstudio_models/step-*.ckpt
    inside = geometry.absolute().is_relative_to(home)  # then both move together
    path = os.path.relpath(geometry.absolute(), checkpoint.absolute().parent) if inside else geometry.absolute()
    return {"path": Path(path).as_posix(), "bytes": geometry.stat().st_size, "num_gaussians": num_gaussians}


def _read_alone(checkpoint: Path) -> dict[str, Any]:
    register_safe_globals()
    try:
        state = read_torch(checkpoint, mmap=True)
        check_state(state, checkpoint)
    except FileNotFoundError as error:
        raise UserError(f"The checkpoint {checkpoint} does not exist: check the path.") from error
    except DamagedFile as error:
        raise UserError(
            f"The checkpoint {checkpoint} cannot be read ({error}): use another checkpoint of that run."
        ) from error
    return state


def _geometry_file(checkpoint: Path, reference: Any) -> Path:
    """Finds the geometry of a lift.

    Raises:
        UserError: If the lift's checkpoint is damaged, or the geometry is gone or another one.
    """
    try:
        path, size = checkpoint.absolute().parent / reference["path"], int(reference["bytes"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"The checkpoint {checkpoint} names no geometry ({error!r}): lift it again.") from error
    path = Path(os.path.normpath(path))
    if not path.is_file():
        raise UserError(
            f"The geometry {path} that {run_folder(checkpoint)} was lifted onto is missing: restore it, or lift again."
        )
    if path.stat().st_size != size:
        raise _another_geometry(path, checkpoint)
    return path


def _another_geometry(path: Path, checkpoint: Path) -> UserError:
    return UserError(
        f"The geometry {path} is not the one that {run_folder(checkpoint)} was lifted onto: restore it, or lift again."
    )


def _gaussians(checkpoint: Path, reference: Any) -> dict[str, Tensor]:
    """Reads the Gaussians that a lift was lifted onto, by their names in a checkpoint."""
    path = _geometry_file(checkpoint, reference)
    try:
        is_run = path.suffix != ".safetensors"
        tensors = _read_alone(path)["pipeline"] if is_run else read_tensors(path, checksum=False).tensors
        gaussians = {f"{GAUSSIANS}{name}": tensors[f"{GAUSSIANS}{name}"] for name in SPLAT}
    except (FileNotFoundError, DamagedFile, KeyError) as error:
        raise UserError(f"The geometry {path} is damaged ({error}): restore it, or lift again.") from error
    counts = {len(tensor) for tensor in gaussians.values()}
    if counts != {reference.get("num_gaussians")}:
        raise _another_geometry(path, checkpoint)
    return gaussians


def _lifted(checkpoint: Path) -> dict[str, Tensor]:
    """Reads features and decoder of a lift, by their names in a checkpoint."""
    tensors = read_lifted(run_folder(checkpoint), whole=True)
    return {f"{GAUSSIANS}{FEATURES}": tensors[FEATURES].float(), DECODER_WEIGHT: tensors[DECODER]}


def drop_optimizer_state(checkpoint: Path) -> None:
    """Writes a checkpoint anew without its optimizers' state, two thirds of it; nothing happens where there is none.

    A run that is trained on from there starts its optimizers anew.

    Args:
        checkpoint: Path of a ``step-*.ckpt``.

    Raises:
        UserError: If it cannot be read or written.
    """
    state = read_checkpoint(checkpoint)
    if not state.get("optimizers"):
        return
    with explain_unwritable(checkpoint), atomic_path(checkpoint) as temporary:
        torch.save({**state, "optimizers": {}, "schedulers": {}, "scalers": {}}, temporary)


def read_lifted(run: Path, whole: bool = False) -> dict[str, Tensor]:
    """Reads what was lifted onto every Gaussian.

    Args:
        run: The folder of a run or lift.
        whole: Whether features and decoder must be there, as in a lift that stands apart from its geometry.

    Returns:
        ``fit3d_variance`` [N], ``fit3d_coverage`` [N], and maybe features [N, D] and decoder [C, D, 3, 3].

    Raises:
        UserError: If the file is missing or damaged.
    """
    path = run / LIFTED
    half_or_full = (torch.float16, torch.float32)
    needed = {name: TensorSpec(torch.float32, ("N",)) for name in ("fit3d_variance", "fit3d_coverage")}
    parts = {FEATURES: TensorSpec(half_or_full, ("N", "D")), DECODER: TensorSpec(torch.float32, ("C", "D", 3, 3))}
    try:
        # Files of version 0.1.0 carry no checksum.
        found = read_tensors(path, {**needed, **(parts if whole else {})}, {} if whole else parts, checksum=False)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: lift again.") from error
    except DamagedFile as error:
        raise UserError(f"{path} is damaged ({error}): lift again.") from error
    return found.tensors


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
            f"The checkpoint's features have {features.shape[1]} dimensions, but {{feature_dim}} is "
            f"{dim}: use the same value."
        )
    if weight.shape[0] != width:
        raise UserError(
            f"The checkpoint was trained with a teacher of {weight.shape[0]} channels, but "
            f"{{backbone}} has {width}: use the same teacher."
        )
