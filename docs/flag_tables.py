"""Tables of flags for the site, read from the configuration classes themselves (a hook of mkdocs).

A line ``<!-- flags: FILE CLASS [PREFIX] -->`` in a page becomes a table of that class's fields: the flag as tyro makes
it, its default, and the docstring under the field. The source is parsed, not imported, so that building the site takes
seconds and needs neither torch nor nerfstudio. A line ``<!-- needs: WHAT -->`` becomes a note.
"""

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"^<!-- flags: (\S+) (\S+)(?: (\S+))? -->$", re.MULTILINE)
NEEDS = re.compile(r"^<!-- needs( on this page)?: (.+) -->$", re.MULTILINE)
"""What the block of commands after it takes that no test can have (tests/docs/documentation.py)."""
_METAVARS = {"Path": "PATH", "int": "INT", "float": "FLOAT", "str": "TEXT", "bool": "{True,False}"}


class Flag(NamedTuple):
    """One field of a configuration class."""

    name: str
    """As typed; of a switch, the form that changes the default."""
    values: str
    """What follows it, empty for a switch."""
    default: str
    """As typed, empty if there is none."""
    meaning: str
    """The field's docstring."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts tables and notes in the place of their markers (mkdocs calls this for every page)."""
    markdown = NEEDS.sub(lambda match: f"*Run by no test{match[1] or ''}: needs {match[2]}.*\n", markdown)
    return MARKER.sub(lambda match: _table(read_flags(match[1], match[2], match[3] or "--")), markdown)


def read_flags(file: str, name: str, prefix: str = "--") -> list[Flag]:
    """Reads the flags that a configuration class declares itself, without those that it inherits.

    Args:
        file: Of the class, relative to the repository.
        name: Of the class.
        prefix: What comes before the field's name; switches exist only where it is ``--``, since nerfstudio's commands
            want a value everywhere.

    Raises:
        ValueError: If there is no such class, or one of its fields has no docstring.
    """
    classes = [node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.ClassDef)]
    found = next((node for node in classes if node.name == name), None)
    if found is None:
        raise ValueError(f"{file} has no class {name}")
    others = {node.name for node in classes}
    flags = []
    for field, after in zip(found.body, [*found.body[1:], None]):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        kind = ast.unparse(field.annotation)
        if field.target.id.startswith("_") or "Settings" in kind or kind in others:
            continue  # a configuration of its own, with a table of its own
        if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
            raise ValueError(f"{name}.{field.target.id} has no docstring")
        meaning = re.sub(r"(?<=[ (])(--[a-z][\w-]*\w)", r"`\1`", " ".join(str(after.value.value).split()))
        flags.append(_flag(field.target.id, field.annotation, field.value, prefix, meaning))
    return flags


def _flag(name: str, annotation: ast.expr, value: ast.expr | None, prefix: str, meaning: str) -> Flag:
    text = name.replace("_", "-")
    if "Positional" in ast.unparse(annotation):
        return Flag(name.upper(), "", "", meaning)
    default = "" if value is None else _typed(value)
    if ast.unparse(annotation) == "bool" and prefix == "--":
        return Flag(f"--no-{text}" if default == "True" else f"--{text}", "", "", meaning)
    return Flag(prefix + text, _values(annotation), default if value is not None else "required", meaning)


def _values(annotation: ast.expr) -> str:
    """What a type looks like on the command line."""
    if isinstance(annotation, ast.Subscript):
        outer, inner = ast.unparse(annotation.value), annotation.slice
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if outer == "Literal":
            return "{" + ",".join(str(ast.literal_eval(part)) for part in parts) + "}"
        if outer == "Tuple":
            open_ended = ast.unparse(parts[-1]) in ("...", "Ellipsis")
            return f"{_values(parts[0])} ..." if open_ended else " ".join(map(_values, parts))
        return _values(parts[0])  # Optional, Annotated
    name = ast.unparse(annotation)
    return _METAVARS.get(name, "NAME")


def _typed(value: ast.expr) -> str:
    """A default as one would type it."""
    if isinstance(value, ast.Call):
        argument = value.args[0] if value.args else None
        return str(argument.value) if isinstance(argument, ast.Constant) else ""
    plain = ast.literal_eval(value)
    if isinstance(plain, tuple):
        return " ".join(map(str, plain))
    return "" if plain is None else str(plain)


def _table(flags: list[Flag]) -> str:
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for flag in flags:
        name = f"`{' '.join(filter(None, (flag.name, flag.values)))}`"
        default = f"`{flag.default}`" if flag.default else ""
        rows.append(f"| {name} | {default} | {flag.meaning} |")
    return "\n".join(rows)
