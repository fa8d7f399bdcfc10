"""The page that tells the story from the photos to the probe tables."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.config import DemoConfig
from demo.report_pictures import evaluation_views, feature_pictures, panels, photos
from demo.results import DemoResults, comparisons, read_results, write_metrics
from demo.stages import EVAL_INTERVAL, Places, places
from fit3d_loop.commands.steps import StepRecord
from fit3d_loop.records import SceneState, read_recorded_state
from fit3d_ns.runs.names import CONFIG
from fit3d_ns.support.html_report import Report
from probe.output_folder import COLUMNS, MEANINGS, format_summary
from probe.zero_shot.correspondence import SAME_PLACE

_WARNING = (
    "Small rooms, few steps, one distillation: the numbers show that the loop works and what it can look like, not "
    "what the method is worth."
)


def write_report(config: DemoConfig, records: Sequence[StepRecord], loop: Sequence[str]) -> Path:
    """Writes ``report.html``, and its numbers as ``metrics.json``.

    Args:
        config: Of a demo whose stages are all done.
        records: Of the steps.
        loop: The loop as typed.

    Returns:
        Its path.

    Raises:
        UserError: If a result is missing, or the page cannot be written.
    """
    where, results = places(config), read_results(config)
    write_metrics(config, results)
    report = Report("From photos to a probe table")
    _add_summary(report, config, records, results)
    _add_rooms(report, where)
    _add_splats(report, where, results)
    _add_distillation(report, where, results)
    _add_features(report, config, where, results)
    _add_probe(report, where, results.segmentation, "segmentation")
    _add_probe(report, where, results.depth, "depth")
    _add_commands(report, where, records, loop)
    path = config.output_dir / "report.html"
    report.write(path)
    return path


def _add_summary(report: Report, config: DemoConfig, records: Sequence[StepRecord], results: DemoResults) -> None:
    taken = [vars(record) for record in records] + [state.geometry or {} for state in _states(config)]
    seconds, cpu = (sum(one.get(name, 0.0) for one in taken) for name in ("seconds", "cpu_seconds"))
    resumed = " (not counting starts that were stopped)" if any(record.resumed for record in records) else ""
    device = results.depth["device"]
    report.add_text(
        f"{config.rooms} rooms were photographed, each was turned into a Gaussian splat, and what {config.backbone} "
        "(the teacher) says about the photos was lifted onto the Gaussians, where all views have to agree. Then the "
        "same backbone learnt to say about a single photo what the splat shows there. A further room, which neither "
        "splats nor backbone ever saw, tells what that was worth, with linear probes for segmentation and depth.\n"
        f"Everything on this page was made in {seconds:.0f} seconds{resumed}, {cpu:.0f} seconds of processor time, on "
        f"{'a CPU' if device == 'CPU' else device}. {_WARNING}"
    )
    report.add_heading("In short: the held-out room")
    segmentation, depth = results.segmentation["rows"], results.depth["rows"]
    found = results.correspondence["rows"]
    rows = [
        (
            name,
            MEANINGS.get(name, "original beside control"),
            found[name]["recall_in_photo_pixels"]["10px"] if name in found else None,
            format_summary(segmentation[name]["miou"]),
            format_summary(depth[name]["rmse"]),
        )
        for name in segmentation
    ]
    report.add_table(rows, ("features", "what they are", "found again", "mIoU", "RMSE (m)"))
    report.add_text(
        "Found again: share of points of a photo that the features find in another view, to 10 pixels; nothing is "
        "trained for it. mIoU: segmentation. RMSE: depth, lower is better. The linear probes are solved, so no row "
        "gains or loses by how long its probe was trained."
    )
    compared = [
        (measure, comparison)
        for measure, probed, higher in (("mIoU", results.segmentation, True), ("RMSE", results.depth, False))
        for comparison in comparisons(probed["differences"], higher)
    ]
    report.add_table(
        [(m, c.row, c.baseline, f"{c.gain:+.4f}", f"{c.low:+.4f} to {c.high:+.4f}", c.verdict) for m, c in compared],
        ("measure", "features", "against", "gain (negative: loss)", "95 % interval", "in words"),
    )
    text = (
        "Against original: what fine-tuning on these rooms brought. The interval is "
        "over draws of the held-out room's photos, the same for both rows; it says nothing of other rooms or another "
        "training."
    )
    if config.control:
        text += " Against the control: what of it is owed to 3D."
    else:
        text += (
            " No control was distilled (--no-control), so whether a gain comes from 3D or from fine-tuning on these "
            "rooms cannot be told."
        )
    report.add_text(text)


def _add_rooms(report: Report, where: Places) -> None:
    report.add_heading("1. Photos")
    report.add_text(
        "Procedural rooms with known cameras; depth and labels are known too, and only the probes use them. Your own "
        "photos would come from ns-process-data."
    )
    for room in where.lifted_rooms:
        report.add_pictures(photos(room, 4), title=room.name)
    report.add_pictures(photos(where.held_out_room, 4), title=f"{where.held_out_room.name}, held out")


def _add_splats(report: Report, where: Places, results: DemoResults) -> None:
    report.add_heading("2. Features lifted into splats")
    report.add_text(
        f"Each room became a splat; every {EVAL_INTERVAL}th view was held out, and only those are shown and measured. "
        "Teacher and lifted features are shown by their first three principal components, with the same colours in a "
        "row: lifted features follow surfaces instead of the picture."
    )
    for room in where.lifted_rooms:
        for number, row in enumerate(evaluation_views(where.evaluation(room), 2), start=1):
            report.add_pictures(row, title=f"{room.name}, held-out view {number}")
    rows: list[Sequence[object]] = []
    for room in results.rooms:
        metrics = room.lift["metrics"]
        rows.append(
            (
                room.name,
                room.lift["gaussians"],
                *(room.scores.get(name) for name in ("psnr", "ssim", "feature_cosine")),
                *(metrics.get(f"view_match_{name}") for name in ("teacher", "lifted")),
                metrics.get("view_match_split", "–"),
            )
        )
    header = ("room", "Gaussians", "PSNR (dB)", "SSIM", "cosine to teacher", "match, teacher", "match, lifted", "views")
    report.add_table(rows, header)
    report.add_text(
        "Match: of the surface points seen in two views, the share that the features of one view find again in the "
        "other, to a patch and a half. It is measured between held-out views, or between training views where "
        "held-out ones share too little surface (last column)."
    )


def _add_distillation(report: Report, where: Places, results: DemoResults) -> None:
    report.add_heading("3. Distillation")
    trained = [("tuned", results.tuned)] + ([("control", results.control)] if results.control else [])
    report.add_text(
        f"The backbone took {results.tuned['steps']} steps of two photos towards what the splats show at their poses. "
        + (
            "The control took as many towards the teacher's own maps, passed through the same few directions: there is "
            "no 3D in them, and its loss cannot be compared with the other."
            if results.control
            else ""
        )
    )
    curves = {name: (list(map(float, m["loss"]["step"])), m["loss"]["l1"]) for name, m in trained}
    report.add_curve("Loss", curves, "step", "L1 to the targets")
    rows = [
        (f"{name}, {when}", *(metrics["mean"].get(f"{key}_{when}") for key in ("l1", "cosine", "view_match")))
        for name, metrics in trained
        for when in ("before", "after")
    ]
    report.add_table(rows, ("held-out views of the lifted rooms", "L1 to the targets", "cosine to them", "match"))
    pages = ", ".join(str(where.distilled(name) / "report.html") for name in ("lifted", "control")[: len(trained)])
    report.add_text(f"More: {pages}")


def _add_features(report: Report, config: DemoConfig, where: Places, results: DemoResults) -> None:
    report.add_heading("4. The held-out room through the backbones")
    report.add_text(
        f"Photos of {where.held_out_room.name}, one at a time; no splat of it exists. Features by their first three "
        "principal components, in one basis taken from the original backbone: the same colour means the same feature."
    )
    for row in feature_pictures(config, 4):
        report.add_pictures(row)
    found = results.correspondence
    pairs = found["data"]["pairs"]
    width = config.width
    report.add_text(
        f"Points found again between {pairs} pairs of its views, by the true depth, within some pixels of a photo of "
        f"{width} pixels width:"
    )
    table = [(name, *values["recall_in_photo_pixels"].values()) for name, values in found["rows"].items()]
    names = next(iter(found["rows"].values()))["recall_in_photo_pixels"]
    report.add_table(table, ("features", *(f"{name.removesuffix('px')} px" for name in names)))
    report.add_text(
        f"{SAME_PLACE}: what matches would reach that stay where they are in the picture. There is no spread: nothing "
        "is trained, and the pairs are the same for all."
    )


def _add_probe(report: Report, where: Places, metrics: dict[str, Any], kind: str) -> None:
    data = metrics["data"]
    number = {"segmentation": 5, "depth": 6}[kind]
    report.add_heading(f"{number}. Probe: {kind}")
    report.add_text(
        f"A linear head on frozen features, trained on {data['train']} photos of the lifted rooms and tested on "
        f"{data['test']} photos of {where.held_out_room.name}. Exact protocol: rows can be compared with each other, "
        "not with published numbers."
    )
    columns = COLUMNS[kind]
    table = [
        [name, values["channels"], *(format_summary(values[key]) for key, _ in columns)]
        for name, values in metrics["rows"].items()
    ]
    report.add_table(table, ("features", "channels", *(title for _, title in columns)))
    for row in panels(where.probe(kind), 3):
        report.add_pictures(row)
    report.add_text(f"More: {where.probe(kind) / 'report.html'}")


def _add_commands(report: Report, where: Places, records: Sequence[StepRecord], loop: Sequence[str]) -> None:
    report.add_heading("Do it yourself")
    report.add_text(
        "The loop is one command; it trained and lifted the rooms, distilled them and probed the result, and says so "
        "when it is started again."
    )
    report.add_code(shlex.join(loop))
    report.add_text(
        "Before it came the rooms, after it pictures and points found again. Steps, also those of the loop (its rooms' "
        f"commands are at the top of the logs below {where.loop.root / 'logs'}):"
    )
    for record in records:
        again = ", of the start that finished it" if record.resumed else ""
        report.add_text(
            f"{record.title}: {record.seconds:.0f} seconds, {record.cpu_seconds:.0f} of processor time{again}"
        )
        report.add_code(shlex.join(record.command))
    report.add_text("Look around in a room and its features:")
    report.add_code(f".venv/bin/ns-viewer --load-config {where.run(where.lifted_rooms[0]) / CONFIG}")


def _states(config: DemoConfig) -> list[SceneState]:
    where = places(config)
    return [read_recorded_state(where.loop, room.name) for room in where.lifted_rooms]
