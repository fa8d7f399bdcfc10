"""A small world in which every command has something to do: a scene, a run, a lift, a bundle, a student, probes."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.faults.running import Ended, run

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

    def make(self, name: str, call: Callable[[], None]) -> Ended:
        """Runs a command that must end well, and notes what it made.

        Args:
            name: Of the command.
            call: What typing the command would do.

        Returns:
            How it ended.
        """
        before = self.files()
        ended = run(call, self.log)
        if ended.status:
            raise RuntimeError(f"{name} failed in an undamaged world:\n{ended.text}")
        self.made[name] = sorted(path for path, stamp in self.files().items() if before.get(path) != stamp)
        return ended

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
        for path in without:
            (self.root / path).unlink(missing_ok=True)
            for folder in (self.root / path).parents:
                if folder == self.root or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()
        self.marker.unlink(missing_ok=True)

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
                for kind, picture in (("", photo), ("annot", labels)):
                    path = self.root / "blocks" / f"{split}{kind}" / f"{index}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(picture).save(path)
        pose = np.eye(4).ravel().tolist()
        path = {"camera_type": "perspective", "render_height": 36, "render_width": 48, "fps": 2, "seconds": 1}
        path["camera_path"] = [{"camera_to_world": pose, "fov": 60, "aspect": 4 / 3} for _ in range(2)]  # type: ignore
        (self.root / "camera_path.json").write_text(json.dumps(path))


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


_TIMES = ("seconds", "per_sec", "modified_ns", "timing", "command", "fps", "memory", "checksum")


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
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
