"""What one pass over a scene's held-out views measures."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.features.correspondences import SurfaceView
from fit3d_ns.features.metrics import MATCH_VIEWS, MatchedViews
from fit3d_ns.model import Fit3DSplatModel
from fit3d_ns.support.samples import evenly_spaced


class EvaluationPass:
    """Gathers what the features of single views measure, and of some views what it takes to compare them.

    Listens while nerfstudio goes through the held-out views (`Fit3DSplatModel.on_measured`), so that each is rendered
    once. Maps and surfaces are kept of at most `MATCH_VIEWS` evenly spaced views: memory does not grow beyond that.

    Args:
        model: Of the scene.
        num_views: Held-out views that will come, in order.
    """

    def __init__(self, model: Fit3DSplatModel, num_views: int) -> None:
        self._model = model
        self._compared = set(evenly_spaced(range(num_views), MATCH_VIEWS))
        self._num_views = 0
        self._scores: dict[str, list[float]] = {}
        self._surfaces: list[SurfaceView] = []
        self._maps: dict[str, list[Float[Tensor, "C h w"]]] = {"teacher": [], "lifted": []}

    def add(
        self,
        outputs: Mapping[str, Any],
        batch: Mapping[str, Any],
        decoded: Float[Tensor, "C h w"],
        scores: Mapping[str, float],
    ) -> None:
        """Takes what was measured on the next view.

        Args:
            outputs: Of the model: ``depth`` and ``accumulation``, [H, W, 1] each.
            batch: Of the data manager: ``camera`` and ``teacher``.
            decoded: [C, h, w] lifted features on the teacher's patch grid.
            scores: ``feature_l1`` and ``feature_cosine``; NaN for a view whose mask hides all of it.
        """
        for name, score in scores.items():
            self._scores.setdefault(name, []).append(score)
        if self._num_views in self._compared:
            self._surfaces.append(self._model.surface_view(batch["camera"], outputs))
            self._maps["teacher"].append(batch["teacher"])
            self._maps["lifted"].append(decoded)
        self._num_views += 1

    def metrics(self, with_deviations: bool) -> dict[str, float]:
        """Returns the features' metrics over all views.

        Args:
            with_deviations: Whether the standard deviations of ``feature_l1`` and ``feature_cosine`` are wanted.

        Returns:
            ``feature_l1`` and ``feature_cosine``, means of the views that have any. ``view_match_teacher`` and
            ``view_match_lifted``, shares in [0, 1] of ``view_match_points`` points (`MatchedViews`); left out where no
            two views share enough surface.
        """
        metrics: dict[str, float] = {}
        for name, scores in self._scores.items():
            measured = torch.tensor([score for score in scores if not math.isnan(score)])
            metrics[name] = float(measured.mean())
            if with_deviations:
                metrics[f"{name}_std"] = float(measured.std())
        grids = [(decoded.shape[1], decoded.shape[2]) for decoded in self._maps["lifted"]]
        matched = MatchedViews(self._surfaces, grids)
        for name, maps in self._maps.items():
            match = matched.match(maps)
            if match is not None:
                metrics[f"view_match_{name}"] = match
                metrics["view_match_points"] = matched.num_points
        return metrics
