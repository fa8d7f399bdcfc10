"""Damage to files of text: JSON, YAML, PLY headers, COLMAP's tables."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.kinds import HUGE, MARKER, Mutation, NotApplicable, overwrite

OTHER_TYPES: tuple[Any, ...] = (
    None,
    "word",
    -1,
    7,
    1.5,
    True,
    [],
    {},
    [None],
    ["word"],
    {"word": 1},
    HUGE,
    -HUGE,
    1e999,
)
"""What a field of a JSON file may become."""


def _json(change: Callable[[Any, random.Random], Any]) -> Mutation:
    def mutate(path: Path, rng: random.Random) -> None:
        path.write_text(json.dumps(change(json.loads(path.read_text()), rng)))

    return mutate


def _each(value: Any, replacement: Any) -> Any:
    if isinstance(value, dict):
        return {key: replacement for key in value}
    return [replacement for _ in value] if isinstance(value, list) else replacement


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


def _some_field(change: Callable[[Any, Any, random.Random], None]) -> Callable[[Any, random.Random], Any]:
    def mutate(content: Any, rng: random.Random) -> Any:
        places = _places(content)
        if not places:
            raise NotApplicable
        by_name: dict[str, list[tuple[Any, Any]]] = {}
        for holder, key in places:
            by_name.setdefault(str(key) if isinstance(holder, dict) else "entry", []).append((holder, key))
        holder, key = rng.choice(by_name[rng.choice(sorted(by_name))])  # a list's thousand numbers are one kind
        change(holder, key, rng)
        return content

    return mutate


def _retype(holder: Any, key: Any, rng: random.Random) -> None:
    holder[key] = rng.choice([value for value in OTHER_TYPES if type(value) is not type(holder[key])])


def _out_of_range(holder: Any, key: Any, rng: random.Random) -> None:
    value = holder[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        holder[key] = "unknown-word" if isinstance(value, str) else []
    else:
        holder[key] = rng.choice([-abs(value) - 1, HUGE, -HUGE, 1e999, float("nan"), 1e-300])


def _drop(holder: Any, key: Any, rng: random.Random) -> None:
    del holder[key]


JSON: dict[str, Mutation] = {
    "null": _json(lambda content, rng: None),
    "[]": _json(lambda content, rng: []),
    "a number": _json(lambda content, rng: 7),
    "all entries null": _json(lambda content, rng: _each(content, None)),
    "all entries lists": _json(lambda content, rng: _each(content, [])),
    "all entries texts": _json(lambda content, rng: _each(content, "word")),
    "nested": overwrite(lambda data, rng: b"[" * 100_000),
    **{f"field of another type {number}": _json(_some_field(_retype)) for number in (1, 2, 3)},
    **{f"field out of range {number}": _json(_some_field(_out_of_range)) for number in (1, 2, 3)},
    **{f"field missing {number}": _json(_some_field(_drop)) for number in (1, 2)},
}


def _yaml_line(change: Callable[[str, random.Random], str]) -> Mutation:
    """Changes the value of one plain field."""

    def mutate(path: Path, rng: random.Random) -> None:
        lines = path.read_text().splitlines()
        places = [n for n, line in enumerate(lines) if ": " in line and not line.rstrip().endswith((":", "[]", "{}"))]
        place = rng.choice(places)
        name = lines[place].partition(": ")[0]
        lines[place] = f"{name}: {change(lines[place], rng)}"
        path.write_text("\n".join(lines) + "\n")

    return mutate


_HOSTILE_TAGS = (
    "!!python/object/apply:os.system ['touch {marker}']",
    "!!python/object/new:os.system ['touch {marker}']",
    "!!python/object/apply:subprocess.check_call [['touch', '{marker}']]",
    '!!python/object/apply:builtins.exec [\'open("{marker}", "w")\']',
)


def _tag(rng: random.Random) -> str:
    return rng.choice(_HOSTILE_TAGS).format(marker=os.environ[MARKER])


YAML: dict[str, Mutation] = {
    "null": overwrite(lambda data, rng: b"null\n"),
    "a list": overwrite(lambda data, rng: b"[]\n"),
    "a number": overwrite(lambda data, rng: b"7\n"),
    "hostile tag alone": overwrite(lambda data, rng: _tag(rng).encode()),
    "hostile tag as a value": _yaml_line(lambda line, rng: _tag(rng)),
    "nested": overwrite(lambda data, rng: b"[" * 100_000),
    **{
        f"field of another type {number}": _yaml_line(lambda line, rng: rng.choice(["[]", "{}", "null", "word", "-7"]))
        for number in (1, 2, 3, 4)
    },
}


def _ply(change: Callable[[bytes, random.Random], bytes]) -> Mutation:
    """Changes the text before ``end_header``."""

    def mutate(path: Path, rng: random.Random) -> None:
        header, end, body = path.read_bytes().partition(b"end_header\n")
        if not end:
            raise NotApplicable
        path.write_bytes(change(header, rng) + end + body)

    return mutate


def _count(header: bytes, rng: random.Random) -> bytes:
    lines = header.split(b"\n")
    return b"\n".join(b"element vertex %d" % HUGE if line.startswith(b"element vertex") else line for line in lines)


def _ply_values(path: Path, rng: random.Random) -> None:
    header, end, body = path.read_bytes().partition(b"end_header\n")
    path.write_bytes(header + end + b"\0\0\xc0\x7f" * (len(body) // 4) + body[len(body) // 4 * 4 :])


PLY: dict[str, Mutation] = {
    "huge count": _ply(_count),
    "no x": _ply(lambda header, rng: header.replace(b" x\n", b" q\n")),
    "unknown type": _ply(
        lambda header, rng: header.replace(b"property float", b"property quux").replace(
            b"property double", b"property quux"
        )
    ),
    "no vertex element": _ply(lambda header, rng: header.replace(b"element vertex", b"element corner")),
    "NaN": _ply_values,
}


def _colmap_count(path: Path, rng: random.Random) -> None:
    path.write_bytes(HUGE.to_bytes(8, "little") + path.read_bytes()[8:])


BINARY: dict[str, Mutation] = {"huge count": _colmap_count}
"""Of COLMAP's tables."""


def _line(change: Callable[[str, random.Random], list[str]]) -> Mutation:
    """Puts other lines in the place of one that says something."""

    def mutate(path: Path, rng: random.Random) -> None:
        lines = path.read_text().splitlines()
        place = rng.choice([number for number, line in enumerate(lines) if line.strip()])
        lines[place : place + 1] = change(lines[place], rng)
        path.write_text("\n".join(lines) + "\n")

    return mutate


def _other_word(line: str, rng: random.Random) -> list[str]:
    words = line.split()
    words[rng.randrange(len(words))] = rng.choice(["word", "nan", "inf", "-1", str(HUGE), "1e999", '"'])
    return [" ".join(words)]


def _fewer_words(line: str, rng: random.Random) -> list[str]:
    words = line.split()
    return [" ".join(words[: rng.randrange(len(words))])]


LINES: dict[str, Mutation] = {
    "line missing": _line(lambda line, rng: []),
    "line twice": _line(lambda line, rng: [line, line]),
    "line cut": _line(_fewer_words),
    **{f"another word {number}": _line(_other_word) for number in (1, 2, 3)},
}
"""Of lists, COLMAP's among them."""
