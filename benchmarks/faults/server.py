"""The process from which ``fit3d`` forks the commands of scenes: one for all cases, since it takes long to start."""

import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from fit3d_loop.commands import worker

_server: Any = forkserver._forkserver  # type: ignore[attr-defined]


def warm_server() -> None:
    """Starts it, for all that are forked from this process; the environment must be that of the world."""
    worker.fork_context()


def use_warm_server() -> None:
    """In a forked process, takes the one that the parent started, where it did."""
    if _server._forkserver_address is not None:
        _server.ensure_running = forkserver.ensure_running = lambda: None  # it is no child of this process to ask for


def use_own_server() -> None:
    """In a forked process, forgets the parent's: a new one is under the limits of this process."""
    _server.__init__()


def fork_from_here() -> None:
    """Makes ``fit3d`` fork commands from this process, with all that watches it."""
    worker.fork_context = lambda: multiprocessing.get_context("fork")


def workers_below(folder: Path) -> list[int]:
    """Returns the processes whose output goes to a log below a folder.

    Args:
        folder: Absolute.
    """
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "fd" / "1").startswith(f"{folder}{os.sep}"):
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found
