"""Views per second of distillation, beside the floor: the ViT alone and the render alone on the same shapes.

Scenes are synthetic (random Gaussians, random photos, random weights), so that any number of any size can be had:

    python benchmarks/distillation.py --backbone vit_small_patch14_dinov2 --size 518 784 --batch-sizes 2 16 32
    python benchmarks/distillation.py --backbone dinov2_small_focus --size 504 504 --batch-sizes 2 16
    python benchmarks/distillation.py --scenes 230 --gaussians 1000000 --views 8 --batch-sizes 16
    torchrun --nproc-per-node 2 benchmarks/distillation.py --batch-sizes 32
    python benchmarks/distillation.py --batch-sizes 16 --profile

What real scenes give is measured with fit3d-distill itself: docs/distillation.md lists the commands.
"""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from safetensors.torch import save_file

from distill.config import DistillConfig
from distill.photo_store import PhotoStore
from distill.prefetcher import Prefetcher
from distill.recipes import Recipe, choose_recipe
from distill.sampler import Sampler
from distill.scenes import Scene, SceneCache, open_scenes
from distill.step import DistillLoss, EagerStep, GraphStep, StepInput, make_optimizer
from distill.student import load_student, prepare_training
from distill.targets import LiftedTargets
from distill.trainer import Trainer
from fit3d_ns.backbones import BackboneSpec, backbone_identity, describe_backbone
from fit3d_ns.backbones.architecture import build_model, resolve_architecture
from fit3d_ns.data.photos.bundled import BundledPhoto, hash_file
from fit3d_ns.features.grid import FEATURE_GRIDS
from fit3d_ns.features.rendering import Geometry
from fit3d_ns.runs.bundle import BundleCameras, BundleInfo, BundleView, SceneTensors, write_bundle
from fit3d_ns.support.command_line import run_command
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_json, atomic_write_text
from fit3d_ns.support.processes import World, join_world, wait_for_all


@dataclass
class Benchmark:
    """Times distillation on synthetic scenes."""

    backbone: str = "vit_small_patch14_dinov2"
    """Architecture of teacher and student; its weights are random."""
    size: tuple[int, int] = (518, 784)
    """Height and width of the photos in pixels."""
    batch_sizes: tuple[int, ...] = (2, 16, 32)
    """Views per step, over all processes."""
    scenes: int = 6
    """Scenes."""
    gaussians: int = 500_000
    """Gaussians in each."""
    views: int = 64
    """Training views of each."""
    feature_grid: Literal["fast", "paper"] = "fast"
    """How features are rendered."""
    timed_views: int = 3200
    """Views that are timed, after the warm-up; many more than are rendered ahead."""
    acceleration: Literal["auto", "none", "compile", "graph"] = "auto"
    """See fit3d-distill."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """See fit3d-distill."""
    scene_placement: Literal["auto", "device", "host", "disk"] = "auto"
    """See fit3d-distill."""
    scene_memory: float | None = None
    """See fit3d-distill."""
    gradient_checkpointing: bool = False
    """See fit3d-distill."""
    keep_targets: bool = False
    """Let targets stay in memory once rendered, as a training of several epochs does if they fit."""
    views_per_render: int = 8
    """See fit3d-distill."""
    render_ahead: int = 64
    """See fit3d-distill."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run."""
    profile: bool = False
    """Also tell which kernels the time goes into; slows the training down a little."""
    folder: Path | None = None
    """Where the synthetic scenes go, to serve again; a temporary folder if not given."""
    output: Path = Path("outputs/benchmarks/distillation.json")
    """Where the rows are written."""


_SCENE_CHOICES = ("backbone", "size", "scenes", "gaussians", "views", "feature_grid")
"""What decides the scenes; a folder can serve again for no others."""


