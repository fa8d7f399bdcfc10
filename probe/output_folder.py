"""The output folder of a probe: what it was asked, what each seed gave, and whether that is finished."""

import hashlib
import json
import logging
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.files import atomic_write_json, atomic_write_text, discard, without_non_finite
from fit3d_ns.support.html_report import Report
from fit3d_ns.support.json_files import build, read_json, write_record
from fit3d_ns.support.output_folders import check_names_are_free, hold_folder
from fit3d_ns.support.processes import world_size
from probe.features.rows import Row, row_width
from probe.panels import Panels
from probe.tasks.metrics import DEPTH_METRICS, NORMAL_METRICS
from probe.tasks.task import Task

_LOGGER = logging.getLogger(__name__)
TABLE_NAME = "table.md"
PAGE_NAME = "report.html"
METRICS_NAME = "metrics.json"
"""Written last: it vouches for the others."""
_PACKAGES = ("fit3d-ns", "torch", "torchmetrics", "timm", "numpy")


class ResultFolder:
    """Results below an output folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Opens a folder, new or of the same settings.

        Args:
            folder: The output folder.
            settings: All that decides the results, beside the seed; JSON-able.

        Raises:
            UserError: If the folder holds results of other settings, or cannot be used.
        """
        self.folder = folder
        self._settings = json.loads(json.dumps(settings, sort_keys=True, default=str))
        content = json.dumps(self._settings, sort_keys=True)
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=12).hexdigest()
        self.panels = Panels(folder / "panels", self.fingerprint)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file: name a folder with --output-dir.")
        path = folder / "question.json"
        if path.is_file():
            difference = None
            try:
                difference = _first_difference(build(dict[str, Any], read_json(path)), self._settings)
            except DamagedFile as error:  # all that was finished carries the question's fingerprint
                _LOGGER.warning(f"{path} is damaged and made anew: {error}.")
            if difference is not None:
                raise UserError(
                    f"{folder} holds the results of another probe (it differs in {difference}): choose another "
                    "--output-dir, or delete it."
                )

    def start(self) -> None:
        """Takes the folder for this process and writes down the settings.

        Raises:
            UserError: If another process writes there, or it cannot be written to.
        """
        hold_folder(self.folder, "--output-dir")
        check_names_are_free(self.folder, (TABLE_NAME, PAGE_NAME, METRICS_NAME), "--output-dir")
        atomic_write_json(self.folder / "question.json", self._settings)

    def checkpoint(self, seed: int) -> Path:
        """Returns where a seed's training is saved.

        Args:
            seed: Of the training.
        """
        return self.folder / "checkpoints" / f"seed_{seed}.pt"

    def read_seed(self, seed: int) -> dict[str, Any] | None:
        """Returns a finished seed's results; None if there are none of these settings, or they are damaged.

        Args:
            seed: Of the training.
        """
        path = self.folder / "seeds" / f"seed_{seed}.json"
        try:
            content = read_json(path)
            if not isinstance(content, dict) or content.get("digest") != _digest(content):
                raise DamagedFile("its checksum differs from its data")
        except FileNotFoundError:
            return None
        except DamagedFile as error:
            _LOGGER.warning(f"{path} is damaged and made anew: {error}.")
            discard(path)
            return None
        return content if content["fingerprint"] == self.fingerprint else None

    def write_seed(self, seed: int, rows: dict[str, Any], timing: dict[str, float]) -> None:
        """Writes a finished seed's results.

        Args:
            seed: Of the training.
            rows: Scores by row, as JSON values.
            timing: Seconds by what took them.
        """
        content: dict[str, Any] = {"fingerprint": self.fingerprint, "seed": seed, "rows": rows, "timing": timing}
        content = without_non_finite(content)
        atomic_write_json(self.folder / "seeds" / f"seed_{seed}.json", {**content, "digest": _digest(content)})


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps({key: value for key, value in content.items() if key != "digest"}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def summarize(values: Sequence[float | None]) -> dict[str, Any]:
    """Returns mean and spread (sample standard deviation; None for a single value) of one metric over seeds.

    Args:
        values: One for each seed; None and NaN do not count.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    return {
        "mean": statistics.fmean(known) if known else None,
        "spread": statistics.stdev(known) if len(known) > 1 else None,
        "values": list(values),
    }


def provenance(device: torch.device) -> dict[str, Any]:
    """Returns the exact command, the versions and the machine's kind.

    Args:
        device: On which was computed.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": shlex.join([*_program(), *sys.argv[1:]]),
        "versions": {"python": sys.version.split()[0], **{name: _version(name) for name in _PACKAGES}},
        "device": gpu or "CPU",
    }


