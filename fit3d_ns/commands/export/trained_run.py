"""A run as exports need it: read from its checkpoint alone, so that its photos may be gone."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fit3d_ns.data.points.splat_ply import standard_gaussians, visible_rows
from fit3d_ns.features.colors import SceneColors
from fit3d_ns.runs.bundling import FinishedRun
from fit3d_ns.runs.checkpoints import find_checkpoint, read_checkpoint
from fit3d_ns.runs.config_reader import read_config
from fit3d_ns.runs.coordinates import read_coordinates
from fit3d_ns.runs.names import CONFIG, DECODER_WEIGHT, EXTRA_STATE, FEATURES, GAUSSIANS, METHOD, MODEL
from fit3d_ns.support.errors import UserError


@dataclass(frozen=True)
class TrainedRun:
    """A run of this project's method and what its newest checkpoint holds."""

    run: FinishedRun
    """Where it is."""
    config: Any
    """nerfstudio's ``TrainerConfig``."""
    state: dict[str, Any]
    """Tensors of the pipeline by name, memory-mapped."""
    gaussians: dict[str, Tensor]
    """As `fit3d_ns.data.points.splat_ply.write_splat_ply` takes them."""
    features: Float[Tensor, "N D"]
    """Lifted features."""
    decoder: Float[Tensor, "C D 3 3"]
    """Kernel of the scene's decoder."""

    @cached_property
    def visible(self) -> Bool[Tensor, "N"]:
        """The rows that are exported."""
        return visible_rows(self.gaussians)

    @cached_property
    def colors(self) -> SceneColors:
        """The colours of the scene's features."""
        return SceneColors.fit(self.features, self.gaussians["opacities"].sigmoid().squeeze(-1), self.decoder)

    @property
    def teacher(self) -> dict[str, Any] | None:
        """The teacher's identity, where the checkpoint notes it."""
        return (self.state.get(EXTRA_STATE) or {}).get("teacher_identity")

    def dataparser_transform(self) -> dict[str, Any] | None:
        """Returns what nerfstudio wrote beside the run: ``transform`` (3x4) and ``scale``; None if it is missing."""
        stored = read_coordinates(self.run.config_path.parent)
        return None if stored is None else {"transform": stored.transform.tolist(), "scale": stored.scale}

    def build_model(self, device: torch.device) -> Any:
        """Builds the run's model for rendering; no photo and no weights of the teacher are read.

        Args:
            device: Where it will render.

        Returns:
            A ``Fit3DSplatModel`` in evaluation mode.

        Raises:
            UserError: If the device or the installation cannot render, or the checkpoint does not fit its
                configuration.
        """
        from nerfstudio.data.scene_box import SceneBox

        from fit3d_ns.backbones import describe_backbone
        from fit3d_ns.rasterization import check_backend

        check_backend(device)
        settings, datamanager = self.config.pipeline.model, self.config.pipeline.datamanager
        settings.init_from, settings.random_init = None, False
        settings.camera_optimizer.mode = "off"  # corrections of training views are not rendered with
        if hasattr(settings, "use_bilateral_grid"):
            settings.use_bilateral_grid = False
        metadata = {
            "teacher": describe_backbone(datamanager.backbone_spec()),
            "teacher_max_size": datamanager.backbone_max_size,
        }
        placeholders = (torch.rand(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 3))
        model = settings.setup(
            scene_box=SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3])),
            num_train_data=1,
            metadata=metadata,
            device=str(device),
            seed_points=placeholders,
        ).to(device)
        wanted = [name for name in self.state if name.startswith((GAUSSIANS, DECODER_WEIGHT))]
        try:
            model.load_state_dict({name.removeprefix(MODEL): self.state[name] for name in wanted}, strict=False)
        except RuntimeError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{self.run.checkpoint} does not fit {self.run.config_path} ({str(error).splitlines()[-1].strip()}): "
                "restore the configuration that the run was trained with."
            ) from error
        return model.eval()


def open_run(load_config: Path) -> TrainedRun:
    """Opens a run for export; runs that were stopped early are welcome.

    Args:
        load_config: Its ``config.yml``, or its folder.

    Returns:
        The run, at its newest checkpoint.

    Raises:
        UserError: If it is no run of this project's method, has no readable checkpoint, or holds no usable features.
    """
    config = read_config(load_config)
    path = load_config.expanduser().absolute()
    path = path / CONFIG if path.is_dir() else path
    if config.method_name != METHOD:
        raise UserError(
            f"{path} is a run of {config.method_name}, not of {METHOD}, and has no features: lift some with "
            "fit3d-lift, or export it with ns-export."
        )
    checkpoint = find_checkpoint(path)
    state = read_checkpoint(checkpoint)["pipeline"]
    parameters = {name.removeprefix(GAUSSIANS): value for name, value in state.items() if name.startswith(GAUSSIANS)}
    decoder = state.get(DECODER_WEIGHT)
    try:
        gaussians = standard_gaussians(parameters, config.pipeline.model.sh_degree)  # type: ignore[attr-defined]
        features = parameters[FEATURES].detach()
    except KeyError as error:
        raise UserError(f"{checkpoint} lacks {error}: use a checkpoint of {METHOD}.") from error
    if decoder is None:
        raise UserError(f"{checkpoint} lacks the decoder: use a checkpoint of {METHOD}.")
    data = Path(config.pipeline.datamanager.data)  # type: ignore[attr-defined]
    opened = TrainedRun(FinishedRun(path, checkpoint, data), config, state, gaussians, features, decoder)
    if not bool(opened.visible.any()):
        raise UserError(f"{checkpoint} has no visible Gaussian: train it again.")
    if not bool(features.any()) or not bool(decoder.any()):
        raise UserError(f"The features in {checkpoint} are all zero, nothing was lifted yet: run fit3d-lift on it.")
    if not bool(torch.isfinite(features[opened.visible]).all()) or not bool(torch.isfinite(decoder).all()):
        raise UserError(f"The features in {checkpoint} hold NaN or infinite values: train or lift it again.")
    return opened
