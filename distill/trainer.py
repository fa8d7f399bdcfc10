"""The training loop: from any step to any other, with the same result."""

import logging
import math
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distill.checkpoint import (
    check_space,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from distill.config import DistillConfig
from distill.evaluation import Validation
from distill.prefetcher import Prefetcher
from distill.recipes import Recipe
from distill.sampler import Batch, Sampler
from distill.scenes import Scene
from distill.step import (
    DistillLoss,
    EagerStep,
    GraphStep,
    StepRunner,
    Work,
    choose_acceleration,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)
from distill.student import make_average, plain_state_dict, prepare_training
from fit3d_ns.backbones import Backbone
from fit3d_ns.support.compiling import can_compile
from fit3d_ns.support.curve_log import CurveLog
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import World, sum_over_processes, wait_for_all
from fit3d_ns.support.progress import progress

_LOGGER = logging.getLogger(__name__)


_RECIPE_SETTINGS = "accumulation ema_decay lr weight_decay clip batch_size schedule warmup_steps flip".split()
_RESULT_SETTINGS = "targets min_accumulation lora_rank seed".split()
"""Choices that decide the student that comes out; a checkpoint can be resumed with no others."""


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training leaves."""

    model: nn.Module
    """The timm model to save: the student's, or its moving average."""
    losses: list[tuple[int, float]]
    """Steps taken, and the mean loss since the point before."""
    validation: list[tuple[int, dict[str, float]]]
    """Steps taken, and what was measured on the validation scenes."""
    steps: int
    """All steps."""
    seconds: float
    """Of this process, since its start or resume."""
    views_per_second: float
    """Over all processes, while training, the first steps (compilation, first reads) left out."""


class Trainer:
    """Trains the student.

    Args:
        config: The user's choices.
        recipe: The numbers that were settled.
        scenes: As opened; a scene's number is its place in this list.
        student: The backbone, with its original weights; changed in place.
        prefetcher: Prepares steps.
        sampler: Knows how many steps there are.
        world: This process among its fellows.
        resumed: Of `read_resumed`.
    """

    def __init__(
        self,
        config: DistillConfig,
        recipe: Recipe,
        scenes: list[Scene],
        student: Backbone,
        prefetcher: Prefetcher,
        sampler: Sampler,
        world: World,
        resumed: dict[str, Any] | None = None,
    ):
        self._config = config
        self._recipe = recipe
        self._validation: Validation | None = None
        self._curves: CurveLog | None = None
        self._scenes = scenes
        self._student = student
        self._prefetcher = prefetcher
        self._block_bytes = sampler.block_bytes
        self._world = world
        self.num_steps = recipe.steps or sampler.steps_of(recipe.epochs)
        self.settings = training_settings(config, recipe, scenes, student)
        self._parameters = prepare_training(student, config)
        self._average = make_average(student, recipe.ema_decay)
        self._optimizer = make_optimizer(self._parameters, recipe, world.device)
        self._losses: list[tuple[int, float]] = []
        self._measured: list[tuple[int, dict[str, float]]] = []
        self._curve_sum, self._curve_count = 0.0, 0
        self._recent: list[tuple[Batch, Tensor]] = []
        self._step = 0
        self._stop_asked = False
        self._saved = -1
        if world.is_main:
            self._check_space()
        if resumed is not None:
            self._resume(resumed)
        model: Any = student.model
        work = Work(self.num_steps * recipe.batch_size, sampler.grids, student.info.width, len(model.blocks))
        self._acceleration, self.how_steps_run = choose_acceleration(
            config.acceleration, world.device.type == "cuda", world.size, work, lambda: can_compile(world.device)
        )
        self._runner = self._make_runner()

    @property
    def num_parameters(self) -> int:
        """Trained weights."""
        return sum(parameter.numel() for parameter in self._parameters)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._step

    def watch(self, curves: CurveLog, validation: Validation | None = None) -> None:
        """Shows what happens while it trains; for the first of several processes.

        Args:
            curves: Where losses and measurements go.
            validation: Measures the validation scenes, if there are any.
        """
        self._curves, self._validation = curves, validation

    def train(self) -> TrainingResult:
        """Trains to the last step.

        Returns:
            The weights to save, and how training went.

        Raises:
            UserError: If the loss becomes NaN or infinite (the batch is named).
            SystemExit: After SIGTERM; a checkpoint was saved.
        """
        previous = signal.signal(signal.SIGTERM, self._ask_to_stop)
        start, begin, first_step = time.perf_counter(), None, self._step
        try:
            self._validate()
            with progress("Distilling", self.num_steps, self._step) as advance:
                for batch, inputs in self._prefetcher.steps(self._step, self.num_steps):
                    set_learning_rate(self._optimizer, learning_rate(self._recipe, batch.step, self.num_steps))
                    self._recent.append((batch, self._runner.run(inputs)))
                    if self._average is not None:
                        self._average.update_parameters(self._student.model)
                    self._step = batch.step + 1
                    loss = f"L1 {self._flush():.4f}" if self._is_log_step() else None
                    advance(remark=loss)
                    if loss is not None and begin is None:
                        begin, first_step = time.perf_counter(), self._step
                    self._validate()
                    if self._step % self._config.save_every == 0:
                        self._save()
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"The GPU's memory does not suffice for a step ({str(error).split('. ')[0]}): lower --batch-size, cut "
                "the batch with --gradient-accumulation, add --gradient-checkpointing, or lower --scene-memory."
            ) from error
        finally:
            signal.signal(signal.SIGTERM, previous)
        self._flush()
        end = time.perf_counter()
        self._save()
        trained = (self._step - first_step) * self._recipe.batch_size
        speed = trained / (end - begin) if begin is not None and trained else 0.0
        return TrainingResult(self._result, self._losses, self._measured, self.num_steps, end - start, speed)

    @property
    def _result(self) -> nn.Module:
        return self._student.model if self._average is None else self._average

    def _validate(self) -> None:
        """Measures the validation scenes if it is time, before training, every so often, and at its end."""
        if self._validation is None or (self._measured and self._measured[-1][0] == self._step):
            return
        if self._step % self._config.validate_every and self._step != self.num_steps:
            return
        measured = self._validation.measure(plain_state_dict(self._result))
        self._measured.append((self._step, measured))
        if self._curves is not None:
            self._curves.write(self._step, {f"validation/{name}": value for name, value in measured.items()})

    def _check_space(self) -> None:
        config = self._config
        weights = sum(tensor.numel() * tensor.element_size() for tensor in self._student.model.state_dict().values())
        moments = 2 * sum(parameter.numel() * parameter.element_size() for parameter in self._parameters)
        checkpoint = weights * (1 if self._average is None else 2) + moments
        result = weights * (1 + (self._recipe.interpolate < 1) + 0.5 * config.half)
        result += weights * (config.dinov2_layout + config.transformers_layout + config.onnx)
        check_space(config.output_dir, checkpoint, int(result), config.keep_checkpoints)

    def _make_runner(self) -> StepRunner:
        config, world = self._config, self._world
        cuda = world.device.type == "cuda"
        bf16 = self._recipe.precision == "bf16" or (self._recipe.precision == "auto" and cuda)
        loss: nn.Module = DistillLoss(self._student, bf16)
        if self._acceleration == "compile":
            loss.compile(dynamic=False)
        if world.size > 1:
            loss = DistributedDataParallel(
                loss, device_ids=[world.device.index] if cuda else None, broadcast_buffers=False
            )
        eager = EagerStep(
            loss, self._optimizer, self._parameters, self._recipe.clip, config.gradient_accumulation, world.size
        )
        if cuda and world.size == 1 and self._acceleration != "none":
            return GraphStep(eager, self._optimizer, self._parameters)
        return eager

    def _is_log_step(self) -> bool:
        # Waiting for the device is cheap on a CPU, where a broken loss is therefore noticed at once.
        every = self._config.log_every if self._world.device.type == "cuda" or self._world.size > 1 else 1
        return self._step % every == 0 or self._step == self.num_steps

    def _flush(self) -> float:
        """Reads the losses since the last time, over all processes; ends the run if it is broken or asked to stop.

        Returns:
            Their mean; NaN if there are none.
        """
        losses: list[float] = []
        if self._recent:
            values = torch.stack([loss for _, loss in self._recent] + [torch.zeros_like(self._recent[0][1])])
            values[-1] = float(self._stop_asked)
            *losses, stop = sum_over_processes(values.double()).tolist()
            for (batch, _), loss in zip(self._recent, losses):
                if not math.isfinite(loss):
                    raise UserError(self._broken(batch))
            self._add_to_curve(losses)
            self._recent.clear()
            if stop:
                self._save()
                wait_for_all()  # torchrun ends all processes soon after the first has gone, also one that writes
                _LOGGER.info(f"Stopped after step {self._step} of {self.num_steps}: go on with --resume.")
                sys.exit(128 + signal.SIGTERM)
        return sum(losses) / len(losses) if losses else float("nan")

    def _add_to_curve(self, losses: list[float]) -> None:
        for offset, loss in enumerate(losses):
            step = self._step - len(losses) + offset + 1
            self._curve_sum += loss
            self._curve_count += 1
            if step % self._config.log_every == 0 or step == self.num_steps:
                self._losses.append((step, self._curve_sum / self._curve_count))
                if self._curves is not None:
                    rate = learning_rate(self._recipe, step - 1, self.num_steps)
                    self._curves.write(step, {"train/l1": self._losses[-1][1], "train/learning_rate": rate})
                self._curve_sum, self._curve_count = 0.0, 0

    def _broken(self, batch: Batch) -> str:
        views = ", ".join(
            f"{self._scenes[sample.scene].name}/{self._scenes[sample.scene].info.views[sample.view].name}"
            for sample in batch.samples[:8]
        )
        more = len(batch.samples) - 8
        return (
            f"The loss of step {batch.step + 1}, or its gradient, is NaN or infinite (batch: {views}"
            f"{f' and {more} more' if more > 0 else ''}): look at those views, "
            "lower --lr, or resume an earlier checkpoint with --precision fp32."
        )

    def _ask_to_stop(self, *_: Any) -> None:
        self._stop_asked = True

    def _save(self) -> None:
        if self._recent:
            self._flush()
        if self._saved == self._step or not self._world.is_main:
            return
        state: dict[str, Any] = {
            "step": self._step,
            "num_steps": self.num_steps,
            "settings": self.settings,
            "block_bytes": self._block_bytes,
            "model": self._student.model.state_dict(),
            "optimizer": self._optimizer.state_dict()["state"],
            "average": None if self._average is None else self._average.state_dict(),
            "losses": self._losses,
            "validation": self._measured,
            "curve": [self._curve_sum, self._curve_count],
        }
        save_checkpoint(self._config.output_dir, state, self._config.keep_checkpoints)
        self._saved = self._step

    def _resume(self, state: dict[str, Any]) -> None:
        if state["step"] > self.num_steps:
            raise UserError(f"The checkpoint has {state['step']} steps already: raise --steps or --epochs.")
        if self._recipe.schedule == "cosine" and state["num_steps"] != self.num_steps:
            raise UserError(
                f"The checkpoint's learning rate falls over {state['num_steps']} steps, not {self.num_steps}: resume "
                "with the same --steps or --epochs."
            )
        self._student.model.load_state_dict(state["model"], strict=True)
        # The groups hold this machine's choices (kernels, where the rate lives), the state what was learnt.
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._losses = [(int(step), float(loss)) for step, loss in state["losses"]]
        self._measured = [(int(step), dict(measured)) for step, measured in state["validation"]]
        self._curve_sum, self._curve_count = state["curve"]
        self._step = self._saved = state["step"]
        _LOGGER.info(f"Resumed after step {self._step}.")


