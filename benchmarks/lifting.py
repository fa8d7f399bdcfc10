"""Compares ways of putting a teacher's features onto the same trained geometry, and what lifting costs.

    python benchmarks/lifting.py --run outputs/scene/splatfacto/RUN --joint outputs/scene/fit3d-splat/RUN ...

Every row is measured on the run's held-out views. `--parts` chooses what is measured:

- `solvers`: aggregation, refinement, robust re-weighting, decoder fits, unseen Gaussians, feature grids, Adam on frozen
  geometry; and the features of the runs named by `--joint` on their own geometry
- `dims`: quality against the number of channels on every Gaussian
- `views`: time and memory against the number of views (the scene's own, repeated)
- `gaussians`: time and memory against the number of Gaussians (synthetic ones, seen by the scene's cameras)
- `teacher`: time to open the photos and compute the teacher's maps, with an empty cache

Writes a JSON file and an HTML page with the tables and curves. Times are of a second call, after a warm-up.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import tyro

from fit3d_ns.decoder import FeatureDecoder
from fit3d_ns.errors import UserError
from fit3d_ns.feature_grid import FEATURE_GRIDS
from fit3d_ns.files import atomic_write_json
from fit3d_ns.lifting.cli import open_source
from fit3d_ns.lifting.evaluation import LiftEvaluation
from fit3d_ns.lifting.lift import LiftScene, lift_features, project, teacher_basis
from fit3d_ns.lifting.operator import FeatureOperator, Geometry
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.lifting.solver import LiftSolver, batches_of_equal_size
from fit3d_ns.lifting.sources import source_from_run
from fit3d_ns.lifting.views import model_geometry, streamed_scene
from fit3d_ns.metrics import feature_l1
from fit3d_ns.report import Report
from fit3d_ns.runs import read_checkpoint

Part = Literal["solvers", "dims", "views", "gaussians", "teacher"]


@dataclass
class Benchmark:
    """Settings of the comparison."""

    run: Path
    """Run of splatfacto or fit3d-splat whose geometry is used."""
    joint: tuple[Path, ...] = ()
    """Runs of fit3d-splat whose trained features are measured beside."""
    parts: tuple[Part, ...] = ("solvers", "dims", "views", "gaussians", "teacher")
    """What is measured."""
    output: Path = Path("outputs/benchmarks/lifting")
    """Where lifting.json and lifting.html go."""
    backbone: Optional[str] = "dinov2_small_focus"
    """Teacher."""
    backbone_weights: Optional[Path] = None
    """Local weights of the teacher."""
    feature_cache_dir: Optional[Path] = None
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
    """A scene ready to be lifted again and again."""

    def __init__(self, settings: Benchmark, run: Path) -> None:
        source = source_from_run(run, "benchmark", settings.output, None)
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
        self.geometry = model_geometry(self.model)
        self.cuda = self.model.device.type == "cuda"

    def operator(self, grid: str = "fast") -> FeatureOperator:
        """Returns the renderer of a feature grid."""
        return FeatureOperator(self.geometry, FEATURE_GRIDS[grid])

    def measure(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Runs one row and adds its time and peak memory."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = self.now()
        row = {"row": name, **work()}
        row.setdefault("seconds", self.now() - start)
        if self.cuda:
            row["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
        print(json.dumps(row), flush=True)
        return row

    def now(self) -> float:
        """Seconds, on the device's own clock."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def main(settings: Benchmark) -> None:
    """Runs all parts and writes the report."""
    settings.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(settings, settings.run)
    results: dict[str, Any] = {
        "run": str(settings.run),
        "device": torch.cuda.get_device_name() if bench.cuda else "CPU",
        "training_views": len(bench.scene.training),
        "held_out_views": len(bench.scene.held_out),
        "num_gaussians": len(bench.geometry),
    }
    lift_row(bench, 64, LiftSettings(evaluate=False))  # compiles and warms up
    parts: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
        "solvers": solver_rows,
        "dims": dim_rows,
        "views": view_rows,
        "gaussians": gaussian_rows,
        "teacher": teacher_rows,
    }
    for part in settings.parts:
        results[part] = parts[part](bench)
        atomic_write_json(settings.output / "lifting.json", results)
    write_report(settings.output / "lifting.html", results)


