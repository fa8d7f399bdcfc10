"""nerfstudio's trainer, made to survive being killed and to go on where it stopped."""

import logging
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils.rich_utils import CONSOLE

from fit3d_ns.compat import resume_adds_steps
from fit3d_ns.runs.checkpoints import find_checkpoint, read_checkpoint, run_folder
from fit3d_ns.runs.config_reader import read_config
from fit3d_ns.runs.names import CONFIG, EXTRA_STATE, RECORD
from fit3d_ns.runs.training_state import check_optimizers
from fit3d_ns.support.errors import DamagedFile, UserError, first_line
from fit3d_ns.support.files import atomic_write_text, explain_unwritable, sync_to_disk
from fit3d_ns.support.output_folders import hold_folder
from fit3d_ns.support.threads import one_thread_for_small

_LOGGER = logging.getLogger(__name__)


def check_same_configuration(config: Any) -> None:
    """Compares the flags that decide what a checkpoint holds with those of the run that it belongs to.

    Other flags (the number of steps, logging, the viewer, learning rates) may change.

    Args:
        config: nerfstudio's ``TrainerConfig`` of ``ns-train fit3d-splat``, before it overwrites the earlier one.

    Raises:
        UserError: If there is no checkpoint, or naming the flags that differ and their values.
    """
    wanted = config.load_dir or config.load_checkpoint
    if wanted is None:
        return
    path = run_folder(find_checkpoint(wanted, config.load_step)) / CONFIG
    if not path.is_file():
        return
    try:
        trained = read_config(path)
    except UserError as error:  # such as the dataparser of another package
        _LOGGER.warning("%s Whether the flags agree cannot be checked.", error)
        return
    if not isinstance(trained.pipeline.model, type(config.pipeline.model)):
        return  # the model says what can be done with a run of plain splatfacto
    before, now = _flags(trained.pipeline.model), _flags(config.pipeline.model)
    # What fit3d-lift writes trains neither way.
    free = {"features"} if before["features"] == "joint" and _is_lifted(path.parent) else set()
    differing = [name for name in now if name not in free and before[name] != now[name]]
    if differing:
        changes = ", ".join(f"--pipeline.model.{name} {before[name]} (now {now[name]})" for name in differing)
        raise UserError(f"The run {path.parent} was trained with {changes}: use the same flags, or start a new run.")


def _check_one_gpu(machine: Any) -> None:
    if machine.num_devices * machine.num_machines > 1:
        raise UserError(
            "One scene trains on one GPU: drop --machine.num-devices and run one ns-train per scene and GPU "
            "(CUDA_VISIBLE_DEVICES=0 ns-train fit3d-splat ..., CUDA_VISIBLE_DEVICES=1 ...)."
        )


def _flags(model: Any) -> dict[str, Any]:
    """The flags of the model that decide which parameters there are and how they are trained."""
    return {
        "camera-optimizer.mode": model.camera_optimizer.mode,
        "sh-degree": model.sh_degree,
        "use-bilateral-grid": model.use_bilateral_grid,
        "grid-shape": tuple(model.grid_shape),
        "strategy": getattr(model, "strategy", "default"),
        "features": model.features,
        # Which run it was does not matter: the checkpoint holds its geometry, and it may have moved.
        "init-from": "not given" if model.init_from is None else "given",
    }


def _is_lifted(run: Path) -> bool:

    return (run / RECORD).is_file()


@dataclass
class Fit3DTrainerConfig(TrainerConfig):
    """Configuration of ``ns-train fit3d-splat``."""

    _target: type = field(default_factory=lambda: Fit3DTrainer)
    """target class to instantiate"""

    def save_config(self) -> None:
        """Writes ``config.yml`` with absolute paths, so that the run can be opened from any working directory.

        Of a run that goes on from a checkpoint it is written once that is loaded: what fails before changes nothing.
        nerfstudio stores them as typed (https://github.com/nerfstudio-project/nerfstudio/issues/1829), in a file that
        a full disk leaves empty.

        Raises:
            UserError: If the folder cannot be written to, several GPUs are asked for, or a run is resumed that was
                trained with other flags.
        """
        # Here, since nerfstudio starts a process for each GPU next, and their errors arrive as tracebacks.
        _check_one_gpu(self.machine)
        check_same_configuration(self)
        self._make_paths_absolute()
        if self.load_dir is None and self.load_checkpoint is None:
            self.write(yaml.dump(self))

    def write(self, text: str) -> None:
        """Writes ``config.yml``.

        Args:
            text: The configuration as YAML.

        Raises:
            UserError: If the folder cannot be written to.
        """
        path = self.get_base_dir() / CONFIG
        CONSOLE.log(f"Saving config to: {path}")
        atomic_write_text(path, text)

    def _make_paths_absolute(self) -> None:
        datamanager: Any = self.pipeline.datamanager
        paths = [
            (self, "output_dir"),
            (self, "data"),
            (datamanager, "data"),
            (datamanager, "backbone_weights"),
            (datamanager, "feature_cache_dir"),
            (datamanager.dataparser, "data"),
            (self.pipeline.model, "init_from"),
        ]
        for holder, name in paths:
            path = getattr(holder, name)
            if path is not None and path != Path():  # an empty path means that none was given
                setattr(holder, name, path.expanduser().absolute())


