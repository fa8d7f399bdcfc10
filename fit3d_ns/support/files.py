"""Files that are either whole or absent: written under a temporary name, then renamed."""

import glob
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fit3d_ns.support.errors import UserError

_WRITE_FAILED = re.compile("PytorchStreamWriter|inline_container|[Ss]erializing")
"""In what torch.save and safetensors say when the operating system refuses."""
TEMPORARY = re.compile(r"\..*\.tmp")
"""Names of files and folders that are being written, or that a killed process left."""


@contextmanager
def atomic_path(path: Path | str, sync: bool = True) -> Iterator[Path]:
    """Lends a temporary path beside ``path`` and renames it to ``path`` when the block ends well.

    A process killed at any moment leaves the old file, or none; at worst a hidden ``.*.tmp`` file remains beside it,
    which no reader of ``path`` can mistake for it. Two processes that write the same path do not disturb each other:
    the last rename wins. Missing parent folders are created.

    Args:
        path: where the file is to stand in the end.
        sync: whether file and folder are synced to disk, so that neither is lost when the power fails right after;
            False for what can be made again.

    Yields:
        The temporary path, in the same folder, not yet existing. The block must create a file there.

    Raises:
        UserError: if the operating system refuses (no such place, read-only, disk full), naming ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with explain_unwritable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if sync:
                sync_to_disk(temporary)
            os.replace(temporary, path)
            if sync:
                sync_to_disk(path.parent, deep=False)
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the parent is no folder or cannot be written: the error that matters is on its way already


def sync_to_disk(path: Path, deep: bool = True) -> None:
    """Waits until the disk holds what was written to a file, or to a folder.

    Args:
        path: The file or folder.
        deep: Whether for a folder everything below it is meant too, not its list of names alone.

    Raises:
        OSError: If the disk could not take it all.
    """
    if path.is_dir():
        for child in path.iterdir() if deep else ():
            sync_to_disk(child)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network file systems cannot sync folders
            raise
    finally:
        os.close(handle)


@contextmanager
def explain_unwritable(path: Path | str) -> Iterator[None]:
    """Turns what is raised where the operating system refuses to write into one sentence.

    Args:
        path: what is being written, for the sentence.

    Raises:
        UserError: instead of OSError, and of what torch.save and safetensors raise when the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"Cannot write {path} ({error.strerror or error}): free space there or choose another place."
        ) from error
    except (RuntimeError, SafetensorError) as error:
        if not _WRITE_FAILED.search(str(error)):
            raise
        raise UserError(f"Cannot write {path}: free space there or choose another place.") from error


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Lends a temporary folder beside ``path`` and renames it to ``path`` when the block ends well.

    The folder that stood at ``path`` is deleted then, and not before. A process killed at any moment leaves a whole
    folder or none; at worst hidden ``.*.tmp`` folders remain beside it, until the next one is written there.

    Args:
        path: where the folder is to stand in the end.

    Yields:
        The temporary folder, empty.

    Raises:
        UserError: as `atomic_path`.
    """
    path = Path(path)
    _remove_those_of_the_dead(path)
    old = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with atomic_path(path) as temporary:
            temporary.mkdir()
            try:
                yield temporary
                if path.exists():
                    os.replace(path, old)  # a folder cannot be renamed onto one that holds files
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)


def _remove_those_of_the_dead(path: Path) -> None:
    """Removes temporary folders of a place whose process, named in theirs, runs no more."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*-*.tmp"):
        process = left.name.removeprefix(f".{path.name}.").partition("-")[0]
        if process.isdecimal() and not _is_running(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # somebody else's, as far as we may know
    return True


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Writes ``data`` to ``path`` as one step; see `atomic_path` for what is promised and raised.

    Args:
        path: The file; its folder exists.
        data: All of its content.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Writes ``text`` as UTF-8 to ``path`` as one step; see `atomic_path` for what is promised and raised.

    Args:
        path: The file; its folder exists.
        text: All of its content.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path | str, data: Any) -> None:
    """Writes ``data`` as indented JSON to ``path`` as one step; see `atomic_path` for what is raised.

    JSON knows no NaN and no infinity, so such numbers become ``null``.

    Args:
        path: where the file is to stand.
        data: mappings with string keys, lists, tuples, strings, numbers, booleans and None, nested at will.

    Raises:
        TypeError: if ``data`` holds anything else.
    """
    atomic_write_text(path, json.dumps(without_non_finite(data), indent=2, allow_nan=False) + "\n")


def without_non_finite(data: Any) -> Any:
    """Returns JSON-able data with None in the place of NaN and infinity, as `atomic_write_json` writes them.

    Args:
        data: Numbers, texts, truth values, None, and lists, tuples and mappings of them.
    """
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: without_non_finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [without_non_finite(value) for value in data]
    return data


def discard(path: Path) -> None:
    """Removes what lies at the place of a file that is to be made anew: a file, a link or a folder.

    Args:
        path: The place; a folder is removed with all that is in it, and a link alone.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        pass  # who writes there next is told why it cannot be done


def user_cache_directory() -> Path:
    """Returns the folder for files that can be made again: ``$FIT3D_CACHE``, else the XDG cache, else ``~/.cache``."""
    if own := os.environ.get("FIT3D_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "fit3d"
    return Path.home() / ".cache" / "fit3d"


def is_complete_safetensors(path: Path) -> bool:
    """Returns whether ``path`` is a safetensors file whose size agrees with its header (reads the header only).

    Args:
        path: Any file, or none.
    """
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
