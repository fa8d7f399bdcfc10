"""The table, the numbers behind it and the page around it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fit3d_ns.files import atomic_write_json, atomic_write_text
from fit3d_ns.report import Report
from probe.features import Row, row_width
from probe.metrics import DEPTH_METRICS, NORMAL_METRICS
from probe.results import ResultFolder, summarize
from probe.task import Task

COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "segmentation": (("miou", "mIoU"), ("macc", "mAcc"), ("aacc", "aAcc")),
    "depth": tuple(
        zip(DEPTH_METRICS, ("RMSE (m)", "AbsRel", "SqRel", "RMSElog", "log10", "d < 1.25", "d < 1.25²", "d < 1.25³"))
    ),
    "normals": tuple(zip(NORMAL_METRICS, ("mean (°)", "RMSE (°)", "< 11.25°", "< 22.5°", "< 30°"))),
}
MEANINGS = {
    "original": "the backbone as it came",
    "duplicate": "original beside itself: what width alone brings",
    "tuned": "the fine-tuned backbone alone",
    "add": "original + tuned",
    "linear": "learned 2C -> C layer on both",
    "concat": "original beside tuned (the paper's)",
    "control": "distilled without 3D, alone",
}
_PANEL_ROWS = ("original", "concat", "tuned", "duplicate")


def write_report(
    results: ResultFolder, task: Task, rows: Sequence[Row], width: int, seeds: Sequence[int], summary: dict[str, Any]
) -> None:
    """Writes metrics.json, table.md and report.html from the finished seeds.

    Args:
        results: The output folder.
        task: The probe.
        rows: Of the table.
        width: Channels of one backbone.
        seeds: All finished.
        summary: What is said about data, protocol and provenance.
    """
    finished = [content for seed in seeds if (content := results.read_seed(seed)) is not None]
    columns = COLUMNS[task.data.kind]
    numbers: dict[str, Any] = {}
    for row in rows:
        runs = [content["rows"][row.name] for content in finished]
        numbers[row.name] = {key: summarize([run["scores"][key] for run in runs]) for key, _ in columns}
        numbers[row.name]["channels"] = row_width(row, width)
        numbers[row.name]["learning_rates"] = [run["learning_rate"] for run in runs]
        numbers[row.name]["validation"] = [run["validation"] for run in runs]
        if task.data.classes:
            per_class = zip(*(run["scores"]["iou"] for run in runs))
            numbers[row.name]["iou"] = {
                name: summarize(list(values)) for name, values in zip(task.data.classes, per_class)
            }
    timing = {f"seed_{content['seed']}": content["timing"] for content in finished}
    atomic_write_json(
        results.folder / "metrics.json", {**summary, "seeds": list(seeds), "timing": timing, "rows": numbers}
    )
    header = ["features", "channels", *(title for _, title in columns)]
    cells = [
        [name, str(values["channels"]), *(format_summary(values[key]) for key, _ in columns)]
        for name, values in numbers.items()
    ]
    sentences = _sentences(summary, seeds)
    text = f"# {_title(summary)}\n\n" + "\n".join(sentences) + "\n\n" + markdown_table(header, cells)
    text += f"\n`{summary['command']}`\n"
    atomic_write_text(results.folder / "table.md", text)
    _write_page(results, task, numbers, header, cells, sentences, summary)


def format_summary(value: dict[str, Any]) -> str:
    """Shows mean and spread with digits that fit the size of the number."""
    if value["mean"] is None:
        return "–"
    digits = 2 if abs(value["mean"]) >= 10 else 4
    text = f"{value['mean']:.{digits}f}"
    return text if value["spread"] is None else f"{text} ± {value['spread']:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _title(summary: dict[str, Any]) -> str:
    return f"{summary['probe'].capitalize()} probe: {summary['backbone']['name']} on {summary['data']['name']}"


def _sentences(summary: dict[str, Any], seeds: Sequence[int]) -> list[str]:
    data = summary["data"]
    sentences = [
        f"Protocol {summary['protocol']}; {data['train']} training and {data['test']} test samples; "
        + (
            f"mean ± standard deviation over {len(seeds)} seeds."
            if len(seeds) > 1
            else "one seed: no spread is known, so do not trust small differences."
        )
    ]
    if summary["fast"]:
        sentences.append(
            "FAST protocol: features cached once, no crop, scale or colour augmentation. Rows can be compared with "
            "each other, not with published numbers."
        )
    return sentences + data["notes"]


def _write_page(
    results: ResultFolder,
    task: Task,
    numbers: dict[str, Any],
    header: list[str],
    cells: list[list[str]],
    sentences: list[str],
    summary: dict[str, Any],
) -> None:
    report = Report(_title(summary))
    for sentence in sentences:
        report.add_text(sentence)
    report.add_table(cells, header)
    shown = [(name, MEANINGS[name]) for name in numbers if name in MEANINGS]
    if any(name.startswith("control_") for name in numbers):
        shown.append(("control_*", "the same assemblies with the backbone distilled without 3D"))
    report.add_table(shown, ("row", "what it is"))
    _add_pictures(report, results, task, numbers)
    if task.data.classes:
        report.add_heading("IoU of every class")
        rows = [
            [name, *(format_summary(numbers[row]["iou"][name]) for row in numbers)]
            for name in task.data.classes
            if any(numbers[row]["iou"][name]["mean"] is not None for row in numbers)
        ]
        report.add_table(rows, ("class", *numbers))
    if any(values["validation"] and values["validation"][0] for values in numbers.values()):
        report.add_heading("Learning rates")
        metric = dict(COLUMNS[task.data.kind])[task.headline]
        report.add_text(f"Chosen for each seed by {metric} on held-out training samples, never on the test split.")
        report.add_table(
            [[name, ", ".join(f"{rate:g}" for rate in values["learning_rates"])] for name, values in numbers.items()],
            ("features", "chosen, by seed"),
        )
    report.add_heading("How this was made")
    report.add_code(summary["command"])
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items() if version)
    report.add_text(f"{versions}; {summary['device']}.")
    report.write(results.folder / "report.html")


def _add_pictures(report: Report, results: ResultFolder, task: Task, numbers: dict[str, Any]) -> None:
    panels = results.read_panels()
    if not panels:
        return
    names = [name for name in _PANEL_ROWS if name in numbers]
    names = names[:3] if "concat" in names else names
    report.add_heading("Test photos")
    for place, pictures in panels.items():
        row: list[tuple[str, np.ndarray]] = [("photo", pictures["photo"]), ("truth", pictures["truth"])]
        row += [(name, pictures[name]) for name in names if name in pictures]
        report.add_pictures(row, title=task.data.test[place].name)