def read_resumed(
    config: DistillConfig, recipe: Recipe, scenes: list[Scene], student: Backbone
) -> dict[str, Any] | None:
    """Reads the newest checkpoint in the output folder, to go on from it.

    Args:
        config: The user's choices.
        recipe: The numbers that were settled.
        scenes: As opened; a scene's number is its place in this list.
        student: As loaded.

    Returns:
        The checkpoint, or None where there is none.

    Raises:
        UserError: If there is one and ``--resume`` was not asked for, or it does not fit.
    """
    checkpoints = list_checkpoints(config.output_dir)
    if not checkpoints:
        return None
    if not config.resume:
        raise UserError(
            f"{config.output_dir} holds a training already ({checkpoints[-1].name}): go on with --resume, or choose "
            "another --output-dir."
        )
    return load_checkpoint(checkpoints[-1], training_settings(config, recipe, scenes, student))


def training_settings(config: DistillConfig, recipe: Recipe, scenes: list[Scene], student: Backbone) -> dict[str, Any]:
    """Returns everything that decides the result but the number of steps, as plain values.

    Args:
        config: The user's choices.
        recipe: The numbers that were settled.
        scenes: As opened; a scene's number is its place in this list.
        student: With its identity, as loaded.
    """
    settings: dict[str, Any] = {name: getattr(config, name) for name in _RESULT_SETTINGS}
    settings |= {name: getattr(recipe, name) for name in _RECIPE_SETTINGS}
    settings["student"] = dict(student.identity)
    settings["scenes"] = [scene.bundle.id for scene in scenes]
    return settings