def main(benchmark: Benchmark) -> None:
    """Runs the benchmark.

    Args:
        benchmark: The user's choices.
    """
    with join_world(benchmark.device) as world:
        folder = benchmark.folder or Path(tempfile.gettempdir()) / f"fit3d-distillation-{os.getppid()}"
        if world.is_main:
            _make_scenes(benchmark, folder)
        wait_for_all()
        scenes = open_scenes(sorted(folder.glob("bundles/*")), None)
        try:
            rows = [_measure(benchmark, scenes, batch_size, world, folder) for batch_size in benchmark.batch_sizes]
        finally:
            wait_for_all()
            if world.is_main and benchmark.folder is None:
                shutil.rmtree(folder)
        if world.is_main:
            atomic_write_json(benchmark.output, {"benchmark": _plain(asdict(benchmark)), "rows": rows})


def _measure(
    benchmark: Benchmark, scenes: list[Scene], batch_size: int, world: World, folder: Path
) -> dict[str, float | str]:
    """One row: the whole training, then its parts alone."""
    device = world.device
    warm_up = 30
    config = DistillConfig(
        ema_decay=0.0,
        output_dir=folder / f"out-{batch_size}-{time.time_ns() if world.size == 1 else 'group'}",
        steps=warm_up + math.ceil(benchmark.timed_views / batch_size),
        batch_size=batch_size,
        acceleration=benchmark.acceleration,
        precision=benchmark.precision,
        gradient_checkpointing=benchmark.gradient_checkpointing,
        views_per_render=benchmark.views_per_render,
        render_ahead=benchmark.render_ahead,
        log_every=warm_up,
        save_every=10**9,
        device=benchmark.device,
    )
    config.output_dir.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    scene_cache = SceneCache(scenes, world, benchmark.scene_placement, benchmark.scene_memory)
    _wait(device)
    upload_seconds = time.perf_counter() - start
    if world.is_main:
        print(scene_cache.describe())
    student = load_student(config, scenes, device)
    photos = PhotoStore(scenes, student.info.patch_size, device, folder / "photo-cache", resident_bytes=8 * 10**9)
    photos.fill(world.rank, world.size, show=False)
    wait_for_all()
    targets = LiftedTargets(scenes, scene_cache, device, "weight", 0.5)
    sampled = [scene.sampled_views() for scene in scenes]
    recipe = choose_recipe(config, sum(len(views.views) for views in sampled), world.size)
    sampler = Sampler(sampled, batch_size, config.seed, recipe.flip, scene_cache.block_bytes)
    kept = 10**12 if benchmark.keep_targets else 0
    prefetcher = Prefetcher(scenes, sampler, targets, scene_cache, photos, config, world, kept_bytes=kept)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(config, recipe, scenes, copy.deepcopy(student), prefetcher, sampler, world)
    activity = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    profiling = torch.profiler.profile(activities=[activity]) if benchmark.profile else None
    with profiling or contextlib.nullcontext():
        result = trainer.train()
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    share = batch_size // world.size
    vit = share / _vit_seconds(config, recipe, student, scenes, share, device) * world.size
    render = 1 / _render_seconds(targets, scenes, benchmark.views_per_render, device) * world.size
    floor = 1 / (1 / vit + 1 / render)
    photos.close()
    scene_cache.close()
    shutil.rmtree(config.output_dir, ignore_errors=True)
    row: dict[str, float | str] = {
        "backbone": benchmark.backbone,
        "size": f"{benchmark.size[0]}x{benchmark.size[1]}",
        "batch_size": batch_size,
        "processes": world.size,
        "placement": scene_cache.placement,
        "views_per_second": result.views_per_second,
        "vit_alone": vit,
        "render_alone": render,
        "floor": floor,
        "share_of_floor": result.views_per_second / floor,
        "bank_gigabytes": scene_cache.total_bytes / 1e9,
        "upload_seconds": upload_seconds,
        "peak_gigabytes": peak,
    }
    if profiling is not None:
        row["kernel_ms_per_view"] = json.dumps(_kernel_times(profiling, device, (config.steps or 0) * share))
    if world.is_main:
        print(json.dumps({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()}))
    return row


