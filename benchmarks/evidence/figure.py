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
    """Writes all three."""
    write_tables(config.records, config.output)
    summary = json.loads((config.output / "summary.json").read_text())
    figure = draw(summary)
    config.pictures.mkdir(parents=True, exist_ok=True)
    with atomic_path(config.pictures / "evidence.svg") as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def draw(summary: Row) -> Figure:
    """Draws scores over the share of the student, the final scores, and, where there are some, those of fewer scenes.

    Args:
        summary: What `write_tables` writes.
    """
    counts = {row["scenes"] for row in summary["test"] if row["kind"] != "original"}
    num_panels = 3 if len(counts) > 1 else 2
    figure = Figure(figsize=(4.2 * num_panels, 3.6), layout="constrained")
    axes = figure.subplots(1, num_panels)
    _shares(axes[0], summary["development"])
    _final(axes[1], [row for row in summary["test"] if row["kind"] == "original" or row["scenes"] == max(counts)])
    if num_panels == 3:
        _scenes(axes[2], summary["test"])
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def _shares(axis: Axes, rows: list[Row]) -> None:
    original = next(row for row in rows if row["kind"] == "original")
    largest = max(row["scenes"] for row in rows if row["kind"] == "lifted")
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row["kind"] == "lifted" and row["scenes"] == largest:
            steps = f"{row['steps']:,} steps" if row["steps"] else "the recipe's steps"
            lines.setdefault(f"round {row['round']}, {steps}", []).append(row)
    for label, members in lines.items():
        points = [(0.0, original["nyu_miou"]), *((row["amount"], row["nyu_miou"]) for row in members)]
        shares, means, spreads = zip(*((share, mean, spread) for share, (mean, spread) in points))
        axis.errorbar(shares, means, spreads, fmt="o-", markersize=3, capsize=2, label=label)
    axis.set(xlabel="share of the student in the weights", ylabel="NYUv2 mIoU (%), development frames")


def _final(axis: Axes, rows: list[Row]) -> None:
    seen = set()
    for row in rows:
        (miou, miou_spread), (rmse, rmse_spread) = row["nyu_miou"], row["nyu_rmse"]
        if row["kind"] == "original":
            axis.plot(rmse, miou, "k*", markersize=9, label="original")
            continue
        name = f"{_NAMES[row['kind']]}, round {row['round']}"
        label = None if name in seen else name
        seen.add(name)
        marker = {1: "o", 2: "s"}.get(row["round"], "D")
        axis.errorbar(
            rmse,
            miou,
            miou_spread,
            rmse_spread,
            fmt=marker,
            color=_COLORS[row["kind"]],
            fillstyle="full" if row["amount"] < 1 else "none",
            markersize=6,
            capsize=2,
            label=label,
        )
    axis.invert_xaxis()
    axis.set(xlabel="NYUv2 depth RMSE (m), test frames", ylabel="NYUv2 mIoU (%), test frames")
    axis.set_title("filled: averaged with the original; hollow: not", fontsize=8)


def _scenes(axis: Axes, rows: list[Row]) -> None:
    original = next(row for row in rows if row["kind"] == "original")["nyu_miou"][0]
    lines: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row.get("round") == 1 and not row["steps"] and row["kind"] in ("lifted", "control"):
            lines.setdefault((row["kind"], row["amount"]), []).append(row)
    for (kind, amount), members in lines.items():
        members = sorted(members, key=lambda row: row["scenes"])
        style = "o-" if amount < 1 else "o--"
        averaged = "averaged" if amount < 1 else "not averaged"
        axis.errorbar(
            [row["scenes"] for row in members],
            [row["nyu_miou"][0] - original for row in members],
            [row["nyu_miou"][1] for row in members],
            fmt=style,
            color=_COLORS[kind],
            markersize=4,
            capsize=2,
            label=f"{_NAMES[kind]}, {averaged}",
        )
    axis.axhline(0, color="k", linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="scenes", ylabel="gain in NYUv2 mIoU (points), test frames")


if __name__ == "__main__":
    main(tyro.cli(EvidenceFigure))
