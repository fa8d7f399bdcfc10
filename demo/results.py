"""What the commands wrote, read back for the report; every number of the page comes from here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from demo.config import DemoConfig
from demo.stages import Places, places
from fit3d_ns.runs.names import RECORD
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_json
from fit3d_ns.support.json_files import UNREADABLE, read_record


@dataclass(frozen=True)
class RoomResult:
    """One lifted room."""

    name: str
    """Of the room's folder."""
    scores: dict[str, Any]
    """Of ns-eval, on the held-out views: psnr, ssim, feature_cosine ..."""
    lift: dict[str, Any]
    """The whole lift.json."""


@dataclass(frozen=True)
class Comparison:
    """A row of a probe beside one that it should beat, over the same test photos."""

    row: str
    """Row of the probe's table."""
    baseline: str
    """The row that it should beat."""
    gain: float
    """Difference of the scores, positive where the row is better."""
    low: float
    """Of the interval that holds 95 % of the draws of test photos."""
    high: float
    """End of that interval."""

    @property
    def verdict(self) -> str:
        """One or two words."""
        if self.low <= 0 <= self.high:
            return "not told apart"
        return "better" if self.gain > 0 else "worse"


@dataclass(frozen=True)
class DemoResults:
    """Everything the demo measured."""

    rooms: list[RoomResult]
    """All that were lifted."""
    tuned: dict[str, Any]
    """metrics.json of the distillation."""
    control: dict[str, Any] | None
    """The same of the control."""
    correspondence: dict[str, Any]
    """metrics.json of the probe; likewise the others."""
    segmentation: dict[str, Any]
    """metrics.json of the probe for segmentation."""
    depth: dict[str, Any]
    """metrics.json of the probe for depth."""


def read_results(config: DemoConfig) -> DemoResults:
    """Reads the files that the commands wrote.

    Args:
        config: Of a demo whose stages are done.

    Returns:
        Every number of the page.

    Raises:
        UserError: If one is missing or damaged.
    """
    where = places(config)
    return DemoResults(
        rooms=[_read_room(where, room) for room in where.lifted_rooms],
        tuned=_read(where.distilled("lifted") / "metrics.json"),
        control=_read(where.distilled("control") / "metrics.json") if config.control else None,
        correspondence=_read(where.probe("correspondence") / "metrics.json"),
        segmentation=_read(where.probe("segmentation") / "metrics.json"),
        depth=_read(where.probe("depth") / "metrics.json"),
    )


def comparisons(differences: Sequence[dict[str, Any]], higher_is_better: bool) -> list[Comparison]:
    """Turns a probe's paired differences into gains.

    Args:
        differences: Of a probe's metrics.json.
        higher_is_better: What is a gain.

    Returns:
        One for each of them.
    """
    found = []
    for one in differences:
        value, low, high = one["value"], one["low"], one["high"]
        if not higher_is_better:
            value, low, high = -value, -high, -low
        found.append(Comparison(one["row"], one["baseline"], value, low, high))
    return found


def write_metrics(config: DemoConfig, results: DemoResults) -> Path:
    """Writes ``metrics.json``: every number of the page.

    Args:
        config: Of a demo whose stages are done.
        results: What the commands wrote.

    Returns:
        Its path.
    """
    path = config.output_dir / "metrics.json"
    atomic_write_json(path, asdict(results))
    return path


def _read_room(where: Places, room: Path) -> RoomResult:
    scores = _read(where.evaluation(room) / "eval.json")["results"]
    return RoomResult(room.name, scores, _read(where.run(room) / RECORD))


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except UNREADABLE as error:
        raise UserError(f"{path} is missing or damaged: delete the demo's folder and start again.") from error
