"""A small world in which every command has something to do: a scene, a run, a lift, a bundle, a student, probes."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from benchmarks.faults.reading import watch_reads
from benchmarks.faults.running import Ended, run
from benchmarks.faults.server import fork_from_here

ROOM = Path(__file__).parents[2] / "tests" / "data" / "tiny_room"
TEACHER = "test_vit"
"""A timm ViT of 64 channels with patches of 16 pixels, made for tests."""
VIEWS = 8


class World:
    """The files, whole, and a copy of them to do harm to, which has one place for ever: files name files.

    Args:
        folder: Where; made anew.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self._whole, self.log = folder / "world", folder / "whole", folder / "log.txt"
        self.marker = folder / "marker"
        """Made by code from a damaged file."""
        self.made: dict[str, list[Path]] = {}
        """Files by the command that made them, relative to the root."""
        shutil.rmtree(folder, ignore_errors=True)
        self.root.mkdir(parents=True)
        os.environ["FIT3D_CACHE"] = str(self.root / "user-cache")
        os.environ["FIT3D_FAULTS_MARKER"] = str(self.marker)
        self._write_inputs()

    @property
    def scene(self) -> Path:
        """The photos with poses."""
        return self.root / "scene"

    @property
    def run_folder(self) -> Path:
        """The trained run."""
        return self.root / "out" / "scene" / "fit3d-splat" / "r"

    def files(self) -> dict[Path, int]:
        """Returns every file, relative to the root, with its time of change."""
        found = (path for path in self.root.rglob("*") if path.is_file() and not path.is_symlink())
        return {path.relative_to(self.root): path.stat().st_mtime_ns for path in found}

    def make(self, name: str, call: Callable[[], None]) -> tuple[Ended, set[Path]]:
        """Runs a command that must end well, and notes what it made.

        Args:
            name: Of the command.
            call: What typing it would do.

        Returns:
            How it ended, and what it read, relative to the root.
        """
        before, there = self.files(), self.paths()
        ended, read = self.watch(name, call)
        changed = {path for path, stamp in self.files().items() if before.get(path) != stamp}
        self.made[name] = sorted(changed | (self.paths() - there))
        return ended, read

    def watch(self, name: str, call: Callable[[], None]) -> tuple[Ended, set[Path]]:
        """Runs a command that must end well, with an eye on what it reads.

        Args:
            name: Of the command.
            call: What typing it would do.

        Returns:
            How it ended, and what it read, relative to the root.
        """
        seen = self.log.with_name("read.txt")
        seen.write_bytes(b"")

        def watched() -> None:
            watch_reads(self.root, seen)
            fork_from_here()
            call()

        ended = run(watched, self.log)
        if ended.status:
            raise RuntimeError(f"{name} failed in an undamaged world:\n{ended.text}")
        return ended, set(map(Path, seen.read_text().splitlines()))

    def keep(self) -> None:
        """Takes the files as they are for whole from now on."""
        shutil.rmtree(self._whole, ignore_errors=True)
        shutil.copytree(self.root, self._whole, symlinks=True)

    def restore(self, without: Iterable[Path] = ()) -> None:
        """Puts every file back as it was kept.

        Args:
            without: Files, relative to the root, that are left out.
        """
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self._whole, self.root, symlinks=True)
        self.remove(without)
        self.marker.unlink(missing_ok=True)

    def paths(self) -> set[Path]:
        """Returns every file and link, relative to the root."""
        found = (path for path in self.root.rglob("*") if path.is_symlink() or path.is_file())
        return {path.relative_to(self.root) for path in found}

    def start_anew(self, made: Iterable[Path], there: set[Path]) -> None:
        """Removes what a command made, under whatever names: those of logs hold the time and the process.

        Args:
            made: What it makes where nothing is damaged, relative to the root.
            there: What there was before it was started.
        """
        self.remove({*made, *(self.paths() - there)})

    def remove(self, paths: Iterable[Path]) -> None:
        """Removes files, and the folders that nothing is left in.

        Args:
            paths: Relative to the root.
        """
        for path in paths:
            (self.root / path).unlink(missing_ok=True)
        for top in {path.parts[0] for path in paths}:
            _remove_empty(self.root / top)

    def _write_inputs(self) -> None:
        shutil.copytree(ROOM, self.scene)
        content = json.loads((self.scene / "transforms.json").read_text())
        content["frames"] = content["frames"][:VIEWS]
        (self.scene / "transforms.json").write_text(json.dumps(content))
        import timm

        torch.manual_seed(0)
        save_file(timm.create_model(TEACHER, num_classes=0).state_dict(), self.root / "teacher.safetensors")
        rng = np.random.default_rng(3)
        palette = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220]])
        for split, count in (("train", 4), ("test", 2)):
            for index in range(count):
                labels = rng.integers(0, 3, (3, 4)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
                photo = (palette[labels] + rng.integers(-20, 21, (*labels.shape, 3))).clip(0, 255).astype(np.uint8)
                depth = (1000 + 500 * labels.astype(np.uint16)).astype(np.uint16)
                for kind, picture in (("", photo), ("annot", labels), ("depth", depth)):
                    path = self.root / "blocks" / f"{split}{kind}" / f"{index}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(path)
        (self.root / "names.txt").write_text("red\ngreen\nblue\n")
        pose = np.eye(4).ravel().tolist()
        path = {"camera_type": "perspective", "render_height": 36, "render_width": 48, "fps": 2, "seconds": 1}
        path["camera_path"] = [{"camera_to_world": pose, "fov": 60, "aspect": 4 / 3} for _ in range(2)]  # type: ignore
        (self.root / "camera_path.json").write_text(json.dumps(path))
        for suffix in (".bin", ".txt"):
            write_colmap(self.scene, self.root / f"colmap{suffix}", suffix)
        listed = [{"data": "scene", "name": "one"}]
        (self.root / "scenes.yaml").write_text(yaml.safe_dump({"scenes": listed}))
        run = self.run_folder.relative_to(self.root)
        (self.root / "scenes.txt").write_text(f"{run}\ne/splat.ply --data colmap.txt\n")


def _remove_empty(folder: Path) -> None:
    """Removes folders without files in them."""
    for path in folder.iterdir() if folder.is_dir() else ():
        _remove_empty(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def values_of(path: Path) -> Any:
    """Returns what a file says, for comparison: nothing of times, speeds and versions.

    Args:
        path: A file that a command wrote.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return _digest(load_file(path))
    if path.suffix in (".ckpt", ".pt"):
        return _digest(torch.load(path, map_location="cpu", weights_only=True, mmap=False))
    if path.suffix == ".json":
        return _without_times(json.loads(path.read_text()))
    return path.read_bytes()


_TIMES = ("bundle", "seconds", "per_sec", "modified_ns", "timing", "command", "fps", "memory", "checksum")


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        if {"id", "info"} <= value.keys():  # of a bundle: a hash of the times too
            value = {key: item for key, item in value.items() if key != "id"}
        return {key: _without_times(item) for key, item in value.items() if not any(word in key for word in _TIMES)}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _digest(value: Any) -> Any:
    import hashlib

    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(data).hexdigest()
    if isinstance(value, dict):
        return {key: _digest(item) for key, item in value.items()}
    return [_digest(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_colmap(scene: Path, folder: Path, suffix: str) -> None:
    """Writes a scene as COLMAP does.

    Args:
        scene: In nerfstudio's format, with one pinhole camera.
        folder: Where to.
        suffix: ``.bin`` or ``.txt``.
    """
    from nerfstudio.data.utils import colmap_parsing_utils as colmap
    from plyfile import PlyData

    content = json.loads((scene / "transforms.json").read_text())
    shutil.copytree(scene / "images", folder / "images")
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    numbers = np.array([content[name] for name in ("fl_x", "fl_y", "cx", "cy")])
    camera = colmap.Camera(id=1, model="PINHOLE", width=content["w"], height=content["h"], params=numbers)
    images, points, nothing = {}, {}, np.zeros(0)
    for number, frame in enumerate(content["frames"], start=1):
        pose = np.linalg.inv(np.array(frame["transform_matrix"]) @ np.diag([1.0, -1, -1, 1]))  # OpenGL to OpenCV
        name = Path(frame["file_path"]).name
        quaternion = colmap.rotmat2qvec(pose[:3, :3])
        images[number] = colmap.Image(
            id=number,
            qvec=quaternion,
            tvec=pose[:3, 3],
            camera_id=1,
            name=name,
            xys=np.zeros((0, 2)),
            point3D_ids=nothing,
        )
    rows = PlyData.read(scene / "sparse_pc.ply")["vertex"].data[:1000]
    for number, row in enumerate(rows, start=1):
        place, color = np.array([row["x"], row["y"], row["z"]]), np.array([row["red"], row["green"], row["blue"]])
        ids = np.zeros(0, dtype=int)
        points[number] = colmap.Point3D(id=number, xyz=place, rgb=color, error=0.5, image_ids=ids, point2D_idxs=ids)
    colmap.write_model({1: camera}, images, points, str(model), suffix)
