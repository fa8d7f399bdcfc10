"""Splatfacto with a feature on every Gaussian and a decoder to the teacher's width."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import OrientedBox
from nerfstudio.models import splatfacto
from nerfstudio.models.splatfacto import SplatfactoModel, SplatfactoModelConfig
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor
from torch.nn import Parameter

from fit3d_ns import compat
from fit3d_ns.backbones import BackboneInfo, patch_grid
from fit3d_ns.features.correspondences import View
from fit3d_ns.features.decoder import FeatureDecoder
from fit3d_ns.features.grid import FEATURE_GRIDS, FeatureGrid, sample_teacher, sampling_offset
from fit3d_ns.features.metrics import feature_cosine, feature_l1
from fit3d_ns.features.pca import ColorBasis
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.rasterization import rasterize
from fit3d_ns.runs.frozen_geometry import freeze_configuration, take_over_run
from fit3d_ns.support.errors import UserError

FEATURES = "fit3d_features"
"""Key of the per-Gaussian features in ``gauss_params``, in checkpoints and among the optimizers."""
DECODER = "fit3d_decoder"
"""Name of the decoder in the model, in checkpoints and among the optimizers."""

FEATURE_INTERVALS = {"paper": 1, "fast": 4}
"""Steps between two trainings of the features. FiT3D trains them at every step; a feature needs far fewer steps than
geometry, and more of them fit single views instead of their agreement (docs/benchmarks.md)."""


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


def image_size(camera: Cameras) -> tuple[int, int]:
    """Returns a camera's height and width in pixels.

    The data manager notes them in the metadata; asking a camera on a GPU would wait for all work queued there.
    """
    noted = (camera.metadata or {}).get("image_size")
    return noted or (int(camera.height.item()), int(camera.width.item()))


class Fit3DSplatModel(SplatfactoModel):
    """Splatfacto plus a feature field that cannot disturb it.

    The colour pass is splatfacto's own. Features are rendered in a second pass over detached geometry, so the feature
    loss reaches features and decoder only (FiT3D, section 3.1: features must not move the geometry), and densification
    sees colour gradients only. Features live in ``gauss_params``, so the strategy carries their rows along when it
    clones, splits, prunes or relocates Gaussians.
    """

    config: Fit3DSplatModelConfig

    def populate_modules(self) -> None:
        """Builds splatfacto, then features and decoder; random numbers of the former are not disturbed.

        Raises:
            UserError: If ``feature_dim`` is out of range, or ``init_from`` names a run that cannot be read or leaves
                nothing to train.
        """
        teacher: BackboneInfo = self.kwargs["metadata"]["teacher"]
        if not 1 <= self.config.feature_dim <= teacher.width:
            raise UserError(
                f"--pipeline.model.feature-dim {self.config.feature_dim} is out of range: 1 to the {teacher.width} "
                "channels of this teacher."
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
        if compat.clamp_refinement_pause(self.strategy):
            CONSOLE.print(
                f"[yellow]{self.num_train_data} training views would stop densification for good; the pause after each "
                f"opacity reset is shortened to {self.strategy.pause_refine_after_reset} steps.[/yellow]"
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
        from fit3d_ns.viewer.feature_view import FeatureView

        self.feature_view = FeatureView(self)

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
        self._check_feature_shapes(dict)
        self.step = 30000  # as splatfacto: all spherical harmonics are active in a loaded model
        num_points = dict["gauss_params.means"].shape[0]
        for parameter in self.gauss_params.values():
            parameter.data = parameter.data.new_zeros(num_points, *parameter.shape[1:])
        if self.num_train_data == 0:  # the run's photos are gone: what it learned about each is of its number of views
            for name, parameter in self.named_parameters():
                parameter.data = parameter.data.new_zeros(dict.get(name, parameter).shape)
        self.feature_view.refresh()
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
        """Renders splatfacto's outputs and the pictures of `fit3d_ns.viewer`, each computed only if it is looked at.

        Args:
            camera: One camera.
            obb_box: Part of the scene to render; all of it if None.
        """
        visible = self.feature_view.visible(obb_box)
        return self.feature_view.extend(super().get_outputs_for_camera(camera, visible), camera, visible)  # type: ignore[arg-type]

    def render_low(
        self,
        camera: Cameras,
        values: Float[Tensor, "N D"] | None = None,
        render_size: tuple[int, int] | None = None,
    ) -> tuple[Float[Tensor, "D H W"], Float[Tensor, "1 H W"]]:
        """Renders the low-dimensional features, by the feature grid's rule and over detached geometry.

        Args:
            camera: One camera, at the photo's size.
            values: Other values to render instead of the features.
            render_size: Height and width of the maps, instead of those of the grid's rule.

        Returns:
            Blended features on a zero background (not divided by accumulation, as FiT3D), and accumulation in [0, 1].
        """
        size = image_size(camera)
        render_size = render_size or self.feature_grid.render_size(size, self.patch_grid(*size))
        colors = self.gauss_params[FEATURES] if values is None else values
        viewmats, intrinsics = self._view_matrices(camera, render_size, optimized=self.training)
        rows = slice(None)
        if self.crop_box is not None and not self.training:
            rows = self.crop_box.within(self.means).reshape(-1)
        features, alpha, _ = rasterize(
            means=self.means.detach()[rows],
            quats=self.quats.detach()[rows],
            scales=torch.exp(self.scales.detach()[rows]),
            opacities=torch.sigmoid(self.opacities.detach()[rows]).squeeze(-1),
            colors=colors[rows],
            viewmats=viewmats,
            Ks=intrinsics,
            width=render_size[1],
            height=render_size[0],
            packed=False,
            tile_size=self.feature_grid.tile_size,
            rasterize_mode=self.feature_grid.rasterize_mode,
        )
        return features[0].permute(2, 0, 1), alpha[0].permute(2, 0, 1)

    def decode_view(self, camera: Cameras, offset: tuple[float, float] = (0.0, 0.0)) -> Float[Tensor, "C h w"]:
        """Renders a view's features and decodes them on the teacher's patch grid.

        Args:
            camera: One camera, at the photo's size.
            offset: Shift of the sampling points in patches (y, x).
        """
        grid = self.patch_grid(*image_size(camera))
        low, _ = self.render_low(camera)
        return self.fit3d_decoder.decode_patches(low, self.feature_grid, grid, offset)

    @torch.no_grad()
    def view_matrices(
        self, camera: Cameras, optimized: bool = False
    ) -> tuple[Float[Tensor, "4 4"], Float[Tensor, "3 3"]]:
        """Returns world-to-camera (OpenCV axes) and the intrinsics in the photo's pixels.

        Args:
            camera: One camera, at the photo's size.
            optimized: Whether what camera optimization learned about this training view is applied.
        """
        viewmats, intrinsics = self._view_matrices(camera, image_size(camera), optimized)
        return viewmats[0], intrinsics[0]

    @torch.no_grad()
    def surface_view(self, camera: Cameras) -> View:
        """Returns a camera with the depth and accumulation that the splat renders for it.

        Args:
            camera: One camera, at the photo's size.
        """
        outputs = self.get_outputs_for_camera(camera)
        depth = outputs["depth"][..., 0]
        viewmats, intrinsics = self._view_matrices(camera, (depth.shape[0], depth.shape[1]), optimized=False)
        return View(
            viewmat=viewmats[0],
            K=intrinsics[0],
            width=depth.shape[1],
            height=depth.shape[0],
            depth=depth,
            accumulation=outputs["accumulation"][..., 0],
        )

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
        """Returns splatfacto's training metrics and the cosine between decoded and teacher features."""
        metrics = super().get_metrics_dict(outputs, batch)
        if "fit3d_decoded" in outputs and self.step % 10 == 0:  # nerfstudio logs every tenth step
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
            metrics["feature_l1"] = float(feature_l1(decoded, teacher, weights))
            metrics["feature_cosine"] = float(feature_cosine(decoded, teacher, weights))
            basis = ColorBasis.fit(teacher.flatten(1).T)
            pair = torch.cat([teacher, decoded], dim=2)
            images["features"] = basis.to_rgb(pair.permute(1, 2, 0))
        return metrics, images

    def _view_matrices(
        self, camera: Cameras, render_size: tuple[int, int], optimized: bool
    ) -> tuple[Float[Tensor, "1 4 4"], Float[Tensor, "1 3 3"]]:
        """World-to-camera (OpenCV axes) and intrinsics of a camera rendered at another size, without gradients."""
        pose = self.camera_optimizer.apply_to_camera(camera) if optimized else camera.camera_to_worlds
        intrinsics = camera.get_intrinsics_matrices().to(self.device).reshape(1, 3, 3).clone()
        height, width = image_size(camera)
        intrinsics[:, 0] *= render_size[1] / width
        intrinsics[:, 1] *= render_size[0] / height
        with compat.splatfacto_on(self.device):
            viewmats = splatfacto.get_viewmat(pose.detach().to(self.device).reshape(1, 3, 4))
        return viewmats, intrinsics

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
        try:
            with torch.no_grad():
                return super().get_outputs(camera)
        finally:
            self.training = True

    def _check_feature_shapes(self, state: dict[str, Tensor]) -> None:
        features, weight = state.get(f"gauss_params.{FEATURES}"), state.get(f"{DECODER}.weight")
        if features is None or weight is None:
            raise UserError(
                "The checkpoint holds no lifted features (a plain splatfacto run?): to add features to it, train with "
                "--pipeline.model.init-from instead of --load-dir."
            )
        if features.shape[1] != self.config.feature_dim:
            raise UserError(
                f"The checkpoint's features have {features.shape[1]} dimensions, but --pipeline.model.feature-dim is "
                f"{self.config.feature_dim}: use the same value."
            )
        if weight.shape[0] != self.fit3d_decoder.width:
            raise UserError(
                f"The checkpoint was trained with a teacher of {weight.shape[0]} channels, but "
                f"--pipeline.datamanager.backbone has {self.fit3d_decoder.width}: use the same teacher."
            )
