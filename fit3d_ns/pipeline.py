"""nerfstudio's pipeline with a checkpoint that resumes exactly, and consistency between views as a metric."""

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.viewer.viewer_elements import ViewerButton

from fit3d_ns.backbones import check_timm
from fit3d_ns.compat import resume_adds_steps
from fit3d_ns.data.dataparsers import without_seed_points
from fit3d_ns.data.dataparsers.base import SEED_REMARK
from fit3d_ns.data.splits import HOLD_OUT
from fit3d_ns.datamanager import Fit3DDataManager
from fit3d_ns.model import Fit3DSplatModel
from fit3d_ns.rasterization import check_backend
from fit3d_ns.runs.checkpoints import find_checkpoint, run_folder
from fit3d_ns.runs.coordinates import Coordinates, read_coordinates
from fit3d_ns.runs.names import COORDINATES
from fit3d_ns.scenes.evaluation import EvaluationPass
from fit3d_ns.scenes.teacher_views import TeacherViews
from fit3d_ns.support.console import show_log
from fit3d_ns.support.errors import UserError
from fit3d_ns.viewer.controls import FeatureControls
from fit3d_ns.viewer.feature_view import FeatureView
from fit3d_ns.viewer.outputs import look

_LOGGER = logging.getLogger(__name__)


def _last_line(error: Exception) -> str:
    """What torch says of tensors that do not fit stands at the end of many lines."""
    return next(reversed(str(error).strip().splitlines()), type(error).__name__).strip()


@dataclass
class Fit3DPipelineConfig(VanillaPipelineConfig):
    """Configuration of data and model together."""

    _target: type = field(default_factory=lambda: Fit3DPipeline)
    """target class to instantiate"""