def lift_row(bench: Bench, dim: int, lift: LiftSettings, grid: str = "fast") -> dict[str, Any]:
    """Lifts once; its time leaves out the evaluation."""
    lift = replace(lift, views_per_batch=bench.settings.views_per_batch)
    outcome = lift_features(bench.operator(grid), bench.scene, bench.width, dim, lift)
    stages = {stage: seconds for stage, seconds in outcome.seconds.items() if stage != "evaluation"}
    return {
        **outcome.metrics,
        "refinements": outcome.refinements,
        "unseen": outcome.summary(lift)["unseen_gaussians"],
        "basis_share": outcome.basis_share,
        "stages": stages,
        "seconds": sum(stages.values()),
    }


def solver_rows(bench: Bench) -> list[dict[str, Any]]:
    """Solvers side by side at 64 channels."""
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
    if bench.scene.held_out:
        variants["--select fidelity"] = (LiftSettings(select="fidelity"), "fast")
        variants["--select consistency"] = (LiftSettings(select="consistency"), "fast")
    rows = [joint_row(bench.settings, run) for run in bench.settings.joint]
    for name, (lift, grid) in variants.items():
        try:
            rows.append(bench.measure(name, lambda lift=lift, grid=grid: lift_row(bench, 64, lift, grid)))
        except UserError as error:  # a selection that this scene cannot measure
            rows.append({"row": name, "failed": str(error)})
    rows += [
        bench.measure(f"Adam, {steps} steps", lambda steps=steps: adam_row(bench, steps))
        for steps in bench.settings.adam_steps
    ]
    return rows


def joint_row(settings: Benchmark, run: Path) -> dict[str, Any]:
    """Measures the features that a run trained, on its own geometry and held-out views."""
    bench = Bench(settings, run)
    assert bench.source.run is not None
    state = read_checkpoint(bench.source.run)["pipeline"]
    values = state["_model.gauss_params.fit3d_features"].to(bench.model.device)
    weight = state["_model.fit3d_decoder.weight"].to(bench.model.device)
    decoder = FeatureDecoder(weight.shape[1], weight.shape[0]).to(bench.model.device)
    decoder.weight.data = weight
    evaluation = LiftEvaluation(
        bench.operator(bench.model.config.feature_grid), bench.scene.held_out, bench.scene.training_surfaces
    )
    return bench.measure(
        f"joint {run.name}, {bench.source.step + 1} steps", lambda: evaluation.measure(values, decoder)
    )


def adam_row(bench: Bench, steps: int) -> dict[str, Any]:
    """Gradient descent on features and decoder over frozen geometry, with the rates of `ns-train fit3d-splat`."""
    device, operator, views = bench.model.device, bench.operator(), bench.scene.training
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
        decoded = decoder.decode_patches(low, operator.feature_grid, view.camera.grid)
        feature_l1(decoded, view.load(), view.weights).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    seconds = bench.now() - start
    evaluation = LiftEvaluation(operator, bench.scene.held_out, bench.scene.training_surfaces)
    return {**evaluation.measure(values.detach(), decoder), "seconds": seconds}


def dim_rows(bench: Bench) -> list[dict[str, Any]]:
    """Quality against channels on every Gaussian."""
    return [
        {"dim": dim, **bench.measure(f"D = {dim}", lambda dim=dim: lift_row(bench, dim, LiftSettings()))}
        for dim in bench.settings.dims
        if dim <= bench.width
    ]


def view_rows(bench: Bench) -> list[dict[str, Any]]:
    """Time and memory against views: the scene's own, over and over."""
    rows = []
    for count in bench.settings.views:
        training = [bench.scene.training[index % len(bench.scene.training)] for index in range(count)]
        scene = LiftScene(training, [], [])
        rows.append(
            {"views": count, **bench.measure(f"{count} views", lambda scene=scene: cost(bench, bench.geometry, scene))}
        )
    return rows