class Fit3DTrainer(Trainer):
    """Trainer with atomic checkpoints and a resume that ends at ``max_num_iterations``."""

    config: Fit3DTrainerConfig
    """The user's choices."""

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """Builds everything; the run's folder is this process's from now on.

        Args:
            test_mode: See nerfstudio.

        Raises:
            UserError: If another process trains in the folder, or the run cannot be trained as asked.
        """
        hold_folder(self.base_dir, "--timestamp")
        try:
            super().setup(test_mode)
        except UserError:
            self._take_back()
            raise

    def train(self) -> None:
        """Trains the model; on a CPU with the threads that its photos are worth."""
        cameras = self.pipeline.datamanager.train_dataset.cameras  # type: ignore[union-attr]
        with ExitStack() as stack:
            if self.pipeline.device.type == "cpu":
                stack.enter_context(one_thread_for_small(int((cameras.width * cameras.height).max())))
            super().train()

    def _take_back(self) -> None:
        """Removes the configuration of a run that is refused, where nothing was trained in its folder."""
        if [entry.name for entry in self.base_dir.iterdir()] != [CONFIG]:
            return
        (self.base_dir / CONFIG).unlink()
        for folder in (self.base_dir, *self.base_dir.parents):
            if folder == self.config.output_dir or any(folder.iterdir()):
                break
            folder.rmdir()

    def _load_checkpoint(self) -> None:
        """Loads the checkpoint asked for by ``--load-dir`` or ``--load-checkpoint``.

        Raises:
            UserError: If there is none, it is damaged, it was trained on another scene or with another teacher, or
                it already holds ``max_num_iterations`` steps.
        """
        wanted = self.config.load_dir or self.config.load_checkpoint
        as_given = "" if wanted is None else yaml.dump(self.config)
        if wanted is not None:
            checkpoint = find_checkpoint(wanted, self.config.load_step)
            state = read_checkpoint(checkpoint)  # a damaged file is said in one sentence
            try:
                check_optimizers(state)
            except DamagedFile as error:
                raise UserError(
                    f"The checkpoint {checkpoint} cannot be gone on with ({error}): use another checkpoint of that run."
                ) from error
            self.pipeline.check_resumes(checkpoint, state["pipeline"].get(EXTRA_STATE) or {})  # type: ignore[operator]
            self.config.load_dir, self.config.load_checkpoint = None, checkpoint
        try:
            super()._load_checkpoint()
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            if wanted is None or isinstance(error, UserError):
                raise
            raise UserError(
                f"The checkpoint {self.config.load_checkpoint} does not fit ({first_line(error)}): use another "
                "checkpoint of that run."
            ) from error
        if wanted is None:
            return
        if self._start_step >= self.config.max_num_iterations:
            raise UserError(
                f"{self.config.load_checkpoint} already holds {self._start_step} steps: "
                "raise --max-num-iterations above that to train on."
            )
        self.config.write(as_given)
        if resume_adds_steps(Trainer):
            self.config.max_num_iterations -= self._start_step

    def save_checkpoint(self, step: int) -> None:
        """Writes a checkpoint under a temporary name first, so that a kill never leaves a torn one.

        Args:
            step: Number of the last finished step.

        Raises:
            UserError: If the disk is full or the run's folder cannot be written to.
        """
        folder = self.checkpoint_dir
        with explain_unwritable(folder / f"step-{step:09d}.ckpt"):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".checkpoint-", suffix=".tmp") as temporary:
                self.checkpoint_dir = Path(temporary)
                try:
                    super().save_checkpoint(step)
                finally:
                    self.checkpoint_dir = folder
                for written in Path(temporary).glob("*.ckpt"):
                    sync_to_disk(written)
                    os.replace(written, folder / written.name)
                sync_to_disk(folder)
        if self.config.save_only_latest_checkpoint:
            for old in folder.glob("*.ckpt"):
                if old.name != f"step-{step:09d}.ckpt":
                    old.unlink()
