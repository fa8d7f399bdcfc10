"""Every file that a command reads, damaged in every way: right all the same, or one sentence; never silently wrong."""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.commands import Command
from benchmarks.faults.kinds import NotApplicable
from benchmarks.faults.mutations import apply, mutations_of
from benchmarks.faults.running import run
from benchmarks.faults.world import World

FAULTS = ("code", "traceback", "silent", "half written", "not healed")
"""Ends that must not be."""


@dataclass(frozen=True)
class Case:
    """One damaged file under one command."""

    command: str
    """Name of the command."""
    file: str
    """Relative to the world's root."""
    kind: str
    """Of the damage."""
    seed: int
    """Of the damage."""


@dataclass(frozen=True)
class Verdict:
    """What came of a case."""

    case: Case
    """That was tried."""
    end: str
    """``equal``, ``sentence``, ``its word`` (a user's file says something else, as valid), or one of `FAULTS`."""
    named: bool | None
    """Whether a sentence names the file."""
    text: str
    """The sentence, or the end of what was said."""

    def plain(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return {**asdict(self.case), "end": self.end, "named": self.named, "text": self.text}


def all_cases(commands: list[Command], root: Path, seed: int) -> list[Case]:
    """Returns every case, shuffled.

    Args:
        commands: Of the world.
        root: Of the world.
        seed: Of the order, and of what each mutation draws.
    """
    cases = [
        Case(command.name, str(path), kind, seed)
        for command in commands
        for path in command.reads
        for kind in mutations_of(root / path)
    ]
    random.Random(seed).shuffle(cases)
    return cases


def judge(world: World, command: Command, case: Case, expected: dict[str, Any]) -> Verdict | None:
    """Damages a file and starts the command twice.

    Args:
        world: Restored first.
        command: The case's.
        case: What to do.
        expected: Values of the command in an undamaged world.

    Returns:
        The verdict; None where the damage does not apply to the file.
    """
    world.restore(command.without)
    path = world.root / case.file
    results = {str(name.relative_to(world.root)) for pattern in command.makes for name in world.root.glob(pattern)}
    before = {name: stamp for name, stamp in world.files().items() if str(name) in results and str(name) != case.file}
    try:
        apply(case.kind, path, random.Random(f"{case.file}{case.kind}{case.seed}"))
    except NotApplicable:
        return None
    ended = run(command.call, world.log)
    if world.marker.exists():
        return Verdict(case, "code", None, ended.text[-2000:])
    if ended.crashed or (ended.status and ended.sentence is None):
        return Verdict(case, "traceback", None, ended.text[-3000:])
    if ended.sentence is not None:
        named = path.name in ended.sentence or str(path.parent) in ended.sentence
        after = world.files()
        fresh = [str(n) for n in after if _is_result(world, command, n) and n not in before and str(n) != case.file]
        changed = [str(n) for n, stamp in before.items() if after.get(n) != stamp]
        if fresh or changed:
            return Verdict(case, "half written", named, f"{ended.sentence} [{(fresh + changed)[:3]}]")
        return Verdict(case, "sentence", named, ended.sentence)
    try:
        found = command.values(world)
    except Exception as error:  # noqa: BLE001  whatever a broken result raises
        return Verdict(case, "silent", None, f"the result does not open: {error}")
    if found != expected:
        theirs = case.file.startswith(("scene/", "blocks/", "camera_path")) or case.file.endswith("config.yml")
        theirs = theirs and "cache" not in case.file
        differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        return Verdict(case, "its word" if theirs else "silent", None, f"{differing[:3]} {ended.text[-600:]}")
    for path in command.without:
        (world.root / path).unlink(missing_ok=True)
    again = run(command.call, world.log)
    if again.status or command.values(world) != expected or "is damaged" in again.text or "made anew" in again.text:
        return Verdict(case, "not healed", None, again.text[-2000:])
    return Verdict(case, "equal", None, "")


def _is_result(world: World, command: Command, path: Path) -> bool:
    return any((world.root / path).match(pattern) for pattern in command.makes)
