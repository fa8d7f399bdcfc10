"""Every file that a command reads, damaged in every way: right all the same, or one sentence; never silently wrong."""

import random
import re
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.faults.commands import Command
from benchmarks.faults.kinds import NotApplicable
from benchmarks.faults.mutations import apply, mutations_of
from benchmarks.faults.reading import kind_of
from benchmarks.faults.running import run
from benchmarks.faults.world import World

SOME_FAILED = re.compile(r"\d+ of \d+ scenes failed ")
"""What ``fit3d`` ends with where it left out scenes."""
FAULTS = ("code", "traceback", "silent", "half written", "not healed")
"""Ends that must not be."""
_THEIRS = ("scene", "colmap", "blocks/", "camera_path", "names.txt", "e/splat.ply")
"""Beginnings of files of the user's, whose word is taken where it is a valid one."""
_NAMED_ANEW = ("teacher.safetensors",)
"""Likewise, where no run knows yet what was in it."""
_SAID = ("no card says otherwise", "coordinates follow from its scene's is not known")
"""What a command says when it goes on without a file that may be missing."""


@dataclass(frozen=True)
class Case:
    """One damaged file under one command."""

    command: str
    """Its name."""
    file: str
    """Relative to the world's root."""
    kind: str
    """Of the damage, see `mutations_of`."""
    anew: bool
    """Whether the command starts from nothing, instead of where it has been."""
    seed: int
    """Of what the damage draws."""

    @property
    def key(self) -> tuple[str, str, str, bool]:
        """What it has in common with the same case in another world, where names hold other hashes."""
        return self.command, "/".join(kind_of(Path(self.file))), self.kind, self.anew


@dataclass(frozen=True)
class Verdict:
    """What came of a case."""

    case: Case
    """What was done."""
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
    """Returns every case, so that the first of them are spread evenly over commands, files, and kinds of damage.

    Args:
        commands: Of the world.
        root: Of the world.
        seed: Of the order, and of what each mutation draws.
    """
    rng = random.Random(seed)
    placed = []
    for command in commands:
        start = rng.random()
        for number, case in enumerate(_shuffled_cases(command, root, seed, rng)):
            placed.append(((start + number) / command.damages, command.name, case))
    return [case for _, _, case in sorted(placed, key=lambda one: one[:2])]


def _shuffled_cases(command: Command, root: Path, seed: int, rng: random.Random) -> list[Case]:
    decks = []
    files = [*((path, True) for path in command.inputs), *((path, False) for path in command.found)]
    for path, anew in rng.sample(files, len(files)):
        kinds = sorted(mutations_of(root / path))
        decks.append([Case(command.name, str(path), kind, anew, seed) for kind in rng.sample(kinds, len(kinds))])
    return [case for cases in zip_longest(*decks) for case in cases if case is not None]


def judge(world: World, command: Command, case: Case) -> Verdict | None:
    """Damages a file and starts the command twice.

    Args:
        world: Restored first.
        command: The case's.
        case: What to do.

    Returns:
        The verdict; None where the damage does not apply to the file.
    """
    expected = command.first[0] if case.anew else command.second
    assert expected is not None
    made = world.made[command.name] if case.anew else []
    world.restore(made)
    there, path = world.paths(), world.root / case.file
    if not path.exists():  # another command of this world makes it
        return None
    results = {str(name.relative_to(world.root)) for pattern in command.makes for name in world.root.glob(pattern)}
    before = {name: stamp for name, stamp in world.files().items() if str(name) in results and str(name) != case.file}
    try:
        apply(case.kind, path, random.Random(f"{case.key}{case.seed}"))
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
        goes_on = SOME_FAILED.match(ended.sentence)  # the others' results are whole, and meant to be there
        if (fresh or changed) and not goes_on:
            return Verdict(case, "half written", named, f"{ended.sentence} [{(fresh + changed)[:3]}]")
        return Verdict(case, "sentence", named, ended.sentence)
    try:
        found = command.values(world)
    except Exception as error:  # noqa: BLE001  whatever a broken result raises
        return Verdict(case, "silent", None, f"the result does not open: {error}")
    if found != expected:
        theirs = case.file.startswith(_THEIRS) or case.file.endswith("config.yml")
        theirs = theirs or (case.anew and case.file in _NAMED_ANEW)
        theirs = (theirs and "cache" not in case.file) or any(said in ended.text for said in _SAID)
        differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        return Verdict(case, "its word" if theirs else "silent", None, f"{differing[:3]} {ended.text[-600:]}")
    if case.anew:
        world.start_anew(made, there)
    again = run(command.call, world.log)
    if again.status or command.values(world) != expected or "is damaged" in again.text or "made anew" in again.text:
        return Verdict(case, "not healed", None, again.text[-2000:])
    return Verdict(case, "equal", None, "")


def _is_result(world: World, command: Command, path: Path) -> bool:
    return any((world.root / path).match(pattern) for pattern in command.makes)
