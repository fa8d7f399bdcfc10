"""Whatever is public says what it takes, what it returns and what it raises: Google docstrings, no exception listed."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT

PACKAGES = ("fit3d_ns", "fit3d_rooms", "distill", "probe", "fit3d_loop", "demo", "benchmarks")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):\n((?:[ \t]+.*\n|\n)*)", re.MULTILINE)
_ENTRY = re.compile(r"^    (?:\*{0,2})([\w.]+)(?: \([^)]*\))?: *(\S.*(?:\n {5,}\S.*)*)?", re.MULTILINE)


class _Owner(NamedTuple):
    """A class, and where it stands."""

    node: ast.ClassDef
    path: str


def _docstring(node: ast.AST) -> str:
    return (ast.get_docstring(node) or "") + "\n"  # type: ignore[arg-type]


def _sections(docstring: str) -> dict[str, dict[str, str]]:
    """Returns, for each section of a docstring, its entries and what is said of them."""
    return {
        name: {entry: " ".join(text.split()) for entry, text in _ENTRY.findall(body)}
        for name, body in _SECTION.findall(docstring)
    }


def _arguments(function: ast.FunctionDef, method: bool) -> list[str]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    static = any(getattr(one, "id", "") == "staticmethod" for one in function.decorator_list)
    names = names[1:] if method and not static else names
    names += [argument.arg for argument in given.kwonlyargs]
    names += [argument.arg for argument in (given.vararg, given.kwarg) if argument]
    return [name for name in names if not name.startswith("_")]


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yields what a function does itself, without the functions inside it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield node
            waiting.extend(ast.iter_child_nodes(node))


def _raised(function: ast.FunctionDef) -> set[str]:
    """Returns the exceptions that a user can cause, as far as a function raises them itself."""
    found = set()
    for node in _own_nodes(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = node.exc.func
            found.add(name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", ""))
    return found & {"UserError"}


def _gives_something(function: ast.FunctionDef) -> bool:
    nothing = isinstance(function.returns, ast.Constant) and function.returns.value is None
    return function.returns is not None and not nothing and getattr(function.returns, "id", "") != "NoReturn"


def _decorated(function: ast.FunctionDef, *names: str) -> bool:
    found = {one.attr if isinstance(one, ast.Attribute) else getattr(one, "id", "") for one in function.decorator_list}
    return bool(found & set(names))


def _says_something(name: str, text: str) -> bool:
    """Returns whether a description has a word that the name does not have."""
    known = {*name.lower().split("_"), name.lower(), "the", "a", "an", "of", "to", "it"}
    return any(word.rstrip("s") not in {one.rstrip("s") for one in known} for word in re.findall(r"\w+", text.lower()))


def _overrides(owner: _Owner, name: str) -> bool:
    """Returns whether a base class has declared a method, so that its contract stands there.

    Modules' ``forward`` is declared by torch, which cannot know what it takes: it is never an override here.
    """
    if not owner.node.bases or name == "forward":
        return False
    return any(name in vars(base) for base in _bases(owner))


def _bases(owner: _Owner) -> tuple[type, ...]:
    module = importlib.import_module(owner.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
    return getattr(module, owner.node.name).__mro__[1:-1]


def _narrows(owner: _Owner, name: str) -> bool:
    """Returns whether a field is that of a base class, with a narrower type."""
    return bool(owner.node.bases) and any(name in vars(base).get("__annotations__", {}) for base in _bases(owner))


def _complaints_of_function(function: ast.FunctionDef, owner: _Owner | None) -> Iterator[str]:
    docstring = _docstring(function)
    sections = _sections(docstring)
    yield from _complaints_of_arguments(_arguments(function, owner is not None), sections)
    missing = _raised(function) - set(sections.get("Raises", {}))
    if missing:
        yield f"Raises: {', '.join(sorted(missing))}"
    if _decorated(function, "property", "cached_property", "contextmanager"):
        return
    said = {"Returns", "Yields"} & {name for name, _ in _SECTION.findall(docstring)}
    if _gives_something(function) and not said and not docstring.startswith(("Returns ", "Yields ")):
        yield "Returns"


def _complaints_of_arguments(names: list[str], sections: dict[str, dict[str, str]]) -> Iterator[str]:
    said = {**sections.get("Attributes", {}), **sections.get("Args", {})}
    for name in names:
        if not said.get(name):
            yield f"Args: {name}"
        elif not _says_something(name, said[name]):
            yield f"{name}: {said[name]!r} says nothing"
    for name in sections.get("Args", {}):
        if name not in names:
            yield f"Args: {name} is no argument"


def _complaints_of_class(owner: _Owner) -> Iterator[tuple[int, str]]:
    node = owner.node
    docstring = _docstring(node)
    if not docstring.strip():
        yield node.lineno, "docstring"
    sections = _sections(docstring)
    for one in node.body:
        if isinstance(one, ast.FunctionDef) and one.name == "__init__":
            said = {**sections, **_sections(_docstring(one))}
            yield from ((one.lineno, text) for text in _complaints_of_arguments(_arguments(one, True), said))
    for one, after in zip(node.body, [*node.body[1:], None]):
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and not one.target.id.startswith("_"):
            name = one.target.id
            said = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            described = said or name in {**sections.get("Attributes", {}), **sections.get("Args", {})}
            if not described and not _narrows(owner, name):
                yield one.lineno, f"docstring of field {name}"


def _complaints(path: Path) -> Iterator[str]:
    where = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text())
    functions: list[tuple[ast.FunctionDef, _Owner | None]] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            functions.append((node, None))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            owner = _Owner(node, where)
            for line, text in _complaints_of_class(owner):
                yield f"{where}:{line} {node.name}: {text}"
            functions += [(one, owner) for one in node.body if isinstance(one, ast.FunctionDef)]
    for function, owner in functions:
        if function.name.startswith("_"):
            continue
        found = [] if _decorated(function, "setter") else list(_complaints_of_function(function, owner))
        if found and not (owner and _overrides(owner, function.name)):
            name = f"{owner.node.name}.{function.name}" if owner else function.name
            yield f"{where}:{function.lineno} {name}: {'; '.join(found)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_public_says_what_it_takes(package):
    found = [text for path in sorted((ROOT / package).rglob("*.py")) for text in _complaints(path)]
    assert not found, f"{len(found)}\n" + "\n".join(found)


def test_complaints_are_found(tmp_path, monkeypatch):
    """The test above would fail on each of these."""
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "module.py"
    path.write_text(
        '"""Module."""\n'
        "class A:\n"
        '    """A."""\n'
        "    field: int\n"
        "    def __init__(self, x): pass\n"
        "    def method(self, a, *, b) -> int:\n"
        '        """Does.\n\n        Args:\n            a: The a.\n            c: Gone, in metres.\n        """\n'
        "        raise UserError('no')\n"
        "def good(size: int) -> int:\n"
        '    """Doubles.\n\n    Args:\n        size: Pixels.\n\n    Returns:\n        Pixels.\n    """\n'
    )
    assert list(_complaints(path)) == [
        "module.py:5 A: Args: x",
        "module.py:4 A: docstring of field field",
        "module.py:6 A.method: a: 'The a.' says nothing; Args: b; Args: c is no argument; Raises: UserError; Returns",
    ]
