"""Carries out the stages one by one, and remembers which are done."""

import json
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from demo.commands import run_command_line
from demo.stages import Stage
from fit3d_ns.support.console import CONSOLE
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_json, atomic_write_text

_RECORDS = "stages"
_SETTINGS = "demo.json"


@dataclass(frozen=True)
class Record:
    """A stage that is done."""

    stage: Stage
    seconds: float
    """On the wall clock, of the start that finished it."""
    cpu_seconds: float
    """Of all threads together."""
    resumed: bool
    """Whether an earlier start had begun it."""


def hold(root: Path) -> FileLock:
    """Takes the output folder for this process; the lock goes with the process.

    Raises:
        UserError: If another demo is at work there, or the folder cannot be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"Another demo is at work in {root}: wait for it, or choose another --output-dir.") from None
    except OSError as error:
        raise UserError(f"The folder {root} cannot be used ({error.strerror}): choose another --output-dir.") from error
    return lock


def stored_settings(root: Path) -> dict[str, Any] | None:
    """Returns the settings that a demo was begun with; None if there is none."""
    try:
        return json.loads((root / _SETTINGS).read_text())
    except (OSError, ValueError):
        return None


def keep_settings(root: Path, settings: dict[str, Any]) -> None:
    """Writes down what a demo is begun with.

    Raises:
        UserError: If the folder holds a demo of other settings.
    """
    stored = stored_settings(root)
    if stored is None:
        atomic_write_json(root / _SETTINGS, settings)
        return
    for name in {**stored, **settings}:
        if stored.get(name) != settings.get(name):
            raise UserError(
                f"{root} holds a demo with {name} {stored.get(name)} instead of {settings.get(name)}: go on with the "
                "same settings, delete it, or choose another --output-dir."
            )


def run_stages(root: Path, stages: Sequence[Stage]) -> list[Record]:
    """Runs what is not done yet.

    Args:
        root: The output folder.
        stages: All stages, in order.

    Returns:
        A record of each stage.

    Raises:
        UserError: If a command failed.
    """
    records: list[Record] = []
    session: list[Record] = []
    for number, stage in enumerate(stages, start=1):
        record = _read(root, stage)
        if record is None:
            left = _seconds_left(session, stages[number - 1 :])
            heading = f"\n[bold]{number} of {len(stages)}: {stage.title}[/bold] (about {_clock(left)} left)"
            CONSOLE.print(heading, highlight=False, soft_wrap=True)
            CONSOLE.print(f"$ {shlex.join(stage.command)}", style="dim", highlight=False, markup=False, soft_wrap=True)
            record = _run(root, stage)
            session.append(record)
        else:
            CONSOLE.print(f"{number} of {len(stages)}: {stage.title}: done before", highlight=False)
        records.append(record)
    return records


def _run(root: Path, stage: Stage) -> Record:
    begun = root / _RECORDS / f"{stage.name}.begun"
    resumed = begun.exists()
    atomic_write_text(begun, "")
    wall, cpu = time.perf_counter(), _cpu_seconds()
    run_command_line(stage.command)
    record = Record(stage, time.perf_counter() - wall, _cpu_seconds() - cpu, resumed)
    content = {
        "command": list(stage.command),
        "seconds": record.seconds,
        "cpu_seconds": record.cpu_seconds,
        "resumed": resumed,
    }
    atomic_write_json(root / _RECORDS / f"{stage.name}.json", content)
    begun.unlink()
    return record


def _read(root: Path, stage: Stage) -> Record | None:
    try:
        content = json.loads((root / _RECORDS / f"{stage.name}.json").read_text())
        if content["command"] != list(stage.command):
            return None  # of another version of this program
        return Record(stage, content["seconds"], content["cpu_seconds"], content["resumed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _seconds_left(session: Sequence[Record], rest: Sequence[Stage]) -> float:
    """The estimates of what is left, scaled by how they fared so far."""
    expected = sum(record.stage.seconds for record in session)
    pace = sum(record.seconds for record in session) / expected if expected else 1.0
    return pace * sum(stage.seconds for stage in rest)


def _clock(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 1):.0f} s"


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
