"""What the loop leaves to be read: ``metrics.json`` with every number, ``report.html`` for people."""

import shlex
from pathlib import Path
from typing import Any

from fit3d_loop.comparison_pictures import read_pictures
from fit3d_loop.rounds import Begun, failures, step_records
from fit3d_ns.backbones.students.result_folder import read_card
from fit3d_ns.support.errors import UserError, first_line
from fit3d_ns.support.files import atomic_write_json
from fit3d_ns.support.html_report import Report
from fit3d_ns.support.json_files import UNREADABLE, build, read_record
from probe.output_folder import COLUMNS, MEANINGS, format_summary


def read_metrics(loop: Begun) -> dict[str, Any]:
    """Gathers every number of a finished loop, as JSON values.

    Args:
        loop: As it was begun: choices, folders and scenes.

    Returns:
        What is written to ``metrics.json``.
    """
    places, config = loop.places, loop.config
    rounds = []
    for number in range(1, config.rounds + 1):
        card = read_card(places.student(number))
        trained = _read(places.student(number) / "metrics.json")
        rounds.append(
            {
                "round": number,
                "teacher_sha256": card["teacher"]["weights_sha256"],
                "weights_sha256": card["weights_sha256"],
                "scenes": len(card["scenes"]),
                **{name: card[name] for name in ("training_views", "steps", "interpolate")},
                **{name: trained[name] for name in ("mean", "loss", "interpolation")},
            }
        )
    return {
        "backbone": loop.backbone,
        "rounds": rounds,
        "scenes": [_scene(loop, index) for index in range(len(loop.scenes))],
        "failures": failures(loop),
        "controls": {kind: _read(places.control(kind) / "metrics.json")["mean"] for kind in config.chosen_controls},
        "probes": {task: _read(places.probe(task) / "metrics.json") for task in _tasks(loop)},
        "steps": [vars(record) for record in step_records(loop)],
    }


def write_report(loop: Begun) -> Path:
    """Writes ``metrics.json`` and ``report.html``.

    Args:
        loop: A loop whose steps are done.

    Returns:
        Path of the page.

    Raises:
        UserError: If a file cannot be written.
    """
    metrics = read_metrics(loop)
    atomic_write_json(loop.places.root / "metrics.json", metrics)
    report = Report(f"{loop.backbone} after {loop.config.rounds} rounds")
    add_gain(report, metrics)
    add_scenes(report, loop, metrics)
    add_pictures(report, loop)
    add_curves(report, metrics)
    add_commands(report, loop)
    path = loop.places.root / "report.html"
    report.write(path)
    return path


def _tasks(loop: Begun) -> tuple[str, ...]:
    return loop.config.probe_tasks if loop.config.probe_data is not None else ()


def _scene(loop: Begun, index: int) -> dict[str, Any]:
    state = loop.state(loop.scenes[index])
    lifts = {number: {name: lift[name] for name in ("seconds", "metrics")} for number, lift in state.rounds.items()}
    geometry = {name: value for name, value in (state.geometry or {}).items() if name not in ("config", "made")}
    return {"name": state.name, "source": state.source, "geometry": geometry, "rounds": lifts, "failure": state.failure}


def add_gain(report: Report, metrics: dict[str, Any]) -> None:
    """What was gained, first.

    Args:
        report: The page.
        metrics: Of `read_metrics`.
    """
    report.add_heading("What was gained")
    first, last = metrics["rounds"][0]["mean"], metrics["rounds"][-1]["mean"]
    before, after = first.get("view_match_before"), last.get("view_match_after")
    if before is not None and after is not None:
        report.add_text(
            f"Points of a held-out view that the features find again in another: {before:.3f} of the original, "
            f"{after:.3f} of the result."
        )
    for task, probe in metrics["probes"].items():
        columns = COLUMNS[task]
        rows = [
            [name, MEANINGS.get(name, ""), *(format_summary(values[key]) for key, _ in columns)]
            for name, values in probe["rows"].items()
        ]
        report.add_table(rows, (f"probe: {task}", "what they are", *(title for _, title in columns)))
        compared = [
            (one["row"], one["baseline"], f"{one['value']:+.4f}", f"{one['low']:+.4f} to {one['high']:+.4f}")
            for one in probe.get("differences", [])
        ]
        if compared:
            report.add_table(compared, ("features", "against", "difference", "95 % interval"))
    rows = []
    for one in metrics["rounds"]:
        mean = one["mean"]
        values = [mean.get(f"{name}_{when}") for name in ("view_match", "cosine") for when in ("before", "after")]
        counts = [one[name] for name in ("round", "scenes", "training_views", "steps")]
        rows.append((*counts, *values, mean.get("drift_after")))
    header = ("round", "scenes", "views", "steps", "match before", "after", "cosine to the lifted, before", "after")
    report.add_table(rows, (*header, "cosine to the original"))
    if metrics["controls"]:
        means = metrics["controls"].items()
        rows = [(kind, mean.get("view_match_after"), mean.get("drift_after")) for kind, mean in means]
        report.add_table(rows, ("control, without 3D", "match", "cosine to the original"))
    if not metrics["probes"]:
        report.add_text("No data with truth was named (--probe-data), so what this is worth for a task is not known.")


