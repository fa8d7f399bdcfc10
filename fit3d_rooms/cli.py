"""The command ``fit3d-rooms``: makes labelled indoor scenes on any machine."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from fit3d_ns.support.command_line import run_command
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.progress import Advance, progress

_LOGGER = logging.getLogger("fit3d_rooms.cli")  # not __main__, which `python -m` makes of __name__

MINIMUM_SIZE = 48
MAXIMUM_SIZE = 4096


@dataclass
class RoomsConfig:
    """Makes procedural indoor scenes with depth and semantic labels, in nerfstudio's format.

    The same seed gives the same files, bit for bit, whatever the number of workers and of other rooms. A run that was
    killed goes on where it stopped.
    """

    out: Annotated[Path, tyro.conf.Positional]
    """Folder for the rooms: new, empty, or holding rooms of the same settings."""
    scenes: int = 3
    """How many rooms: a living room, a bedroom, a studio, then again."""
    views: int = 40
    """Pictures per room, along a closed walk."""
    width: int = 400
    """Width of the pictures in pixels."""
    height: int = 300
    """Height of the pictures in pixels."""
    seed: int = 0
    """Rooms of another seed look different; the classes and their ids stay."""
    start_scene: int = 0
    """Index of the first room to make, so that several machines can share a set."""
    workers: int = field(default_factory=lambda: min(os.cpu_count() or 1, 16))
    """Threads."""


def check_size(width: int, height: int) -> None:
    """Checks the size of the photos.

    Args:
        width: Pixels.
        height: Pixels.

    Raises:
        UserError: If a side is too short or too long.
    """
    for name, size in (("width", width), ("height", height)):
        if not MINIMUM_SIZE <= size <= MAXIMUM_SIZE:
            raise UserError(f"--{name} {size} is out of range: choose {MINIMUM_SIZE} to {MAXIMUM_SIZE} pixels.")


def _check(config: RoomsConfig) -> None:
    if config.views < 2:
        raise UserError(f"--views {config.views} is too few: a scene needs at least 2 views.")
    check_size(config.width, config.height)
    for name, least in (("scenes", 1), ("seed", 0), ("start_scene", 0), ("workers", 1)):
        if getattr(config, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} is too small: at least {least}.")
    try:
        import open3d  # noqa: F401
    except (ImportError, OSError) as error:
        raise UserError(
            f"Open3D, which casts the rays, cannot be loaded ({error}): run `pip install open3d-cpu`."
        ) from error


def make_rooms(config: RoomsConfig) -> list[Path]:
    """Makes the rooms that are not there yet.

    Args:
        config: see `RoomsConfig`.

    Returns:
        Folders of all rooms asked for.

    Raises:
        UserError: if a value is out of range, Open3D is missing, or the folder is not ours or cannot be written.
    """
    _check(config)
    from fit3d_rooms.dataset import RoomSettings, is_finished, open_output, room_name, write_index, write_room
    from fit3d_rooms.room import render_room

    settings = RoomSettings(config.seed, config.views, config.width, config.height)
    indices = range(config.start_scene, config.start_scene + config.scenes)
    try:
        open_output(config.out, settings)
        missing = [index for index in indices if not is_finished(config.out, index, settings)]
        write_index(config.out, settings)
        with progress("Rooms", len(missing)) as advance:
            for index in missing:
                show = _parts(advance, room_name(index))
                room = render_room(config.seed, index, config.views, config.width, config.height, config.workers, show)
                write_room(config.out, index, settings, room)
                show("written", 1.0)
    except OSError as error:
        raise UserError(
            f"The rooms cannot be written to {error.filename or config.out}: {error.strerror or error}."
        ) from error
    return [config.out / room_name(index) for index in indices]


def _parts(advance: Advance, name: str) -> Callable[[str, float], None]:
    """Returns what takes the stage that a room is in and the share of it that is done."""
    reached = 0.0

    def show(stage: str, share: float) -> None:
        nonlocal reached
        advance(share - reached, f"{name}: {stage}")
        reached = share

    return show


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``fit3d-rooms``.

    Args:
        args: Words of the command line; None for those of this process.
    """
    run_command(lambda: _make_and_report(tyro.cli(RoomsConfig, prog="fit3d-rooms", args=args)))


def _make_and_report(config: RoomsConfig) -> None:
    folders = make_rooms(config)
    _LOGGER.info("%d rooms of %d views in %s", len(folders), config.views, config.out)
    _LOGGER.info("Train on one: ns-train fit3d-splat --data %s", folders[0])


if __name__ == "__main__":
    main()