def _vit_seconds(
    config: DistillConfig, recipe: Recipe, student: Any, scenes: list[Scene], share: int, device: torch.device
) -> float:
    """Seconds of one optimizer step on inputs that lie ready."""
    rows, columns = scenes[0].info.patch_grid(0)
    patch, width = student.info.patch_size, student.info.width
    student = copy.deepcopy(student)
    parameters = prepare_training(student, config)
    optimizer = make_optimizer(parameters, recipe, device)
    cuda = device.type == "cuda"
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and cuda)
    loss: torch.nn.Module = DistillLoss(student, bf16)
    if config.acceleration == "compile":
        loss.compile(dynamic=False)
    eager = EagerStep(loss, optimizer, parameters, recipe.clip)
    graph = cuda and config.acceleration != "none"
    runner = GraphStep(eager, optimizer, parameters) if graph else eager
    weights = torch.ones(share, rows, columns, device=device)
    inputs = StepInput(
        images=torch.randint(0, 256, (share, 3, rows * patch, columns * patch), dtype=torch.uint8, device=device),
        targets=torch.randn(share, width, rows, columns, device=device).half(),
        weights=weights,
        total_weight=weights.sum(),
        fullness=torch.ones((), device=device),
    )
    return _seconds(lambda: runner.run(inputs), device)


_KERNELS = {
    "attention": "flash|fmha|attention|softmax",
    "matrix products": "gemm|nvjet|cutlass|cublas|splitK",
    "render": "gsplat|rasterize|projection|isect|radix|Radix|DeviceScan|fully_fused",
    "decoder, photos": "conv|im2col|interpolate|upsample|grid_sample|nchwToNhwc|nhwcToNchw|flip",
    "optimizer, clipping": "multi_tensor|adam|Adam|foreach|FusedOptimizer",
    "norms, activations, casts": "layer_norm|LayerNorm|Gelu|gelu|elementwise|reduce|Reduce|triton|copy|Copy",
    "memory": "Memcpy|Memset",
}
"""Patterns of CUDA kernels' names; the first that is found counts."""


def _kernel_times(profiler: torch.profiler.profile, device: torch.device, views: int) -> dict[str, float]:
    """Milliseconds of the device's time a view of this process, by kind of kernel, the longest kind first."""
    times = dict.fromkeys([*_KERNELS, "other"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, pattern in _KERNELS.items() if re.search(pattern, event.key)), "other")
        microseconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        times[kind] += microseconds / 1000 / views
    return {kind: round(value, 4) for kind, value in sorted(times.items(), key=lambda item: -item[1])}