def _program() -> list[str]:
    name = Path(sys.argv[0]).name
    if world_size() > 1:
        return [
            "torchrun",
            "--nproc-per-node",
            str(world_size()),
            *(["-m", "probe.cli"] if name == "cli.py" else [name]),
        ]
    return ["python", "-m", "probe.cli"] if name == "cli.py" else [name]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_difference(found: Any, wanted: Any, path: str = "") -> str | None:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**found, **wanted}:
            difference = _first_difference(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
            if difference is not None:
                return difference
        return None
    return None if found == wanted else path or "everything"


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
    """Writes table.md, report.html and then metrics.json from the finished seeds.

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
        numbers[row.name]["learning_rates"] = [run["learning_rate"] for run in runs if "learning_rate" in run]
        numbers[row.name]["validation"] = [run["validation"] for run in runs]
        if task.data.classes:
            per_class = zip(*(run["scores"]["iou"] for run in runs))
            numbers[row.name]["iou"] = {
                name: summarize(list(values)) for name, values in zip(task.data.classes, per_class)
            }
    timing = {f"seed_{content['seed']}": content["timing"] for content in finished}
    header = ["features", "channels", *(title for _, title in columns)]
    cells = [
        [name, str(values["channels"]), *(format_summary(values[key]) for key, _ in columns)]
        for name, values in numbers.items()
    ]
    sentences = _sentences(summary, seeds)
    text = f"# {report_title(summary)}\n\n" + "\n".join(sentences) + "\n\n" + markdown_table(header, cells)
    text += f"\n`{summary['command']}`\n"
    atomic_write_text(results.folder / TABLE_NAME, text)
    _write_page(results, task, numbers, header, cells, sentences, summary)
    content = {**summary, "seeds": list(seeds), "timing": timing, "rows": numbers}
    write_record(results.folder / METRICS_NAME, content)


def format_summary(value: dict[str, Any]) -> str:
    """Shows mean and spread with digits that fit the size of the number.

    Args:
        value: Of `summarize`.

    Returns:
        Such as ``0.4840 ± 0.0031``, a dash where nothing is known.
    """
    if value["mean"] is None:
        return "–"
    digits = 2 if abs(value["mean"]) >= 10 else 4
    text = f"{value['mean']:.{digits}f}"
    return text if value["spread"] is None else f"{text} ± {value['spread']:.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table.

    Args:
        header: Of the columns.
        rows: As many cells each.
    """
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---", *["---:"] * (len(header) - 1)]) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def report_title(summary: dict[str, Any]) -> str:
    """Returns the title of a probe's page.

    Args:
        summary: What the page is about: ``probe``, ``backbone`` and ``data``.
    """
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
    if "-fast-" in summary["protocol"]:
        sentences.append(
            "FAST protocol: features cached once, no crop, scale or colour augmentation, and heads that have not "
            "converged when their training ends: what differs by less than duplicate and original do is no difference."
        )
    return [*sentences, *([summary["features"]] if "features" in summary else []), *data["notes"]]


def _write_page(
    results: ResultFolder,
    task: Task,
    numbers: dict[str, Any],
    header: list[str],
    cells: list[list[str]],
    sentences: list[str],
    summary: dict[str, Any],
) -> None:
    report = Report(report_title(summary))
    for sentence in sentences:
        report.add_text(sentence)
    report.add_table(cells, header)
    shown = [(name, MEANINGS[name]) for name in numbers if name in MEANINGS]
    if any(name.startswith("control_") for name in numbers):
        shown.append(("control_*", "the same assemblies with the backbone distilled without 3D"))
    report.add_table(shown, ("row", "what it is"))
    add_pictures(report, results, task, list(numbers))
    if task.data.classes:
        add_class_table(report, task.data.classes, numbers)
    if any(values["validation"] and values["validation"][0] for values in numbers.values()):
        report.add_heading("Learning rates")
        metric = dict(COLUMNS[task.data.kind])[task.headline]
        report.add_text(f"Chosen for each seed by {metric} on held-out training samples, never on the test split.")
        report.add_table(
            [[name, ", ".join(f"{rate:g}" for rate in values["learning_rates"])] for name, values in numbers.items()],
            ("features", "chosen, by seed"),
        )
    add_provenance(report, summary)
    report.write(results.folder / PAGE_NAME)


def add_provenance(report: Report, summary: dict[str, Any]) -> None:
    """Adds the command, the versions and the machine's kind to a page.

    Args:
        report: The page.
        summary: Of `provenance`.
    """
    report.add_heading("How this was made")
    report.add_code(summary["command"])
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items() if version)
    report.add_text(f"{versions}; {summary['device']}.")


def add_class_table(report: Report, classes: Sequence[str], numbers: dict[str, Any]) -> None:
    """Adds the IoU of every class that occurs, by row, to a page.

    Args:
        report: The page.
        classes: Their names.
        numbers: Summaries by row, of which ``iou`` is taken, by class.
    """
    report.add_heading("IoU of every class")
    rows = [
        [name, *(format_summary(numbers[row]["iou"][name]) for row in numbers)]
        for name in classes
        if any(numbers[row]["iou"][name]["mean"] is not None for row in numbers)
    ]
    report.add_table(rows, ("class", *numbers))


def add_pictures(report: Report, results: ResultFolder, task: Task, rows: Sequence[str]) -> None:
    """Adds the test photos that were kept, with their truth and the predictions of some rows, to a page.

    Args:
        report: The page.
        results: Where the pictures were kept.
        task: Knows the test photos' names.
        rows: Names of the rows.
    """
    panels = results.panels.read()
    if not panels:
        return
    names = [name for name in _PANEL_ROWS if name in rows]
    names = names[:3] if "concat" in names else names
    report.add_heading("Test photos")
    for place, pictures in panels.items():
        row: list[tuple[str, np.ndarray]] = [("photo", pictures["photo"]), ("truth", pictures["truth"])]
        row += [(name, pictures[name]) for name in names if name in pictures]
        report.add_pictures(row, title=task.data.test[place].name)
