"""Teacher maps in, features and decoder out: the steps of lifting one scene, in order."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.features.decoder import FeatureDecoder
from fit3d_ns.features.pca import FeatureCovariance, PCABasis
from fit3d_ns.lifting.decoder_fit import centre_tap, fit_decoder
from fit3d_ns.lifting.evaluation import EvaluationView, LiftEvaluation, MatchedSplit, choose_matched
from fit3d_ns.lifting.operator import FeatureOperator
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.lifting.solver import SEEN, Advance, LiftSolver, LiftView, fill_unseen
from fit3d_ns.support.errors import UserError

PATIENCE = 2
"""A selection stops after this many steps in a row without a better number."""
_METRICS = {"fidelity": "feature_cosine", "consistency": "view_match_lifted"}


@dataclass(frozen=True)
class LiftScene:
    """The views of a scene.

    Attributes:
        training: Views that features are lifted from.
        held_out: Views to measure on that are not among them; may be empty.
        training_surfaces: The training views as views to measure on.
    """

    training: Sequence[LiftView]
    held_out: Sequence[EvaluationView]
    training_surfaces: Sequence[EvaluationView]

    @functools.cached_property
    def matched(self) -> MatchedSplit:
        """Views whose maps are compared with each other; chosen when first asked for."""
        return choose_matched(self.held_out, self.training_surfaces)


@dataclass
class Lift:
    """Lifted features.

    Attributes:
        values: [N, D] features, one row per Gaussian.
        decoder: Brings rendered features to the teacher's width.
        coverage: [N] total contribution of each Gaussian to the training views, in patches.
        variance: [N] how much the training views disagree about it, in squared feature units.
        refinements: Steps taken.
        metrics: Fidelity and consistency of the outcome, and ``view_match_teacher``.
        curve: The same after each number of steps, where a selection measured them.
        dim_curve: The same for several numbers of channels, always with the basis as the decoder.
        feature_energy: Mean squared length of the teacher's features.
        basis_share: Share of it that the D directions hold.
        seconds: Time of each stage.
    """

    values: Float[Tensor, "N D"]
    decoder: FeatureDecoder
    coverage: Float[Tensor, "N"]
    variance: Float[Tensor, "N"]
    refinements: int
    metrics: dict[str, Any]
    curve: list[dict[str, Any]]
    dim_curve: list[dict[str, Any]]
    feature_energy: float
    basis_share: float
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def disagreement(self) -> float:
        """Mean variance of the seen Gaussians as a share of the features' mean squared length."""
        seen = self.coverage > SEEN
        return float(self.variance[seen].mean()) / max(self.feature_energy, 1e-12)

    @property
    def num_unseen(self) -> int:
        """Gaussians that no training view sees."""
        return int((self.coverage <= SEEN).sum())

    def summary(self, settings: LiftSettings) -> dict[str, Any]:
        """Returns what is worth writing beside the features, as plain JSON values.

        Args:
            settings: With which was lifted.
        """
        return {
            "settings": asdict(settings),
            "refinements": self.refinements,
            "gaussians": len(self.values),
            "unseen_gaussians": self.num_unseen,
            "basis_share": self.basis_share,
            "disagreement": self.disagreement,
            "metrics": self.metrics,
            "curve": self.curve,
            "dim_curve": self.dim_curve,
            "seconds": self.seconds,
        }


def passes(settings: LiftSettings) -> int:
    """Returns how often all training views are gone through at most: basis, aggregation, steps, decoder.

    Args:
        settings: The user's choices.
    """
    return 2 + settings.robust + settings.most_steps + (settings.decoder == "fit")


