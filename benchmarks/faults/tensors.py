"""Damage to files of tensors, as safetensors and torch write them."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faults.kinds import HUGE, Mutation, NotApplicable, overwrite


def _tensors(change: Callable[[dict, str, dict, bytearray], None], alone: bool = True) -> Mutation:
    """Changes the header's entry, or the bytes, of one tensor of a safetensors file, or of each."""

    def mutate(path: Path, rng: random.Random) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
        names = [name for name in header if name != "__metadata__"]
        before = json.dumps(header), bytes(body)
        for name in [rng.choice(names)] if alone else names:
            change(header, name, header[name], body)
        if (json.dumps(header), bytes(body)) == before:
            raise NotApplicable
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(body))

    return mutate


_NUMBERS = {
    "F64": (b"\0\0\0\0\0\0\xf8\x7f", b"\0\0\0\0\0\0\xf0\x7f"),
    "F32": (b"\0\0\xc0\x7f", b"\0\0\x80\x7f"),
    "F16": (b"\0\x7e", b"\0\x7c"),
}


def _number(which: int) -> Callable[[dict, str, dict, bytearray], None]:
    def change(header: dict, name: str, entry: dict, body: bytearray) -> None:
        if entry["dtype"] in _NUMBERS:
            value, start = _NUMBERS[entry["dtype"]][which], entry["data_offsets"][0]
            body[start : start + len(value)] = value

    return change


def _other_dtype(header: dict, name: str, entry: dict, body: bytearray) -> None:
    other = {"F64": "I64", "F32": "I32", "F16": "I16", "U8": "I8", "I64": "F64"}
    entry["dtype"] = other.get(entry["dtype"], entry["dtype"])


def _flat(header: dict, name: str, entry: dict, body: bytearray) -> None:
    entry["shape"] = [int(np.prod(entry["shape"])), 1]


def _huge(header: dict, name: str, entry: dict, body: bytearray) -> None:
    entry["shape"] = [HUGE, *entry["shape"][1:]]


def _deep_header(path: Path, rng: random.Random) -> None:
    text = b"[" * 100_000
    path.write_bytes(len(text).to_bytes(8, "little") + text)


SAFETENSORS: dict[str, Mutation] = {
    "tensor renamed": _tensors(lambda header, name, entry, body: header.update({"x" + name: header.pop(name)})),
    "all tensors renamed": _tensors(
        lambda header, name, entry, body: header.update({"x" + name: header.pop(name)}), alone=False
    ),
    "another dtype": _tensors(_other_dtype, alone=False),
    "another shape": _tensors(_flat, alone=False),
    "NaN": _tensors(_number(0), alone=False),
    "infinity": _tensors(_number(1), alone=False),
    "huge count": _tensors(_huge),
    "huge header": overwrite(lambda data, rng: HUGE.to_bytes(8, "little") + data[8:]),
    "nested header": _deep_header,
}


def _another_dtype(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor.float()


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)[: tensor.numel() // 2].clone() if tensor.numel() > 1 else tensor.reshape(1, 1)


def _in_torch_file(change: Callable[[Any], Any]) -> Mutation:
    def walk(value: Any, changed: list[bool]) -> Any:
        if isinstance(value, torch.Tensor):
            damaged = change(value)
            changed.append(damaged.dtype != value.dtype or not torch.equal(damaged, value))
            return damaged
        return {key: walk(item, changed) for key, item in value.items()} if isinstance(value, dict) else value

    def mutate(path: Path, rng: random.Random) -> None:
        changed: list[bool] = []
        # Files of the harness's own making, just written by the command under test; hostile ones never come here.
        damaged = walk(torch.load(path, weights_only=False), changed)
        if not any(changed):
            raise NotApplicable
        _save(damaged, path)

    return mutate


def _in_one_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Mutation:
    def mutate(path: Path, rng: random.Random) -> None:
        state = torch.load(path, weights_only=False)  # likewise
        places = [
            (holder, key)
            for holder in _nested_dicts(state)
            for key, value in holder.items()
            if isinstance(value, torch.Tensor) and value.numel()
        ]
        if not places:
            raise NotApplicable
        holder, key = rng.choice(places)
        holder[key] = change(holder[key])
        _save(state, path)

    return mutate


def _entry(change: Callable[[dict, random.Random], None]) -> Mutation:
    def mutate(path: Path, rng: random.Random) -> None:
        state = torch.load(path, weights_only=False)  # likewise
        change(state, rng)
        _save(state, path)

    return mutate


def _save(state: Any, path: Path) -> None:
    """Leaves a checkpoint's time as it was: which run is the newest goes by it, and that is another matter."""
    before = path.stat()
    torch.save(state, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _nested_dicts(state: dict) -> list[dict]:
    return [state, *(inner for value in state.values() if isinstance(value, dict) for inner in _nested_dicts(value))]


def _drop_entry(state: dict, rng: random.Random) -> None:
    holder = rng.choice([found for found in _nested_dicts(state) if found])
    del holder[rng.choice(list(holder))]


def _replace_entry(state: dict, rng: random.Random) -> None:
    holder = rng.choice([found for found in _nested_dicts(state) if found])
    key = rng.choice(list(holder))
    others = [None, "word", 7, [], {}, torch.zeros(3)]
    holder[key] = rng.choice([other for other in others if type(other) is not type(holder[key])])


TORCH: dict[str, Mutation] = {
    "half of every tensor": _in_torch_file(lambda tensor: tensor.reshape(-1)[: max(1, tensor.numel() // 2)].clone()),
    "NaN": _in_torch_file(lambda tensor: tensor * float("nan") if tensor.is_floating_point() else tensor),
    "infinity": _in_torch_file(lambda tensor: tensor + float("inf") if tensor.is_floating_point() else tensor),
    "another dtype": _in_torch_file(_another_dtype),
    "half of one tensor": _in_one_tensor(_half),
    "another dtype of one tensor": _in_one_tensor(_another_dtype),
    "entry missing": _entry(_drop_entry),
    "entry of another kind": _entry(_replace_entry),
}
