"""What ``fit3d-lift`` leaves in a run for looking at."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from fit3d_ns.lifting.lift import Lift
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.runs.names import RECORD, REPORT, VARIANCE
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_bytes, atomic_write_json
from fit3d_ns.support.html_report import Report


def write_record(
    folder: Path, lift: Lift, settings: LiftSettings, report: Report, provenance: dict[str, Any] | None = None
) -> None:
    """Writes what is worth knowing about a lift beside its checkpoint.

    Args:
        folder: Of the run.
        lift: The outcome.
        settings: The user's choices.
        report: Of `fit3d_ns.scenes.lift.lift_report`.
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


def read_disagreement(run: Path) -> tuple[Tensor, Tensor] | None:
    """Returns variance and coverage of every Gaussian, [N] each; None if the run was not lifted.

    Args:
        run: The run's folder.

    Raises:
        UserError: If the file is damaged.
    """
    path = run / VARIANCE
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        return tensors["fit3d_variance"], tensors["fit3d_coverage"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): lift the run again to see where views disagree.") from error
