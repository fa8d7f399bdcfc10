"""Writes a lift beside the geometry that it belongs to, and knows one that is finished."""

import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.data.photos.bundled import hash_file
from fit3d_ns.lifting.lift import Lift
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.pipeline import Fit3DPipeline
from fit3d_ns.runs.checkpoints import find_checkpoint, geometry_reference, read_checkpoint
from fit3d_ns.runs.config_reader import read_config
from fit3d_ns.runs.coordinates import read_coordinates
from fit3d_ns.runs.names import (
    CONFIG,
    COORDINATES,
    DECODER,
    DECODER_WEIGHT,
    FEATURES,
    GAUSSIANS,
    GEOMETRY,
    HASH_LETTERS,
    LIFTED,
    RECORD,
    SPLAT,
)
from fit3d_ns.runs.record import write_lifted, write_record
from fit3d_ns.support.errors import DamagedFile, UserError, first_line
from fit3d_ns.support.files import atomic_path, discard
from fit3d_ns.support.html_report import Report
from fit3d_ns.support.json_files import build, read_json
from fit3d_ns.support.tensor_files import read_tensors, write_tensors
from fit3d_ns.trainer import Fit3DTrainerConfig

_LOGGER = logging.getLogger(__name__)


def finished_request(folder: Path) -> dict[str, Any] | None:
    """Returns what a finished lift in a folder was asked for; None if there is none that is whole.

    The record counts only where every file that it vouches for opens; what is damaged is said, and made anew.

    Args:
        folder: Of the lift.
    """
    if not os.path.lexists(folder / CONFIG):
        return None
    try:
        request = build(dict[str, Any], build(dict[str, Any], read_json(folder / RECORD)).get("request"), "request")
        read_config(folder)
        read_checkpoint(find_checkpoint(folder))
        if read_coordinates(folder) is None:
            return None
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        _LOGGER.warning("%s is damaged (%s): it is lifted anew.", folder / RECORD, error)
        return None
    except UserError as error:
        _LOGGER.warning("%s It is lifted anew.", error)
        return None
    return request


def write_geometry(folder: Path, source: Path, gaussians: Mapping[str, Tensor]) -> Path:
    """Writes Gaussians that come from no run, once for all that is lifted onto them.

    Args:
        folder: In which the lifts stand.
        source: The file that they were read from; its hash is part of the name.
        gaussians: By the names of ``SPLAT``.

    Returns:
        The file, safetensors by the names of a checkpoint.

    Raises:
        UserError: If the disk is full or the folder cannot be written to.
    """
    path = folder / f"geometry-{hash_file(source)[:HASH_LETTERS]}.safetensors"
    if not _is_whole(path):
        tensors = {f"{GAUSSIANS}{name}": gaussians[name].detach().cpu().contiguous() for name in SPLAT}
        _check_space(folder, tensors)
        discard(path)
        write_tensors(path, tensors)
    return path


def _is_whole(path: Path) -> bool:
    try:
        read_tensors(path)
    except FileNotFoundError:
        return False
    except DamagedFile as error:
        _LOGGER.warning("%s is damaged (%s): it is made anew.", path, error)
        return False
    return True


def write_lift(
    pipeline: Fit3DPipeline,
    config: Fit3DTrainerConfig,
    geometry: Path,
    step: int,
    lift: Lift,
    settings: LiftSettings,
    report: Report,
    provenance: dict[str, Any],
) -> Path:
    """Writes everything that nerfstudio's commands need to open the lift, beside the geometry.

    ``config.yml`` comes last: without it a folder is no run, so a kill at any moment leaves a whole lift or none.

    Args:
        pipeline: With the lifted model.
        config: Of the lift; names its folder.
        geometry: The file that holds the model's Gaussians.
        step: Number of the last training step that the geometry has behind it.
        lift: Features, decoder and measures, as `lift_features` returns them.
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
    state = dict(pipeline.state_dict())
    lifted = {FEATURES: state.pop(f"{GAUSSIANS}{FEATURES}"), DECODER: state.pop(DECODER_WEIGHT)}
    for name in SPLAT:
        del state[f"{GAUSSIANS}{name}"]
    reference = geometry_reference(geometry, checkpoint, len(lift.values))
    # No optimizer state: a run that is trained on starts its optimizers anew.
    written = {"step": step, "pipeline": state, "optimizers": {}, "schedulers": {}, "scalers": {}, GEOMETRY: reference}
    try:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        # The temporary files are those of a process that was killed while it wrote this lift.
        leftovers = [*checkpoint.parent.glob("step-*.ckpt"), *folder.rglob(".*.tmp")]
        for old in [folder / CONFIG, folder / RECORD, folder / LIFTED, folder / COORDINATES, *leftovers]:
            discard(old)
        _check_space(folder, {**state, **lifted})
        with atomic_path(folder / COORDINATES) as temporary:
            pipeline.datamanager.train_dataparser_outputs.save_dataparser_transform(temporary)
        write_lifted(folder, lift, lifted)
        with atomic_path(checkpoint) as temporary:
            torch.save(written, temporary)
        write_record(folder, lift, settings, report, provenance)
        config.save_config()
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        for path in (folder / CONFIG, folder / RECORD, checkpoint):  # nothing without the rest
            with suppress(OSError):
                path.unlink()
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"The lift {folder} cannot be written ({first_line(error)}): free some space there, or choose "
            "another --output-dir."
        ) from error
    return folder / CONFIG


def _check_space(folder: Path, state: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, torch.Tensor))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The lift needs {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB left: free some space, or "
            "choose another --output-dir."
        )
