"""Rooms on disk: a folder per room that nerfstudio's ``nerfstudio-data`` reads, and an index of all of them.

```
OUT/rooms.json                       format, version, settings, classes, finished rooms
OUT/room_000/transforms.json         cameras; metres, z up, OpenGL axes
             images/frame_00001.png      colour, 8-bit sRGB
             depths/frame_00001.png      z-depth (along the optical axis, not the ray), uint16 millimetres
             semantics/frame_00001.png   class ids, uint8; 255 is void
             sparse_pc.ply               seed points with colour
             classes.json                id, name and colour of every class: the same in all rooms
             room.json                   what the room is and how it was made
```
"""

import glob
import hashlib
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_text
from fit3d_ns.support.json_files import UNREADABLE, read_record, write_record
from fit3d_rooms.classes import class_table
from fit3d_rooms.room import RenderedRoom

FORMAT = "fit3d-rooms"
VERSION = 1
"""Raised whenever the same seed gives other rooms."""
SEED_POINTS = 15_000


@dataclass(frozen=True)
class RoomSettings:
    """What a set of rooms depends on, besides how many there are."""

    seed: int
    """Of all rooms."""
    views: int
    """Photos of each room."""
    width: int
    """Of a photo, pixels."""
    height: int
    """Of a photo, pixels."""

    def key(self, index: int) -> str:
        """Returns the hash of everything that a room depends on.

        Args:
            index: Of the room, from 0.
        """
        content = json.dumps({"version": VERSION, "index": index, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def room_name(index: int) -> str:
    """Returns the name of a room's folder.

    Args:
        index: Of the room, from 0.
    """
    return f"room_{index:03d}"


def open_output(out: Path, settings: RoomSettings) -> None:
    """Makes the output folder, or checks that it holds rooms of the same settings.

    Args:
        out: Folder of all rooms.
        settings: What they depend on.

    Raises:
        UserError: if ``out`` is a file, holds something else or other rooms, or cannot be written.
    """
    index_file = out / "rooms.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a new folder for the rooms.")
    if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        found = _read_json(index_file)
        if found.get("format") != FORMAT:
            raise UserError(f"{out} is not empty and holds no rooms of this program: name a new or empty folder.")
        wanted = {"version": VERSION, **asdict(settings)}
        settings_there = found.get("settings")
        if not isinstance(settings_there, dict):
            raise UserError(f"{index_file} is damaged (it says no settings): restore it, or name a new folder.")
        stored = {"version": found.get("version"), **settings_there}
        for name, value in wanted.items():
            if stored.get(name) != value:
                raise UserError(
                    f"{out} holds rooms made with {name} {stored.get(name)} instead of {value}: "
                    "use the same settings or another folder."
                )
    out.mkdir(parents=True, exist_ok=True)
    _sweep(out)


def _read_json(path: Path) -> dict:
    try:
        return read_record(path)
    except UNREADABLE:
        return {}


def _sweep(out: Path) -> None:
    """Removes what killed runs of this machine left half-made; folders of running processes stay."""
    for folder in out.glob(f".room_*.partial-{glob.escape(platform.node())}-*"):
        owner = folder.name.rpartition("-")[2]
        if owner.isdigit() and int(owner) != os.getpid():
            try:
                os.kill(int(owner), 0)
                continue
            except ProcessLookupError:
                pass
            except OSError:
                continue
        shutil.rmtree(folder, ignore_errors=True)


def _write_json(path: Path, content: object) -> None:
    atomic_write_text(path, json.dumps(content, indent=1) + "\n")


def write_index(out: Path, settings: RoomSettings) -> None:
    """Writes ``rooms.json`` from the rooms that are finished.

    Args:
        out: Folder of all rooms.
        settings: What they depend on.
    """
    keep = ("name", "index", "kind", "views", "settings_key")
    rooms = [_read_json(path) for path in sorted(out.glob("room_*/room.json"))]
    rooms = [room for room in rooms if room.keys() >= set(keep)]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "settings": asdict(settings),
        "classes": class_table(),
        "rooms": [{key: room.get(key) for key in keep} for room in rooms],
    }
    _write_json(out / "rooms.json", content)


def is_finished(out: Path, index: int, settings: RoomSettings) -> bool:
    """Returns whether a room is there already.

    Args:
        out: Folder of all rooms.
        index: Of the room, from 0.
        settings: What it depends on.

    Raises:
        UserError: if something else has its name.
    """
    folder = out / room_name(index)
    if not folder.exists():
        return False
    if _read_json(folder / "room.json").get("settings_key") != settings.key(index):
        raise UserError(f"{folder} is not a finished room of these settings: move it away or name another folder.")
    return True


