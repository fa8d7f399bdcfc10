"""JSON files: read within reason, and checked field by field against the types of the dataclass that they fill."""

import hashlib
import json
import math
import os
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fit3d_ns.support.errors import DamagedFile, UserError, first_line
from fit3d_ns.support.files import atomic_write_json, without_non_finite

Made = TypeVar("Made")
UNREADABLE = (OSError, DamagedFile)
"""What `read_json` raises."""
_CHECKSUM = "checksum"
_SHOWN = 40
"""Characters of a wrong value that a sentence shows."""


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: If nothing is there.
        DamagedFile: If it cannot be read, is no UTF-8, no JSON, or nested too deep.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        if not os.path.lexists(path):
            raise FileNotFoundError(path) from error
        raise DamagedFile(error.strerror or first_line(error)) from error
    except (ValueError, RecursionError) as error:
        raise DamagedFile(first_line(error)) from error


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an object of a JSON file and a checksum of its fields, as one step.

    Args:
        path: Where it is to stand.
        content: As `fit3d_ns.support.files.atomic_write_json` takes it.

    Raises:
        UserError: If the operating system refuses.
    """
    atomic_write_json(path, {**content, _CHECKSUM: _checksum(content)})


def read_record(path: Path) -> dict[str, Any]:
    """Reads what `write_record` wrote; a file without a checksum, of an earlier version, too.

    Args:
        path: The file.

    Returns:
        Its fields, without the checksum.

    Raises:
        FileNotFoundError: If nothing is there.
        DamagedFile: As `read_json`, or if it is no object, or its fields are not as they were written.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise _wrong("", content, "no object")
    if content.pop(_CHECKSUM, None) not in (None, _checksum(content)):
        raise DamagedFile("it is not as it was written: its checksum differs")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    stored = json.loads(json.dumps(without_non_finite(content)))  # as it is read back: numbers as keys become texts
    text = json.dumps(stored, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def build(kind: type[Made], value: Any, name: str = "") -> Made:
    """Makes an object of a JSON value, with every field of the type that its dataclass says.

    Numbers are finite, whole numbers are no truth values, texts of a `Literal` are among its words. Ranges are the
    business of the dataclass: what its ``__post_init__`` raises as `ValueError` names the field.

    Args:
        kind: A dataclass, or any type that can stand in one: ``int``, ``float``, ``str``, ``bool``, `Path`, `Literal`,
            ``list[...]``, ``tuple[...]``, ``dict[str, ...]``, ``X | None``, ``Any``.
        value: What `read_json` gave.
        name: Of the value, for the sentence.

    Returns:
        An object of ``kind``.

    Raises:
        DamagedFile: Naming the first field that is missing, unknown, of another type or out of range.
    """
    if is_dataclass(kind):
        return _build_object(kind, value, name)
    origin, parts = get_origin(kind), get_args(kind)
    made: Any = value
    if kind is Any:
        return made
    if origin in (Union, types.UnionType):
        chosen = [part for part in parts if part is not type(None)]
        if value is None and len(chosen) < len(parts):
            return None  # type: ignore[return-value]
        return build(chosen[0], value, name)
    if origin is Literal:
        if not any(value == part and type(value) is type(part) for part in parts):
            raise _wrong(name, value, f"none of {', '.join(map(str, parts))}")
    elif origin is list:
        if not isinstance(value, list):
            raise _wrong(name, value, "no list")
        made = [build(parts[0], item, f"{name}[{index}]") for index, item in enumerate(value)]
    elif origin is tuple:
        made = _build_tuple(parts, value, name)
    elif origin is dict:
        if not isinstance(value, dict):
            raise _wrong(name, value, "no object")
        made = {key: build(parts[1], item, f"{name}.{key}") for key, item in value.items()}
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
            raise _wrong(name, value, "no finite number")
        made = float(value)
    elif kind is int:
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
            raise _wrong(name, value, "no whole number")
    elif kind is bool or kind is str:
        if not isinstance(value, kind):
            raise _wrong(name, value, "not true or false" if kind is bool else "no text")
    elif kind is Path:
        if not isinstance(value, str) or "\0" in value:
            raise _wrong(name, value, "no path")
        made = Path(value)
    else:
        raise TypeError(f"{name}: nothing of type {kind} stands in JSON")
    return made


def damaged(path: Path, error: Exception, remedy: str) -> UserError:
    """Returns what is said of a file that cannot be used.

    Args:
        path: The file.
        error: What is wrong with it.
        remedy: What to do, after a colon.
    """
    return UserError(f"{path} is damaged ({first_line(error)}): {remedy}")


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _build_object(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(name, value, "no object")
    hints, prefix = _hints(kind), f"{name}." if name else ""
    known = {item.name: item for item in fields(kind)}
    for key in value:
        if key not in known:
            raise DamagedFile(f"{prefix}{key[:_SHOWN]} is unknown")
    for key, item in known.items():
        if key not in value and item.default is MISSING and item.default_factory is MISSING:
            raise DamagedFile(f"{prefix}{key} is missing")
    made = {key: build(hints[key], item, f"{prefix}{key}") for key, item in value.items()}
    try:
        return kind(**made)
    except ValueError as error:
        raise DamagedFile(f"{prefix}{first_line(error)}") from error


def _build_tuple(parts: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    any_length = len(parts) == 2 and parts[1] is Ellipsis
    if not isinstance(value, list) or (not any_length and len(value) != len(parts)):
        raise _wrong(name, value, "no list" if any_length else f"no list of {len(parts)}")
    kinds = [parts[0]] * len(value) if any_length else parts
    return tuple(build(kind, item, f"{name}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value)))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _wrong(name: str, value: Any, fact: str) -> DamagedFile:
    shown = repr(value)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    return DamagedFile(f"{name or 'the content'} is {shown}, {fact}")
