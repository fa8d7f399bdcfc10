"""The page and the numbers that a training ends with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from distill.photo_store import PhotoStore
from distill.scenes import Scene
from distill.targets import LiftedTargets, TargetSource
from fit3d_ns.backbones import Backbone
from fit3d_ns.features.metrics import choose_pairs, feature_cosine, feature_l1, view_match
from fit3d_ns.features.pca import ColorBasis
from fit3d_ns.support.files import atomic_write_json
from fit3d_ns.support.html_report import Report


@dataclass(frozen=True)
class ViewPictures:
    """A view and its maps, on the CPU."""

    name: str
    photo: UInt8[Tensor, "H W 3"]
    original: Float[Tensor, "C h w"]
    target: Float[Tensor, "C h w"]
    tuned: Float[Tensor, "C h w"]


@dataclass(frozen=True)
class SceneResult:
    """Measurements on one scene."""

    scene: str
    """Its name."""
    held_out: bool
    """Whether the views were held out from lifting and from distillation."""
    num_views: int
    """Views measured."""
    metrics: dict[str, float]
    """``l1_before``, ``l1_after``, ``cosine_before``, ``cosine_after`` to the target; ``view_match_before``,
    ``view_match_after``, ``view_match_target`` (left out where no two views share enough surface), and
    ``view_match_points``."""
    pictures: list[ViewPictures] = field(default_factory=list)
    """Some views to look at."""


@torch.no_grad()
def measure_scene(
    scenes: Sequence[Scene],
    index: int,
    original: Backbone,
    tuned: Backbone,
    targets: TargetSource,
    geometry: LiftedTargets,
    photos: PhotoStore,
    num_views: int,
    num_pictures: int,
) -> SceneResult:
    """Measures one scene.

    Args:
        scenes: The scenes.
        index: Which.
        original: The student before training.
        tuned: The student after training.
        targets: What it was trained on.
        geometry: Renders depth, by which points are found again in other views.
        photos: Where photos are.
        num_views: Most held-out views that are measured.
        num_pictures: Most views that are kept as pictures.
    """
    scene = scenes[index]
    views, held_out = scene.report_views(num_views)
    maps: dict[str, list[Tensor]] = {"before": [], "after": [], "target": []}
    sums: dict[str, list[float]] = {}
    pictures: list[ViewPictures] = []
    for view in views:
        photo = photos.get([(index, view)])
        made = targets.make(index, [view])
        target, weights = made.maps[0].float(), made.weights[0]
        maps["target"].append(target)
        for name, backbone in (("before", original), ("after", tuned)):
            features = backbone(photo.float() / 255.0).patch_tokens[0].float()
            maps[name].append(features)
            if bool(weights.any()):
                sums.setdefault(f"l1_{name}", []).append(float(feature_l1(features, target, weights)))
                sums.setdefault(f"cosine_{name}", []).append(float(feature_cosine(features, target, weights)))
        if len(pictures) < num_pictures:
            shown = (maps["before"][-1].cpu(), target.cpu(), maps["after"][-1].cpu())
            pictures.append(ViewPictures(scene.info.views[view].name, photo[0].permute(1, 2, 0).cpu(), *shown))
    metrics = {name: sum(values) / len(values) for name, values in sums.items()}
    surfaces = [geometry.surface(index, view) for view in views]
    pairs = choose_pairs(surfaces, [scene.info.patch_grid(view) for view in views])
    for name, features in maps.items():
        match = view_match(features, surfaces, pairs)
        if match.num_points:
            metrics[f"view_match_{name}"] = match.rate
            metrics["view_match_points"] = match.num_points
    return SceneResult(scene.name, held_out, len(views), metrics, pictures)


def average(results: Sequence[SceneResult]) -> dict[str, float]:
    """Returns the mean of each metric over the scenes that have it; points of ``view_match`` are summed."""
    names = dict.fromkeys(name for result in results for name in result.metrics)
    means = {}
    for name in names:
        values = [result.metrics[name] for result in results if not math.isnan(result.metrics.get(name, math.nan))]
        if values:
            means[name] = float(sum(values)) if name == "view_match_points" else sum(values) / len(values)
    return means


_METRICS = (
    ("l1", "L1 to the target (lower is better)"),
    ("cosine", "cosine to the target"),
    ("view_match", "points that the features find again in another view"),
)

_USAGE = """from fit3d_ns.backbones import load