def seed_points(room: RenderedRoom, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws coloured points on visible surfaces, more where the picture changes, as structure from motion would.

    Args:
        room: Rendered.
        rng: Draws what differs from room to room.
        count: Points P.

    Returns:
        Positions float32 [P, 3] in metres and colours uint8 [P, 3].
    """
    height, width = room.camera.height, room.camera.width
    weights = []
    for view in room.views:
        gray = view.rgb.astype(np.float64).sum(axis=2)
        change = np.abs(np.diff(gray, axis=0, append=gray[-1:])) + np.abs(np.diff(gray, axis=1, append=gray[:, -1:]))
        weights.append((change / max(change.sum(), 1.0) + 1.0 / change.size).ravel())
    weight = np.concatenate(weights)
    total = np.cumsum(weight)
    chosen = np.unique(np.searchsorted(total, rng.random(count) * total[-1], side="right").clip(0, len(total) - 1))
    view, pixel = np.divmod(chosen, height * width)
    directions = room.camera.directions((0.5, 0.5))[pixel]
    depth = np.stack([v.depth.ravel() for v in room.views])[view, pixel]
    rays = (room.poses[view, :3, :3] * directions[:, None, :]).sum(axis=2)
    points = room.poses[view, :3, 3] + rays * depth[:, None]
    colors = np.stack([v.rgb.reshape(-1, 3) for v in room.views])[view, pixel]
    return points.astype(np.float32), colors


def _write_ply(path: Path, points: np.ndarray, colors: np.ndarray) -> None:
    vertices = np.empty(len(points), [("xyz", "<f4", 3), ("rgb", "u1", 3)])
    vertices["xyz"], vertices["rgb"] = points, colors
    properties = [f"property float {axis}" for axis in "xyz"] + [
        f"property uchar {c}" for c in ("red", "green", "blue")
    ]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}", *properties, "end_header"]
    path.write_bytes(("\n".join(header) + "\n").encode() + vertices.tobytes())


def write_room(out: Path, index: int, settings: RoomSettings, room: RenderedRoom) -> None:
    """Writes a room under a temporary name and gives it its own name when it is complete.

    Args:
        out: Folder of all rooms.
        index: Of the room, from 0.
        settings: What it depends on.
        room: Rendered.
    """
    target = out / room_name(index)
    partial = out / f".{room_name(index)}.partial-{platform.node()}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name in ("images", "depths", "semantics"):
            (partial / name).mkdir(parents=True)
        frames = []
        for number, (pose, view) in enumerate(zip(room.poses, room.views), start=1):
            name = f"frame_{number:05d}.png"
            Image.fromarray(view.rgb).save(partial / "images" / name)
            Image.fromarray(np.rint(view.depth * 1000).astype(np.uint16)).save(partial / "depths" / name)
            Image.fromarray(view.label).save(partial / "semantics" / name)
            frames.append(
                {
                    "file_path": f"images/{name}",
                    "depth_file_path": f"depths/{name}",
                    "semantics_file_path": f"semantics/{name}",
                    "transform_matrix": pose.tolist(),
                }
            )
        rng = np.random.default_rng(np.random.SeedSequence([settings.seed, index, VERSION]))
        _write_ply(partial / "sparse_pc.ply", *seed_points(room, rng, SEED_POINTS))
        camera = room.camera
        lens = {"fl_x": camera.focal, "fl_y": camera.focal, "cx": camera.width / 2, "cy": camera.height / 2}
        distortion = dict.fromkeys(("k1", "k2", "p1", "p2"), 0.0)
        _write_json(
            partial / "transforms.json",
            {
                "camera_model": "OPENCV",
                **lens,
                "w": camera.width,
                "h": camera.height,
                **distortion,
                "ply_file_path": "sparse_pc.ply",
                "frames": frames,
            },
        )
        _write_json(partial / "classes.json", class_table())
        description = {
            "format": FORMAT,
            "version": VERSION,
            "name": room_name(index),
            "index": index,
            "kind": room.kind,
            **asdict(settings),
            "settings_key": settings.key(index),
            "units": "metres; depth maps in millimetres along the optical axis",
        }
        write_record(partial / "room.json", description)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    write_index(out, settings)