class Fit3DPipeline(VanillaPipeline):
    """Photos, teacher and feature splat of one scene.

    Args:
        config: The user's choices.
        device: Name of the device, ``cpu``, ``cuda`` or ``cuda:N``.
        world_size: Processes that train together.
        **kwargs: nerfstudio's: ``test_mode``, ``local_rank``, ``grad_scaler``.

    Raises:
        UserError: If the installation, the device or the scene cannot be used, or features cannot be lifted as asked.
    """

    datamanager: Fit3DDataManager

    def __init__(self, config: Fit3DPipelineConfig, device: str, world_size: int = 1, **kwargs: Any):
        show_log()
        check_timm()
        check_backend(torch.device(device))
        if kwargs.get("test_mode", "val") != "val":
            # Not training: the checkpoint holds all geometry, and the run it once came from may be gone.
            config.model.init_from = None  # type: ignore[attr-defined]
        self._build(config, device=device, world_size=world_size, **kwargs)
        model = self.fit3d_model
        if model.frozen:
            self._check_same_coordinates(model.config.init_from)
        self._resumed_state: dict[str, Any] | None = None
        self._trains = False
        self._lift_asked_for = False
        self._write_record: Callable[[], None] | None = None
        self.feature_view = FeatureView(model, TeacherViews(self.datamanager, model))
        model.extra_outputs = partial(look, self.feature_view)
        self.features = FeatureControls(self.feature_view)
        if model.config.features == "lift":
            if kwargs.get("test_mode", "val") == "val":
                self._check_lift()
            self.lift_button = ViewerButton(name="Lift features", cb_hook=self.features.reporting(self.ask_for_lift))

    def _build(self, config: Fit3DPipelineConfig, **kwargs: Any) -> None:
        """Builds data manager and model; where a trained run's photos are gone, without them.

        Raises:
            UserError: If photos are needed, or something else is wrong.
        """
        if kwargs.get("test_mode", "val") == "val":
            if config.model.init_from is not None:  # type: ignore[attr-defined]
                without_seed_points(config.datamanager.dataparser)  # type: ignore[attr-defined]
            super().__init__(config, **kwargs)
            return self._say_that_nothing_is_held_out()
        try:
            super().__init__(config, **kwargs)
        except UserError as error:
            from fit3d_ns.scenes.absent import without_photos

            config.datamanager = without_photos(config.datamanager, str(error))  # type: ignore[arg-type]
            super().__init__(config, **kwargs)
            # Printed only now: what has nothing to do with photos was raised again.
            _LOGGER.warning(f"{error} Opened without photos and teacher.")

    def _say_that_nothing_is_held_out(self) -> None:
        from fit3d_ns.scenes.views import held_out_flags

        if not any(held_out_flags(self.datamanager)):
            _LOGGER.warning(
                "No view of the scene is held out, so that nothing can be measured on views that were not trained on: "
                f"{HOLD_OUT}."
            )

    @property
    def fit3d_model(self) -> Fit3DSplatModel:
        """The model, with its type."""
        assert isinstance(self._model, Fit3DSplatModel)
        return self._model

    def load_pipeline(self, loaded_state: dict[str, Any], step: int) -> None:
        """Loads a checkpoint; pictures of the features take their colours from it.

        Args:
            loaded_state: Tensors and the extra state by name.
            step: Of the checkpoint.
        """
        try:
            super().load_pipeline(loaded_state, step)
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"The checkpoint does not fit the run's configuration and scene ({_last_line(error)}): use another "
                "checkpoint of that run, or restore its config.yml."
            ) from error
        self.feature_view.refresh()

    def get_extra_state(self) -> dict[str, Any]:
        """Returns what nerfstudio's checkpoints lack for an exact resume, and what the features were lifted with.

        Tensors and plain values only, so that torch's restricted loader reads it.
        """
        if self.datamanager.absent is not None and self._resumed_state is not None:
            return self._resumed_state  # without photos nothing was trained since it was loaded
        numpy_kind, numpy_keys, *numpy_rest = np.random.get_state()
        python_kind, python_values, python_gauss = random.getstate()
        return {
            "teacher": self._teacher_flags(),
            "teacher_identity": self.datamanager.teacher_identity(),
            "teacher_precision": self.datamanager.teacher_precision(),
            "photos": self._photos(),
            "feature_grid": self.fit3d_model.feature_grid.to_dict(),
            "strategy": dict(self.fit3d_model.strategy_state),
            "sampler": self.datamanager.sampler_state(),
            "random": {
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
                "numpy": [numpy_kind, np.asarray(numpy_keys).tolist(), *numpy_rest],
                "python": [python_kind, list(python_values), python_gauss],
            },
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Keeps the state until training starts, since building viewer and loaders draws random numbers.

        Raises:
            UserError: If the checkpoint was trained with another teacher or feature grid.
        """
        asked = {**self._teacher_flags(), "feature_grid": self.fit3d_model.feature_grid.to_dict()["name"]}
        trained = {**state["teacher"], "feature_grid": state["feature_grid"]["name"]}
        differing = [name for name in asked if asked[name] != trained.get(name)]
        if differing:
            changes = ", ".join(f"{name} {trained.get(name)} (now {asked[name]})" for name in differing)
            raise UserError(f"The checkpoint was trained with {changes}: use the same flags, or start a new run.")
        self._resumed_state = state
        assert self.feature_view.teacher is not None
        identity, precision = state.get("teacher_identity"), state.get("teacher_precision")
        self.feature_view.teacher.identity, self.feature_view.teacher.precision = identity, precision
        if self.test_mode != "val" and self.datamanager.absent is None:
            self.datamanager.measure_against(identity, precision)

    def check_resumes(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Checks, before it is loaded, that a checkpoint was trained on these views and with these weights.

        Args:
            checkpoint: Its path.
            state: Of ``get_extra_state``; what an older checkpoint lacks is not compared.

        Raises:
            UserError: If coordinates, training views or the teacher's weights are others.
        """
        self._check_same_coordinates(checkpoint)
        photos, trained = self._photos(), state.get("photos")
        if trained is not None and trained != photos:
            raise UserError(
                f"The checkpoint {checkpoint} was trained on {len(trained)} photos, which are not the {len(photos)} "
                "that this scene gives for training: use the same --data and the same dataparser flags, or start a new "
                "run."
            )
        identity = state.get("teacher_identity")
        if identity is None or state.get("teacher") != self._teacher_flags():
            return  # flags that differ are named when the state is loaded
        weights = self.datamanager.open_feature_cache().identity["weights_sha256"]
        if weights != identity["weights_sha256"]:
            raise UserError(
                f"The checkpoint {checkpoint} was trained with other weights of {identity['name']} (SHA-256 "
                f"{identity['weights_sha256'][:12]}, now {weights[:12]}): name the same "
                "--pipeline.datamanager.backbone-weights, or start a new run."
            )

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """Returns nerfstudio's callbacks, preceded by the one that restores a resumed run's state.

        With ``features lift``, the last one solves for the features when the last step is done, or when asked for.
        """
        model = self.fit3d_model
        if not model.frozen and (model.seed_points is None or model.config.random_init):
            reason = self.datamanager.train_dataparser_outputs.metadata.get(SEED_REMARK)
            _LOGGER.warning(
                f"No seed points{f' ({reason})' if reason else ''}: {model.num_points} Gaussians start at random "
                "positions. A point cloud (COLMAP, or ply_file_path in transforms.json) trains better."
            )
        restore = TrainingCallback([TrainingCallbackLocation.BEFORE_TRAIN_ITERATION], lambda step: self._restore())
        callbacks = [restore, *super().get_training_callbacks(training_callback_attributes)]
        trainer = training_callback_attributes.trainer
        if trainer is not None:
            model.steps_per_log = max(trainer.config.logging.steps_per_log, 1)
        if model.config.features == "lift":
            self._trains = True
            callbacks.append(
                TrainingCallback(
                    [TrainingCallbackLocation.AFTER_TRAIN_ITERATION], lambda step: self._lift_when_due(step, trainer)
                )
            )
            # After the last checkpoint, which holds the features that the record vouches for.
            record = TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN], lambda step: self._leave_record())
            callbacks.insert(-1, record)
        return callbacks

    def ask_for_lift(self) -> str:
        """Solves for the features now, or after the current step where training is under way.

        Returns:
            A sentence that says which.
        """
        if self._trains:
            self._lift_asked_for = True
            return "Features are lifted after the current step."
        self._lift()
        return "Features are lifted."

    @torch.no_grad()
    def get_average_eval_image_metrics(
        self, step: int | None = None, output_path: Path | None = None, get_std: bool = False
    ) -> dict[str, float]:
        """Averages the per-view metrics and adds those of the features over all views (see `EvaluationPass`)."""
        model = self.fit3d_model
        features = EvaluationPass(model, len(self.datamanager.eval_dataset))
        model.on_measured = features.add
        try:
            metrics = super().get_average_eval_image_metrics(step, output_path, get_std)
        finally:
            model.on_measured = None
        return {**metrics, **features.metrics(get_std)}

    def _lift_when_due(self, step: int, trainer: Any) -> None:
        """Lifts after the last step, and earlier where the viewer asks."""
        from nerfstudio.engine.trainer import Trainer

        first = trainer._start_step if resume_adds_steps(Trainer) else 0
        last = step + 1 >= first + trainer.config.max_num_iterations
        if last or self._lift_asked_for:
            self._lift_asked_for, self._trains = False, not last
            self._lift(trainer.base_dir if last else None)

    def _lift(self, folder: Path | None = None) -> None:
        from fit3d_ns.runs.record import write_lifted, write_record
        from fit3d_ns.scenes.lift import lift_report, lift_scene
        from fit3d_ns.scenes.views import scene_to_lift

        settings, was_training = self.fit3d_model.config.lift, self.training
        self.eval()
        scene = scene_to_lift(self.datamanager, self.fit3d_model)
        lift = lift_scene(self.fit3d_model, scene, settings)
        self.feature_view.refresh()
        self.feature_view.take_disagreement(lift.variance, lift.coverage)
        if folder is not None:
            report = lift_report(self.fit3d_model, scene, lift, self.datamanager.teacher_info.name)
            write_lifted(folder, lift)
            self._write_record = partial(write_record, folder, lift, settings, report)
        self.train(was_training)

    def _leave_record(self) -> None:
        if self._write_record is not None:
            self._write_record()
        self._write_record = None

    def _check_lift(self) -> None:
        """Refuses before training what the lift after the last step would refuse."""
        from fit3d_ns.scenes.views import held_out_flags

        config, training = self.fit3d_model.config, len(self.datamanager.train_dataset)
        width = self.fit3d_model.fit3d_decoder.width
        config.lift.check(config.feature_dim, width, training, sum(held_out_flags(self.datamanager)))

    def _restore(self) -> None:
        """Puts a resumed run's random, sampler and strategy states in place, once."""
        state, self._resumed_state = self._resumed_state, None
        if state is None:
            return
        model = self.fit3d_model
        model.strategy_state.update(
            {
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in state["strategy"].items()
            }
        )
        self.datamanager.load_sampler_state(state["sampler"])
        try:
            self._restore_random_state(state["random"])
        except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
            raise UserError(
                f"The state of the random generators in the checkpoint is damaged ({_last_line(error)}): use another "
                "checkpoint of that run."
            ) from error

    @staticmethod
    def _restore_random_state(generators: dict[str, Any]) -> None:
        torch.set_rng_state(generators["torch"])
        if len(generators["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(generators["cuda"])
        numpy_kind, numpy_keys, *numpy_rest = generators["numpy"]
        np.random.set_state((numpy_kind, np.asarray(numpy_keys, dtype=np.uint32), *numpy_rest))
        python_kind, python_values, python_gauss = generators["python"]
        random.setstate((python_kind, tuple(python_values), python_gauss))

    def _teacher_flags(self) -> dict[str, Any]:
        """The flags that decide what the teacher's maps contain."""
        config = self.datamanager.config
        return {
            "backbone": config.backbone,
            "backbone_layer": config.backbone_layer,
            "backbone_norm": config.backbone_norm,
            "backbone_normalization": config.backbone_normalization,
            "backbone_max_size": config.backbone_max_size,
        }

    def _photos(self) -> list[str]:
        """Names of the training photos, without folders: a scene may move."""
        if self.datamanager.absent is not None:
            return []
        return [Path(path).name for path in self.datamanager.train_dataset.image_filenames]

    def _check_same_coordinates(self, run: Path | None) -> None:
        """Refuses geometry whose world differs from this scene's, since views would not fit it."""
        assert run is not None
        folder = run_folder(find_checkpoint(run))
        stored = read_coordinates(folder)
        if stored is not None and not stored.agrees_with(Coordinates.of(self.datamanager.train_dataparser_outputs)):
            raise UserError(
                f"The run {run} was trained in other coordinates than this scene gives (its {COORDINATES} differs): "
                "use the same --data and the same dataparser flags as that run."
            )
