"""Lifting in place: a model's features and decoder are replaced by lifted ones."""

from pathlib import Path
from typing import Any, Optional

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save

from fit3d_ns.files import atomic_write_bytes, atomic_write_json
from fit3d_ns.lifting.lift import Lift, LiftScene, lift_features, passes
from fit3d_ns.lifting.operator import FeatureOperator
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.lifting.views import model_geometry
from fit3d_ns.model import FEATURES, Fit3DSplatModel
from fit3d_ns.report import Report

RECORD = "lift.json"
"""What was lifted, how, and how well; written last, so a run that has it is whole."""
REPORT = "lift.html"
"""What was lifted as pictures, tables and curves."""
VARIANCE = "lift.safetensors"
"""Per-Gaussian tensors beside the checkpoint: ``fit3d_variance`` and ``fit3d_coverage``, both [N] float32."""


def lift_scene(model: Fit3DSplatModel, scene: LiftScene, settings: LiftSettings) -> Lift:
    """Lifts features onto a model's Gaussians, under a progress bar.

    Args:
        model: In evaluation mode; its features and decoder are overwritten.
        scene: Its views.
        settings: The user's choices.

    Raises:
        UserError: As ``lift_features``.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        total = passes(settings) * len(scene.training)
        task = progress.add_task(f"Lifting {len(scene.training)} views", total=total)
        with torch.no_grad():
            lift = lift_features(
                FeatureOperator(model_geometry(model), model.feature_grid),
                scene,
                model.fit3d_decoder.width,
                model.config.feature_dim,
                settings,
                lambda count: progress.advance(task, count),
            )
        progress.update(task, completed=total)
    model.gauss_params[FEATURES].data.copy_(lift.values)
    model.fit3d_decoder.weight.data.copy_(lift.decoder.weight.data)
    model.feature_view.refresh()
    model.feature_view.take_disagreement(lift.variance, lift.coverage)
    return lift


def write_record(
    folder: Path, lift: Lift, settings: LiftSettings, report: Report, provenance: Optional[dict[str, Any]] = None
) -> None:
    """Writes what is worth knowing about a lift beside its checkpoint.

    Args:
        folder: Of the run.
        lift: The outcome.
        settings: The user's choices.
        report: Of `fit3d_ns.lifting.report.lift_report`.
        provenance: Where the geometry came from.

    Raises:
        UserError: If the folder cannot be written to.
    """
    tensors = {"fit3d_variance": lift.variance, "fit3d_coverage": lift.coverage}
    atomic_write_bytes(
        folder / VARIANCE, save({name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()})
    )
    report.write(folder / REPORT)
    atomic_write_json(folder / RECORD, {**(provenance or {}), **lift.summary(settings)})
