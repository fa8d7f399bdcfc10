"""Fidelity and consistency of lifted features, the two numbers between which refinement trades."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fit3d_ns.features.correspondences import Correspondences, View, correspondences
from fit3d_ns.features.decoder import FeatureDecoder
from fit3d_ns.features.metrics import choose_pairs, feature_cosine, feature_l1, match_rate
from fit3d_ns.lifting.operator import FeatureOperator
from fit3d_ns.lifting.solver import LiftView

MATCH_VIEWS = 40
"""Most views whose maps are compared with each other; bounds memory."""


@dataclass(frozen=True)
class EvaluationView:
    """A view to measure on.

    Attributes:
        view: Its camera and the teacher's map of it.
        surface: Renders the surface that it sees.
        photo: Returns its photo, [H, W, 3], as 8-bit RGB.
    """

    view: LiftView
    surface: Callable[[], View]
    photo: Callable[[], UInt8[Tensor, "H W 3"]]


class MatchedViews:
    """Views that share surface, and which of their patches show the same points.

    Held-out views where enough of them share surface, training views otherwise. Chosen once for a scene: it renders
    depth maps and compares views by pairs, and depends on no features.

    Args:
        held_out: Views that no feature was lifted from.
        training: Views that features were lifted from.
    """

    def __init__(self, held_out: Sequence[EvaluationView], training: Sequence[EvaluationView]) -> None:
        self.split = "held-out"
        self.views, self._points = self._choose(held_out)
        if not self._points:
            self.split = "training"
            self.views, self._points = self._choose(training)

    def match(self, maps: Sequence[Float[Tensor, "C h w"]]) -> float | None:
        """Returns ``view_match`` of one map for each of ``views``, in [0, 1]; None where there is nothing to match."""
        counts = [match_rate(maps[a], maps[b], points) for a, b, points in self._points]
        total = sum(count for _, count in counts)
        return sum(hits for hits, _ in counts) / total if total else None

    @staticmethod
    def _choose(
        views: Sequence[EvaluationView],
    ) -> tuple[list[EvaluationView], list[tuple[int, int, Correspondences]]]:
        """Evenly spaced views, and the points of every pair that is worth comparing; no views where there is none."""
        count = min(MATCH_VIEWS, len(views))
        chosen = [views[(2 * k + 1) * len(views) // (2 * count)] for k in range(count)]
        grids = [item.view.camera.grid for item in chosen]
        surfaces = [item.surface() for item in chosen]
        points = [
            (first, second, correspondences(surfaces[first], surfaces[second], grids[first], grids[second]))
            for pair in (choose_pairs(surfaces, grids) if surfaces else [])
            for first, second in (pair, pair[::-1])
        ]
        return (chosen, points) if points else ([], [])


class LiftEvaluation:
    """Measures candidates on the same views and pairs of views.

    Args:
        operator: The renderer.
        held_out: Views that no feature was lifted from.
        matched: Views whose maps are compared with each other.
    """

    def __init__(self, operator: FeatureOperator, held_out: Sequence[EvaluationView], matched: MatchedViews) -> None:
        self._operator = operator
        self._held_out = held_out
        self._matched = matched

    def fidelity(self, values: Float[Tensor, "N D"], decoder: FeatureDecoder) -> dict[str, float]:
        """Returns ``feature_cosine`` and ``feature_l1`` to the teacher, averaged over the held-out views."""
        scores = _Fidelity()
        for item in self._held_out:
            scores.add(decode_view(self._operator, item.view, values, decoder), item.view)
        return scores.mean()

    def consistency(self, values: Float[Tensor, "N D"], decoder: FeatureDecoder) -> float | None:
        """Returns ``view_match`` of the decoded maps, in [0, 1]; None where no two views share enough surface."""
        return self._matched.match(
            [decode_view(self._operator, item.view, values, decoder) for item in self._matched.views]
        )

    def teacher_consistency(self) -> float | None:
        """Returns ``view_match`` of the teacher's own maps on the same pairs."""
        return self._matched.match([item.view.load().float() for item in self._matched.views])

    def measure(self, values: Float[Tensor, "N D"], decoder: FeatureDecoder) -> dict[str, float]:
        """Returns fidelity and consistency under the names that ``ns-eval`` uses."""
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
            match = self._matched.match([_expand(low, basis, dim) for low in lows])
            measured.append(numbers if match is None else {**numbers, "view_match_lifted": match})
        return measured

    def _patches(self, view: LiftView, values: Float[Tensor, "N D"]) -> Float[Tensor, "D h w"]:
        """What the centre tap of a decoder reads."""
        low = self._operator.low_maps([view.camera], values)[0]
        return self._operator.feature_grid.windows(low, view.camera.grid)[:, 4].clone()


@torch.no_grad()
def decode_view(
    operator: FeatureOperator, view: LiftView, values: Float[Tensor, "N D"], decoder: FeatureDecoder
) -> Float[Tensor, "C h w"]:
    """Returns a view's lifted features on the teacher's patch grid, as evaluation and distillation read them."""
    low = operator.low_maps([view.camera], values)[0]
    return decoder.decode_patches(low, operator.feature_grid, view.camera.grid)


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
