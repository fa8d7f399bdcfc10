"""The page and the numbers that a training ends with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.evaluation import SceneResult, average, average_curve
from fit3d_ns.backbones.students.result_folder import CARD_NAME, MEASURES, METRICS_NAME, PAGE_NAME
from fit3d_ns.features.pca import ColorBasis
from fit3d_ns.support.html_report import Report
from fit3d_ns.support.json_files import UNREADABLE, read_json, write_record

_METRICS = tuple(MEASURES.items())
_TITLES = {
    "lifted": "A backbone distilled from 3D",
    "control": "A backbone distilled without 3D (control)",
    "control-blur": "A backbone distilled without 3D (blurred control)",
    "control-shift": "A backbone distilled without 3D (control of shifted photos)",
}
_CONTROLS = {
    "control": "",
    "control-blur": ", and blurred as much as lifting blurs",
    "control-shift": ", averaged over shifted photos",
}


@dataclass(frozen=True)
class Findings:
    """What was measured of a training."""

    scenes: Sequence[SceneResult]
    """Of every scene that was trained on, on its held-out views."""
    validation: Sequence[SceneResult]
    """Of every scene that was not."""
    losses: Sequence[tuple[int, float]]
    """Steps taken, and mean loss since the point before."""
    watched: Sequence[tuple[int, Mapping[str, float]]]
    """Steps taken, and what was measured on the validation scenes while it trained."""


def write_metrics(output_dir: Path, card: Mapping[str, Any], findings: Findings) -> None:
    """Writes ``metrics.json``.

    Args:
        output_dir: The training's folder.
        card: See `distill.results.result.make_card`.
        findings: What was measured.
    """
    settings, losses, watched = card["settings"], findings.losses, findings.watched
    content = {
        "targets": settings["targets"],
        "recipe": card["recipe"],
        "interpolate": card["interpolate"],
        "steps": card["steps"],
        "seconds": card["seconds"],
        "views_per_second": card["views_per_second"],
        "mean": average(findings.scenes),
        "scenes": _by_scene(findings.scenes),
        "interpolation": average_curve(findings.scenes),
        "loss": {"step": [step for step, _ in losses], "l1": [loss for _, loss in losses]},
    }
    if findings.validation:
        content["validation"] = {
            "mean": average(findings.validation),
            "scenes": _by_scene(findings.validation),
            "interpolation": average_curve(findings.validation),
            "while_training": {
                "step": [step for step, _ in watched],
                **{name: [values.get(name) for _, values in watched] for name in MEASURES},
            },
        }
    write_record(output_dir / METRICS_NAME, content)


def _by_scene(results: Sequence[SceneResult]) -> dict[str, Any]:
    return {
        f"{number:03d} {result.scene}": {"views": result.num_views, "held_out": result.held_out, **result.metrics}
        for number, result in enumerate(results)
    }


def write_report(output_dir: Path, card: Mapping[str, Any], findings: Findings) -> None:
    """Writes ``report.html``.

    Args:
        output_dir: Of the training.
        card: Of `fit3d_ns.backbones.students.result_folder.read_card`.
        findings: Everything that was measured.
    """
    report = Report(_TITLES[card["settings"]["targets"]])
    report.add_text(_what_was_done(card))
    report.add_heading("Before and after")
    _add_means(report, findings.scenes, len(card["scenes"]), "that neither lifting nor distillation saw")
    if findings.validation:
        report.add_heading("On scenes that were not trained on")
        _add_means(report, findings.validation, None, "of the validation scenes")
    _add_siblings(report, output_dir, card, findings)
    _add_interpolation(report, card, findings)
    _add_pictures(report, findings.scenes)
    _add_training(report, findings)
    report.add_heading("Scene by scene")
    columns = [f"{name}_{when}" for name, _ in _METRICS[:3] for when in ("before", "after")]
    columns += ["view_match_target", "drift_after"]
    table = [
        (result.scene, "yes" if result.held_out else "no", *(result.metrics.get(name) for name in columns))
        for result in [*findings.scenes, *findings.validation]
    ]
    names = [name.replace("view_", "").replace("_", " ") for name in columns]
    report.add_table(table, header=("scene", "held out", *names))
    report.add_heading("Use it")
    beside = "alone" if card["assembly"] == "tuned" else "beside the original's, as the paper evaluates them"
    report.add_text(
        f"From this folder, its features {beside}; the card beside the weights says so, and assembly= chooses another "
        "way. backbone.safetensors is a plain timm state dict."
    )
    channels = "C" if card["assembly"] == "tuned" else "2C"
    report.add_code(
        "from fit3d_ns.backbones import load\n\n"
        f'backbone = load("path/to/this/folder", assembly="{card["assembly"]}")\n'
        f"features = backbone(images)  # [B, 3, H, W], RGB in [0, 1], to [B, {channels}, h, w]"
    )
    report.write(output_dir / PAGE_NAME)


def _what_was_done(card: Mapping[str, Any]) -> str:
    num_scenes = len(card["scenes"])
    settings, teacher, amount = card["settings"], card["teacher"]["name"], card["interpolate"]
    if settings["targets"] == "lifted":
        scenes = f"{num_scenes} scene{'s' if num_scenes > 1 else ''}"
        learnt = f"features of {teacher} that were lifted into {scenes} and rendered back"
    else:
        learnt = (
            f"the maps of {teacher} itself, passed through each scene's low-dimensional basis"
            f"{_CONTROLS[settings['targets']]}: no 3D is in them, so whatever improves here is not owed to lifting"
        )
    round_ = " The teacher is itself a student: this is a further round." if card["teacher_original"] else ""
    averaged = (
        f" The result is {amount:g} x student + {1 - amount:g} x original, weight by weight." if amount < 1 else ""
    )
    return (
        f"{card['student']['name']} learnt {learnt}.{round_} Recipe {card['recipe']}: {card['steps']} steps of "
        f"{settings['batch_size']} views, learning rate {settings['lr']:g} ({settings['schedule']}), "
        f"{card['training_views']} training views, {card['views_per_second']:.1f} views a second.{averaged}"
    )


def _add_means(report: Report, results: Sequence[SceneResult], num_scenes: int | None, which: str) -> None:
    held_out = all(result.held_out for result in results)
    some = num_scenes is not None and len(results) < num_scenes
    scenes = f"{len(results)} of the {num_scenes} scenes, evenly spaced" if some else "scenes"
    report.add_text(
        f"Means over {scenes}, on views {which}."
        if held_out
        else f"Means over {scenes}. Some scenes have no held-out views; their training views were measured instead."
    )
    means = average(results)
    rows = [
        (what, means.get(f"{name}_before"), means.get(f"{name}_after"), means.get(f"{name}_target"))
        for name, what in _METRICS
    ]
    report.add_table(rows, header=("measure", "before", "after", "the targets"))
    if "view_match_points" not in means:
        report.add_text("No two of these views share enough surface to find points of one again in the other.")


def _add_siblings(report: Report, output_dir: Path, card: Mapping[str, Any], findings: Findings) -> None:
    """Shows student and controls of the same scenes that were made beside this folder."""
    siblings = _siblings(output_dir, card)
    if not siblings:
        return
    held_out, validation = average(findings.scenes), average(findings.validation)
    rows = [("original", held_out.get("view_match_before"), validation.get("view_match_before"), 1.0)]
    siblings[f"this: {card['settings']['targets']}"] = {"mean": held_out, "validation": {"mean": validation}}
    for name, metrics in sorted(siblings.items()):
        own, other = metrics["mean"], metrics.get("validation", {}).get("mean", {})
        rows.append((name, own.get("view_match_after"), other.get("view_match_after"), own.get("drift_after")))
    report.add_heading("With and without 3D")
    report.add_text(
        "Students of the same scenes and teacher that lie beside this one. Only what a student gains over every "
        "control is owed to lifting; fit3d-probe shows it in labels."
    )
    report.add_table(rows, header=("student", "match", "match on validation scenes", "cosine to the original"))


def _siblings(output_dir: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``metrics.json`` of other finished trainings on the same scenes in the folder above, by name."""
    found = {}
    for path in sorted(output_dir.absolute().parent.glob(f"*/{CARD_NAME}")):
        folder = path.parent
        if folder == output_dir.absolute():
            continue
        try:
            other = read_json(path)
            metrics = read_json(folder / METRICS_NAME)
            same = [other[name] for name in ("scenes", "teacher")] == [card[name] for name in ("scenes", "teacher")]
            if same and isinstance(metrics["mean"], dict):
                found[f"{folder.name}: {other['settings']['targets']}"] = metrics
        except (*UNREADABLE, KeyError, TypeError):
            continue  # unfinished, or somebody else's
    return found