def gaussian_rows(bench: Bench) -> list[dict[str, Any]]:
    """Time and memory against Gaussians: the trained ones drawn at random, a little moved and shrunk."""
    generator = torch.Generator(device=bench.model.device).manual_seed(0)
    rows = []
    for count in bench.settings.gaussians:
        old = bench.geometry
        chosen = torch.randint(len(old), (count,), generator=generator, device=old.means.device)
        shrink = min(1.0, (len(old) / count) ** 0.5)  # surfaces stay covered about as often
        noise = torch.randn(count, 3, generator=generator, device=old.means.device)
        scales = old.scales[chosen]
        geometry = Geometry(
            means=old.means[chosen] + noise * scales,
            quats=old.quats[chosen],
            scales=scales * shrink,
            opacities=old.opacities[chosen],
        )
        rows.append(
            {
                "gaussians": count,
                **bench.measure(f"{count:,} Gaussians", lambda geometry=geometry: cost(bench, geometry, bench.scene)),
            }
        )
    return rows


def cost(bench: Bench, geometry: Geometry, scene: LiftScene) -> dict[str, Any]:
    """Times the stages of a lift with 64 channels and one refinement step."""
    marks = [bench.now()]
    device = geometry.means.device
    basis = teacher_basis(scene.training, bench.width, min(64, bench.width), device)
    marks.append(bench.now())
    operator = FeatureOperator(geometry, FEATURE_GRIDS["fast"])
    solver = LiftSolver(operator, project(scene.training, basis), len(basis.components), bench.settings.views_per_batch)
    aggregate = solver.aggregate()
    marks.append(bench.now())
    solver.refine(aggregate.values, aggregate.coverage)
    marks.append(bench.now())
    views = operator.batch_size(len(basis.components) + 2, bench.settings.views_per_batch)
    return {
        "basis_seconds": marks[1] - marks[0],
        "aggregation_seconds": marks[2] - marks[1],
        "refinement_seconds": marks[3] - marks[2],
        "seconds": marks[3] - marks[0],
        "views_per_call": len(batches_of_equal_size(scene.training, views)[0]),
    }


def teacher_rows(bench: Bench) -> list[dict[str, Any]]:
    """Opens all photos and computes all maps, as on the first visit to a scene."""
    datamanager = bench.pipeline.datamanager
    with tempfile.TemporaryDirectory() as folder:
        datamanager.config.feature_cache_dir, datamanager._feature_cache = Path(folder), None
        rows = [bench.measure(name, lambda: streamed_views(bench)) for name in ("teacher, cold", "teacher, cached")]
    datamanager._feature_cache = None
    return rows


def streamed_views(bench: Bench) -> dict[str, Any]:
    """Counts the views that were opened."""
    scene = streamed_scene(bench.pipeline.datamanager, bench.model)
    return {"views": len(scene.training) + len(scene.held_out)}


def write_report(path: Path, results: dict[str, Any]) -> None:
    """Writes tables and curves."""
    report = Report("Lifting features onto trained geometry")
    report.add_text(
        f"{results['num_gaussians']:,} Gaussians, {results['training_views']} training and {results['held_out_views']} "
        f"held-out views, {results['device']}."
    )
    columns = ("feature_cosine", "feature_l1", "view_match_lifted", "seconds", "peak_memory_mb")
    for part in ("solvers", "dims", "views", "gaussians", "teacher"):
        if part not in results:
            continue
        report.add_heading(part.capitalize())
        shown = [name for name in columns if any(name in row for row in results[part])]
        rows = [(row["row"], *(row.get(name, "") for name in shown)) for row in results[part]]
        report.add_table(rows, header=("", *shown))
        axis = {"dims": "dim", "views": "views", "gaussians": "gaussians"}.get(part)
        if axis is None or len(results[part]) < 2:
            continue
        for name in shown:
            points = [(row[axis], row[name]) for row in results[part] if name in row]
            curve = ([float(x) for x, _ in points], [float(y) for _, y in points])
            report.add_curve(f"{name} against {axis}", {name: curve}, axis, name)
    report.write(path)


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
