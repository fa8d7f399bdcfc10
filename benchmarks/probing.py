"""Times the probes: a table of six rows against one, the photos per second, and what the fast protocol differs by.

Each measurement prints one line of JSON and is appended to the output file; nothing is asserted.

    python benchmarks/probing.py throughput --device cuda --precision fp32
    python benchmarks/probing.py throughput --kind depth --device cuda --precision bf16
    python benchmarks/probing.py feed --data photos --workers 14
    python benchmarks/probing.py random --backbone dinov2_small_focus --weights random.safetensors
    python benchmarks/probing.py difference --data camvid --backbone dinov2_small_focus --tuned tuned.safetensors

`throughput` needs no data and no weights: features of noise cost what features of photos cost. It times the backbones
alone, one row and all six in turn in one process, so that the ratios hold whatever else the machine does, and projects
the whole recipe. `feed` times reading and augmentation alone. `difference` runs the fast and the full protocol with
the same seeds and tabulates the difference row by row. `random` writes randomly initialised weights, for the row that
shows what an architecture alone is worth: `fit3d-probe ... --backbone-weights random.safetensors`.
"""

import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Callable, Literal, Optional, Tuple, Union

import torch
import tyro
from safetensors.torch import save_file

from fit3d_ns.backbones import Backbone, BackboneSpec, describe_backbone
from fit3d_ns.backbones.architecture import build_model, resolve_architecture
from fit3d_ns.files import atomic_write_json
from probe.config import DepthConfig, SegmentationConfig
from probe.datasets import DataChoice, LabelRule, ProbeData, load_data
from probe.datasets.choice import DatasetName
from probe.depth import DepthTask
from probe.features import FrozenBackbones, Row, choose_rows
from probe.recipes import DepthRecipe, SegmentationRecipe, choose_recipe
from probe.run import run_trained_probe
from probe.segmentation import SegmentationTask
from probe.sources import train_samples
from probe.stream import training_batches
from probe.task import Task
from probe.training import HeadBank


@dataclass
class Throughput:
    """Seconds per step with one row and with all six, against the backbones alone."""

    kind: Literal["segmentation", "depth"] = "segmentation"
    """Which probe."""
    backbone: str = "dinov2_small"
    """Architecture; its weights stay random."""
    classes: int = 150
    """Of segmentation."""
    steps: int = 30
    """Timed steps of each measurement."""
    warm_up: int = 5
    """Steps before."""
    batch_size: int = 16
    """Photos per step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the backbones on CUDA."""
    device: str = "cuda"
    """Where."""
    output: Path = Path("outputs/benchmarks/probing.json")
    """Where the lines are collected."""


@dataclass
class Feed:
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
    tuned: Path
    """Fine-tuned weights."""
    dataset: DatasetName = "folder"
    """Its layout."""
    kind: Literal["segmentation", "depth"] = "segmentation"
    """Which probe."""
    backbone: str = "dinov2_small_focus"
    """Original."""
    iterations: Optional[int] = None
    """Of the full protocol, instead of the recipe's."""
    seeds: Tuple[int, ...] = (0, 1, 2)
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


def throughput(benchmark: Throughput) -> dict[str, Any]:
    """Times steps on noise."""
    device = torch.device(benchmark.device)
    spec = BackboneSpec(benchmark.backbone, norm=benchmark.kind == "segmentation")
    info = describe_backbone(spec)

    def random_backbone() -> Backbone:
        return (
            Backbone(build_model(resolve_architecture(benchmark.backbone), device), info, spec.norm, {})
            .to(device)
            .eval()
        )

    both = FrozenBackbones({"original": random_backbone(), "tuned": random_backbone()}, benchmark.precision)
    alone = FrozenBackbones({"original": random_backbone()}, benchmark.precision)
    task, size = _task(benchmark.kind, benchmark.classes)
    generator = torch.Generator(device).manual_seed(0)
    images = torch.rand(benchmark.batch_size, 3, *size, generator=generator, device=device)
    shape = (benchmark.batch_size, *size)
    if benchmark.kind == "segmentation":
        target = torch.randint(0, benchmark.classes, shape, generator=generator, device=device)
    else:
        target = 0.5 + 9 * torch.rand(shape, generator=generator, device=device)

    def seconds(step: Callable[[int], object]) -> float:
        for number in range(benchmark.warm_up):
            step(number)
        _wait(device)
        start = time.perf_counter()
        for number in range(benchmark.steps):
            step(number)
        _wait(device)
        return (time.perf_counter() - start) / benchmark.steps

    optimization = replace(task.recipe.optimization, batch_size=benchmark.batch_size)
    rows = choose_rows(None, True, False)
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
        bank = HeadBank(task, chosen, optimization, (info.width, info.width), 0, device)
        # Late enough for the full loss.
        loss = partial(task.loss, target=target, step=10_000)
        measured[name] = seconds(lambda number: bank.step(number, backbones(images), loss))  # noqa: B023
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    iterations = optimization.iterations
    return {
        "benchmark": "throughput",
        **{key: value for key, value in asdict(benchmark).items() if key != "output"},
        "machine": _machine(device),
        "seconds_per_step": measured,
        "six_rows_over_row_concat": measured["six_rows"] / measured["row_concat"],
        "six_rows_over_row_original": measured["six_rows"] / measured["row_original"],
        "images_per_second": benchmark.batch_size / measured["six_rows"],
        "share_of_backbones_alone": measured["two_backbones"] / measured["six_rows"],
        "projected_recipe_minutes": iterations * measured["six_rows"] / 60,
        "peak_gib": memory,
    }


