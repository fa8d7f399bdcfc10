"""The layout holds: no circle of imports, and none through a wall; imports inside functions count."""

import ast
from collections.abc import Iterator

import pytest
from house import FLOORS, OUTSIDE, PICTURE, ROOT, circles, files, imports, picture, room_of
from paths import LONGEST_FIRST


def test_every_room_has_its_floor():
    """Also: no floor is left over from a room that is gone."""
    rooms = {room_of(path) for path in files()}
    assert rooms == {room for floor in FLOORS for room in floor}


def test_no_circle_between_files():
    graph: dict[str, set[str]] = {}
    for one in imports():
        graph.setdefault(one.importer, set()).add(one.imported)
    assert not circles(graph)


def test_no_circle_within_a_folder():
    """What stands in a folder, file or folder, is used one way, in every folder."""
    graphs: dict[str, dict[str, set[str]]] = {}
    for one in imports():
        importer, imported = one.importer.split("/"), one.imported.split("/")
        depth = next(place for place, (a, b) in enumerate(zip(importer, imported)) if a != b)
        if "__init__.py" not in (importer[depth], imported[depth]):  # what a package offers for use from outside
            graph = graphs.setdefault("/".join(importer[:depth]), {})
            graph.setdefault(importer[depth], set()).add(imported[depth])
    assert not {folder: found for folder, graph in graphs.items() if (found := circles(graph))}


def test_imports_lead_down():
    """A room may use what stands on lower floors, never its neighbours and never what stands above it."""
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    wrong = [
        f"{one}: {room_of(one.importer)} must not know {room_of(one.imported)}"
        for one in imports()
        if room_of(one.importer) != room_of(one.imported)
        and floor_of[room_of(one.imported)] >= floor_of[room_of(one.importer)]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", OUTSIDE)
def test_only_these_rooms_know(package):
    wrong = [
        f"{path}:{line} imports {name}"
        for path, line, name in _outside_imports()
        if name.split(".")[0] == package and not path.startswith(OUTSIDE[package])
    ]
    assert not wrong, "\n".join(wrong)


def _outside_imports() -> Iterator[tuple[str, int, str]]:
    for path in files():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in names:
                yield path, node.lineno, name  # type: ignore[attr-defined]


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}}) == [["a", "b", "c"]]
    assert not circles({"a": {"b"}, "b": {"c"}})


def test_no_room_is_overcrowded():
    """At most 16 files in a folder, and at most 400 lines in a file."""
    count: dict[str, int] = {}
    for path in files():
        folder = path.rpartition("/")[0]
        count[folder] = count.get(folder, 0) + (not path.endswith("__init__.py"))
        lines = (ROOT / path).read_text().count("\n")
        assert lines <= 400, f"{path}: {lines} lines"
    crowded = {folder: number for folder, number in count.items() if number > 16}
    assert not crowded


def test_the_picture_shows_these_imports():
    assert PICTURE.read_text() == picture(), "draw it anew: python docs/house.py"


def test_json_comes_in_through_one_door():
    """`read_json` knows what can be wrong with a file; ``json.loads`` is for texts that came from elsewhere."""
    door, wrong = "fit3d_ns/support/json_files.py", []
    for path in files():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("json.load", "json.loads"):
                continue
            if path != door and ("read" in ast.unparse(node.args[0]) or ast.unparse(node.func) == "json.load"):
                wrong.append(f"{path}:{node.lineno} reads JSON: use read_json")
    assert not wrong, "\n".join(wrong)


def test_long_tests_that_go_first_are_there():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert [name for name in LONGEST_FIRST if names.count(name) != 1] == []
