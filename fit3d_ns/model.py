"""Splatfacto with a feature on every Gaussian and a decoder to the teacher's width."""

import logging
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.models.splatfacto import SplatfactoModel, SplatfactoModelConfig
from torch import Tensor
from torch.nn import Parameter

from fit3d_ns import compat
from fit3d_ns.backbones import BackboneInfo, patch_grid
from fit3d_ns.data.photos.reader import image_size
from fit3d_ns.features.correspondences import SURFACE_SIDE, SurfaceView
from fit3d_ns.features.decoder import FeatureDecoder
from fit3d_ns.features.grid import FEATURE_GRIDS, FeatureGrid, sample_teacher, sampling_offset
from fit3d_ns.features.metrics import feature_cosine, feature_l1
from fit3d_ns.features.pca import ColorBasis
from fit3d_ns.features.rendering import Geometry, decode_views, render_features, viewmats_of
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.runs.checkpoints import check_features
from fit3d_ns.runs.frozen_geometry import freeze_configuration, take_over_run
from fit3d_ns.runs.names import DECODER, FEATURES
from fit3d_ns.support.errors import UserError

_LOGGER = logging.getLogger(__name__)

FEATURE_INTERVALS = {"paper": 1, "fast": 4}
"""Steps between two trainings of the features. FiT3D trains them at every step; a feature needs far fewer steps than
geometry, and more of them fit single views instead of their agreement (docs/benchmarks.md)."""


ExtraOutputs = Callable[[Callable[..., Any], Cameras, Any], Any]


@dataclass
class Fit3DSplatModelConfig(SplatfactoModelConfig):
    """Configuration of the splat and of its feature field."""

    _target: type = field(default_factory=lambda: Fit3DSplatModel)
    """target class to instantiate"""
    feature_dim: int = 64
    """Channels D of the feature on every Gaussian (FiT3D: 64)."""
    feature_grid: Literal["paper", "fast"] = "fast"
    """How features are rendered for the teacher's patches: `paper` at full image size, sampled bilinearly; `fast` at 4
    pixels a patch and side, antialiased, averaged over the patch. Recorded with the scene."""
    feature_init: Literal["zeros", "random"] = "zeros"
    """Initial features: zeros (as FiT3D's code) or small random numbers (as its text)."""
    feature_interval: int | None = None
    """Train features at every n-th step only; geometry and colour at every step. Without it, 4 with the `fast` grid and
    1 with `paper`."""
    features: Literal["joint", "lift"] = "joint"
    """`joint` trains features with the geometry, as FiT3D; `lift` trains plain splatfacto and solves for the features
    when training ends, in seconds, or when the viewer's button asks for it."""
    lift: LiftSettings = field(default_factory=LiftSettings)
    """How features are solved for; only read with `features lift`."""
    init_from: Path | None = None
    """A trained splatfacto or fit3d-splat run (its folder, config.yml or checkpoint). Its geometry and colour are taken
    over and frozen; only features and decoder are trained."""


