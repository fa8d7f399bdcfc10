"""Output folders: one process at a time writes to one, what a killed process left goes, results come all at once."""

import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import TEMPORARY, explain_unwritable, sync_to_disk

try:
    import fcntl
except ImportError:  # Windows, where two commands in one folder are not told from each other
    fcntl = None

_PATIENCE_SECONDS = 5.0
"""The workers of a killed process end a moment after it."""
_held: dict[str, int] = {}
"""Folders that this process holds, and their open handles."""


@contextmanager
def held_folder(folder: Path, flag: str) -> Iterator[None]:
    """Keeps other processes from writing to a folder, and removes what killed ones left there.

    Args:
        folder: The folder; made if needed.
        flag: By which the user names it, for the sentence.

    Raises:
        UserError: If another process is writing there, or it cannot be made.
    """
    name = os.path.realpath(folder)
    if name in _held:
        yield  # by whoever called us
        return
    is_new = not folder.exists()
    hold_folder(folder, flag)
    try:
        yield
    finally:
        os.close(_held.pop(name))
        if is_new:
            with suppress(OSError):  # it stays unless nothing came
                folder.rmdir()


def hold_folder(folder: Path, flag: str) -> None:
    """Keeps other processes from writing to a folder until this process ends, as `held_folder` does for a block.

    Args:
        folder: The output folder; made if needed.
        flag: By which the user names it, for the sentence.

    Raises:
        UserError: If another process is writing there, or it cannot be made.
    """
    name = os.path.realpath(folder)
    if name in _held:
        return
    with explain_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    if not _lock(handle):
        os.close(handle)
        raise UserError(f"Another process is writing to {folder}: wait for it to end, or choose another {flag}.")
    _held[name] = handle
    remove_leftovers(folder)


def check_names_are_free(folder: Path, names: Iterable[str], flag: str) -> None:
    """Checks before any long work that no folder stands where a file of the result will go.

    Args:
        folder: The output folder; it need not exist.
        names: Of the files.
        flag: By which the user names the folder, for the sentence.

    Raises:
        UserError: If one does.
    """
    for name in names:
        if (folder / name).is_dir():
            raise UserError(
                f"{folder / name} is a folder, and a file of the result goes there: move it away, or choose another "
                f"{flag}."
            )


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders below a folder that a killed process left.

    Args:
        folder: In which nobody else writes.
    """
    for path in [path for path in folder.rglob(".*") if TEMPORARY.fullmatch(path.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Lends a temporary folder, all of whose entries are moved to ``folder`` when the block ends well; else none is.

    Args:
        folder: Where files and folders go, in place of those of the same name.

    Yields:
        The temporary folder, empty, inside ``folder``.

    Raises:
        UserError: If the operating system refuses.
    """
    temporary = folder / f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with explain_unwritable(folder):
            temporary.mkdir(parents=True)
            yield temporary
            sync_to_disk(temporary)
            for entry in sorted(temporary.iterdir()):
                target = folder / entry.name
                if target.is_dir() and not target.is_symlink():
                    os.replace(target, temporary / f".{entry.name}.tmp")  # goes with the temporary folder
                os.replace(entry, target)
            sync_to_disk(folder, deep=False)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _lock(handle: int) -> bool:
    """Locks an open folder; returns whether nobody else holds it."""
    if fcntl is None:
        return True
    start = time.monotonic()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() - start > _PATIENCE_SECONDS:
                return False
            time.sleep(0.1)
        except OSError:  # a file system without locks, such as some network ones
            return True
