"""The layout of the packages, read off the imports: for the test of the walls and for the picture of the house.

``python docs/house.py`` draws the picture of docs/architecture.md anew.
"""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ("fit3d_ns", "fit3d_rooms", "distill", "probe", "fit3d_loop", "demo")
FLOORS = (
    ("fit3d_ns/__init__.py", "fit3d_ns/support"),
    ("fit3d_ns/backbones", "fit3d_ns/rasterization"),
    ("fit3d_ns/features", "fit3d_ns/compat.py"),
    ("fit3d_ns/lifting", "fit3d_ns/data", "fit3d_ns/schedulers.py"),
    ("fit3d_ns/runs", "fit3d_ns/datamanager.py"),
    ("fit3d_ns/model.py", "fit3d_ns/trainer.py"),
    ("fit3d_ns/scenes",),
    ("fit3d_ns/viewer",),
    ("fit3d_ns/pipeline.py",),
    ("fit3d_ns/config.py",),
    ("fit3d_ns/commands",),
    ("fit3d_rooms", "distill", "probe"),
    ("fit3d_loop",),
    ("demo",),
)
"""Rooms by floor, from the ground: folders, and what nerfstudio registers as single files."""
OUTSIDE: dict[str, tuple[str, ...]] = {
    "nerfstudio": tuple(
        f"fit3d_ns/{room}"
        for room in (
            *("compat.py", "schedulers.py", "datamanager.py", "model.py", "trainer.py", "pipeline.py", "config.py"),
            *("data/", "runs/", "scenes/", "viewer/", "commands/"),
        )
    ),
    "gsplat": ("fit3d_ns/rasterization/", "fit3d_ns/compat.py"),
    "timm": ("fit3d_ns/backbones/",),
    "viser": ("fit3d_ns/viewer/",),
    "open3d": ("fit3d_rooms/",),
}
"""Packages of others, and the only places that know them."""
PICTURE = ROOT / "docs" / "pictures" / "house.svg"
_WIDTH, _ROW, _BOX_WIDTH, _BOX_HEIGHT = 900, 72, 200, 32


class Import(NamedTuple):
    """One import statement."""

    importer: str
    """Path relative to the repository."""
    line: int
    """From 1."""
    imported: str
    """Path relative to the repository."""

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


@cache
def files() -> tuple[str, ...]:
    """Returns the paths of all modules of the packages, relative to the repository."""
    found = (path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return tuple(sorted(found))


def room_of(path: str) -> str:
    """Returns the room that a file belongs to: a folder of ``fit3d_ns``, a file at its top, or another package."""
    parts = path.split("/")
    return parts[0] if parts[0] != "fit3d_ns" or parts[-1] == path else "/".join(parts[:2])


@cache
def imports() -> tuple[Import, ...]:
    """Returns every import among the packages, those inside functions and for type checkers included."""
    return tuple(one for path in files() for one in _imports_of(path))


def _imports_of(path: str) -> Iterator[Import]:
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in dict.fromkeys(names):
            target = _file_of(name)
            if target and target != path:
                yield Import(path, node.lineno, target)


def _file_of(name: str) -> str | None:
    """Returns the file of a module, or of the module that a name is taken from; None if it is not ours."""
    for dotted in (name, name.rpartition(".")[0]):
        for path in (f"{dotted.replace('.', '/')}.py", f"{dotted.replace('.', '/')}/__init__.py"):
            if path in files():
                return path
    return None


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Returns the sets of nodes that reach each other (Tarjan, SIAM J. Comput. 1972), sorted.

    Args:
        graph: For each node, the nodes that it leads to.
    """
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in number:
                visit(other)
                lowest[node] = min(lowest[node], lowest[other])
            elif other in stack:
                lowest[node] = min(lowest[node], number[other])
        if lowest[node] == number[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in number:
            visit(node)
    return sorted(found)


def picture() -> str:
    """Returns the house as SVG: a row for each floor, an arrow for each room that another one uses.

    Arrows that follow from others (A uses B uses C) are left out.
    """
    arrows: dict[str, set[str]] = {}
    for one in imports():
        if room_of(one.importer) != room_of(one.imported):
            arrows.setdefault(room_of(one.importer), set()).add(room_of(one.imported))
    places = _places()
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_ROW * len(FLOORS) + 20}" '
        'font-family="sans-serif" font-size="14" text-anchor="middle">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#64748b"/></marker></defs>',
        f'<rect width="{_WIDTH}" height="{_ROW * len(FLOORS) + 20}" fill="#ffffff"/>',
    ]
    for above in sorted(arrows):
        implied = set().union(*(_reached(arrows, other) for other in arrows[above]))
        for below in sorted(arrows[above] - implied):
            (x1, y1), (x2, y2) = places[above], places[below]
            lines.append(
                f'<line x1="{x1}" y1="{y1 + _BOX_HEIGHT // 2}" x2="{x2}" y2="{y2 - _BOX_HEIGHT // 2}" '
                'stroke="#64748b" marker-end="url(#tip)"/>'
            )
    for room, (x, y) in places.items():
        lines.append(
            f'<rect x="{x - _BOX_WIDTH // 2}" y="{y - _BOX_HEIGHT // 2}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" '
            'rx="6" fill="#f1f5f9" stroke="#334155"/>'
            f'<text x="{x}" y="{y + 5}" fill="#0f172a">{room}</text>'
        )
    return "\n".join([*lines, "</svg>", ""])


def _places() -> dict[str, tuple[int, int]]:
    """Returns the centre of each room's box; rows are shifted so that few arrows pass behind a box."""
    places = {}
    for number, floor in enumerate(FLOORS):
        shown = [room for room in floor if room != "fit3d_ns/__init__.py"]
        shift = (0, -150, 150)[number % 3] if len(shown) == 1 and number < len(FLOORS) - 2 else 0
        for place, room in enumerate(shown):
            x = _WIDTH * (2 * place + 1) // (2 * len(shown)) + shift
            places[room] = (x, _ROW * (len(FLOORS) - number) - _ROW // 2 + 10)
    return places


def _reached(arrows: Mapping[str, set[str]], room: str) -> set[str]:
    below = arrows.get(room, set())
    return below.union(*(_reached(arrows, other) for other in below)) if below else set()


def main() -> None:
    """Draws the picture anew."""
    PICTURE.write_text(picture())


if __name__ == "__main__":
    main()