def add_scenes(report: Report, loop: Begun, metrics: dict[str, Any]) -> None:
    """A table of all scenes, failed ones with their sentence.

    Args:
        report: The page.
        loop: As it was begun: choices, folders and scenes.
        metrics: Of `read_metrics`.
    """
    report.add_heading("Scenes")
    numbers = [str(number) for number in range(1, loop.config.rounds + 1)]
    rows: list[list[object]] = []
    for scene in metrics["scenes"]:
        geometry = scene["geometry"]
        photos = geometry.get("training_views")
        row: list[object] = [scene["name"], None if photos is None else photos + geometry["held_out_views"]]
        row += [geometry.get("seconds"), geometry.get("gaussians"), geometry.get("psnr")]
        for name in ("feature_cosine", "view_match_lifted"):
            row += [scene["rounds"].get(number, {}).get("metrics", {}).get(name) for number in numbers]
        rows.append(row)
    header = ["scene", "photos", "seconds", "Gaussians", "PSNR (dB)"]
    header += [f"{what}, round {number}" for what in ("cosine", "match") for number in numbers]
    report.add_table(rows, header)
    report.add_text("Cosine: of the lifted features to the teacher's, held-out views. Match: between views, lifted.")
    if metrics["failures"]:
        report.add_heading("Scenes that failed")
        failed = [(name, one["stage"], one["sentence"]) for name, one in metrics["failures"].items()]
        report.add_table(failed, ("scene", "stage", "why"))


def add_pictures(report: Report, loop: Begun) -> None:
    """Views through original, splat and student.

    Args:
        report: The page.
        loop: As it was begun: choices, folders and scenes.
    """
    rows = read_pictures(loop.places.root / "pictures")
    if not rows:
        return
    report.add_heading("Features")
    report.add_text(
        "Held-out views by the first three principal components of the original's features, in one basis: the same "
        "colour means the same feature. Lifted: what the splat of the last round shows, which the student learnt."
    )
    for row in rows:
        report.add_pictures(row)


def add_curves(report: Report, metrics: dict[str, Any]) -> None:
    """Losses of all rounds.

    Args:
        report: The page.
        metrics: Of `read_metrics`.
    """
    report.add_heading("Distillation")
    curves = {
        f"round {one['round']}": (list(map(float, one["loss"]["step"])), one["loss"]["l1"]) for one in metrics["rounds"]
    }
    report.add_curve("Loss", curves, "step", "L1 to the targets")
    for one in metrics["rounds"]:
        curve = one["interpolation"]
        lines = {"match": "view_match", "cosine to the lifted": "cosine", "cosine to the original": "drift"}
        shown = {
            name: (curve["amount"], [float("nan") if value is None else value for value in curve[key]])
            for name, key in lines.items()
            if any(value is not None for value in curve[key])
        }
        report.add_curve(f"Round {one['round']}, held-out views", shown, "share of the student in the average", "")


def add_commands(report: Report, loop: Begun) -> None:
    """The commands that made it.

    Args:
        report: The page.
        loop: As it was begun: choices, folders and scenes.
    """
    report.add_heading("Commands")
    report.add_text("Each can be repeated as it stands. Those of the scenes are at the top of the logs below logs/.")
    for record in step_records(loop):
        again = ", of the start that finished it" if record.resumed else ""
        took = f"{record.seconds:.0f} seconds, {record.cpu_seconds:.0f} of processor time"
        report.add_text(f"{record.title}: {took}{again}")
        report.add_code(shlex.join(record.command))


def _read(path: Path) -> dict[str, Any]:
    try:
        return build(dict[str, Any], read_record(path))
    except UNREADABLE as error:
        raise UserError(
            f"{path} is missing or damaged ({first_line(error)}): restore it, or delete its folder."
        ) from error
