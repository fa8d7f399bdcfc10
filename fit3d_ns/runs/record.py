"""What ``fit3d-lift`` leaves in a run for looking at."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.lifting.lift import Lift
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.runs.checkpoints import read_lifted
from fit3d_ns.runs.names import FEATURES, LIFTED, RECORD, REPORT
from fit3d_ns.support.files import atomic_write_json
from fit3d_ns.support.html_report import Report
from fit3d_ns.support.tensor_files import write_tensors


def write_lifted(folder: Path, lift: Lift, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Writes what was lifted onto every Gaussian, beside the checkpoint.

    Args:
        folder: Of the run.
        lift: Features, decoder and measures, as `lift_features` returns them.
        tensors: Features and decoder by their names, where the checkpoint does not hold them. Features are stored in
            half precision where its range holds them, as in bundles.

    Raises:
        UserError: If the folder cannot be written to.
    """
    stored = {"fit3d_variance": lift.variance.float(), "fit3d_coverage": lift.coverage.float()}
    for name, tensor in (tensors or {}).items():
        half = name == FEATURES and float(tensor.abs().max()) < torch.finfo(torch.float16).max
        stored[name] = tensor.half() if half else tensor.float()
    write_tensors(folder / LIFTED, stored)


def write_record(
    folder: Path, lift: Lift, settings: LiftSettings, report: Report, provenance: dict[str, Any] | None = None
) -> None:
    """Writes what is worth knowing about a lift, after everything that it vouches for.

    Args:
        folder: Of the run.
        lift: Features, decoder and measures, as `lift_features` returns them.
        settings: The user's choices.
        report: Of `fit3d_ns.scenes.lift.lift_report`.
        provenance: Where the geometry came from, as plain JSON values.

    Raises:
        UserError: If the folder cannot be written to.
    """
    report.write(folder / REPORT)
    atomic_write_json(folder / RECORD, {**(provenance or {}), **lift.summary(settings)})


def read_disagreement(run: Path) -> tuple[Tensor, Tensor] | None:
    """Returns variance and coverage of every Gaussian, [N] each; None if the run was not lifted.

    Args:
        run: The run's folder.

    Raises:
        UserError: If the file is damaged.
    """
    if not os.path.lexists(run / LIFTED):
        return None
    tensors = read_lifted(run)
    return tensors["fit3d_variance"], tensors["fit3d_coverage"]