def _add_interpolation(report: Report, card: Mapping[str, Any], findings: Findings) -> None:
    report.add_heading("How much of the student")
    report.add_text(
        "The weights can be averaged with the original's to any degree, without training: 0 is the original, 1 the "
        f"student, and what this page measures as the result is {card['interpolate']:g}. Change it in a second with\n"
        "fit3d-distill --average-only path/to/this/folder --interpolate 0.5"
    )
    for what, results in (("Held-out views", findings.scenes), ("Validation scenes", findings.validation)):
        if not results:
            continue
        curve = average_curve(results)
        lines = {"match": "view_match", "cosine to the targets": "cosine", "cosine to the original": "drift"}
        shown = {
            name: ([float(x or 0) for x in curve["amount"]], _numbers(curve[key]))
            for name, key in lines.items()
            if any(value is not None for value in curve[key])
        }
        report.add_curve(what, shown, "share of the student", "")


def _add_training(report: Report, findings: Findings) -> None:
    if findings.losses:
        report.add_heading("While training")
        steps, values = zip(*findings.losses)
        report.add_curve("Loss", {"L1 to the targets": ([float(step) for step in steps], values)}, "step", "L1")
    if findings.watched:
        steps = [float(step) for step, _ in findings.watched]
        lines = {"match": "view_match", "cosine to the targets": "cosine", "cosine to the original": "drift"}
        shown = {
            name: (steps, _numbers([values.get(key) for _, values in findings.watched]))
            for name, key in lines.items()
            if any(key in values for _, values in findings.watched)
        }
        report.add_curve("Validation scenes, of what the result would be", shown, "step", "")


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


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
