r"""Times the probes: a table of six rows against one, the photos per second, and what the fast protocol differs by.

Each measurement prints one line of JSON and is appended to the output file; nothing is asserted.

    python benchmarks/probing.py throughput --data photos --workers 14
    python benchmarks/probing.py throughput --kind depth --precision bf16
    torchrun --nproc-per-node 2 benchmarks/probing.py throughput --data photos --workers 14
    python benchmarks/probing.py data-loading --data photos --workers 14
    python benchmarks/probing.py random --backbone dinov2_small_focus --weights random.safetensors
    python benchmarks/probing.py difference --data camvid --backbone dinov2_small_focus --tuned tuned.safetensors \
        --control control.safetensors

`throughput` needs no weights and no data: features of noise cost what features of photos cost. It times the backbones
alone, one row and all six in turn in one process, so that the ratios hold whatever else the machine does, and projects
the whole recipe. With `--data` it also times the six rows on photos that workers read and augment meanwhile, which is
what a user gets. Under torchrun the batch is shared by the processes, as in the probe. `data-loading` times reading and
augmentation alone. `difference` runs the fast and the full protocol with the same seeds and tabulates the difference
row by row. `random` writes randomly initialised weights, for the row that shows what an architecture alone is worth:
`fit3d-probe ... --backbone-weights random.safetensors`.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from safetensors.torch import save_file

from fit3d_ns.backbones import Backbone, BackboneSpec, FineTuned, describe_backbone
from fit3d_ns.backbones.architecture import build_model, resolve_architecture
from fit3d_ns.support.console import rank
from fit3d_ns.support.files import atomic_write_json
from fit3d_ns.support.processes import join_world, wait_for_all, world_size
from probe.augment import crop_size
from probe.config import DepthConfig, SegmentationConfig
from probe.data.base import LabelRule, ProbeData, read_image
from probe.data.batches import training_batches
from probe.data.choice import DataChoice, DatasetName
from probe.data.loading import load_data
from probe.feature_sources import OnlineSource, train_samples
from probe.features.partners import Partner
from probe.features.rows import FrozenBackbones, Row, choose_rows
from probe.protocols import DepthRecipe, SegmentationRecipe, choose_recipe
from probe.run import run_trained_probe
from probe.stacks import one_by_one
from probe.tasks import TASKS
from probe.tasks.depth import DepthTask
from probe.tasks.segmentation import SegmentationTask
from probe.tasks.task import Task
from probe.training import HeadTrainer


@dataclass
class Throughput:
    """Seconds per step with one row and with all six, against the backbones alone."""

    kind: Literal["segmentation", "depth"] = "segmentation"
    """Which probe."""
    backbone: str = "dinov2_small"
    """Architecture; its weights stay random."""
    classes: int = 150
    """Of segmentation; those of the data set where one is given."""
    data: Path | None = None
    """Data set, to time the whole pipeline too."""
    dataset: DatasetName = "folder"
    """Its layout."""
    workers: int = 4
    """Processes that read its photos."""
    steps: int = 30
    """Timed steps of each measurement."""
    warm_up: int = 5
    """Steps before."""
    batch_size: int = 16
    """Photos per step over all processes."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the backbones on CUDA."""
    device: str = "auto"
    """Where."""
    output: Path = Path("outputs/benchmarks/probing.json")
    """Where the lines are collected."""


@dataclass
class DataLoading:
    """Photos per second of reading and augmentation, without any network."""

    data: Path
    """Data set."""
    dataset: DatasetName = "folder"
    """Its layout."""
    kind: Literal["segmentation", "depth"] = "segmentation"
    """Which probe."""
    workers: int = 4
    """Processes."""
    batches: int = 30
    """Timed batches of 16."""
    output: Path = Path("outputs/benchmarks/probing.json")
    """Where the lines are collected."""


@dataclass
class Difference:
    """What the fast protocol's numbers differ by from the full one's."""

    data: Path
    """Data set."""
    tuned: tuple[str, ...]
    """Fine-tuned backbones, as for fit3d-probe."""
    control: tuple[str, ...] = ()
    """Backbones distilled without 3D, likewise."""
    dataset: DatasetName = "folder"
    """Its layout."""
    kind: Literal["segmentation", "depth"] = "segmentation"
    """Which probe."""
    backbone: str = "dinov2_small_focus"
    """Original."""
    backbone_weights: Path | None = None
    """Local weights of the original."""
    iterations: int | None = None
    """Of the full protocol, instead of the recipe's."""
    fast_iterations: int | None = None
    """Of the fast protocol, likewise."""
    batch_size: int | None = None
    """Photos of a step of both protocols, instead of the recipe's."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of both."""
    device: str = "auto"
    """Where."""
    workers: int = 4
    """Processes that read ahead."""
    runs: Path = Path("outputs/benchmarks/probing_runs")
    """Output folders of the probes."""
    output: Path = Path("outputs/benchmarks/probing.json")
    """Where the lines are collected."""


