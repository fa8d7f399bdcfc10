"""State of what is looked at: what pictures share from frame to frame, and what buttons and sliders change."""

import threading
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fit3d_ns import compat
from fit3d_ns.features.colors import SceneColors
from fit3d_ns.features.pca import ColorBasis
from fit3d_ns.model import Fit3DSplatModel
from fit3d_ns.runs.names import FEATURES
from fit3d_ns.scenes.teacher_views import TeacherViews
from fit3d_ns.support.errors import UserError
from fit3d_ns.viewer.clusters import fit_clusters, sample_gaussians, visible_weights
from fit3d_ns.viewer.disagreement import Disagreement, view_disagreement
from fit3d_ns.viewer.feature_space import FeatureSpace
from fit3d_ns.viewer.selection import GaussianSelection, similarity

NO_FEATURES = "There are no features yet: they come with the first training steps, or when they are lifted."


class FeatureView:
    """What is looked at, and how.

    What pictures share from frame to frame (basis, clusters, disagreement of views) is made when it is first needed and
    kept: colours mean the same from every side. A render can be interrupted at any line, so every value is
    built first and assigned once.

    Args:
        model: What is looked at.
        teacher: The teacher's maps of training views; None where a model has no scene.

    Attributes:
        background: [3] what the model puts behind its renders where no browser looks.
        query: Feature of the clicked point, [C]; None before a click.
        threshold: Cosine from which a Gaussian is similar to the query, in [0, 1].
        num_clusters: k of the k-means, at least 2.
        segment: Whether browsers see the similar Gaussians alone.
        viewer: nerfstudio's viewer; None while there is none.
    """

    def __init__(self, model: Fit3DSplatModel, teacher: TeacherViews | None = None) -> None:
        self.model = model
        self.teacher = teacher
        self.background = model.background_color
        self.query: Float[Tensor, "C"] | None = None
        self.threshold = 0.6
        self.num_clusters = 8
        self.segment = False
        self.viewer: Any = None
        self._renders_for_browser: type[threading.Thread] | None = None
        self._basis: ColorBasis | None = None
        self._centres: tuple[int, Float[Tensor, "k C"]] | None = None
        self._disagreement: Disagreement | None = None

    @property
    def features(self) -> Float[Tensor, "N D"]:
        """The features on the Gaussians, without gradients."""
        return self.model.gauss_params[FEATURES].detach()

    def space(self) -> FeatureSpace:
        """Returns the space in which features are compared now."""
        return FeatureSpace.of(self.model.fit3d_decoder)

    def colors(self) -> SceneColors:
        """Returns the colours of the scene, of which the basis is fixed at the first call, until `refresh`.

        Raises:
            UserError: If there are no features.
        """
        decoder = self.model.fit3d_decoder.weight
        if self._basis is None:
            self._weights()  # says so where there are none
            opacities = self.model.opacities.sigmoid().squeeze(-1)
            self._basis = SceneColors.fit(self.features, opacities, decoder).basis
        return SceneColors.of(self._basis, decoder)

    def centres(self) -> Float[Tensor, "k C"]:
        """Returns the centres of the clusters, fixed at the first call with a k, until `refresh`.

        Raises:
            UserError: If there are no features.
        """
        count = self.num_clusters
        if self._centres is None or self._centres[0] != count:
            weights, space = self._weights(), self.space()
            rows = sample_gaussians(weights)
            centres = fit_clusters(space.coordinates(self.features[rows]), weights[rows], count)
            self._centres = (count, space.decode(centres))
        return self._centres[1]

    def disagreement(self) -> Disagreement:
        """Returns how much views disagree about each Gaussian.

        Raises:
            UserError: If that was neither computed nor stored with the run, or Gaussians came and went since.
        """
        if self._disagreement is None or len(self._disagreement.values) != len(self.features):
            if self.in_browser():
                raise UserError(
                    "How far views disagree is not known yet for these Gaussians: press `Compute view variance`, which "
                    "goes through all training views once."
                )
            self.compute_disagreement()
        assert self._disagreement is not None
        return self._disagreement

    def compute_disagreement(self) -> None:
        """Measures how much views disagree about each Gaussian, from the teacher's maps in the cache.

        Raises:
            UserError: If the scene, or maps of it, are gone.
        """
        if self.teacher is None:
            raise UserError("This model has no scene, so how far its views disagree is not known.")
        self._disagreement = view_disagreement(self.model, self.teacher.lift_views())

    def take_disagreement(self, variance: Float[Tensor, "N"], coverage: Float[Tensor, "N"]) -> None:
        """Takes what lifting measured; left aside if it belongs to other Gaussians.

        Args:
            variance: How much views disagree about each Gaussian, squared feature units.
            coverage: Its contribution to all training views, in patches.
        """
        if len(variance) == len(self.features):
            self._disagreement = Disagreement.of(variance.to(self.model.device), coverage.to(self.model.device))

    def refresh(self) -> None:
        """Lets go of basis and clusters: the next picture fixes them anew."""
        self._basis, self._centres = None, None

    def similar(self) -> Bool[Tensor, "N"]:
        """Returns the Gaussians at least as similar to the query as the threshold.

        Raises:
            UserError: If nothing was clicked yet.
        """
        if self.query is None:
            raise UserError("Nothing was clicked yet: press `Click to query`, then click on the scene.")
        space = self.space()
        return similarity(space.coordinates(self.features), self.query, space) >= self.threshold

    def visible(self, box: Any) -> Any:
        """Returns what a camera shows: a crop box, and in a browser the segment, if one is shown alone.

        Args:
            box: A crop box, or None.
        """
        if not (self.segment and self.query is not None and self.in_browser()):
            return box
        return GaussianSelection(self.similar(), box)

    def prepare(self) -> None:
        """Imports and compiles what pictures take, before the first render: one may be ended at any line."""
        from nerfstudio.viewer.render_state_machine import RenderStateMachine
        from nerfstudio.viewer_legacy.server import viewer_utils  # noqa: F401 - `LazyOutputs` asks for its exception

        self._renders_for_browser = RenderStateMachine
        fit_clusters(torch.eye(3), torch.ones(3), 2)  # scikit-learn imports more when it is first used
        compat.compile_splatfacto(self.model.device)

    def in_browser(self) -> bool:
        """Returns whether this thread renders for a browser."""
        return self._renders_for_browser is not None and isinstance(
            threading.current_thread(), self._renders_for_browser
        )

    def _weights(self) -> Float[Tensor, "N"]:
        model = self.model
        weights = visible_weights(model.opacities, model.scales, self.features)
        if not bool(weights.any()):
            raise UserError(NO_FEATURES)
        return weights
