"""Tables and figure from the records of the evidence, without making anything anew.

Those of the documentation: ``python -m benchmarks.evidence.figure RECORDS --pictures docs/pictures``, with the records
of `benchmarks/results/evidence`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.evidence.tables import Row, write_tables
from fit3d_ns.support.files import atomic_path

_NAMES = {
    "control": "control",
    "control-blur": "control, blurred",
    "control-shift": "control, shifted photos",
    "lifted": "lifted",
}
_COLORS = {"control": "tab:gray", "control-blur": "tab:olive", "control-shift": "tab:brown", "lifted": "tab:blue"}


@dataclass
class EvidenceFigure:
    """Writes summary.json, table.md and evidence.svg."""

    records: tyro.conf.Positional[Path]
    """Folder that holds `development/` and `test/`."""
    output: Path = Path("outputs/evidence")
    """Where the tables go."""
    pictures: Path = Path("outputs/evidence")
    """Where the figure goes."""


def main(config: EvidenceFigure) -> None:
    """Writes all three.

    Args:
        config: The user's choices.
    """
    write_tables(config.records, config.output)
    summary = json.loads((config.output / "summary.json").read_text())
    figure = draw(summary)
    config.pictures.mkdir(parents=True, exist_ok=True)
    with atomic_path(config.pictures / "evidence.svg") as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def draw(summary: Row) -> Figure:
    """Draws the gain over the number of scenes, scores of students and controls by round, and over the share.

    Args:
        summary: What `write_tables` writes.

    Returns:
        Panels side by side.
    """
    counts = {row["scenes"] for row in summary["test"] if row["kind"] != "original"}
    panels = [_rounds, _shares]
    if len(counts) > 1:
        panels.insert(0, _scenes)
    figure = Figure(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels)), panels):
        panel(axis, summary)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def _scenes(axis: Axes, summary: Row) -> None:
    original = _original(summary["test"])["nyu_miou"][0]
    lines: dict[tuple[str, float], list[Row]] = {}
    for row in summary["test"]:
        if row.get("round") == 1 and not row["steps"] and row["kind"] in ("lifted", "control", "control-shift"):
            lines.setdefault((row["kind"], row["amount"]), []).append(row)
    for (kind, amount), members in lines.items():
        if amount == 1 and kind != "lifted":
            continue  # below the averaged ones, and in the table
        members = sorted(members, key=lambda row: row["scenes"])
        axis.errorbar(
            [row["scenes"] for row in members],
            [row["nyu_miou"][0] - original for row in members],
            [row["nyu_miou"][1] for row in members],
            fmt="o-" if amount < 1 else "o--",
            color=_COLORS[kind],
            markersize=4,
            capsize=2,
            label=f"{_NAMES[kind]}, {'averaged' if amount < 1 else 'not averaged'}",
        )
    axis.axhline(0, color="k", linewidth=0.8)
    counts = sorted({row["scenes"] for members in lines.values() for row in members})
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set(xlabel="scenes, one round", ylabel="gain in NYUv2 mIoU (points), test frames")


def _rounds(axis: Axes, summary: Row) -> None:
    rows = summary["test"]
    largest = max(row["scenes"] for row in rows if row["kind"] == "lifted")
    original = _original(rows)
    axis.plot(original["nyu_rmse"][0], original["nyu_miou"][0], "k*", markersize=9, label="original")
    for kind, name in _NAMES.items():
        members = [row for row in rows if row["kind"] == kind and row["amount"] < 1 and row["scenes"] == largest]
        members = sorted((row for row in members if not row["steps"]), key=lambda row: row["round"])
        if not members:
            continue
        miou, miou_spread = zip(*(row["nyu_miou"] for row in members))
        rmse, rmse_spread = zip(*(row["nyu_rmse"] for row in members))
        axis.errorbar(
            rmse, miou, miou_spread, rmse_spread, fmt="o-", color=_COLORS[kind], markersize=4, capsize=2, label=name
        )
        for row in members:
            place = (row["nyu_rmse"][0], row["nyu_miou"][0])
            axis.annotate(str(row["round"]), place, (4, -9), textcoords="offset points", fontsize=7)
    axis.invert_xaxis()
    axis.set(xlabel="NYUv2 depth RMSE (m), test frames", ylabel="NYUv2 mIoU (%), test frames")
    axis.set_title("numbers: rounds; all averaged with the original", fontsize=8)


def _shares(axis: Axes, summary: Row) -> None:
    rows = summary["development"]
    original = _original(rows)
    largest = max(row["scenes"] for row in rows if row["kind"] == "lifted")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "lifted" and row["scenes"] == largest:
            steps = f", {row['steps']:,} steps" if row["steps"] else ""
            lines.setdefault(f"round {row['round']}{steps}", []).append(row)
    for label, members in lines.items():
        points = [(0.0, original["nyu_miou"]), *((row["amount"], row["nyu_miou"]) for row in members)]
        shares, means, spreads = zip(*((share, mean, spread) for share, (mean, spread) in points))
        axis.errorbar(shares, means, spreads, fmt="o-", markersize=3, capsize=2, label=label)
    axis.set(xlabel="share of the student in the weights", ylabel="NYUv2 mIoU (%), development frames")


def _original(rows: list[Row]) -> Row:
    return next(row for row in rows if row["kind"] == "original")


if __name__ == "__main__":
    main(tyro.cli(EvidenceFigure))