def feed(benchmark: Feed) -> dict[str, Any]:
    """Times the workers."""
    data = load_data(DataChoice(benchmark.dataset, benchmark.data, benchmark.kind))
    recipe = choose_recipe(benchmark.kind, benchmark.dataset)
    task: Task = SegmentationTask(data, recipe) if isinstance(recipe, SegmentationRecipe) else DepthTask(data, recipe)
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
    """Runs both protocols."""
    kind = SegmentationConfig if benchmark.kind == "segmentation" else DepthConfig
    tables = {}
    for name, fast in (("fast", True), ("full", False)):
        config = kind(
            data=benchmark.data,
            dataset=benchmark.dataset,
            backbone=benchmark.backbone,
            tuned=str(benchmark.tuned),
            seeds=benchmark.seeds,
            fast=fast,
            iterations=None if fast else benchmark.iterations,
            device=benchmark.device,
            workers=benchmark.workers,
            output_dir=benchmark.runs / f"{benchmark.kind}_{name}",
        )
        run_trained_probe(config, benchmark.kind)
        tables[name] = json.loads((config.output_dir / "metrics.json").read_text())["rows"]
    headline = "miou" if benchmark.kind == "segmentation" else "rmse"
    return {
        "benchmark": "difference",
        "data": benchmark.data.name,
        "kind": benchmark.kind,
        "metric": headline,
        "rows": {
            row: {
                "fast": tables["fast"][row][headline],
                "full": tables["full"][row][headline],
                "difference": tables["fast"][row][headline]["mean"] - tables["full"][row][headline]["mean"],
            }
            for row in tables["full"]
        },
    }


def write_random_weights(benchmark: Random) -> None:
    """Writes the weights that timm starts training with."""
    torch.manual_seed(benchmark.seed)
    model = build_model(resolve_architecture(benchmark.backbone), "cpu")
    save_file(model.state_dict(), benchmark.weights)


def main(benchmark: Union[Throughput, Feed, Difference, Random]) -> None:
    """Runs a benchmark and collects its line."""
    if isinstance(benchmark, Random):
        write_random_weights(benchmark)
        return
    if isinstance(benchmark, Throughput):
        line = throughput(benchmark)
    elif isinstance(benchmark, Feed):
        line = feed(benchmark)
    else:
        line = difference(benchmark)
    print(json.dumps(line))
    lines = json.loads(benchmark.output.read_text()) if benchmark.output.is_file() else []
    atomic_write_json(benchmark.output, [*lines, line])


def _task(kind: str, classes: int) -> tuple[Task, tuple[int, int]]:
    """Returns a task without data, and the size of its training crops."""
    if kind == "segmentation":
        names = tuple(map(str, range(classes)))
        data = ProbeData("noise", "segmentation", (), (), classes=names, labels=LabelRule(classes))
        recipe = choose_recipe("segmentation", "folder")
        assert isinstance(recipe, SegmentationRecipe)
        return SegmentationTask(data, recipe), (recipe.crop, recipe.crop)
    recipe = choose_recipe("depth", "nyuv2")
    assert isinstance(recipe, DepthRecipe) and recipe.crop is not None
    return DepthTask(ProbeData("noise", "depth", (), ()), recipe), recipe.crop


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


if __name__ == "__main__":
    main(
        tyro.cli(
            Union[
                Annotated[Throughput, tyro.conf.subcommand("throughput")],
                Annotated[Feed, tyro.conf.subcommand("feed")],
                Annotated[Difference, tyro.conf.subcommand("difference")],
                Annotated[Random, tyro.conf.subcommand("random")],
            ],  # type: ignore[arg-type]
            description=__doc__,
        )
    )
