"""What can be wrong with a file: every kind of damage, for every format that a command reads."""

import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.kinds import MARKER, Mutation, NotApplicable, overwrite
from benchmarks.faults.tensors import SAFETENSORS, TORCH
from benchmarks.faults.texts import BINARY, JSON, LINES, PLY, YAML


class Hostile:
    """Unpickled by a loader that trusts files, it makes the marker."""

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {os.environ[MARKER]}",))


def _flip(start: float, end: float) -> Mutation:
    def mutate(path: Path, rng: random.Random) -> None:
        data = bytearray(path.read_bytes())
        place = rng.randrange(int(start * len(data)), max(int(end * len(data)), int(start * len(data)) + 1))
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))

    return mutate


def _header_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(min(len(data), 64))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _to_itself(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _hostile_pickle(path: Path, rng: random.Random) -> None:
    path.write_bytes(pickle.dumps(Hostile()))


def _hostile_zip(path: Path, rng: random.Random) -> None:
    content: Any = {"pipeline": {}, "step": 1, "planted": Hostile()}
    torch.save(content, path)


ANY: dict[str, Mutation] = {
    "empty": overwrite(lambda data, rng: b""),
    "half": overwrite(lambda data, rng: data[: len(data) // 2]),
    "last byte off": overwrite(lambda data, rng: data[: -2 if data.endswith(b"\n") else -1]),
    "noise": overwrite(lambda data, rng: rng.randbytes(max(len(data), 16))),
    "text": overwrite(lambda data, rng: b"This is a text.\n"),
    "no UTF-8": overwrite(lambda data, rng: b"\xff\xfe\xc3\x28" + data[4:]),
    "bit in the header": _header_bit,
    "bit in the data": _flip(0.5, 1.0),
    "folder": _folder,
    "missing": lambda path, rng: path.unlink(),
    "link to itself": _to_itself,
    "hostile pickle": _hostile_pickle,
    "hostile torch file": _hostile_zip,
}


FORMATS: dict[str, dict[str, Mutation]] = {
    ".safetensors": SAFETENSORS,
    **dict.fromkeys((".pt", ".pth", ".ckpt"), TORCH),
    ".json": JSON,
    **dict.fromkeys((".yml", ".yaml"), YAML),
    ".ply": PLY,
    ".bin": BINARY,
    **dict.fromkeys((".txt", ".jsonl", ".log"), LINES),
    ".png": {},
}
"""What can be done to a file of a format beside `ANY`, by suffix; formats without structure of ours have nothing."""


def mutations_of(path: Path) -> dict[str, Mutation]:
    """Returns what can be done to a file, by name.

    Args:
        path: The file; its suffix tells its format.
    """
    return ANY | FORMATS.get(path.suffix, {})


def apply(name: str, path: Path, rng: random.Random) -> None:
    """Does one kind of damage to a file.

    Args:
        name: Of `mutations_of`.
        path: The file.
        rng: Draws places and values.

    Raises:
        NotApplicable: If it changes nothing.
    """
    before = path.read_bytes()
    if path.is_symlink():  # of the user's cache: the target is not to be touched
        path.unlink()
        path.write_bytes(before)
    try:
        mutations_of(path)[name](path, rng)
    except (IndexError, KeyError, ValueError) as error:
        shutil.rmtree(path, ignore_errors=True)
        path.write_bytes(before)
        raise NotApplicable(str(error)) from error
    if path.is_file() and not path.is_symlink() and path.read_bytes() == before:
        raise NotApplicable
