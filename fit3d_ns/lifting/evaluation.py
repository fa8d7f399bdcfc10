"""Fidelity and consistency of lifted features, the two numbers between which refinement trades."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.decoder import FeatureDecoder
from fit3d_ns.lifting.operator import FeatureOperator
from fit3d_ns.lifting.solver import LiftView
from fit3d_ns.metrics import choose_pairs, feature_cosine, feature_l1, match_rate
from fit3d_ns.view_geometry import Correspondences, View, correspondences

MATCH_VIEWS = 40
"""Most views whose maps are compared with each other; bounds memory."""


@dataclass(frozen=True)
class EvaluationView:
    """A view to measure on.

    Attributes:
        view: Its camera and the teacher's map of it.
        surface: Renders the surface that it sees.
    """

    view: LiftView
    surface: Callable[[], View]


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

    def match(self, maps: Sequence[Float[Tensor, "C h w"]]) -> Optional[float]:
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
        scores = []
        for held_out in self._held_out:
            view, decoded, teacher = held_out.view, self._decode(held_out.view, values, decoder), held_out.view.load()
            scores.append(
                (
                    float(feature_cosine(decoded, teacher, view.weights)),
                    float(feature_l1(decoded, teacher, view.weights)),
                )
            )
        known = [score for score in scores if not math.isnan(score[0])]
        if not known:
            return {}
        cosine, l1 = torch.tensor(known, dtype=torch.float64).mean(0).tolist()
        return {"feature_cosine": cosine, "feature_l1": l1}

    def consistency(self, values: Float[Tensor, "N D"], decoder: FeatureDecoder) -> Optional[float]:
        """Returns ``view_match`` of the decoded maps, in [0, 1]; None where no two views share enough surface."""
        return self._matched.match([self._decode(item.view, values, decoder) for item in self._matched.views])

    def teacher_consistency(self) -> Optional[float]:
        """Returns ``view_match`` of the teacher's own maps on the same pairs."""
        return self._matched.match([item.view.load().float() for item in self._matched.views])

    def measure(self, values: Float[Tensor, "N D"], decoder: FeatureDecoder) -> dict[str, float]:
        """Returns fidelity and consistency under the names that ``ns-eval`` uses."""
        measured = self.fidelity(values, decoder)
        match = self.consistency(values, decoder)
        if match is not None:
            measured["view_match_lifted"] = match
        return measured

    def _decode(self, view: LiftView, values: Float[Tensor, "N D"], decoder: FeatureDecoder) -> Float[Tensor, "C h w"]:
        with torch.no_grad():
            low = self._operator.low_maps([view.camera], values)[0]
            return decoder.decode_patches(low, self._operator.feature_grid, view.camera.grid)