def _render_seconds(targets: LiftedTargets, scenes: list[Scene], at_once: int, device: torch.device) -> float:
    """Seconds of one view's target: rendered, decoded, weighed."""
    calls = 0

    def render() -> None:
        nonlocal calls
        scene = calls % len(scenes)
        views = scenes[scene].info.indices("train")
        first = calls // len(scenes) * at_once % max(len(views) - at_once + 1, 1)
        targets.make(scene, views[first : first + at_once])
        calls += 1

    return _seconds(render, device) / min(at_once, len(scenes[0].info.indices("train")))


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median over five rounds, each of as many calls as fill a fifth of a second, after a warm-up."""
    for _ in range(5):
        call()
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    count = max(1, int(0.2 / max(time.perf_counter() - start, 1e-6)))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            call()
        _wait(device)
        rounds.append((time.perf_counter() - start) / count)
    return float(np.median(rounds))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _make_scenes(benchmark: Benchmark, folder: Path) -> None:
    """Writes the bundles; scenes share the bytes of their Gaussians and photos on disk, not on the device.

    Raises:
        UserError: If the folder holds something else already.
    """
    description = json.dumps({name: getattr(benchmark, name) for name in _SCENE_CHOICES})
    described = folder / "scenes.json"
    if folder.exists():
        if not described.is_file() or described.read_text() != description:
            raise UserError(
                f"--folder {folder} holds no scenes of these choices ({', '.join(_SCENE_CHOICES)}): name another, or "
                "delete it."
            )
        return
    random = np.random.default_rng(0)
    height, width = benchmark.size
    architecture = resolve_architecture(benchmark.backbone)
    folder.mkdir(parents=True)
    weights = folder / "weights.safetensors"
    save_file(
        {name: value.contiguous() for name, value in build_model(architecture, "cpu").state_dict().items()}, weights
    )
    spec = BackboneSpec(benchmark.backbone, weights)
    channels = describe_backbone(spec).width
    views = []
    for index in range(benchmark.views):
        path = folder / "photos" / f"{index % 16:02d}.jpg"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            blobs = Image.fromarray(random.integers(0, 255, (24, 32, 3), dtype=np.uint8))
            blobs.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=92)
        views.append(BundleView(f"{index:04d}", "train", BundledPhoto(str(path), hash_file(path), height, width)))
    info = BundleInfo(
        scene="synthetic",
        teacher=backbone_identity(spec),
        teacher_max_size=None,
        teacher_weights=str(weights),
        feature_grid=FEATURE_GRIDS[benchmark.feature_grid],
        dataparser_transform=torch.eye(4)[:3].tolist(),
        dataparser_scale=1.0,
        source={},
        views=views,
    )
    first = folder / "bundles" / "000"
    write_bundle(first, info, _room(benchmark.gaussians, channels), _ring(benchmark), {})
    for number in range(1, benchmark.scenes):
        copied = folder / "bundles" / f"{number:03d}"
        copied.mkdir()
        for path in first.iterdir():
            os.link(path, copied / path.name)
    atomic_write_text(described, description)  # last, so that scenes made in part are not taken for whole


def _room(gaussians: int, channels: int) -> SceneTensors:
    """Small flat Gaussians on the walls of a box of 5 x 3 x 5 units, about as opaque and as deep as a trained room."""
    generator = torch.Generator().manual_seed(0)
    half = torch.tensor([2.5, 1.5, 2.5])
    means = (torch.rand(gaussians, 3, generator=generator) * 2 - 1) * half
    wall = torch.randint(0, 3, (gaussians,), generator=generator)
    side = torch.randint(0, 2, (gaussians,), generator=generator) * 2.0 - 1.0
    depth = torch.rand(gaussians, generator=generator) * 0.3
    means[torch.arange(gaussians), wall] = side * (half[wall] - depth)
    size = 0.5 * (110.0 / gaussians) ** 0.5  # 110 square units of wall
    return SceneTensors(
        geometry=Geometry(
            means=means,
            quats=torch.randn(gaussians, 4, generator=generator),
            scales=size * torch.exp(0.5 * torch.randn(gaussians, 3, generator=generator)),
            opacities=torch.sigmoid(torch.randn(gaussians, generator=generator)),
        ),
        features=torch.randn(gaussians, 64, generator=generator).half(),
        decoder=torch.randn(channels, 64, 3, 3, generator=generator) * 0.05,
    )


def _ring(benchmark: Benchmark) -> BundleCameras:
    """Cameras in the middle of the room, looking around."""
    angles = torch.arange(benchmark.views) * 2 * torch.pi / benchmark.views
    viewmats = torch.eye(4).repeat(benchmark.views, 1, 1)
    viewmats[:, 0, 0], viewmats[:, 0, 2] = angles.cos(), angles.sin()
    viewmats[:, 2, 0], viewmats[:, 2, 2] = -angles.sin(), angles.cos()
    viewmats[:, 2, 3] = 0.5
    height, width = benchmark.size
    intrinsics = torch.tensor([[0.7 * width, 0, width / 2], [0, 0.7 * width, height / 2], [0, 0, 1]])
    return BundleCameras(viewmats, intrinsics.expand(benchmark.views, 3, 3))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Benchmark)))