@dataclass
class Random:
    """Randomly initialised weights."""

    weights: Path
    """File to write, .safetensors."""
    backbone: str = "dinov2_small_focus"
    """Architecture."""
    seed: int = 0
    """Of the weights."""


def throughput(benchmark: Throughput) -> dict[str, Any] | None:
    """Times steps on noise, and on photos if there are some.

    Args:
        benchmark: The user's choices.

    Returns:
        What was measured; None in all processes but the first.
    """
    with join_world(benchmark.device) as world:
        line = _throughput(benchmark, world.device)
        return line if world.is_main else None


def _throughput(benchmark: Throughput, device: torch.device) -> dict[str, Any]:
    info = describe_backbone(BackboneSpec(benchmark.backbone, norm=benchmark.kind == "segmentation"))

    def random_backbone() -> Backbone:
        model = build_model(resolve_architecture(benchmark.backbone), device)
        return Backbone(model, info, benchmark.kind == "segmentation", {}).to(device).eval()

    both = FrozenBackbones({"original": random_backbone(), "tuned": random_backbone()}, benchmark.precision)
    alone = FrozenBackbones({"original": random_backbone()}, benchmark.precision)
    task, size = _task(benchmark)
    share = benchmark.batch_size // world_size()
    generator = torch.Generator(device).manual_seed(rank())
    images = torch.rand(share, 3, *size, generator=generator, device=device)
    if benchmark.kind == "segmentation":
        classes = len(task.data.classes)
        target = torch.randint(0, classes, (share, *size), generator=generator, device=device)
    else:
        target = 0.5 + 9 * torch.rand(share, *size, generator=generator, device=device)
    optimization = replace(task.recipe.optimization, batch_size=benchmark.batch_size)
    rows = choose_rows(None, (Partner("tuned", "tuned", "tuned", FineTuned("random", Path("random"))),))

    def new_trainer(chosen: tuple[Row, ...]) -> HeadTrainer:
        return HeadTrainer(task, chosen, optimization, (info.width, info.width), 0, device)

    def seconds(step: Callable[[int], object]) -> float:
        for number in range(benchmark.warm_up):
            step(number)
        _wait(device)
        start = time.perf_counter()
        for number in range(benchmark.steps):
            step(number)
        _wait(device)
        return (time.perf_counter() - start) / benchmark.steps

    measured: dict[str, float] = {
        "one_backbone": seconds(lambda _: alone(images)),
        "two_backbones": seconds(lambda _: both(images)),
    }
    tables: tuple[tuple[str, tuple[Row, ...], FrozenBackbones], ...] = (
        ("row_original", rows[:1], alone),
        ("row_concat", rows[-1:], both),
        ("six_rows", rows, both),
    )
    for name, chosen, backbones in tables:
        trainer = new_trainer(chosen)
        # Late enough for the full loss.
        loss = one_by_one(partial(task.loss, target=target, step=10_000))
        measured[name] = seconds(lambda number: trainer.step(number, backbones(images), loss))  # noqa: B023
    whole = measured["six_rows"]
    if benchmark.data is not None:
        fill = torch.tensor(info.mean, device=device).view(1, 3, 1, 1)
        source = OnlineSource(task, both, device, benchmark.workers, fill)
        trainer = new_trainer(rows)
        batches = source.training(0, 0, benchmark.warm_up + benchmark.steps, benchmark.batch_size)
        whole = measured["six_rows_on_photos"] = seconds(lambda number: trainer.step(number, *next(batches)))
    return {
        "benchmark": "throughput",
        **{key: value for key, value in asdict(benchmark).items() if key not in ("output", "data")},
        "data": task.data.name,
        "classes": len(task.data.classes),
        "processes": world_size(),
        "machine": _machine(device),
        "seconds_per_step": measured,
        "six_rows_over_row_concat": measured["six_rows"] / measured["row_concat"],
        "six_rows_over_row_original": measured["six_rows"] / measured["row_original"],
        "images_per_second": benchmark.batch_size / whole,
        "share_of_backbones_alone": measured["two_backbones"] / whole,
        "projected_recipe_minutes": optimization.iterations * whole / 60,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


def data_loading(benchmark: DataLoading) -> dict[str, Any]:
    """Times the workers.

    Args:
        benchmark: The user's choices.

    Returns:
        What was measured.
    """
    data = load_data(DataChoice(benchmark.dataset, benchmark.data, benchmark.kind))
    recipe = choose_recipe(benchmark.kind, benchmark.dataset)
    task: Task = TASKS[benchmark.kind](data, recipe)
    batches = training_batches(train_samples(task, 0), 0, benchmark.batches + 5, 16, benchmark.workers, False)
    for _ in range(5):
        next(batches)
    start = time.perf_counter()
    count = sum(len(batch["image"]) for batch in batches)
    seconds = time.perf_counter() - start
    return {
        "benchmark": "feed",
        "data": data.name,
        "kind": benchmark.kind,
        "workers": benchmark.workers,
        "machine": _machine(torch.device("cpu")),
        "images_per_second": count / seconds,
    }


def difference(benchmark: Difference) -> dict[str, Any]:
    """Runs both protocols.

    Args:
        benchmark: The user's choices.

    Returns:
        Scores of both by row, and below `metrics` all that both wrote: every seed, class and setting.
    """
    kind = SegmentationConfig if benchmark.kind == "segmentation" else DepthConfig
    tables = {}
    protocols: tuple[tuple[str, Literal["fast", "paper"]], ...] = (("fast", "fast"), ("full", "paper"))
    for name, protocol in protocols:
        config = kind(
            data=benchmark.data,
            dataset=benchmark.dataset,
            backbone=benchmark.backbone,
            backbone_weights=benchmark.backbone_weights,
            tuned=benchmark.tuned,
            control=benchmark.control,
            seeds=benchmark.seeds,
            protocol=protocol,
            iterations=benchmark.fast_iterations if name == "fast" else benchmark.iterations,
            batch_size=benchmark.batch_size,
            device=benchmark.device,
            workers=benchmark.workers,
            output_dir=benchmark.runs / f"{benchmark.kind}_{name}",
        )
        run_trained_probe(config, benchmark.kind)
        tables[name] = json.loads((config.output_dir / "metrics.json").read_text())
    headline = "miou" if benchmark.kind == "segmentation" else "rmse"
    fast, full = tables["fast"]["rows"], tables["full"]["rows"]
    return {
        "benchmark": "difference",
        "data": benchmark.data.name,
        "kind": benchmark.kind,
        "metric": headline,
        "rows": {
            row: {
                "fast": fast[row][headline],
                "full": full[row][headline],
                "difference": fast[row][headline]["mean"] - full[row][headline]["mean"],
            }
            for row in full
        },
        "metrics": tables,
    }


def write_random_weights(benchmark: Random) -> None:
    """Writes the weights that timm starts training with.

    Args:
        benchmark: The user's choices.
    """
    torch.manual_seed(benchmark.seed)
    model = build_model(resolve_architecture(benchmark.backbone), "cpu")
    save_file(model.state_dict(), benchmark.weights)


def main(benchmark: Throughput | DataLoading | Difference | Random) -> None:
    """Runs a benchmark and collects its line.

    Args:
        benchmark: The user's choices.
    """
    if isinstance(benchmark, Random):
        write_random_weights(benchmark)
        return
    if isinstance(benchmark, Throughput):
        line = throughput(benchmark)
        if line is None:
            return
    elif isinstance(benchmark, DataLoading):
        line = data_loading(benchmark)
    else:
        line = difference(benchmark)
    print(json.dumps(line))
    lines = json.loads(benchmark.output.read_text()) if benchmark.output.is_file() else []
    atomic_write_json(benchmark.output, [*lines, line])


def _task(benchmark: Throughput) -> tuple[Task, tuple[int, int]]:
    """Returns a task, without data if none are given, and the size of its training crops."""
    if benchmark.kind == "segmentation":
        names = tuple(map(str, range(benchmark.classes)))
        data = ProbeData("noise", "segmentation", (), (), classes=names, labels=LabelRule(benchmark.classes))
    else:
        data = ProbeData("noise", "depth", (), ())
    if benchmark.data is not None:
        data = load_data(DataChoice(benchmark.dataset, benchmark.data, benchmark.kind))
    recipe = choose_recipe(benchmark.kind, benchmark.dataset if benchmark.data else "nyuv2")
    if isinstance(recipe, SegmentationRecipe):
        return SegmentationTask(data, recipe), (recipe.crop, recipe.crop)
    assert isinstance(recipe, DepthRecipe)
    if recipe.crop is not None:
        return DepthTask(data, recipe), recipe.crop
    height, width = read_image(data.train[0].image).shape[:2]
    return DepthTask(data, recipe), crop_size(height, width)


def _wait(device: torch.device) -> None:
    wait_for_all()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


if __name__ == "__main__":
    main(
        tyro.cli(
            Annotated[Throughput, tyro.conf.subcommand("throughput")]
            | Annotated[DataLoading, tyro.conf.subcommand("data-loading")]
            | Annotated[Difference, tyro.conf.subcommand("difference")]
            | Annotated[Random, tyro.conf.subcommand("random")],  # type: ignore[arg-type]
            description=__doc__,
        )
    )
