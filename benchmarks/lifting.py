"""Compares ways of putting a teacher's features onto the same trained geometry, and what lifting costs.

    python benchmarks/lifting.py --run outputs/scene/splatfacto/RUN --joint outputs/scene/fit3d-splat/RUN ...

Every row is measured on the run's held-out views. `--parts` chooses what is measured:

- `solvers`: aggregation, refinement, robust re-weighting, decoder fits, unseen Gaussians, feature grids, Adam on frozen
  geometry; and the features of the runs named by `--joint` on their own geometry
- `dims`: quality against the number of channels on every Gaussian
- `views`: time and memory against the number of views (the scene's own, repeated)
- `gaussians`: time and memory against the number of Gaussians (synthetic ones, seen by the scene's cameras)
- `teacher`: time to open the photos and compute the teacher's maps, with an empty cache
- `command`: `fit3d-lift` from the run to the lifted run on disk, with an empty and with a filled cache

Writes a JSON file, row by row, and an HTML page with the tables and curves. Times are taken after a warm-up and,
but for `command`, leave out opening the scene and measuring; peak memory is that of torch on the GPU.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from lifting_figures import write_report

from fit3d_ns.commands.lift.cli import LiftCommand, open_source, run_lift
from fit3d_ns.commands.lift.sources import source_from_run
from fit3d_ns.features.decoder import FeatureDecoder, decode_patches
from fit3d_ns.features.grid import FEATURE_GRIDS
from fit3d_ns.features.metrics import feature_l1
from fit3d_ns.features.rendering import Geometry
from fit3d_ns.lifting.evaluation import LiftEvaluation
from fit3d_ns.lifting.lift import LiftScene, lift_features, project, teacher_basis
from fit3d_ns.lifting.operator import FeatureOperator
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.lifting.solver import LiftSolver, LiftView
from fit3d_ns.runs.checkpoints import read_checkpoint
from fit3d_ns.runs.names import DECODER_WEIGHT, FEATURES, GAUSSIANS, RECORD
from fit3d_ns.scenes.views import streamed_scene
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_json

Part = Literal["solvers", "dims", "views", "gaussians", "teacher", "command"]


@dataclass
class Benchmark:
    """Settings of the comparison."""

    run: Path
    """Run of splatfacto or fit3d-splat whose geometry is used."""
    joint: tuple[Path, ...] = ()
    """Runs of fit3d-splat whose trained features are measured beside."""
    parts: tuple[Part, ...] = ("solvers", "dims", "views", "gaussians", "teacher", "command")
    """What is measured."""
    output: Path = Path("outputs/benchmarks/lifting")
    """Where lifting.json and lifting.html go."""
    backbone: str | None = "dinov2_small_focus"
    """Teacher."""
    backbone_weights: Path | None = None
    """Local weights of the teacher."""
    feature_cache_dir: Path | None = None
    """Feature cache."""
    refinements: tuple[int, ...] = (0, 1, 2, 3, 5, 10)
    """Numbers of refinement steps compared."""
    adam_steps: tuple[int, ...] = (1000, 5000)
    """Lengths of the gradient descent compared; none to leave it out."""
    dims: tuple[int, ...] = (16, 32, 64, 128, 256, 384)
    """Channels compared."""
    views: tuple[int, ...] = (50, 100, 200, 400, 800)
    """Numbers of views timed."""
    gaussians: tuple[int, ...] = (100_000, 300_000, 1_000_000, 2_000_000, 4_000_000)
    """Numbers of Gaussians timed."""
    views_per_batch: int = 8
    """Most views rendered in one call."""


class Bench:
    """A scene ready to be lifted again and again.

    Args:
        settings: The user's choices.
        run: Of splatfacto or fit3d-splat.
    """

    def __init__(self, settings: Benchmark, run: Path) -> None:
        source = source_from_run(run, settings.output, None)
        datamanager = source.configs[0].pipeline.datamanager
        if settings.backbone is not None:
            datamanager.backbone, datamanager.backbone_weights = settings.backbone, settings.backbone_weights  # type: ignore[attr-defined]
        datamanager.feature_cache_dir = settings.feature_cache_dir or datamanager.feature_cache_dir  # type: ignore[attr-defined]
        self.source = source
        self.settings = settings
        self.pipeline, _ = open_source(source)
        self.model = self.pipeline.fit3d_model
        self.scene: LiftScene = streamed_scene(self.pipeline.datamanager, self.model)
        self.width = self.model.fit3d_decoder.width
        self.geometry = self.model.geometry
        self.cuda = self.model.device.type == "cuda"

    def operator(self, grid: str = "fast") -> FeatureOperator:
        """Returns the renderer of a feature grid.

        Args:
            grid: ``fast`` or ``paper``.
        """
        return FeatureOperator(self.geometry, FEATURE_GRIDS[grid])

    def evaluation(self, operator: FeatureOperator) -> LiftEvaluation:
        """Returns the measures of fidelity and consistency; which views are compared is found out once.

        Args:
            operator: The renderer.
        """
        return LiftEvaluation(operator, self.scene.held_out, self.scene.matched)

    def now(self) -> float:
        """Returns the seconds of a clock, once the device has done all its work."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset_peak(self) -> None:
        """Starts to look for the largest memory anew."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float]:
        """Returns the largest memory of the device since ``reset_peak``, where there is one."""
        return {"peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20} if self.cuda else {}


class Table:
    """Rows of all parts, written to disk one by one: what was measured outlives what comes after it.

    Args:
        path: JSON file of all rows.
        facts: Of the scene and the machine.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.results = facts

    def add(self, part: Part, name: str, work: Callable[[], dict[str, Any]], **labels: Any) -> None:
        """Measures one row; one that fails says why, and the others go on.

        Args:
            part: Of the benchmark.
            name: Of the row.
            work: Measures it.
            **labels: What else the row says.
        """
        try:
            row = {"row": name, **labels, **work()}
        except (UserError, torch.cuda.OutOfMemoryError) as error:
            row = {"row": name, **labels, "failed": str(error).splitlines()[0]}
        self.results.setdefault(part, []).append(row)
        atomic_write_json(self.path, self.results)
        print(json.dumps(row), flush=True)


