"""The page and the numbers that a training ends with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distill.evaluation import SceneResult, average
from fit3d_ns.files import atomic_write_json
from fit3d_ns.pca import ColorBasis
from fit3d_ns.report import Report

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
