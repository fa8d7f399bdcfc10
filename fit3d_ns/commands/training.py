"""``ns-train fit3d-splat`` for programs that train many scenes: goes on where it was, and ends when it is told to."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fit3d_ns.runs.checkpoints import drop_optimizer_state, find_checkpoint
from fit3d_ns.runs.names import GEOMETRY_RECORD, RECORD
from fit3d_ns.support.files import atomic_write_json
from fit3d_ns.support.progress import progress

SLOW_IMPORTS = (
    "nerfstudio.configs.method_configs",
    "nerfstudio.scripts.train",
    "timm",
    "torchmetrics.image",
    "scipy.stats",
    "sklearn.neighbors",
    "matplotlib.pyplot",
    "fit3d_ns.commands.lift.sources",
    "fit3d_ns.scenes.lift",
    "fit3d_ns.scenes.photo_check",
    "fit3d_ns.backbones.students.fine_tuned",
    "fit3d_ns.runs.bundling",
)
"""What training, lifting and bundling a scene import, in three quarters of the time that a short one takes; for a
process from which others are forked."""


def train(words: Sequence[str], keep_optimizer: bool = True) -> None:
    """Does what ``ns-train`` does with these arguments, without its page of settings.

    nerfstudio's command swallows Ctrl-C, and goes on from a checkpoint only where it is named; this one goes on from
    the newest of the run, and does nothing where that is the last. What the held-out views show of the geometry is
    left as ``geometry.json`` in the run.

    Args:
        words: Arguments of ``ns-train``: method, flags, dataparser; with a ``--timestamp``.
        keep_optimizer: Whether the last checkpoint keeps the optimizers' state, two thirds of its size.

    Raises:
        UserError: If scene, teacher or settings cannot be used.
        SystemExit: If the arguments are none of ``ns-train``.
    """
    import tyro
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion

    config: Any = tyro.cli(AnnotatedBaseConfigUnion, prog="ns-train", args=list(words))
    steps, config.pipeline.datamanager.data = config.max_num_iterations, config.data
    config.logging.local_writer.enable = False
    if _lacks_its_lift(config, steps):
        shutil.rmtree(config.get_base_dir())
    config.save_config()
    done = 0
    if any(config.get_checkpoint_dir().glob("step-*.ckpt")):
        config.load_dir = config.get_checkpoint_dir()
        done = int(find_checkpoint(config.load_dir).stem.removeprefix("step-")) + 1
    if done < steps:
        _train(config, done, steps)
    if not keep_optimizer:
        drop_optimizer_state(find_checkpoint(config.get_checkpoint_dir()))


def _lacks_its_lift(config: Any, steps: int) -> bool:
    """Whether a run ended with its last step and was killed before it had written down what was lifted."""
    folder = config.get_base_dir()
    last = (config.get_checkpoint_dir() / f"step-{steps - 1:09d}.ckpt").is_file()
    return config.pipeline.model.features == "lift" and last and not (folder / RECORD).is_file()


def _train(config: Any, done: int, steps: int) -> None:
    from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
    from nerfstudio.scripts.train import _set_random_seed
    from nerfstudio.utils import writer

    _set_random_seed(config.machine.seed)
    trainer = config.setup()
    trainer.setup()
    trainer.pipeline.fit3d_model.strategy.verbose = False
    trainer.pipeline.datamanager.prepare_teacher_maps()  # under their own progress bar
    with ExitStack() as bar:
        advance = bar.enter_context(progress("Training", steps, done))

        def show(step: int) -> None:
            advance()
            if step + 1 == steps:
                bar.close()  # lifting follows the last step, under a bar of its own

        def measure(step: int) -> None:
            if step + 1 == steps:
                _measure(trainer.pipeline, config.get_base_dir() / GEOMETRY_RECORD)

        after = [TrainingCallbackLocation.AFTER_TRAIN_ITERATION]
        trainer.callbacks.insert(0, TrainingCallback(after, show))
        trainer.callbacks.append(TrainingCallback(after, measure))  # the others read what the step rendered
        try:
            trainer.train()
        finally:
            # They are global, and the next run's events would go to this run's log too.
            for event_writer in writer.EVENT_WRITERS:
                event_writer.tb_writer.close()
            writer.EVENT_WRITERS.clear()


@torch.no_grad()
def _measure(pipeline: Any, path: Path) -> None:
    """Writes how well the held-out views are rendered, before the checkpoint that ends the run."""
    model, datamanager = pipeline.fit3d_model, pipeline.datamanager
    pipeline.eval()
    psnr = []
    for camera, batch in datamanager.fixed_indices_eval_dataloader if len(datamanager.eval_dataset) else ():
        outputs = model.get_outputs_for_camera(camera.to(model.device))
        photo = model.composite_with_background(model.get_gt_img(batch["image"]), outputs["background"])
        psnr.append(float(model.psnr(photo.moveaxis(-1, 0)[None], outputs["rgb"].moveaxis(-1, 0)[None])))
    pipeline.train()
    record = {
        "gaussians": model.num_points,
        "training_views": len(datamanager.train_dataset),
        "held_out_views": len(psnr),
        "psnr": sum(psnr) / len(psnr) if psnr else None,
    }
    atomic_write_json(path, record)
