"""Measures the host memory of what reads photos without training: lifts, evaluation, bundles, distillation.

    python -m benchmarks.photo_memory --folder memory --photos 100 300

Makes a scene of large photos around coloured Gaussians (renders, enlarged, with grain, as JPEG) and a run lifted from
small copies of them, and puts the large photos in their place. Each measured command runs in a process of its own,
whose largest resident set and time are taken as ``/usr/bin/time -v`` takes them, and written to a JSON file. Photos
beyond ``--distinct`` are further files of the same content and pose, so that a large scene is made quickly.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file

from fit3d_ns.data.points.splat_ply import rgb_to_sh, write_splat_ply
from fit3d_ns.rasterization import rasterize
from fit3d_ns.support.console import CONSOLE
from fit3d_ns.support.files import atomic_write_json
from fit3d_ns.support.progress import progress

GAUSSIANS = 400
SMALLER = 20
"""Photos are rendered smaller by this factor, and enlarged."""
SMALL = 10
"""The run is lifted from photos that are smaller by this factor."""
MADE = {
    "lift": ["scene/.fit3d_cache", "measured"],
    "evaluate": [],
    "bundle": ["bundles"],
    "distill": ["student", "photos"],
}
"""What a command makes, for it to be made anew."""
LAUNCH = (
    "import atexit, pathlib, sys, torch; peak = pathlib.Path(sys.argv.pop(1)); "
    "atexit.register(lambda: peak.write_text(str(torch.cuda.max_memory_reserved()))); "
    "from {module} import {function} as main; sys.argv[0] = '{function}'; sys.exit(main())"
)


@dataclass
class Benchmark:
    """Settings of the measurement."""

    folder: Path
    """Where scenes and runs are made; those of an earlier call are used again."""
    photos: tuple[int, ...] = (100, 300)
    """Numbers of photos."""
    size: tuple[int, int] = (4000, 3000)
    """Width and height of a photo, pixels."""
    distinct: int = 100
    """Most photos that are made; the others are links to them."""
    commands: tuple[str, ...] = ("lift", "evaluate", "bundle", "distill")
    """What is measured; `distill` needs the bundles."""
    output: Path = Path("benchmarks/results/photo_memory.json")
    """The JSON file; other rows in it are kept."""


def make_scene(folder: Path, count: int, distinct: int, size: tuple[int, int]) -> None:
    """Writes photos, poses and the Gaussians that they show.

    Args:
        folder: The scene; nothing is done if it is whole.
        count: Number of photos.
        distinct: Most of them that differ.
        size: Width and height of a photo, pixels.
    """
    if (folder / "transforms.json").is_file() or (folder.parent / "scene" / "transforms.json").is_file():
        return  # there, or in its place already
    (folder / "images").mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(0)
    means = torch.nn.functional.normalize(torch.randn(GAUSSIANS, 3, generator=random), dim=-1)
    colors = torch.rand(GAUSSIANS, 3, generator=random)
    gaussians = {
        "means": means,
        "quats": torch.nn.functional.normalize(torch.randn(GAUSSIANS, 4, generator=random), dim=-1),
        "scales": torch.full((GAUSSIANS, 3), math.log(0.12)),
        "opacities": torch.full((GAUSSIANS, 1), 3.0),
        "features_dc": rgb_to_sh(colors),
        "features_rest": torch.zeros(GAUSSIANS, 15, 3),
    }
    write_splat_ply(folder / "splat.ply", gaussians)
    width, height = size
    small = (width // SMALLER, height // SMALLER)
    grain = np.random.default_rng(0).integers(-12, 13, (height, width, 1), dtype=np.int16)
    frames = []
    with progress(f"Making {count} photos", count) as advance:
        for index in range(count):
            name = f"images/{index:05d}.jpg"
            if index >= distinct:
                os.link(folder / frames[index % distinct]["file_path"], folder / name)
                frames.append({**frames[index % distinct], "file_path": name})
                advance(1)
                continue
            pose = _pose(2 * math.pi * index / min(count, distinct), 0.4 * math.sin(7 * index))
            viewmat = torch.linalg.inv(pose @ torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0])))
            K = torch.tensor([[small[0], 0.0, small[0] / 2], [0.0, small[0], small[1] / 2], [0.0, 0.0, 1.0]])
            render = rasterize(
                means,
                gaussians["quats"],
                gaussians["scales"].exp(),
                gaussians["opacities"].sigmoid()[:, 0],
                colors,
                viewmat[None],
                K[None],
                *small,
            )[0][0]
            picture = Image.fromarray((render.clamp(0, 1) * 255).byte().numpy()).resize(size, Image.Resampling.BICUBIC)
            photo = np.clip(np.asarray(picture).astype(np.int16) + np.roll(grain, 31 * index, axis=1), 0, 255)
            Image.fromarray(photo.astype(np.uint8)).save(folder / name, quality=90)
            frames.append({"file_path": name, "transform_matrix": pose.tolist()})
            advance(1)
    camera = {"fl_x": width, "fl_y": width, "cx": width / 2, "cy": height / 2, "w": width, "h": height}
    atomic_write_json(folder / "transforms.json", {"camera_model": "PINHOLE", **camera, "frames": frames})


def _pose(angle: float, rise: float) -> torch.Tensor:
    """[4, 4] camera to world, OpenGL axes, on a ring around the origin, looking at it."""
    position = torch.tensor([3 * math.cos(angle), 3 * math.sin(angle), rise])
    back = torch.nn.functional.normalize(position, dim=0)
    right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]), back), dim=0)
    pose = torch.eye(4)
    pose[:3] = torch.stack([right, torch.linalg.cross(back, right), back, position], dim=1)
    return pose


def make_run(folder: Path) -> None:
    """Lifts a run from small copies of the photos in ``folder/large``, and puts the large ones in their place.

    Args:
        folder: Where the run goes; nothing is done if it is there.
    """
    scene, large = folder / "scene", folder / "large"
    if any((folder / "lifted").rglob("lift.json")):
        return
    shutil.rmtree(scene, ignore_errors=True)
    (scene / "images").mkdir(parents=True)
    content = json.loads((large / "transforms.json").read_text())
    for frame in content["frames"]:
        with Image.open(large / frame["file_path"]) as photo:
            photo.draft("RGB", (photo.width // SMALL, photo.height // SMALL))
            photo.resize((content["w"] // SMALL, content["h"] // SMALL)).save(scene / frame["file_path"])
    content.update({name: content[name] / SMALL for name in ("fl_x", "fl_y", "cx", "cy")})
    content.update({name: content[name] // SMALL for name in ("w", "h")})
    atomic_write_json(scene / "transforms.json", content)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "teacher.safetensors")
    lift = lift_flags(folder, large / "splat.ply", "lifted")
    measure("fit3d_ns.commands.lift.cli", "main", [*lift, "--no-evaluate"], folder / "run.log")
    shutil.rmtree(scene)
    large.rename(scene)


def lift_flags(folder: Path, splat: Path, output: str) -> list[str]:
    """Returns the flags of a lift onto the scene's Gaussians.

    Args:
        folder: Of scene and runs.
        splat: PLY file of the Gaussians.
        output: Name of the lift's output folder, below ``folder``.
    """
    flags = ["--ply", str(splat), "--data", str(folder / "scene"), "--output-dir", str(folder / output)]
    flags += ["--backbone", "test_vit", "--backbone-weights", str(folder / "teacher.safetensors")]
    return [*flags, "--feature-dim", "8"]


def measure(module: str, function: str, arguments: Sequence[str], log: Path) -> dict[str, Any]:
    """Runs a command in a process of its own.

    Args:
        module: Where its function is.
        function: Name of the command's entry point there.
        arguments: Words of the command line.
        log: File for what it prints.

    Returns:
        ``peak_gigabytes``, the largest resident set in GiB; ``gpu_gigabytes`` in 10^9 bytes, the most that torch held
        at once, to which CUDA itself adds half a gigabyte; ``seconds``.
    """
    gpu = log.with_suffix(".gpu")
    gpu.unlink(missing_ok=True)
    command = [sys.executable, "-c", LAUNCH.format(module=module, function=function), str(gpu), *arguments]
    start = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status or not gpu.is_file():
        raise SystemExit(f"{module} failed, see {log}")
    host, seconds = usage.ru_maxrss / 2**20, time.perf_counter() - start
    return {"peak_gigabytes": host, "gpu_gigabytes": int(gpu.read_text()) / 1e9, "seconds": seconds}


def main() -> None:
    """Measures, and writes the figures."""
    settings = tyro.cli(Benchmark, description=__doc__)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    stored = json.loads(settings.output.read_text()) if settings.output.is_file() else {}
    for count in settings.photos:
        folder = settings.folder / f"{count}_photos"
        make_scene(folder / "large", count, settings.distinct, settings.size)
        make_run(folder)
        config = next((folder / "lifted").rglob("config.yml"))
        bundle = ["--runs", str(folder / "lifted"), "--bundle-dir", str(folder / "bundles"), "--bundles-only"]
        distill = ["--bundles", str(folder / "bundles"), "--output-dir", str(folder / "student"), "--steps", "2"]
        evaluate = ["--load-config", str(config), "--output-path", str(folder / "evaluation.json")]
        commands = {
            "lift": (
                "fit3d_ns.commands.lift.cli",
                "main",
                lift_flags(folder, folder / "scene" / "splat.ply", "measured"),
            ),
            "evaluate": ("nerfstudio.scripts.eval", "entrypoint", evaluate),
            "bundle": ("distill.cli", "main", bundle),
            "distill": ("distill.cli", "main", [*distill, "--cache-dir", str(folder / "photos")]),
        }
        for name in settings.commands:
            for made in MADE[name]:
                shutil.rmtree(folder / made, ignore_errors=True)
            row = measure(*commands[name], folder / f"{name}.log")
            facts = {"command": name, "photos": count, "distinct": min(count, settings.distinct), "device": device}
            stored[f"{name} {count} {device}"] = {**facts, "size": list(settings.size), **row}
            atomic_write_json(settings.output, stored)
            CONSOLE.print(f"{name}, {count} photos: {row['peak_gigabytes']:.2f} GB, {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
