"""Disks that fill up, folders that cannot be written to, files that may not grow: one sentence, and nothing torn."""

import os
import random
import resource
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.commands import Command
from benchmarks.faults.running import Ended, run
from benchmarks.faults.world import World

NOBODY = 65534


@dataclass(frozen=True)
class Limited:
    """A command under a limit, and what came of it."""

    command: str
    """Name of the command."""
    limit: str
    """Its name and size."""
    good: bool
    """One sentence and no result, or the right result; and the right result once the limit is gone."""
    text: str
    """What was said."""

    def plain(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return asdict(self)


def file_size(world: World, command: Command, expected: dict[str, Any], rng: random.Random) -> Limited:
    """Runs a command under ``ulimit -f``: no file grows beyond a few kilobytes, up to half of what the largest takes.

    Args:
        world: Restored first.
        command: Any of the world's.
        expected: Its values in an undisturbed run.
        rng: Draws the limit.

    Returns:
        What came of it.
    """
    world.restore(without=world.made[command.name])
    sizes = [(world.root / path).stat().st_size for path in world.made[command.name] if (world.root / path).is_file()]
    limit = rng.choice([1000, 20_000, 200_000, max(sizes, default=50_000) // 2])
    ended = run(command.call, world.log, limit=limit)
    return _verdict(world, command, expected, f"ulimit -f {limit}", ended)


def full_disk(world: World, command: Command, expected: dict[str, Any], rng: random.Random) -> Limited | None:
    """Runs a command whose result's folder is a file system of a few kilobytes.

    Args:
        world: Restored first.
        command: Any of the world's.
        expected: Its values in an undisturbed run.
        rng: Draws the size.

    Returns:
        What came of it; None where no file system can be mounted.
    """
    if not (shutil.which("mount") and shutil.which("umount")):
        return None
    world.restore(without=world.made[command.name])
    places = {(world.root / pattern).parts[len(world.root.parts)] for pattern in command.makes}
    size = rng.choice([16, 64, 256, 1024])
    mounted: list[Path] = []
    try:
        for place in sorted(places):
            folder = world.root / place
            before = world.log.with_name("before")
            shutil.rmtree(before, ignore_errors=True)
            if folder.is_dir():
                shutil.copytree(folder, before)
            folder.mkdir(exist_ok=True)
            extra = _kilobytes(before) if before.is_dir() else 0
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size + 2 * extra}k", "tmpfs", str(folder)]
            if subprocess.run(mount, capture_output=True, check=False).returncode:
                return None
            mounted.append(folder)
            if before.is_dir():
                shutil.copytree(before, folder, dirs_exist_ok=True)
        ended = run(command.call, world.log)
        good, text = _is_good(world, command, expected, ended)
        return Limited(command.name, f"disk of {size} KiB", good, text)
    finally:
        for folder in mounted:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def read_only(world: World, command: Command, expected: dict[str, Any]) -> Limited | None:
    """Runs a command as someone who may read everything and write nothing.

    Args:
        world: Restored first.
        command: Any of the world's.
        expected: Its values in an undisturbed run.

    Returns:
        What came of it; None where this process cannot be someone else.
    """
    if os.geteuid() != 0:
        return None
    world.restore(without=world.made[command.name])
    for path in [world.root, *world.root.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
    ended = run(command.call, world.log, user=NOBODY)
    good, text = _is_good(world, command, expected, ended)
    return Limited(command.name, "read-only", good, text)


def _verdict(world: World, command: Command, expected: dict[str, Any], limit: str, ended: Ended) -> Limited:
    good, text = _is_good(world, command, expected, ended)
    if good:
        again = run(command.call, world.log)
        if again.status or command.values(world) != expected:
            good, text = False, f"after the limit was gone: {again.text[-1500:]}"
    return Limited(command.name, limit, good, text)


def _is_good(world: World, command: Command, expected: dict[str, Any], ended: Ended) -> tuple[bool, str]:
    if ended.status == 0:
        return command.values(world) == expected, "other values"
    if ended.sentence is None:
        return False, ended.text[-2500:]
    try:
        command.values(world)  # what is there opens
    except Exception as error:  # noqa: BLE001  whatever a torn file raises
        return False, f"torn: {error}"
    return True, ended.sentence


def _kilobytes(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 1024) + 4 for path in folder.rglob("*") if path.is_file())


def unlimited() -> bool:
    """Returns whether this process itself is under no limit of file sizes, which would spoil every result."""
    return resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
