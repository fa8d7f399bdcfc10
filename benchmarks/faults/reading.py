"""What a command reads, as seen from inside it: nobody has to keep a list that a new reader would not be on."""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

_HASH = re.compile(r"[0-9a-f]{16,}|\d+")
_NOT_A_FORMAT = ("events.out.tfevents", ".lock")


def watch_reads(root: Path, log: Path) -> None:
    """Writes down every file that this process, or one forked from it, opens for reading from now on.

    Args:
        root: Of what is of interest.
        log: Where the paths go, relative to the root, one a line.
    """
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    prefix = f"{root}{os.sep}"

    def note(path: Any) -> None:
        name = os.path.abspath(os.fsdecode(path))
        if name.startswith(prefix):
            os.write(handle, f"{name[len(prefix) :]}\n".encode())

    def audit(event: str, arguments: tuple) -> None:
        if event == "open" and not isinstance(arguments[0], int) and arguments[0] is not None:
            mode, flags = arguments[1], arguments[2]
            reads = mode is None and not flags & (os.O_WRONLY | os.O_RDWR) or mode is not None and "r" in mode
            if reads:
                note(arguments[0])

    sys.addaudithook(audit)
    for module in [module for module in sys.modules.values() if getattr(module, "safe_open", None) is _SAFE_OPEN]:
        setattr(module, "safe_open", _noted(note))  # Rust opens its files unseen
    safetensors.torch.load_file = _noted_load(note)


_SAFE_OPEN, _LOAD_FILE = safetensors.safe_open, safetensors.torch.load_file


def _noted(note: Any) -> Any:
    def safe_open(filename: Any, *arguments: Any, **named: Any) -> Any:
        note(filename)
        return _SAFE_OPEN(filename, *arguments, **named)

    return safe_open


def _noted_load(note: Any) -> Any:
    def load_file(filename: Any, *arguments: Any, **named: Any) -> Any:
        note(filename)
        return _LOAD_FILE(filename, *arguments, **named)

    return load_file


def kind_of(path: Path) -> tuple[str, str]:
    """Returns what a file has in common with others like it: folder and name, without hashes and numbers.

    Args:
        path: Relative to the world's root.
    """
    return _HASH.sub("#", str(path.parent)), _HASH.sub("#", path.name)


def one_of_each_kind(paths: Iterable[Path]) -> list[Path]:
    """Returns the last of each kind of file, in an order that no hash in a name decides.

    Args:
        paths: Relative to the world's root.
    """
    kinds = {kind_of(path): path for path in sorted(paths) if not any(word in path.name for word in _NOT_A_FORMAT)}
    return [kinds[kind] for kind in sorted(kinds)]
