"""How many scenes share a machine best: scenes an hour and memory with 1, 2, 4 ... of them at once.

    python -m benchmarks.loop SCENES --at-once 1 2 4 8 12 16 --output packing.json

Every scene is trained, lifted and bundled, as in the first round of `fit3d`, by processes of this machine (Ray is not
needed). Where there are fewer scenes than are to run at once, they are taken again under another name.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from benchmarks.gpu_memory import peak_gpu_memory
from fit3d_loop.commands.mps import mps
from fit3d_loop.commands.worker import Settings
from fit3d_loop.config import LoopConfig
from fit3d_loop.records import ORIGINAL, Places, read_state
from fit3d_loop.scenes.machine import look_at_photos, num_cores
from fit3d_loop.scenes.runner import open_engine
from fit3d_loop.scenes.scene_list import SceneSource, read_scenes
from fit3d_loop.scenes.stages import Job
from fit3d_ns.support.command_line import run_command
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_json


@dataclass
class PackingConfig:
    """Measures how many scenes share a machine best."""

    scenes: Annotated[Path, tyro.conf.Positional]
    """As for `fit3d`."""
    at_once: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    """Scenes side by side, one measurement each."""
    steps: int = 1000
    """Of geometry."""
    backbone: str = "dinov2_small_focus"
    """Teacher."""
    backbone_weights: Path | None = None
    """Its local weights."""
    geometry_flags: str = ""
    """As of `fit3d`."""
    threads: int = 2
    """Processor threads of each scene."""
    mps: bool = False
    """Start NVIDIA's MPS for the time of the measurement, which changes no setting of the card."""
    work_dir: Path | None = None
    """Where runs go, which are deleted; a temporary folder if not given."""
    output: Path = Path("outputs/packing.json")
    """Raw numbers."""


def main(config: PackingConfig) -> None:
    """Measures and prints a line for each number of scenes.

    Args:
        config: The user's choices.
    """
    scenes, _ = read_scenes(config.scenes)
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=config.work_dir) as folder, mps("on" if config.mps else "off"):
        root = Path(folder)
        warm = replace(config, steps=10)
        _measure(warm, scenes[:1], 1, root / "warm_up")  # imports, compiled kernels, the photos in memory
        for at_once in config.at_once:
            chosen = _repeated(scenes, at_once)
            measured.append(_measure(config, chosen, at_once, root / str(at_once)))
            shutil.rmtree(root / str(at_once), ignore_errors=True)
            line = "{at_once:3d} at once: {seconds:7.1f} s, {scenes_an_hour:7.1f} scenes an hour, {peak_gigabytes} GB"
            print(line.format(**measured[-1]), flush=True)
            atomic_write_json(config.output, {**_machine(config), "measured": measured})


def _repeated(scenes: Sequence[SceneSource], count: int) -> list[SceneSource]:
    """So many scenes, each as often as need be."""
    found = [scenes[number % len(scenes)] for number in range(count)]
    return [replace(scene, name=f"{scene.name}-{number}") for number, scene in enumerate(found)]


def _measure(config: PackingConfig, scenes: Sequence[SceneSource], at_once: int, root: Path) -> dict[str, Any]:
    loop = LoopConfig(config.scenes, root, engine="processes", scenes_at_once=at_once)
    flags = tuple(replace(loop, geometry_flags=config.geometry_flags).given_flags("geometry_flags"))
    weights = None if config.backbone_weights is None else config.backbone_weights.absolute()
    settings = Settings(config.threads, keep_optimizer=False)
    backbone = (config.backbone, weights)
    jobs = [Job(one, root, 1, ORIGINAL, backbone, config.steps, (flags, ()), 42, settings) for one in scenes]
    start = time.perf_counter()
    with peak_gpu_memory() as peak, open_engine(loop, look_at_photos(scenes), config.threads) as engine:
        outcomes = engine.run(jobs, lambda done: None)
    seconds = time.perf_counter() - start
    failed = [f"{outcome.job.source.name}: {outcome.sentence}" for outcome in outcomes if outcome.result != "done"]
    if failed:
        raise UserError(f"{len(failed)} scenes failed with {at_once} at once: {failed[0]}")
    geometry = [read_state(Places(root), scene.name, scene.identity).geometry or {} for scene in scenes]
    return {
        "at_once": at_once,
        "scenes": len(scenes),
        "seconds": round(seconds, 2),
        "scenes_an_hour": round(len(scenes) / seconds * 3600, 1),
        "peak_gigabytes": round(peak[0], 2) if torch.cuda.is_available() else None,
        "geometry": [{name: one.get(name) for name in ("seconds", "gaussians", "psnr")} for one in geometry],
    }


def _machine(config: PackingConfig) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(gpu) for gpu in range(torch.cuda.device_count())] if cuda else []
    settings = json.loads(json.dumps(asdict(config), default=lambda path: path.name))
    return {"gpus": names, "cores": num_cores(), "torch": torch.__version__, "settings": settings}


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(PackingConfig)))
