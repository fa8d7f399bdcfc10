"""Files of `torch.save`: read without running code from them, with the checksums compared that the archive carries."""

import re
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fit3d_ns.support.errors import DamagedFile

_AT_ONCE = 8
"""Threads that read records."""
_CHUNK = 2**20
"""Bytes."""
_whole: set[tuple[int, ...]] = set()
"""Files whose data were compared by this process: a command that reads its run's checkpoint twice does so once."""


def read_torch(path: Path, mmap: bool = False, device: str | torch.device = "cpu") -> Any:
    """Reads a file with torch's restricted loader.

    Args:
        path: The file.
        mmap: Whether tensors are memory-mapped.
        device: Where tensors go; with ``mmap`` the CPU.

    Returns:
        Tensors and plain values.

    Raises:
        FileNotFoundError: If nothing is there.
        DamagedFile: If it cannot be read, its data differ from their checksums, or it holds anything else.
    """
    _compare_checksums(path)
    try:
        if mmap:
            return torch.load(path, map_location=device, weights_only=True, mmap=True)
        with open(path, "rb") as file:  # not by its name, of which torch takes what the file is
            return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # torch raises a different kind for each sort of damage
        asked_for = re.search(r"GLOBAL (\S+)", str(error))
        if asked_for is None:
            raise DamagedFile(f"it is damaged or was not written by torch, {type(error).__name__}") from error
        raise DamagedFile(
            f"it asks for `{asked_for[1]}`, which is neither a tensor nor a plain value, and was not loaded"
        ) from error


def _is_whole(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    """Whether a record has its checksum."""
    with archive.open(record) as file:
        try:
            while file.read(_CHUNK):
                pass
        except zipfile.BadZipFile:
            return False
    return True


def _are_whole(path: Path, records: Sequence[zipfile.ZipInfo]) -> bool:
    """Whether all these records have theirs; by an archive of its own, since threads cannot share one."""
    with zipfile.ZipFile(path) as archive:
        return all(_is_whole(archive, record) for record in records)


def _compare_checksums(path: Path) -> None:
    """Reads every record of the archive; torch compares none of its checksums. Formats before torch 1.6 have none."""
    try:
        state = _state(path)
        if state in _whole or not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            records = sorted(archive.infolist(), key=lambda record: -record.file_size)
        shares = [records[first::_AT_ONCE] for first in range(_AT_ONCE)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            whole = all(pool.map(partial(_are_whole, path), filter(None, shares)))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFile(f"it is damaged or was not written by torch, {type(error).__name__}") from error
    if not whole:
        raise DamagedFile("it is damaged, its data differ from their checksums")
    _whole.add(state)


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
