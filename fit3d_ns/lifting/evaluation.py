"""Fidelity and consistency of lifted features, the two numbers between which refinement trades."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fit3d_ns.features.correspondences import SurfaceView
from fit3d_ns.features.decoder import FeatureDecoder
from fit3d_ns.features.metrics import MATCH_VIEWS, MatchedViews, feature_cosine, feature_l1
from fit3d_ns.lifting.operator import FeatureOperator
from fit3d_ns.lifting.solver import LiftView
from fit3d_ns.support.samples import evenly_spaced


@dataclass(frozen=True)
class EvaluationView:
    """A view to measure on.

    Attributes:
        view: Its camera and the teacher's map of it.
        surface: Renders the surface that it sees.
        photo: Returns its photo, [H, W, 3], as 8-bit RGB.
    """

    view: LiftView
    surface: Callable[[], SurfaceView]
    photo: Callable[[], UInt8[Tensor, "H W 3"]]


@dataclass(frozen=True)
class MatchedSplit:
    """Views whose maps are compared with each other.

    Attributes:
        split: ``held-out`` or ``training``, for people.
        views: The views; none where no two share enough surface.
        points: Which of their patches show the same points.
    """

    split: Literal["held-out", "training"]
    views: list[EvaluationView]
    points: MatchedViews


def choose_matched(held_out: Sequence[EvaluationView], training: Sequence[EvaluationView]) -> MatchedSplit:
    """Chooses the views to compare: held-out ones where enough of them share surface, training views otherwise.

    Once for a scene: it renders depth maps and compares views by pairs, and depends on no features.

    Args:
        held_out: Views that no feature was lifted from.
        training: Views that features were lifted from.

    Returns:
        The chosen views and what they see of each other; without points where no split's views share surface.
    """
    splits: tuple[tuple[Literal["held-out", "training"], Sequence[EvaluationView]], ...]
    splits = (("held-out", held_out), ("training", training))
    for split, views in splits:
        chosen = evenly_spaced(views, MATCH_VIEWS)
        points = MatchedViews([item.surface() for item in chosen], [item.view.camera.grid for item in chosen])
        if points.num_points:
            return MatchedSplit(split, chosen, points)
    return MatchedSplit("training", [], MatchedViews([], []))


class LiftEvaluation:
    """Measures candidates on the same views and pairs of views.

    Args:
        operator: The renderer.
        held_out: Views that no feature was lifted from.
        matched: Views whose maps are compared with each other.
    """

    def __init__(self, operator: FeatureOperator, held_out: Sequence[EvaluationView], matched: MatchedSplit) -> None:
        self._operator = operator
        self._held_out = held_out
        self._matched = matched

    def fidelity(self, values: Float[Tensor, "N D"], decoder: FeatureDecoder) -> dict[str, float]:
        """Returns ``feature_cosine`` and ``feature_l1`` to the teacher, averaged over the held-out views.

        Args:
            values: [N, D] features of all Gaussians.
            decoder: From D to the teacher's C channels.
        """
        scores = _Fidelity()
        for item in self._held_out:
            scores.add(self._operator.decode(item.view.camera, values, decoder), item.view)
        return scores.mean()

    def consistency(self, values: Float[Tensor, "N D"], decoder: FeatureDecoder) -> float | None:
        """Returns ``view_match`` of the decoded maps, in [0, 1]; None where no two views share enough surface.

        Args:
            values: [N, D] features of all Gaussians.
            decoder: From D to the teacher's C channels.
        """
        return self._matched.points.match(
            [self._operator.decode(item.view.camera, values, decoder) for item in self._matched.views]
        )

    def teacher_consistency(self) -> float | None:
        """Returns ``view_match`` of the teacher's own maps on the same pairs."""
        return self._matched.points.match([item.view.load().float() for item in self._matched.views])

    def measure(self, values: Float[Tensor, "N D"], decoder: FeatureDecoder) -> dict[str, float]:
        """Returns fidelity and consistency under the names that ``ns-eval`` uses.

        Args:
            values: [N, D] features of all Gaussians.
            decoder: From D to the teacher's C channels.
        """
        measured = self.fidelity(values, decoder)
        match = self.consistency(values, decoder)
        if match is not None:
            measured["view_match_lifted"] = match
        return measured

    def by_dimension(
        self, values: Float[Tensor, "N D"], basis: Float[Tensor, "C D"], dims: Sequence[int]
    ) -> list[dict[str, float]]:
        """Measures what would have been lifted with fewer channels, with one render of every view for all of them.

        Lifting commutes with the projection onto a basis, and so does rendering: with fewer channels, features would
        be the first ones of these. With robust weights, which depend on the residuals in all channels, only about so.

        Args:
            values: [N, D] lifted features.
            basis: [C, D] directions that bring them back to the teacher's width, ordered by what they hold.
            dims: Numbers of channels, at most D.

        Returns:
            For each of them, ``dim`` and the numbers of `measure`.
        """
        scores = {dim: _Fidelity() for dim in dims}
        for item in self._held_out:
            low = self._patches(item.view, values)
            for dim in dims:
                scores[dim].add(_expand(low, basis, dim), item.view)
        lows = [self._patches(item.view, values) for item in self._matched.views]
        measured = []
        for dim in dims:
            numbers = {"dim": dim, **scores[dim].mean()}
            match = self._matched.points.match([_expand(low, basis, dim) for low in lows])
            measured.append(numbers if match is None else {**numbers, "view_match_lifted": match})
        return measured

    def _patches(self, view: LiftView, values: Float[Tensor, "N D"]) -> Float[Tensor, "D h w"]:
        """What the centre tap of a decoder reads."""
        low = self._operator.low_maps([view.camera], values)[0]
        return self._operator.feature_grid.windows(low, view.camera.grid)[:, 4].clone()


class _Fidelity:
    """Averages over views; views that are masked out altogether do not count."""

    def __init__(self) -> None:
        self._scores: list[tuple[float, float]] = []

    def add(self, decoded: Float[Tensor, "C h w"], view: LiftView) -> None:
        teacher = view.load()
        cosine = float(feature_cosine(decoded, teacher, view.weights))
        if not math.isnan(cosine):
            self._scores.append((cosine, float(feature_l1(decoded, teacher, view.weights))))

    def mean(self) -> dict[str, float]:
        if not self._scores:
            return {}
        cosine, l1 = torch.tensor(self._scores, dtype=torch.float64).mean(0).tolist()
        return {"feature_cosine": cosine, "feature_l1": l1}


def _expand(low: Float[Tensor, "D h w"], basis: Float[Tensor, "C D"], dim: int) -> Float[Tensor, "C h w"]:
    return torch.einsum("cd,dhw->chw", basis[:, :dim], low[:dim])
