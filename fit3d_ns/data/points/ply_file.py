"""PLY files of any content: the one place where they are opened."""

from pathlib import Path
from typing import Any, cast

from plyfile import PlyData, PlyHeaderParseError, PlyParseError

from fit3d_ns.support.errors import DamagedFile, first_line
from fit3d_ns.support.foreign_files import what_it_is

OTHER_SPLATS = (".splat", ".ksplat", ".spz", ".sog", ".lcc")
"""Suffixes of splats that are no PLY files."""
_OTHER_POINTS = (".pcd", ".las", ".laz", ".e57", ".xyz", ".pts", ".obj", ".glb", ".usdz")


def read_elements(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Reads a PLY file.

    Args:
        path: The file; ASCII or binary.
        mapped: Whether binary rows stay on disk until they are used, so that none is held twice.

    Returns:
        By the element's name (``vertex``, ``face`` ...) a structured array of its rows.

    Raises:
        DamagedFile: If the file is missing, no PLY file, or damaged.
    """
    try:
        options: Any = {} if mapped else {"mmap": cast(Any, False)}
        return {element.name: element.data for element in PlyData.read(path, **options).elements}
    except OSError as error:
        raise DamagedFile(error.strerror or first_line(error)) from error
    except (PlyHeaderParseError, UnicodeDecodeError) as error:
        if _magic(path) != b"ply":
            raise DamagedFile(_instead(path) or what_it_is(path) or "it is no PLY file") from error
        raise DamagedFile(f"its header is damaged: {first_line(error)}") from error
    except (PlyParseError, ValueError, KeyError, TypeError, IndexError, MemoryError, OverflowError) as error:
        raise DamagedFile(f"it is damaged: {first_line(error)}") from error


def _instead(path: Path) -> str | None:
    """What a file of splats or points in another format is, with the way out."""
    suffix = path.suffix.lower()
    if suffix in OTHER_SPLATS:
        return f"it is a {suffix} file, another format of splats: open it in SuperSplat and export it as PLY"
    if suffix in _OTHER_POINTS:
        return f"it is a {suffix} file: convert it to PLY, for example with CloudCompare"
    return None


def _magic(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(3)
