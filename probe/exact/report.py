"""Table, numbers and page of the exact protocol."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fit3d_ns.support.files import atomic_write_text
from fit3d_ns.support.html_report import Report
from fit3d_ns.support.json_files import write_record
from probe.exact.intervals import Bootstrap, Interval
from probe.exact.patches import Unit
from probe.exact.solved_rows import SolvedRows
from probe.features.partners import Partner
from probe.features.rows import Row, row_width
from probe.output_folder import (
    COLUMNS,
    MEANINGS,
    METRICS_NAME,
    PAGE_NAME,
    TABLE_NAME,
    ResultFolder,
    add_class_table,
    add_pictures,
    add_provenance,
    format_summary,
    markdown_table,
    report_title,
    summarize,
)
from probe.protocols import ExactRecipe
from probe.tasks import Task

_SHOWN_CLASSES = 8


def write_exact_report(
    results: ResultFolder,
    task: Task,
    recipe: ExactRecipe,
    units: Sequence[Unit],
    partners: Sequence[Partner],
    width: int,
    summary: dict[str, Any],
) -> None:
    """Writes table.md, report.html and then metrics.json from the rows' files.

    Args:
        results: The output folder.
        task: The probe.
        recipe: The protocol.
        units: Rows and their students, all solved and scored.
        partners: The fine-tuned backbones.
        width: Channels of one backbone.
        summary: What is said about data, protocol and provenance.
    """
    solved = SolvedRows(results)
    rows = list(dict.fromkeys(unit.row for unit in units))
    sums = {row.name: [_sums(solved, unit) for unit in units if unit.row == row] for row in rows}
    columns = COLUMNS[task.data.kind]
    numbers: dict[str, Any] = {}
    for row in rows:
        scores = [task.scores(one.sum(0)) for one in sums[row.name]]
        facts = [solved.read_facts(unit.key) or {} for unit in units if unit.row == row]
        numbers[row.name] = {key: summarize([float(one[key]) for one in scores]) for key, _ in columns}
        numbers[row.name] |= {
            "channels": row_width(row, width),
            "students": [unit.partner for unit in units if unit.row == row and unit.partner],
            "seconds": [one.get("seconds") for one in facts],
        }
        if task.data.classes:
            per_class = zip(*(one["iou"].tolist() for one in scores))
            numbers[row.name]["iou"] = {
                name: summarize(list(values)) for name, values in zip(task.data.classes, per_class)
            }
    bootstrap = Bootstrap(sums, task.scores, task.headline, recipe.resamples)
    for row in rows:
        interval = bootstrap.score(row.name)
        numbers[row.name][task.headline] |= {"low": interval.low, "high": interval.high}
    differences = [
        {"row": a, "baseline": b, "metric": task.headline, **vars(bootstrap.difference(a, b))}
        for a, b in _comparisons(rows, partners)
    ]
    meter = None
    if {"original", "duplicate"} <= set(numbers):
        meter = {
            key: numbers["duplicate"][key]["mean"] - numbers["original"][key]["mean"]
            for key, _ in columns
            if numbers["original"][key]["mean"] is not None
        }
    facts = {**summary["facts"], **_facts_of_test(task, sums[rows[0].name][0])}
    chosen = solved.read_facts(units[0].key) or {}
    decay = {"chosen_by": units[0].key, "decay": chosen.get("decay"), "held_out": chosen.get("held_out")}
    content = {
        **summary,
        "facts": facts,
        "decay": decay,
        "convergence": meter,
        "rows": numbers,
        "differences": differences,
    }
    header = ["features", "channels", *(title for _, title in columns)]
    cells = [
        [name, str(values["channels"]), *(format_summary(values[key]) for key, _ in columns)]
        for name, values in numbers.items()
    ]
    sentences = _sentences(content, task, meter)
    text = f"# {report_title(summary)}\n\n" + "\n".join(sentences) + "\n\n" + markdown_table(header, cells)
    if differences:
        text += "\n" + markdown_table(*_difference_table(task, differences))
    text += f"\n`{summary['command']}`\n"
    atomic_write_text(results.folder / TABLE_NAME, text)
    report = Report(report_title(summary))
    for sentence in sentences:
        report.add_text(sentence)
    report.add_table(cells, header)
    if differences:
        report.add_heading("Differences")
        report.add_text(
            f"In {dict(columns)[task.headline]}, {'higher' if task.higher_is_better else 'lower'} is better. The "
            f"interval holds 95 % of {recipe.resamples} draws of as many test photos, the same draws for both rows; it "
            "says nothing of other training photos or other students."
        )
        titles, lines = _difference_table(task, differences)
        report.add_table(lines, titles)
    report.add_table(_meanings(rows, partners), ("row", "what it is"))
    add_pictures(report, results, task, list(numbers))
    if task.data.classes:
        add_class_table(report, task.data.classes, numbers)
    report.add_heading("Decay")
    report.add_text(
        f"{decay['decay']:g} for all rows, chosen by {decay['chosen_by']} on {facts['held_out']} held-out training "
        "photos; every map is then fitted to all training photos. The test photos choose nothing."
    )
    measure = "mIoU of held-out patches" if task.data.kind == "segmentation" else "negative squared error"
    tried = [[name, f"{score:.4g}"] for name, score in (decay["held_out"] or {}).items()]
    report.add_table(tried, ("decay", measure))
    add_provenance(report, summary)
    report.write(results.folder / PAGE_NAME)
    write_record(results.folder / METRICS_NAME, content)


def _sums(solved: SolvedRows, unit: Unit) -> Tensor:
    sums = solved.read_sums(unit.key)
    assert sums is not None
    return sums


def _comparisons(rows: Sequence[Row], partners: Sequence[Partner]) -> list[tuple[str, str]]:
    """Pairs each row of a student with the original, then with the controls of the same assembly."""
    roles = {partner.group: partner.role for partner in partners}
    names = [row.name for row in rows]
    pairs = [(row.name, "original") for row in rows if row.partner and "original" in names]
    for row in rows:
        if row.partner and roles[row.partner] == "tuned":
            controls = [other for other in rows if other.partner and roles[other.partner] == "control"]
            pairs += [(row.name, other.name) for other in controls if other.assembly == row.assembly]
    return pairs


def _facts_of_test(task: Task, sums: Tensor) -> dict[str, Any]:
    """Returns what the truth of the test photos lacks."""
    if task.data.kind != "segmentation":
        return {"test_photos_without_truth": int((sums[:, 0] == 0).sum())}
    truth = sums.unflatten(1, (3, -1))[:, 2]  # [photos, K]
    never = [name for name, count in zip(task.data.classes, truth.sum(0)) if not count]
    return {"test_photos_without_truth": int((truth.sum(1) == 0).sum()), "classes_never_in_test": never}


def _sentences(content: dict[str, Any], task: Task, meter: dict[str, float] | None) -> list[str]:
    data, facts = content["data"], content["facts"]
    most = max(len(values["students"]) for values in content["rows"].values())
    sentences = [
        f"Protocol {content['protocol']}; {data['train']} training and {data['test']} test samples, photos of "
        f"{facts['photo_size'][1]}x{facts['photo_size'][0]} pixels; over all pixels of the test photos"
        + ("; mean ± standard deviation over students." if most > 1 else "."),
        content["features"],
    ]
    if 0 < most < 2:
        sentences.append("One student: what another seed of its training gives is not known.")
    if meter is not None:
        name = dict(COLUMNS[task.data.kind])[task.headline]
        sentences.append(
            f"Convergence: duplicate - original is {meter[task.headline]:+.1g} in {name}; both are one problem, so "
            "that is what the solver has left."
        )
    for key, what in (("training_photos_without_truth", "training"), ("test_photos_without_truth", "test")):
        if facts.get(key):
            sentences.append(f"{facts[key]} {what} photos have no pixel with a truth and take no part.")
    for key, what, then in (
        ("classes_never_in_training", "training", "never predicted"),
        ("classes_never_in_test", "test", "no part of the mean unless predicted"),
    ):
        names = facts.get(key) or []
        if names:
            shown = ", ".join(names[:_SHOWN_CLASSES]) + (", ..." if len(names) > _SHOWN_CLASSES else "")
            sentences.append(f"{len(names)} classes never occur in the {what} photos and are {then}: {shown}.")
    return sentences + data["notes"]


def _difference_table(task: Task, differences: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    title = dict(COLUMNS[task.data.kind])[task.headline]
    lines = []
    for one in differences:
        interval = Interval(one["value"], one["low"], one["high"])
        sign = interval.sign * (1 if task.higher_is_better else -1)
        digits = 2 if task.data.kind == "normals" else 4
        lines.append(
            [
                one["row"],
                one["baseline"],
                f"{interval.value:+.{digits}f}",
                f"{interval.low:+.{digits}f} to {interval.high:+.{digits}f}",
                ("worse", "not told apart", "better")[sign + 1],
            ]
        )
    return ["features", "against", title, "95 % interval", "verdict"], lines


def _meanings(rows: Sequence[Row], partners: Sequence[Partner]) -> list[tuple[str, str]]:
    roles = {partner.group: partner.role for partner in partners}
    lines = []
    for row in rows:
        meaning = MEANINGS[row.assembly]
        if row.partner and row.partner != "tuned":
            without = ", distilled without 3D" if roles[row.partner] == "control" else ""
            meaning = f"{meaning}, with {row.partner}{without}"
        lines.append((row.name, meaning))
    for partner in partners:
        lines.append((f"student {partner.name}", partner.found.source))
    return lines
