"""Tiny scenes cut from the tiny room, and what tells one loop's result from another's."""

import hashlib
import json
import shutil
from pathlib import Path

from paths import TINY_ROOM

VIEWS = 8


def make_scene(folder: Path, start: int = 0) -> Path:
    """A scene of some of the tiny room's views."""
    content = json.loads((TINY_ROOM / "transforms.json").read_text())
    content["frames"] = content["frames"][start : start + VIEWS]
    (folder / "images").mkdir(parents=True)
    for frame in content["frames"]:
        frame.pop("depth_file_path", None)
        shutil.copy(TINY_ROOM / frame["file_path"], folder / frame["file_path"])
    shutil.copy(TINY_ROOM / content["ply_file_path"], folder)
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


def break_scene(folder: Path) -> Path:
    """Takes a photo away."""
    min((folder / "images").iterdir()).unlink()
    return folder


def digest(folder: Path) -> str:
    """What tells one result from another."""
    return hashlib.sha256((folder / "backbone.safetensors").read_bytes()).hexdigest()


def leftovers(folder: Path) -> list[Path]:
    """Temporary files, and what a finished loop has no use for."""
    found = [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".checkpoint-")]
    wasted = [path for name in ("bundles", "teacher_maps", "running") for path in (folder / name).rglob("*")]
    return found + [path for path in wasted if path.is_file()]
