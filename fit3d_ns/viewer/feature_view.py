"""What is looked at: which pictures a model's outputs hold, and what they share from frame to frame."""

import threading
from collections import UserDict
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from fit3d_ns.features.colors import SceneColors
from fit3d_ns.features.pca import ColorBasis
from fit3d_ns.model import FEATURES, Fit3DSplatModel
from fit3d_ns.scenes.teacher_views import TeacherViews
from fit3d_ns.support.errors import UserError
from fit3d_ns.viewer.clusters import fit_clusters, sample_gaussians, visible_weights
from fit3d_ns.viewer.disagreement import Disagreement, view_disagreement
from fit3d_ns.viewer.feature_space import FeatureSpace
from fit3d_ns.viewer.outputs import PICTURES, Frame
from fit3d_ns.viewer.pictures import lettering
from fit3d_ns.viewer.selection import GaussianSelection, similarity

NO_FEATURES = "There are no features yet: they come with the first training steps, or when they are lifted."


class Outputs(UserDict):
    """Outputs of a model, some of them computed when they are read."""

    def __init__(self, ready: dict[str, Tensor], later: dict[str, Callable[[], Tensor]]) -> None:
        """Takes outputs.

        Args:
            ready: Outputs by name.
            later: What computes the others, by name.
        """
        super().__init__({**ready, **later})

    def __getitem__(self, name: str) -> Tensor:
        value: Any = super().__getitem__(name)
        if not isinstance(value, Tensor):
            self.data[name] = value = value()
        return value


class FeatureView:
    """State of what is looked at, and the pictures made of it.

    nerfstudio's viewer renders in one thread per browser and takes one picture of a frame, or two when its screen is
    split; every other reader of a model's outputs picks by name. So in such a thread the chosen pictures are computed
    at once, while nerfstudio holds the lock that keeps training away, and elsewhere each when it is read.

    What pictures share from frame to frame (basis, clusters, disagreement of views) is made when it is first needed and
    kept: colours mean the same from every side. A render can be interrupted at any line, so every value is
    built first and assigned once.

    Attributes:
        model: What is looked at.
        query: Feature of the clicked point, [C]; None before a click.
        threshold: Cosine from which a Gaussian is similar to the query.
        num_clusters: k of the k-means.
        segment: Whether browsers see the similar Gaussians alone.
        teacher: The teacher's maps of training views; None where a model has no scene.
        viewer: nerfstudio's viewer; None while there is none.
    """

    def __init__(self, model: Fit3DSplatModel) -> None:
        self.model = model
        self.query: Float[Tensor, "C"] | None = None
        self.threshold = 0.6
        self.num_clusters = 8
        self.segment = False
        self.teacher: TeacherViews | None = None
        self.viewer: Any = None
        self._basis: ColorBasis | None = None
        self._centres: tuple[int, Float[Tensor, "k C"]] | None = None
        self._disagreement: Disagreement | None = None
        self._reported: set[str] = set()

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
            if self._rendering_thread():
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
        if not (self.segment and self.query is not None and self._rendering_thread()):
            return box
        return GaussianSelection(self.similar(), box)

    def extend(self, outputs: dict[str, Tensor], camera: Cameras, visible: Any) -> Any:
        """Adds the pictures to splatfacto's outputs.

        Args:
            outputs: Of splatfacto; ``background`` is brought to the picture's size.
            camera: Of these outputs.
            visible: Crop box or selection that they were rendered with.

        Returns:
            By name, splatfacto's outputs and `PICTURES`: [H, W, 3] each, finite, in [0, 1], of the size of ``rgb``.
            Those that nobody looks at are grey in a browser's thread, and computed when read elsewhere.
        """
        rgb = outputs["rgb"]
        outputs["background"] = outputs["background"].expand_as(rgb)
        frame = Frame(self, self.model, camera, rgb, outputs["background"], outputs["accumulation"], visible)
        if not self._rendering_thread():
            return Outputs(outputs, {name: self._drawing(name, frame) for name in PICTURES})
        panel = self.viewer.control_panel
        shown = {panel.output_render, panel.split_output_render if panel.split else None}
        grey = rgb.new_full((1, 1, 3), 0.5).expand_as(rgb)
        return {**outputs, **{name: self._draw_safely(name, frame) if name in shown else grey for name in PICTURES}}

    def _drawing(self, name: str, frame: Frame) -> Callable[[], Float[Tensor, "H W 3"]]:
        return lambda: self._draw(name, frame)

    @torch.no_grad()
    def _draw(self, name: str, frame: Frame) -> Float[Tensor, "H W 3"]:
        """Draws a picture; where it cannot be, the picture says why."""
        try:
            return frame.background if frame.nothing_visible() else PICTURES[name](frame)
        except UserError as error:
            return lettering(f"{name}: {error}", frame.rgb)

    def _draw_safely(self, name: str, frame: Frame) -> Float[Tensor, "H W 3"]:
        """Draws a picture in a browser's thread, which nerfstudio never starts again once an exception ended it."""
        from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException

        try:
            return self._draw(name, frame)
        except IOChangeException:  # nerfstudio's own: a newer camera makes this picture superfluous
            raise
        except Exception as error:
            sentence = f"{name} cannot be drawn ({type(error).__name__}: {error})."
            if sentence not in self._reported:
                self._reported.add(sentence)
                CONSOLE.print_exception()
            return lettering(sentence, frame.rgb)

    def _rendering_thread(self) -> bool:
        """Whether this thread renders for a browser."""
        if self.viewer is None:
            return False
        from nerfstudio.viewer.render_state_machine import RenderStateMachine

        return isinstance(threading.current_thread(), RenderStateMachine)

    def _weights(self) -> Float[Tensor, "N"]:
        model = self.model
        weights = visible_weights(model.opacities, model.scales, self.features)
        if not bool(weights.any()):
            raise UserError(NO_FEATURES)
        return weights
