"""Draws the figures of docs/lifting.md from what benchmarks/lifting.py wrote, and the page of such a comparison.

    python benchmarks/lifting_figures.py redkitchen.json bear.json --output docs/pictures

Makes `lifting_cost.svg` (seconds against views and against Gaussians) and `lifting_choice.svg` (fidelity against
consistency of every solver).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fit3d_ns.support.files import atomic_path
from fit3d_ns.support.html_report import Report

_FAMILIES = (
    ("k = ", "refinement", "o-"),
    ("3x3 fit, ridge", "3x3 decoder fitted", "s"),
    ("Adam", "Adam, frozen geometry", "^"),
    ("joint", "trained jointly", "D"),
)


@dataclass
class Figures:
    """Draws the figures."""

    results: tyro.conf.Positional[tuple[Path, ...]]
    """lifting.json of each scene; the file's name names the scene."""
    output: Path = Path("outputs/benchmarks")
    """Where the figures go."""


def write_report(path: Path, results: dict[str, Any]) -> None:
    """Writes the page of a comparison, tables and curves.

    Args:
        path: The HTML file.
        results: What `benchmarks/lifting.py` writes as JSON: facts of the scene, and rows by part.
    """
    report = Report("Lifting features onto trained geometry")
    report.add_text(
        f"{results['num_gaussians']:,} Gaussians, {results['training_views']} training and {results['held_out_views']} "
        f"held-out views, {results['device']}."
    )
    columns = ("feature_cosine", "feature_l1", "view_match_lifted", "seconds", "peak_memory_mb")
    for part in ("solvers", "dims", "views", "gaussians", "teacher", "command"):
        if part not in results:
            continue
        report.add_heading(part.capitalize())
        shown = [name for name in columns if any(name in row for row in results[part])]
        rows = [(row["row"], *(row.get(name) for name in shown), row.get("failed", "")) for row in results[part]]
        report.add_table(rows, header=("", *shown, ""))
        axis = {"dims": "dim", "views": "views", "gaussians": "gaussians"}.get(part)
        if axis is None or len(results[part]) < 2:
            continue
        for name in shown:
            points = [(row[axis], row[name]) for row in results[part] if name in row]
            curve = ([float(x) for x, _ in points], [float(y) for _, y in points])
            report.add_curve(f"{name} against {axis}", {name: curve}, axis, name)
    report.write(path)


def main(figures: Figures) -> None:
    """Draws both figures.

    Args:
        figures: The user's choices.
    """
    scenes = {path.stem: json.loads(path.read_text()) for path in figures.results}
    _save(_cost(scenes), figures.output / "lifting_cost.svg")
    _save(_choice(scenes), figures.output / "lifting_choice.svg")


def _cost(scenes: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, part, key, label in (
        (axes[0], "views", "views", "views"),
        (axes[1], "gaussians", "gaussians", "million Gaussians"),
    ):
        scale = 1e6 if key == "gaussians" else 1
        for name, results in scenes.items():
            rows = results[part]
            views = "" if key == "views" else f", {results['training_views']} views"
            title = f"{name}, {results['num_gaussians'] / 1e6:.2f} M Gaussians" if key == "views" else f"{name}{views}"
            axis.plot([row[key] / scale for row in rows], [row["seconds"] for row in rows], "o-", label=title)
        axis.set(xlabel=label, ylabel="seconds", xlim=0, ylim=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def _choice(scenes: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots(1, len(scenes), squeeze=False)[0]
    for axis, (name, results) in zip(axes, scenes.items()):
        for prefix, label, style in _FAMILIES:
            _points(axis, [row for row in results["solvers"] if row["row"].startswith(prefix)], label, style)
        axis.set(title=name, xlabel="feature_cosine (fidelity)", ylabel="view_match (consistency)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, loc="lower left")
    return figure


def _points(axis: Axes, rows: list[dict[str, Any]], label: str, style: str) -> None:
    x, y = [row["feature_cosine"] for row in rows], [row["view_match_lifted"] for row in rows]
    axis.plot(x, y, style, label=label, markersize=4)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main(tyro.cli(Figures))