def main(settings: Benchmark) -> None:
    """Runs all parts and writes the report.

    Args:
        settings: The user's choices.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(settings, settings.run)
    table = Table(
        settings.output / "lifting.json",
        {
            "run": str(settings.run),
            "device": torch.cuda.get_device_name() if bench.cuda else "CPU",
            "training_views": len(bench.scene.training),
            "held_out_views": len(bench.scene.held_out),
            "num_gaussians": len(bench.geometry),
        },
    )
    parts: dict[Part, Callable[[Bench, Table], None]] = {
        "solvers": add_solvers,
        "dims": add_dims,
        "views": add_views,
        "gaussians": add_gaussians,
        "teacher": add_teacher,
        "command": add_command,
    }
    for part in settings.parts:
        parts[part](bench, table)
    write_report(settings.output / "lifting.html", table.results)


def lift_row(bench: Bench, dim: int, lift: LiftSettings, grid: str = "fast") -> dict[str, Any]:
    """Lifts once, then measures; time and memory are those of the lift, with a selection its measurements included.

    Args:
        bench: The scene.
        dim: Channels D on every Gaussian.
        lift: How is lifted.
        grid: ``fast`` or ``paper``.

    Returns:
        The row.
    """
    operator, selects = bench.operator(grid), lift.select != "fixed"
    lift = replace(lift, views_per_batch=bench.settings.views_per_batch, evaluate=selects, report_dims=())
    # Two views load and start every kernel and library that this row needs.
    warm = replace(lift, refinements=min(1, lift.most_steps), select="fixed", unseen="zero", evaluate=False)
    lift_features(operator, LiftScene(bench.scene.training[:2], [], []), bench.width, dim, warm)
    bench.reset_peak()
    outcome = lift_features(operator, bench.scene, bench.width, dim, lift)
    peak = bench.peak()
    return {
        **bench.evaluation(operator).measure(outcome.values, outcome.decoder),
        "refinements": outcome.refinements,
        "unseen": outcome.summary(lift)["unseen_gaussians"],
        "basis_share": outcome.basis_share,
        "stages": outcome.seconds,
        "seconds": sum(outcome.seconds.values()),
        **peak,
    }


def add_solvers(bench: Bench, table: Table) -> None:
    """Solvers side by side at 64 channels, and features that were trained.

    Args:
        bench: The scene.
        table: Takes the rows.
    """
    variants: dict[str, tuple[LiftSettings, str]] = {
        f"k = {k}": (LiftSettings(refinements=k), "fast") for k in bench.settings.refinements
    }
    for k in (0, 1):
        variants[f"robust 2, k = {k}"] = (LiftSettings(refinements=k, robust=2), "fast")
        for ridge in (1.0, 0.1, 0.01, 0.001):
            fit = LiftSettings(refinements=k, decoder="fit", decoder_ridge=ridge)
            variants[f"3x3 fit, ridge {ridge:g}, k = {k}"] = (fit, "fast")
        variants[f"nearest for unseen, k = {k}"] = (LiftSettings(refinements=k, unseen="nearest"), "fast")
        variants[f"paper grid, k = {k}"] = (LiftSettings(refinements=k), "paper")
        variants[f"paper grid, 3x3 fit, k = {k}"] = (LiftSettings(refinements=k, decoder="fit"), "paper")
    for ridge in (0.1, 0.001):  # how far fidelity goes
        variants[f"3x3 fit, ridge {ridge:g}, k = 10"] = (
            LiftSettings(refinements=10, decoder="fit", decoder_ridge=ridge),
            "fast",
        )
    if bench.scene.held_out:
        variants["--select fidelity"] = (LiftSettings(select="fidelity"), "fast")
        variants["--select consistency"] = (LiftSettings(select="consistency"), "fast")
    table.add("solvers", "teacher itself", lambda: teacher_row(bench))
    for name, (lift, grid) in variants.items():
        table.add("solvers", name, lambda lift=lift, grid=grid: lift_row(bench, 64, lift, grid))
    for steps in bench.settings.adam_steps:
        table.add("solvers", f"Adam, {steps} steps", lambda steps=steps: adam_row(bench, steps))
    for run in bench.settings.joint:
        table.add("solvers", f"joint, {run}", lambda run=run: joint_row(bench.settings, run))


def teacher_row(bench: Bench) -> dict[str, Any]:
    """Measures the consistency that lifting starts from.

    Args:
        bench: The scene.

    Returns:
        The row.
    """
    return {"view_match_lifted": bench.evaluation(bench.operator()).teacher_consistency()}


def joint_row(settings: Benchmark, run: Path) -> dict[str, Any]:
    """Measures the features that a run trained, on its own geometry and held-out views; its training is not timed.

    Args:
        settings: The user's choices.
        run: Whose features were trained.

    Returns:
        The row.
    """
    bench = Bench(settings, run)
    assert bench.source.checkpoint is not None
    state = read_checkpoint(bench.source.checkpoint)["pipeline"]
    values = state[f"{GAUSSIANS}{FEATURES}"].to(bench.model.device)
    weight = state[DECODER_WEIGHT].to(bench.model.device)
    decoder = FeatureDecoder(weight.shape[1], weight.shape[0]).to(bench.model.device)
    decoder.weight.data = weight
    measured = bench.evaluation(bench.operator(bench.model.config.feature_grid)).measure(values, decoder)
    return {"steps": bench.source.step + 1, "num_gaussians": len(values), **measured}


def adam_row(bench: Bench, steps: int) -> dict[str, Any]:
    """Fits features and decoder over frozen geometry by gradient descent, with the rates of `ns-train fit3d-splat`.

    Args:
        bench: The scene.
        steps: Of Adam.

    Returns:
        The row.
    """
    device, operator, views = bench.model.device, bench.operator(), bench.scene.training
    bench.reset_peak()
    start = bench.now()
    generator = torch.Generator().manual_seed(0)
    values = torch.zeros(len(bench.geometry), 64, device=device, requires_grad=True)
    decoder = FeatureDecoder(64, bench.width, generator).to(device)
    optimizers = [
        torch.optim.Adam([values], lr=1e-2, eps=1e-15, fused=True),
        torch.optim.Adam(decoder.parameters(), lr=1e-3, eps=1e-15, fused=True),
    ]
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(len(views), generator=generator).tolist()
        view = views[order.pop()]
        low = operator.low_maps([view.camera], values)[0]
        decoded = decode_patches(low, decoder.weight, operator.feature_grid, view.camera.grid)
        feature_l1(decoded, view.load(), view.weights).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    seconds, peak = bench.now() - start, bench.peak()
    return {**bench.evaluation(operator).measure(values.detach(), decoder), "seconds": seconds, **peak}


def add_dims(bench: Bench, table: Table) -> None:
    """Quality against channels on every Gaussian.

    Args:
        bench: The scene.
        table: Takes the rows.
    """
    for dim in bench.settings.dims:
        if dim <= bench.width:
            table.add("dims", f"D = {dim}", lambda dim=dim: lift_row(bench, dim, LiftSettings()), dim=dim)


def add_views(bench: Bench, table: Table) -> None:
    """Time and memory against views: the scene's own, over and over.

    Args:
        bench: The scene.
        table: Takes the rows.
    """
    for count in bench.settings.views:
        training = [bench.scene.training[index % len(bench.scene.training)] for index in range(count)]
        table.add(
            "views",
            f"{count} views",
            lambda training=training: cost_row(bench, bench.geometry, LiftScene(training, [], [])),
            views=count,
        )


def add_gaussians(bench: Bench, table: Table) -> None:
    """Time and memory against Gaussians.

    Args:
        bench: The scene.
        table: Takes the rows.
    """
    for count in bench.settings.gaussians:
        table.add(
            "gaussians",
            f"{count:,} Gaussians",
            lambda count=count: cost_row(bench, resampled(bench.geometry, count), bench.scene),
            gaussians=count,
        )


def resampled(old: Geometry, count: int) -> Geometry:
    """Returns trained Gaussians drawn at random, a little moved and shrunk.

    Args:
        old: The trained ones.
        count: How many are wanted.
    """
    generator = torch.Generator(device=old.means.device).manual_seed(0)
    chosen = torch.randint(len(old), (count,), generator=generator, device=old.means.device)
    noise = torch.randn(count, 3, generator=generator, device=old.means.device)
    scales = old.scales[chosen]
    return Geometry(
        means=old.means[chosen] + noise * scales,
        quats=old.quats[chosen],
        scales=scales * min(1.0, (len(old) / count) ** 0.5),  # surfaces stay covered about as often
        opacities=old.opacities[chosen],
    )


def cost_row(bench: Bench, geometry: Geometry, scene: LiftScene) -> dict[str, Any]:
    """Times the stages of a lift with 64 channels and one refinement step.

    Args:
        bench: The scene.
        geometry: Gaussians to lift onto.
        scene: Views to lift from.

    Returns:
        The row.
    """
    operator = FeatureOperator(geometry, FEATURE_GRIDS["fast"])
    dim = min(64, bench.width)

    def work(views: Sequence[LiftView]) -> list[float]:
        marks = [bench.now()]
        basis = teacher_basis(views, bench.width, dim, geometry.means.device)
        marks.append(bench.now())
        solver = LiftSolver(operator, project(views, basis), dim, bench.settings.views_per_batch)
        aggregate = solver.aggregate()
        marks.append(bench.now())
        solver.refine(aggregate.values, aggregate.coverage)
        return [*marks, bench.now()]

    work(scene.training[:2])
    bench.reset_peak()
    marks = work(scene.training)
    return {
        "basis_seconds": marks[1] - marks[0],
        "aggregation_seconds": marks[2] - marks[1],
        "refinement_seconds": marks[3] - marks[2],
        "seconds": marks[3] - marks[0],
        **bench.peak(),
    }


def add_teacher(bench: Bench, table: Table) -> None:
    """Opens all photos and computes all maps, as on the first visit to a scene, and once more with all maps there.

    Args:
        bench: The scene.
        table: Takes the rows.
    """
    datamanager = bench.pipeline.datamanager
    place, cache = datamanager.config.feature_cache_dir, datamanager._feature_cache

    def opened() -> dict[str, Any]:
        bench.reset_peak()
        start = bench.now()
        scene = streamed_scene(datamanager, bench.model)
        views = len(scene.training) + len(scene.held_out)
        return {"views": views, "seconds": bench.now() - start, **bench.peak()}

    with tempfile.TemporaryDirectory() as folder:
        datamanager.config.feature_cache_dir, datamanager._feature_cache = Path(folder), None
        for name in ("teacher, nothing cached", "teacher, all cached"):
            table.add("teacher", name, opened)
    datamanager.config.feature_cache_dir, datamanager._feature_cache = place, cache


def add_command(bench: Bench, table: Table) -> None:
    """Runs the whole command, in a process that has imported and started everything.

    Args:
        bench: The scene.
        table: Takes the rows.
    """
    settings = bench.settings
    with tempfile.TemporaryDirectory() as folder:
        command = LiftCommand(
            load_config=settings.run,
            output_dir=Path(folder),
            backbone=settings.backbone,
            backbone_weights=settings.backbone_weights,
            feature_cache_dir=Path(folder) / "cache",
        )

        def run(name: str, evaluate: bool) -> dict[str, Any]:
            lift = LiftSettings(evaluate=evaluate, views_per_batch=settings.views_per_batch)
            bench.reset_peak()
            start = bench.now()
            (config,) = run_lift(replace(command, name=name, lift=lift))
            record = json.loads((config.parent / RECORD).read_text())
            return {"stages": record["seconds"], "seconds": bench.now() - start, **bench.peak()}

        table.add("command", "nothing cached, not measured", lambda: run("first", False))
        table.add("command", "teacher's maps cached, not measured", lambda: run("second", False))
        table.add("command", "teacher's maps cached, measured", lambda: run("third", True))


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
