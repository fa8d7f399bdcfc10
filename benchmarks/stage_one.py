r"""Trains plain splatfacto and fit3d-splat side by side on one scene and tabulates quality, time and memory.

Each variant is trained in a process of its own, one after the other (timings are comparable) or all at once
(`--parallel`: quality only, timings are not comparable). A variant is `splatfacto`, or `fast` or `paper` with settings:

    python benchmarks/stage_one.py --data scene --steps 7000 --variants splatfacto fast paper
    python benchmarks/stage_one.py --data scene --steps 7000 --parallel \\
        --variants fast:lr=6.25e-5 fast:lr=1e-2 fast:lr=1e-2,init=random
"""

import json
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from fit3d_ns.runs.names import DECODER, FEATURES, METHOD
from fit3d_ns.support.files import atomic_write_json

WARM_UP = 50
"""Steps that compile and load: trained, but not timed."""


@dataclass
class Benchmark:
    """Compares ways of training one scene."""

    data: Path
    """Scene in nerfstudio's format."""
    output: Path = Path("outputs/benchmarks/stage_one.json")
    """Where the table is written."""
    variants: tuple[str, ...] = ("splatfacto", "fast", "paper")
    """What is trained."""
    steps: int = 7000
    """Training steps."""
    curve_every: int = 1000
    """Steps between measurements on the held-out views; their time is not counted."""
    backbone: str = "dinov2_small_focus"
    """Teacher."""
    backbone_weights: Path | None = None
    """Local weights of the teacher."""
    cache: Path = Path("/tmp/fit3d_benchmark_cache")
    """Feature cache shared by the variants."""
    seed: int = 42
    """Seed of every run."""
    parallel: bool = False
    """Train all variants at once."""
    single: str | None = None
    """Internal: train this variant in this process and print its row."""


def main(benchmark: Benchmark) -> None:
    """Runs the benchmark, or one variant of it.

    Args:
        benchmark: The user's choices.
    """
    if benchmark.single is not None:
        print("ROW " + json.dumps(train_variant(benchmark, benchmark.single)), flush=True)
        return
    processes: list[tuple[str, subprocess.Popen]] = []
    rows: list[dict[str, Any]] = []
    for variant in benchmark.variants:
        processes.append((variant, _start(variant)))
        if not benchmark.parallel:
            rows.append(_finish(*processes.pop()))
            atomic_write_json(benchmark.output, rows)
    rows += [_finish(*process) for process in processes]
    atomic_write_json(benchmark.output, rows)
    keys = [key for key in rows[-1] if not isinstance(rows[-1][key], (list, dict))]
    print("\t".join(keys))
    for row in rows:
        cells = (row.get(key) for key in keys)
        print("\t".join(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells))


def _start(variant: str) -> subprocess.Popen:
    command = [sys.executable, __file__, *sys.argv[1:], "--single", variant]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(variant: str, process: subprocess.Popen) -> dict[str, Any]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("CURVE "):
            print(line, end="", flush=True)
        if line.startswith("ROW "):
            process.wait()
            return json.loads(line[4:])
    return {"variant": variant, "failed": "".join(lines)[-2000:]}


def train_variant(benchmark: Benchmark, variant: str) -> dict[str, Any]:
    """Trains one variant and measures it on the held-out views.

    Args:
        benchmark: Common settings.
        variant: `splatfacto`, or a feature grid with settings, such as `fast:lr=1e-2,init=random`.

    Returns:
        One row of the table; `curve` holds the measurements along the way.
    """
    from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
    from nerfstudio.scripts.train import _set_random_seed

    from fit3d_ns import compat

    name, _, settings = variant.partition(":")
    options = dict(setting.split("=") for setting in settings.split(",") if setting)
    config = _configuration(benchmark, name, options)
    _set_random_seed(benchmark.seed)
    with compat.lazy_lpips():
        trainer = config.setup()
        trainer.setup()
    cuda = trainer.device.startswith("cuda")
    fill_seconds = 0.0
    if name != "splatfacto":
        start = time.perf_counter()
        trainer.pipeline.datamanager.teacher_map("train", 0)
        fill_seconds = time.perf_counter() - start
    curve: list[dict[str, float]] = []
    marks: dict[int, float] = {}
    paused, last_peak = 0.0, 0

    def measure(step: int) -> None:
        nonlocal paused, last_peak
        start = _now(cuda)
        last_peak = max(last_peak, torch.cuda.max_memory_allocated() if cuda else 0)
        metrics = trainer.pipeline.get_average_eval_image_metrics(step)
        seconds = start - paused - marks.get(WARM_UP, start)
        curve.append({"step": step + 1, "seconds": seconds, "gaussians": trainer.pipeline.model.num_points, **metrics})
        print("CURVE " + json.dumps({"variant": variant, **curve[-1]}), flush=True)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        paused += _now(cuda) - start

    trainer.callbacks.append(
        TrainingCallback(
            [TrainingCallbackLocation.AFTER_TRAIN_ITERATION],
            lambda step: measure(step) if (step + 1) % benchmark.curve_every == 0 else None,
        )
    )
    trainer.callbacks.append(
        TrainingCallback(
            [TrainingCallbackLocation.AFTER_TRAIN_ITERATION],
            lambda step: marks.update({step: _now(cuda)}) if step == WARM_UP else None,
        )
    )
    trainer.train()
    seconds = curve[-1]["seconds"]
    final = {key: value for key, value in curve[-1].items() if key not in ("num_rays_per_sec", "fps", "step")}
    return {
        "variant": variant,
        "steps": benchmark.steps,
        **final,
        "seconds": seconds,
        "ms_per_step": 1000 * seconds / (curve[-1]["step"] - 1 - WARM_UP),
        "teacher_seconds": fill_seconds,
        "peak_memory_mb": last_peak / 2**20,
        "curve": curve,
    }


def _now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _configuration(benchmark: Benchmark, name: str, options: dict[str, str]) -> Any:
    from nerfstudio.configs.method_configs import all_methods

    config = deepcopy(all_methods["splatfacto" if name == "splatfacto" else METHOD])
    config.vis = "tensorboard"
    config.viewer.quit_on_train_completion = True
    config.logging.local_writer.enable = False
    config.max_num_iterations = benchmark.steps
    config.steps_per_eval_image = config.steps_per_eval_all_images = config.steps_per_save = 10**9
    config.output_dir = Path("/tmp/fit3d_benchmark_runs")
    config.timestamp = f"{name}-{time.time_ns()}"
    config.machine.device_type = "cuda" if torch.cuda.is_available() else "cpu"
    config.pipeline.datamanager.data = benchmark.data
    if name == "splatfacto":
        return config
    datamanager = config.pipeline.datamanager
    datamanager.backbone = benchmark.backbone
    datamanager.backbone_weights = benchmark.backbone_weights
    datamanager.feature_cache_dir = benchmark.cache
    config.pipeline.model.feature_grid = name
    if "init" in options:
        config.pipeline.model.feature_init = options["init"]
    if "interval" in options:
        config.pipeline.model.feature_interval = int(options["interval"])
    if "lr" in options:
        config.optimizers[FEATURES]["optimizer"].lr = float(options["lr"])
    if "decoder_lr" in options:
        config.optimizers[DECODER]["optimizer"].lr = float(options["decoder_lr"])
    if "dim" in options:
        config.pipeline.model.feature_dim = int(options["dim"])
    return config


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
