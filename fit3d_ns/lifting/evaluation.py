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
from fit3d_ns.metrics import choose_pairs, feature_cosine, feature_l1, view_match
from fit3d_ns.view_geometry import View

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


class LiftEvaluation:
    """Measures candidates on the same views and pairs of views.

    Args:
        operator: The renderer.
        held_out: Views that no feature was lifted from.
        training: Views that features were lifted from; compared with each other where no two held-out views share
            enough surface.
    """

    def __init__(
        self, operator: FeatureOperator, held_out: Sequence[EvaluationView], training: Sequence[EvaluationView]
    ) -> None:
        self._operator = operator
        self._held_out = held_out
        self.match_split = "held-out"
        self._matched, self._surfaces, self._pairs = self._choose(held_out)
        if not self._pairs:
            self.match_split = "training"
            self._matched, self._surfaces, self._pairs = self._choose(training)

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
        return self._match([self._decode(item.view, values, decoder) for item in self._matched] if self._pairs else [])

    def teacher_consistency(self) -> Optional[float]:
        """Returns ``view_match`` of the teacher's own maps on the same pairs."""
        return self._match([item.view.load().float() for item in self._matched] if self._pairs else [])

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

    def _match(self, maps: list[Tensor]) -> Optional[float]:
        if not self._pairs:
            return None
        match = view_match(maps, self._surfaces, self._pairs)
        return match.rate if match.num_points else None

    @staticmethod
    def _choose(
        views: Sequence[EvaluationView],
    ) -> tuple[list[EvaluationView], list[View], list[tuple[int, int]]]:
        """Evenly spaced views, what they see, and which pairs of them are worth comparing."""
        count = min(MATCH_VIEWS, len(views))
        chosen = [views[(2 * k + 1) * len(views) // (2 * count)] for k in range(count)]
        surfaces = [item.surface() for item in chosen]
        pairs = choose_pairs(surfaces, [item.view.camera.grid for item in chosen]) if surfaces else []
        return chosen, surfaces, pairs