def lift_features(
    operator: FeatureOperator,
    scene: LiftScene,
    width: int,
    dim: int,
    settings: LiftSettings,
    advance: Advance = lambda count: None,
) -> Lift:
    """Lifts the teacher's features onto the Gaussians.

    Args:
        operator: The renderer.
        scene: Its views.
        width: Channels C of the teacher.
        dim: Channels D on every Gaussian, at most C.
        settings: The user's choices.
        advance: Called with the number of views done, ``passes(settings)`` times the number of views in all at most.

    Returns:
        Features, decoder, and how well they fit.

    Raises:
        UserError: If a setting is out of range, a selection is asked for without held-out views, or no Gaussian is
            seen by any view.
    """
    clock = _Clock(operator.geometry.means.device)
    settings.check(dim, width, len(scene.training), len(scene.held_out))
    limit = settings.most_steps
    with clock("basis"):
        basis = teacher_basis(scene.training, width, dim, operator.geometry.means.device, advance)
    decoder = FeatureDecoder(dim, width).to(operator.geometry.means.device)
    decoder.weight.data = centre_tap(basis)
    solver = LiftSolver(operator, project(scene.training, basis), dim, settings.views_per_batch, advance)
    with clock("aggregation"):
        aggregate = solver.aggregate()
    if not bool(aggregate.seen.any()):
        raise UserError("No training view sees any Gaussian: the geometry and the cameras do not belong together.")
    with clock("refinement"):
        values = aggregate.values
        coverage = aggregate.coverage
        for _ in range(settings.robust):
            values, coverage = solver.reweight(values, basis.total_variance**0.5, from_zero=True)
    evaluation: LiftEvaluation | None = None
    if settings.evaluate or settings.select != "fixed":
        with clock("evaluation"):
            evaluation = LiftEvaluation(operator, scene.held_out, scene.matched)

    def step(values: Tensor) -> Tensor:
        with clock("refinement"):
            if settings.robust:
                return solver.reweight(values, basis.total_variance**0.5, from_zero=False)[0]
            return solver.refine(values, coverage)

    curve: list[dict[str, Any]] = []
    if settings.select == "fixed":
        steps = limit
        for _ in range(limit):
            values = step(values)
    else:
        assert evaluation is not None
        measure, metric = evaluation.measure, _METRICS[settings.select]

        def measured(values: Tensor) -> dict[str, Any]:
            with clock("evaluation"):
                return measure(values, decoder)

        values, steps, curve = select_steps(values, limit, step, measured, metric)
    if settings.unseen == "nearest":
        with clock("unseen"):
            values = fill_unseen(values, operator.geometry.means, aggregate.seen)
    dim_curve: list[dict[str, Any]] = []
    if settings.evaluate and evaluation is not None:
        with clock("evaluation"):
            dim_curve = _compare_dims(operator, scene, width, evaluation, settings, steps, values, decoder)
    if settings.decoder == "fit":
        with clock("decoder"):
            decoder.weight.data = fit_decoder(
                operator, scene.training, values, decoder.weight.data, settings.decoder_ridge, advance
            )
    metrics: dict[str, Any] = {}
    if evaluation is not None:
        with clock("evaluation"):
            # With the basis as the decoder, the outcome is a point of the curve.
            points = [point for point in dim_curve if point["dim"] == dim and settings.decoder == "pca"]
            measured_last = points[0] if points else evaluation.measure(values, decoder)
            metrics = {name: value for name, value in measured_last.items() if name != "dim"}
            metrics["view_match_split"] = scene.matched.split
            teacher = evaluation.teacher_consistency()
            if teacher is not None:
                metrics["view_match_teacher"] = teacher
    return Lift(
        values=values,
        decoder=decoder,
        coverage=aggregate.coverage,
        variance=aggregate.variance,
        refinements=steps,
        metrics=metrics,
        curve=curve,
        dim_curve=dim_curve,
        feature_energy=basis.total_variance,
        basis_share=basis.explained_fraction,
        seconds=clock.seconds,
    )


def _compare_dims(
    operator: FeatureOperator,
    scene: LiftScene,
    width: int,
    evaluation: LiftEvaluation,
    settings: LiftSettings,
    steps: int,
    values: Float[Tensor, "N D"],
    decoder: FeatureDecoder,
) -> list[dict[str, Any]]:
    """Measures several numbers of channels; those beyond D are lifted once more, together."""
    dims = settings.compared_dims(values.shape[1])
    narrow = [dim for dim in dims if dim <= values.shape[1]]
    wide = [dim for dim in dims if dim > values.shape[1]]
    curve = evaluation.by_dimension(values, decoder.weight.data[:, :, 1, 1], narrow)
    if wide:
        plain = replace(settings, select="fixed", refinements=steps, decoder="pca", evaluate=False)
        lift = lift_features(operator, scene, width, wide[-1], plain)
        curve += evaluation.by_dimension(lift.values, lift.decoder.weight.data[:, :, 1, 1], wide)
    return curve


def teacher_basis(
    views: Sequence[LiftView], width: int, dim: int, device: torch.device, advance: Advance = lambda count: None
) -> PCABasis:
    """Returns the D directions that hold most of the teacher's patch features, in one streaming pass.

    Uncentred, since the decoder has no bias.

    Args:
        views: Training views with the teacher's own maps.
        width: Channels C of the teacher.
        dim: Directions wanted.
        device: Where the sums live.
        advance: Called with the number of views done.

    Raises:
        UserError: If the features are not finite, or all masked out.
    """
    covariance = FeatureCovariance(width, device)
    for view in views:
        weights = None if view.weights is None else view.weights.flatten()
        covariance.add(view.load().flatten(1).T, weights)
        advance(1)
    return covariance.basis(dim, centred=False)


def project(views: Sequence[LiftView], basis: PCABasis) -> list[LiftView]:
    """Returns the views with their maps in the coordinates of a basis, computed whenever a map is read.

    Args:
        views: With maps of C channels.
        basis: From C to D channels.
    """

    def projected(view: LiftView) -> Callable[[], Float[Tensor, "D h w"]]:
        return lambda: torch.einsum("dc,chw->dhw", basis.components, view.load().to(basis.components))

    return [replace(view, load=projected(view)) for view in views]


def select_steps(
    values: Float[Tensor, "N D"],
    limit: int,
    step: Callable[[Tensor], Tensor],
    measure: Callable[[Tensor], dict[str, Any]],
    metric: str,
) -> tuple[Float[Tensor, "N D"], int, list[dict[str, Any]]]:
    """Refines until held-out views say stop.

    Args:
        values: [N, D] before the first step.
        limit: Most steps.
        step: One refinement step.
        measure: Measures values; larger is better.
        metric: Which of its numbers decides.

    Returns:
        The best values, the steps that they took, and all measurements.

    Raises:
        UserError: If the number cannot be measured in this scene.
    """
    curve = [{"refinements": 0, **measure(values)}]
    if metric not in curve[0]:
        raise UserError(
            f"{metric} cannot be measured in this scene (too few views share a surface): use --select fixed."
        )
    best, best_steps = values, 0
    for count in range(1, limit + 1):
        values = step(values)
        curve.append({"refinements": count, **measure(values)})
        if curve[count][metric] > curve[best_steps][metric]:
            best, best_steps = values, count
        elif count - best_steps >= PATIENCE:
            break
    return best, best_steps, curve


class _Clock:
    """Seconds by stage, on the device's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