backbone = load("path/to/this/folder", assembly="concat")
features = backbone(images)  # [B, 3, H, W], RGB in [0, 1], to [B, 2C, h, w]"""


def write_metrics(
    output_dir: Path, card: Mapping[str, Any], results: Sequence[SceneResult], losses: Sequence[tuple[int, float]]
) -> None:
    """Writes ``metrics.json``.

    Args:
        output_dir: The training's folder.
        card: See `distill.result.make_card`.
        results: Of every scene.
        losses: Steps taken, and mean loss since the point before.
    """
    content = {
        "targets": card["settings"]["targets"],
        "steps": card["steps"],
        "seconds": card["seconds"],
        "views_per_second": card["views_per_second"],
        "mean": average(results),
        "scenes": {
            f"{number:03d} {result.scene}": {
                "views": result.num_views,
                "held_out": result.held_out,
                **result.metrics,
            }
            for number, result in enumerate(results)
        },
        "loss": {"step": [step for step, _ in losses], "l1": [loss for _, loss in losses]},
    }
    atomic_write_json(output_dir / "metrics.json", content)


def write_report(
    output_dir: Path, card: Mapping[str, Any], results: Sequence[SceneResult], losses: Sequence[tuple[int, float]]
) -> None:
    """Writes ``report.html``; arguments as `write_metrics`."""
    settings, control = card["settings"], card["settings"]["targets"] == "control"
    report = Report("A backbone distilled without 3D (control)" if control else "A backbone distilled from 3D")
    learnt = (
        f"the maps of {card['teacher']['name']} itself, passed through each scene's low-dimensional basis: no 3D is in "
        "them, so whatever improves here is not owed to lifting"
        if control
        else f"features of {card['teacher']['name']} that were lifted into {len(results)} "
        f"scene{'s' if len(results) > 1 else ''} and rendered back"
    )
    report.add_text(
        f"{card['student']['name']} learnt {learnt}. {card['steps']} steps of {settings['batch_size']} views, learning "
        f"rate {settings['lr']:g}, {card['training_views']} training views, {card['views_per_second']:.1f} views a "
        "second."
    )
    report.add_heading("Before and after")
    held_out = all(result.held_out for result in results)
    report.add_text(
        "Means over scenes, on views that neither lifting nor distillation saw."
        if held_out
        else "Means over scenes. Some scenes have no held-out views; their training views were measured instead."
    )
    means = average(results)
    rows = [
        (what, means.get(f"{name}_before"), means.get(f"{name}_after"), means.get(f"{name}_target"))
        for name, what in _METRICS
    ]
    report.add_table(rows, header=("measure", "before", "after", "the targets"))
    if "view_match_points" not in means:
        report.add_text("No two of these views share enough surface to find points of one again in the other.")
    _add_pictures(report, results)
    if losses:
        report.add_heading("While training")
        curve = {"L1 to the targets": ([float(step) for step, _ in losses], [loss for _, loss in losses])}
        report.add_curve("Loss", curve, "step", "L1")
    report.add_heading("Every scene")
    columns = [f"{name}_{when}" for name, _ in _METRICS for when in ("before", "after")] + ["view_match_target"]
    table = [
        (result.scene, "yes" if result.held_out else "no", *(result.metrics.get(name) for name in columns))
        for result in results
    ]
    report.add_table(
        table, header=("scene", "held out", *(name.replace("view_", "").replace("_", " ") for name in columns))
    )
    report.add_heading("Use it")
    report.add_text(
        "From this folder, the original's features beside the fine-tuned backbone's, as the paper evaluates them. "
        "backbone.safetensors is a plain timm state dict."
    )
    report.add_code(_USAGE)
    report.write(output_dir / "report.html")


def _add_pictures(report: Report, results: Sequence[SceneResult]) -> None:
    shown = [result for result in results if result.pictures]
    if not shown:
        return
    originals = [picture.original.flatten(1).T for result in shown for picture in result.pictures]
    basis = ColorBasis.fit(torch.cat(originals))
    report.add_heading("Pictures")
    report.add_text(
        "Features by their first three principal components, in one basis for all pictures of this page, taken from "
        "the original backbone: the same colour means the same feature."
    )
    for result in shown:
        for picture in result.pictures:
            maps = [("original", picture.original), ("target", picture.target), ("fine-tuned", picture.tuned)]
            report.add_pictures(
                [("photo", picture.photo), *((name, basis.to_rgb(map_.permute(1, 2, 0))) for name, map_ in maps)],
                title=f"{result.scene}: {picture.name}",
            )
