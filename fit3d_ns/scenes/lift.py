"""Lifting in place: a model's features and decoder are replaced by lifted ones."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from fit3d_ns.features.pca import ColorBasis
from fit3d_ns.lifting.evaluation import EvaluationView
from fit3d_ns.lifting.lift import Lift, LiftScene, lift_features, passes
from fit3d_ns.lifting.operator import FeatureOperator
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.model import Fit3DSplatModel
from fit3d_ns.runs.names import FEATURES
from fit3d_ns.support.html_report import ImageLike, Report
from fit3d_ns.support.progress import progress
from fit3d_ns.support.samples import evenly_spaced


def lift_scene(model: Fit3DSplatModel, scene: LiftScene, settings: LiftSettings) -> Lift:
    """Lifts features onto a model's Gaussians, under a progress bar.

    Args:
        model: In evaluation mode; its features and decoder are overwritten.
        scene: Its views.
        settings: The user's choices.

    Returns:
        Features, decoder, and how well they fit.

    Raises:
        UserError: As ``lift_features``.
    """
    num_views = len(scene.training)
    with progress(f"Lifting {num_views} views", passes(settings) * num_views) as advance, torch.no_grad():
        lift = lift_features(
            FeatureOperator(model.geometry, model.feature_grid),
            scene,
            model.fit3d_decoder.width,
            model.config.feature_dim,
            settings,
            advance,
        )
    model.gauss_params[FEATURES].data.copy_(lift.values)
    model.fit3d_decoder.weight.data.copy_(lift.decoder.weight.data)
    return lift


PICTURED = 3
"""Views that are shown."""
_BRIGHTEST = 0.99
"""Share of the shown pixels that are darker than the brightest colour of the heat map."""
_CURVES = {"feature_cosine": "held-out cosine", "feature_l1": "held-out L1", "view_match_lifted": "match between views"}
_METRICS = {
    "feature_cosine": "cosine to the teacher, held-out views",
    "feature_l1": "L1 to the teacher, held-out views",
    "view_match_lifted": "match between views, lifted",
    "view_match_teacher": "match between views, teacher",
}


@torch.no_grad()
def lift_report(
    model: Fit3DSplatModel, scene: LiftScene, lift: Lift, teacher: str, peak_memory_mb: float | None = None
) -> Report:
    """Describes a lift.

    Args:
        model: With the lifted features, in evaluation mode.
        scene: Its views.
        lift: Features, decoder and measures, as `lift_features` returns them.
        teacher: Name of the backbone.
        peak_memory_mb: Largest memory of the GPU, if there is one.

    Returns:
        The page, not written yet.
    """
    operator = FeatureOperator(model.geometry, model.feature_grid)
    summary = f"{len(lift.values):,} Gaussians carry {lift.values.shape[1]} channels"
    report = Report(f"Features of {teacher} lifted onto a trained splat")
    report.add_text(
        f"{summary}, which hold {lift.basis_share:.1%} of the teacher's squared length; solved from "
        f"{len(scene.training)} views with {lift.refinements} refinement steps on the {model.feature_grid.name} grid."
    )
    rows = [(text, lift.metrics[name]) for name, text in _METRICS.items() if name in lift.metrics]
    if rows:
        report.add_heading("Quality")
        report.add_table(rows)
        if "view_match_lifted" in lift.metrics:
            report.add_text(
                "Match is the share of surface points that their feature finds again in another view, here between "
                f"{lift.metrics['view_match_split']} views."
            )
    report.add_heading("Views")
    _add_views(report, operator, scene, lift)
    _add_curve(report, "Quality against refinement steps", lift.curve, "refinements", "refinement steps")
    _add_curve(report, "Quality against channels", lift.dim_curve, "dim", "channels on every Gaussian")
    report.add_heading("Time")
    report.add_table([*lift.seconds.items(), ("in all", sum(lift.seconds.values()))], header=("stage", "seconds"))
    if peak_memory_mb is not None:
        report.add_text(f"At most {peak_memory_mb:,.0f} MB on the GPU.")
    return report


def _add_views(report: Report, operator: FeatureOperator, scene: LiftScene, lift: Lift) -> None:
    """Photo, teacher and lifted features in the same colours, and how far views disagree about what is seen there."""
    views, kind = (scene.held_out, "held-out view") if scene.held_out else (scene.training_surfaces, "training view")
    places = evenly_spaced(range(len(views)), PICTURED)
    shown = [views[place] for place in places]
    teachers = [item.view.load().float() for item in shown]
    lifted = [operator.decode(item.view.camera, lift.values, lift.decoder) for item in shown]
    spreads = [disagreement_map(operator, item, lift) for item in shown]
    brightest = max(float(np.quantile(np.concatenate([spread.ravel() for spread in spreads]), _BRIGHTEST)), 1e-6)
    report.add_text(
        "Teacher and lifted features share their colours (principal components). The heat map shows how far the "
        "training views' features spread about the mean of what is seen at a pixel, as a share of a feature's length: "
        f"black is none, the brightest colour {brightest:.0%}. Surfaces that no training view sees are black too."
    )
    colors = ColorBasis.fit(torch.cat([teacher.flatten(1).T for teacher in teachers]))
    for place, item, teacher, features, spread in zip(places, shown, teachers, lifted, spreads):
        pictures: list[tuple[str, ImageLike]] = [
            ("photo", item.photo()),
            ("teacher", colors.to_rgb(teacher.permute(1, 2, 0))),
            ("lifted", colors.to_rgb(features.permute(1, 2, 0))),
            ("where views disagree", mpl.colormaps["inferno"](np.clip(spread / brightest, 0, 1))[..., :3]),
        ]
        report.add_pictures(pictures, f"{kind} {place + 1} of {len(views)}".capitalize())


def disagreement_map(operator: FeatureOperator, item: EvaluationView, lift: Lift) -> np.ndarray:
    """Renders the standard deviation of what the training views say, as a share of a feature's length.

    Args:
        operator: The renderer.
        item: The view to render.
        lift: Features, decoder and measures, as `lift_features` returns them.

    Returns:
        float32 [H, W], at the grid's render size.
    """
    deviations = lift.variance.sqrt()[:, None] / max(lift.feature_energy, 1e-12) ** 0.5
    return operator.low_maps([item.view.camera], deviations)[0, 0].cpu().numpy()


def _add_curve(report: Report, title: str, points: Sequence[dict[str, Any]], axis: str, label: str) -> None:
    """Fidelity and consistency against a choice, where more than one was measured."""
    if len(points) < 2:
        return
    names = [name for name in _CURVES if any(name in point for point in points)]
    report.add_heading(title)
    report.add_table(
        [(point[axis], *(point.get(name) for name in names)) for point in points],
        header=(label, *(_CURVES[name] for name in names)),
    )
    steps = [float(point[axis]) for point in points]
    curves = {
        _CURVES[name]: (steps, [float(point.get(name, math.nan)) for point in points])
        for name in names
        if name != "feature_l1"  # of another scale
    }
    report.add_curve("Fidelity and consistency", curves, label, "")
