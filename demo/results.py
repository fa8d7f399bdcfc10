"""What the commands wrote, read back for the report; every number of the page comes from here."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.config import DemoConfig
from demo.stages import Places, places
from fit3d_ns.support.errors import UserError

_CLEAR = 2.0
"""Differences above this many standard deviations of a difference are called differences."""


@dataclass(frozen=True)
class RoomResult:
    """One lifted room."""

    name: str
    scores: dict[str, Any]
    """Of ns-eval, on the held-out views: psnr, ssim, feature_cosine ..."""
    lift: dict[str, Any]
    """The whole lift.json."""


@dataclass(frozen=True)
class Comparison:
    """A row of a probe beside one that it should beat."""

    row: str
    baseline: str
    gain: float
    """Difference of the means, positive where the row is better."""
    spread: float | None
    """Standard deviation of that difference over the seeds of the heads; None for a single seed."""

    @property
    def verdict(self) -> str:
        """One or two words."""
        if self.spread is None:
            return "spread unknown"
        if abs(self.gain) <= _CLEAR * self.spread:
            return "no clear difference"
        return "better" if self.gain > 0 else "worse"


@dataclass(frozen=True)
class DemoResults:
    """Everything the demo measured."""

    rooms: list[RoomResult]
    tuned: dict[str, Any]
    """metrics.json of the distillation."""
    control: dict[str, Any] | None
    """The same of the control."""
    correspondence: dict[str, Any]
    """metrics.json of the probe; likewise the others."""
    segmentation: dict[str, Any]
    depth: dict[str, Any]


def read_results(config: DemoConfig) -> DemoResults:
    """Reads the files that the commands wrote.

    Args:
        config: Of a demo whose stages are done.

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


def comparisons(rows: dict[str, Any], metric: str, higher_is_better: bool) -> list[Comparison]:
    """Compares each fine-tuned row with the untuned one of the same width, and with its control.

    Args:
        rows: Of a probe's metrics.json.
        metric: Key of the number that is compared.
        higher_is_better: What is a gain.

    Returns:
        Comparisons of the rows that are there.
    """
    pairs = [("tuned", "original"), ("tuned", "control"), ("concat", "duplicate"), ("concat", "control_concat")]
    found = []
    for row, baseline in pairs:
        if row not in rows or baseline not in rows:
            continue
        a, b = rows[row][metric], rows[baseline][metric]
        if a["mean"] is None or b["mean"] is None:
            continue
        gain = (a["mean"] - b["mean"]) * (1 if higher_is_better else -1)
        known = a["spread"] is not None and b["spread"] is not None
        found.append(Comparison(row, baseline, gain, math.hypot(a["spread"], b["spread"]) if known else None))
    return found


def _read_room(where: Places, room: Path) -> RoomResult:
    run = where.run(room)
    return RoomResult(room.name, _read(run / "eval.json")["results"], _read(run / "lift.json"))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: delete the demo's folder and start again.") from error