class Fit3DSplatModel(SplatfactoModel):
    """Splatfacto plus a feature field that cannot disturb it.

    The colour pass is splatfacto's own. Features are rendered in a second pass over detached geometry, so the feature
    loss reaches features and decoder only (FiT3D, section 3.1: features must not move the geometry), and densification
    sees colour gradients only. Features live in ``gauss_params``, so the strategy carries their rows along when it
    clones, splits, prunes or relocates Gaussians.
    """

    config: Fit3DSplatModelConfig
    steps_per_log: int = 1
    """Training steps between two whose metrics are logged; measuring takes a tenth of a step."""
    extra_outputs: ExtraOutputs | None = None
    """Wraps ``get_outputs_for_camera`` where somebody looks: gets its rendering function, camera and crop box."""
    on_measured: Callable[[Mapping[str, Any], Mapping[str, Any], Tensor, Mapping[str, float]], None] | None = None
    """Told of each held-out view that is measured: its outputs, its batch, its decoded map and the features' scores."""

    def populate_modules(self) -> None:
        """Builds splatfacto, then features and decoder; random numbers of the former are not disturbed.

        Raises:
            UserError: If ``feature_dim`` is out of range, or ``init_from`` names a run that cannot be read or leaves
                nothing to train.
        """
        teacher: BackboneInfo = self.kwargs["metadata"]["teacher"]
        if not 1 <= self.config.feature_dim <= teacher.width:
            raise UserError(
                f"{{feature_dim}} {self.config.feature_dim} is out of range: 1 to the {teacher.width} "
                "channels of this teacher."
            )
        if self.config.feature_interval is not None and self.config.feature_interval < 1:
            raise UserError(
                f"--pipeline.model.feature-interval {self.config.feature_interval} is out of range: at least 1, every "
                "step; leave it out for the feature grid's own."
            )
        if self.frozen and self.config.features == "lift":
            raise UserError(
                "--pipeline.model.init-from freezes geometry and --pipeline.model.features lift trains no features, so "
                "there is nothing to train: use `fit3d-lift --load-config` on that run."
            )
        if self.frozen:
            freeze_configuration(self.config)
        device = torch.device(self.kwargs.get("device", "cpu"))
        with compat.lazy_lpips(), compat.splatfacto_on(device):
            super().populate_modules()
        compat.reset_opacities(self.strategy)
        if compat.clamp_refinement_pause(self.strategy):
            _LOGGER.warning(
                f"{self.num_train_data} training views would stop densification for good; the pause after each "
                f"opacity reset is shortened to {self.strategy.pause_refine_after_reset} steps."
            )
        if self.config.init_from is not None:
            take_over_run(self.gauss_params, self.camera_optimizer, self.config.init_from)
        # A generator of its own, seeded like the run: the global sequence must be the same with and without features.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        features = torch.zeros(self.num_points, self.config.feature_dim)
        if self.config.feature_init == "random":
            features.normal_(std=0.1, generator=generator)
        self.gauss_params[FEATURES] = Parameter(features)
        self.fit3d_decoder = FeatureDecoder(self.config.feature_dim, teacher.width, generator)

    @property
    def frozen(self) -> bool:
        """Whether geometry and colour come from another run and stay as they are."""
        return self.config.init_from is not None

    @property
    def has_features(self) -> bool:
        """Whether there are features to measure: always when they are trained, once lifted otherwise."""
        return self.config.features == "joint" or bool(self.gauss_params[FEATURES].any())

    @property
    def feature_grid(self) -> FeatureGrid:
        """The rule by which features are rendered for the teacher's patches."""
        return FEATURE_GRIDS[self.config.feature_grid]

    def patch_grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width, in patches, of the teacher's map of an image.

        Args:
            height: Height of the image in pixels.
            width: Width of the image in pixels.
        """
        metadata = self.kwargs["metadata"]
        return patch_grid(height, width, metadata["teacher"].patch_size, metadata["teacher_max_size"])

    def load_state_dict(self, dict: dict[str, Tensor], **kwargs: Any) -> Any:  # type: ignore[override]
        """Loads a checkpoint into the live parameters, so that optimizers built before go on training them.

        Splatfacto replaces its parameters here, and a resumed run trains tensors that nothing reads
        (https://github.com/nerfstudio-project/nerfstudio/issues/3554).

        Raises:
            UserError: If the checkpoint has no features, or features of another dimension or width.
        """
        check_features(dict, self.config.feature_dim, self.fit3d_decoder.width)
        self.step = 30000  # as splatfacto: all spherical harmonics are active in a loaded model
        num_points = dict["gauss_params.means"].shape[0]
        for parameter in self.gauss_params.values():
            parameter.data = parameter.data.new_zeros(num_points, *parameter.shape[1:])
        if self.num_train_data == 0:  # the run's photos are gone: what it learned about each is of its number of views
            for name, parameter in self.named_parameters():
                parameter.data = parameter.data.new_zeros(dict.get(name, parameter).shape)
        # LPIPS has no weights here (compat.LazyLpips); a splatfacto checkpoint may carry them.
        state = {name: value for name, value in dict.items() if not name.startswith("lpips.")}
        return super(SplatfactoModel, self).load_state_dict(state, **kwargs)

    def get_gaussian_param_groups(self) -> dict[str, list[Parameter]]:
        """Returns splatfacto's groups and the features."""
        return {**super().get_gaussian_param_groups(), FEATURES: [self.gauss_params[FEATURES]]}

    def get_param_groups(self) -> dict[str, list[Parameter]]:
        """Returns all groups: splatfacto's, the features and the decoder."""
        return {**super().get_param_groups(), DECODER: list(self.fit3d_decoder.parameters())}

    def get_outputs(self, camera: Cameras) -> dict[str, Any]:
        """Renders colour and, while training, the decoded features.

        Args:
            camera: One camera.

        Returns:
            Splatfacto's outputs; while training also ``fit3d_decoded``, of shape [C, h, w], sampled at this step's
            points.
        """
        decoded = None
        if self.training and self._trains_features():
            # Before the colour pass, which rescales the camera and may round its size.
            decoded = self.decode_view(camera, self._sampling_offset())
        with compat.splatfacto_on(self.device):
            outputs = self._frozen_outputs(camera) if self.frozen and self.training else super().get_outputs(camera)
        if decoded is not None:
            outputs["fit3d_decoded"] = decoded
        return outputs

    def get_outputs_for_camera(self, camera: Cameras, obb_box: OrientedBox | None = None) -> Any:
        """Renders splatfacto's outputs, and what ``extra_outputs`` makes of them.

        Args:
            camera: One camera.
            obb_box: Part of the scene to render; all of it if None.
        """
        render = super().get_outputs_for_camera
        return self.extra_outputs(render, camera, obb_box) if self.extra_outputs else render(camera, obb_box)

    @property
    def geometry(self) -> Geometry:
        """The Gaussians in the units of the rasteriser, without gradients."""
        return Geometry(
            means=self.means.detach(),
            quats=self.quats.detach(),
            scales=torch.exp(self.scales.detach()),
            opacities=torch.sigmoid(self.opacities.detach()).squeeze(-1),
        )

    def render_low(
        self,
        camera: Cameras,
        values: Float[Tensor, "N D"] | None = None,
        render_size: tuple[int, int] | None = None,
        visible: Bool[Tensor, "N"] | None = None,
    ) -> tuple[Float[Tensor, "D H W"], Float[Tensor, "1 H W"]]:
        """Renders the low-dimensional features, by the feature grid's rule and over detached geometry.

        Args:
            camera: One camera, at the photo's size.
            values: [N, D] other values to render instead of the features.
            render_size: Height H and width W of the maps in pixels, instead of those of the grid's rule.
            visible: [N] which Gaussians are there; all of them if None.

        Returns:
            Blended features [D, H, W] on a zero background (not divided by accumulation, as FiT3D), and accumulation
            [1, H, W] in [0, 1].
        """
        size = image_size(camera)
        render_size = render_size or self.feature_grid.render_size(size, self.patch_grid(*size))
        shown = self.gauss_params[FEATURES] if values is None else values
        matrices = self._matrices(camera, corrected=self.training)
        low, alpha = render_features(self.geometry, shown, *matrices, size, render_size, self.feature_grid, visible)
        return low[0], alpha[0]

    def decode_view(self, camera: Cameras, offset: tuple[float, float] = (0.0, 0.0)) -> Float[Tensor, "C h w"]:
        """Renders a view's features and decodes them on the teacher's patch grid.

        Args:
            camera: One camera, at the photo's size.
            offset: Shift of the sampling points in patches (y, x).

        Returns:
            [C, h, w] on the teacher's patch grid.
        """
        size = image_size(camera)
        features, kernel = self.gauss_params[FEATURES], self.fit3d_decoder.weight
        matrices = self._matrices(camera, corrected=self.training)
        maps, _ = decode_views(
            self.geometry, features, kernel, *matrices, size, self.patch_grid(*size), self.feature_grid, offset
        )
        return maps[0]

    @torch.no_grad()
    def corrected(self, camera: Cameras) -> Cameras:
        """Returns a training view's camera where camera optimization moved it (by default it moves none).

        Args:
            camera: One training camera, with its ``cam_idx``.
        """
        moved = deepcopy(camera)
        moved.camera_to_worlds = self.camera_optimizer.apply_to_camera(camera).detach()
        # Without its number, whatever is done with it: it must not be moved twice.
        moved.metadata = {name: value for name, value in (camera.metadata or {}).items() if name != "cam_idx"}
        return moved

    @torch.no_grad()
    def view_matrices(self, camera: Cameras) -> tuple[Float[Tensor, "4 4"], Float[Tensor, "3 3"]]:
        """Returns world-to-camera (OpenCV axes) and the intrinsics in the photo's pixels.

        Args:
            camera: One camera, at the photo's size.
        """
        viewmats, intrinsics = self._matrices(camera, corrected=False)
        return viewmats[0], intrinsics[0]

    @torch.no_grad()
    def surface_view(self, camera: Cameras, outputs: Mapping[str, Any] | None = None) -> SurfaceView:
        """Returns a camera with the depth and accumulation that the splat renders for it.

        Args:
            camera: One camera, at the photo's size.
            outputs: Of ``get_outputs_for_camera`` for this camera; rendered here if None.
        """
        rendered: Any = outputs or self.get_outputs_for_camera(camera)
        depth, accumulation = rendered["depth"][..., 0], rendered["accumulation"][..., 0]  # [H, W]
        viewmat, K = self.view_matrices(camera)
        (height, width), K = image_size(camera), K.clone()
        K[0] *= depth.shape[1] / width
        K[1] *= depth.shape[0] / height
        return SurfaceView(viewmat, K, depth.shape[1], depth.shape[0], depth, accumulation).thinned(SURFACE_SIDE)

    def get_loss_dict(
        self, outputs: dict[str, Any], batch: dict[str, Any], metrics_dict: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Returns splatfacto's losses and the feature L1 (FiT3D, equation 3), which share no parameter.

        Args:
            outputs: Of ``get_outputs``.
            batch: Of ``Fit3DDataManager.next_train``.
            metrics_dict: Unused by the losses.
        """
        losses = {} if self.frozen and self.training else super().get_loss_dict(outputs, batch, metrics_dict)
        if "fit3d_decoded" in outputs:
            teacher = sample_teacher(batch["teacher"].float(), self._sampling_offset())
            decoded, weights = outputs["fit3d_decoded"], batch.get("patch_weights")
            masked_out = weights is not None and not bool(weights.any())
            losses["feature_loss"] = decoded.sum() * 0.0 if masked_out else feature_l1(decoded, teacher, weights)
        return losses

    def get_metrics_dict(self, outputs: dict[str, Any], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns splatfacto's training metrics and the features' cosine; nothing of steps that are not logged."""
        if self.training and self.step % self.steps_per_log:
            return {}
        metrics = super().get_metrics_dict(outputs, batch)
        if "fit3d_decoded" in outputs:
            with torch.no_grad():
                teacher = sample_teacher(batch["teacher"].float(), self._sampling_offset())
                metrics["feature_cosine"] = feature_cosine(
                    outputs["fit3d_decoded"], teacher, batch.get("patch_weights")
                )
        return metrics

    @torch.no_grad()
    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Any]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Measures one held-out view.

        Args:
            outputs: Of ``get_outputs_for_camera``.
            batch: Of ``Fit3DDataManager``: with ``camera`` and ``teacher``.

        Returns:
            ``psnr``, ``ssim``, ``lpips`` (where its weights can be had), ``feature_l1`` and ``feature_cosine`` (decoded
            render against the teacher's map of that view, at patch resolution); and pictures: photo beside render, and
            teacher beside lifted features in one shared colour basis.
        """
        metrics, images = super().get_image_metrics_and_images(outputs, batch)
        if not self.lpips.available:
            metrics = {name: value for name, value in metrics.items() if not name.endswith("lpips")}
        if "teacher" in batch and "camera" in batch and self.has_features:
            teacher = batch["teacher"].float()
            decoded = self.decode_view(batch["camera"])
            weights = batch.get("patch_weights")
            scores = {
                "feature_l1": float(feature_l1(decoded, teacher, weights)),
                "feature_cosine": float(feature_cosine(decoded, teacher, weights)),
            }
            if self.on_measured is not None:
                self.on_measured(outputs, batch, decoded, scores)
            metrics.update(scores)
            basis = ColorBasis.fit(teacher.flatten(1).T)
            pair = torch.cat([teacher, decoded], dim=2)
            images["features"] = basis.to_rgb(pair.permute(1, 2, 0))
        return metrics, images

    def _matrices(self, camera: Cameras, corrected: bool) -> tuple[Float[Tensor, "1 4 4"], Float[Tensor, "1 3 3"]]:
        """World-to-camera (OpenCV axes) and intrinsics in the photo's pixels, without gradients."""
        pose = self.camera_optimizer.apply_to_camera(camera) if corrected else camera.camera_to_worlds
        intrinsics = camera.get_intrinsics_matrices().to(self.device).reshape(1, 3, 3)
        return viewmats_of(pose.detach().to(self.device).reshape(1, 3, 4)), intrinsics

    def _trains_features(self) -> bool:
        if self.config.features == "lift":
            return False
        interval = self.config.feature_interval or FEATURE_INTERVALS[self.config.feature_grid]
        return self.frozen or self.step % interval == 0

    def _sampling_offset(self) -> tuple[float, float]:
        """This step's sampling points: moving for bilinear rules, fixed where whole patches are averaged."""
        return sampling_offset(self.step) if self.feature_grid.pooling == "bilinear" else (0.0, 0.0)

    def _frozen_outputs(self, camera: Cameras) -> dict[str, Any]:
        """Colour without gradients, for the logs of a run whose geometry is frozen."""
        self.training = False
        self.set_crop(None)  # that of the last picture that the viewer showed
        try:
            with torch.no_grad():
                return super().get_outputs(camera)
        finally:
            self.training = True
