"""Command lines, carried out in this process: what takes seconds to import is imported once."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import entry_points
from typing import Any

from fit3d_ns.runs.checkpoints import find_checkpoint
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.progress import progress


def run_command_line(words: Sequence[str]) -> None:
    """Does what typing the words in a shell would do.

    Args:
        words: The command's name and its arguments.

    Raises:
        UserError: If there is no such command, or it ended with an error, which it has said itself.
        SystemExit: If it was told to stop.
    """
    with _typed(words):
        if words[0] == "ns-train":
            _train(words[1:])
            return
        found = tuple(entry_points(group="console_scripts", name=words[0]))
        if not found:
            raise UserError(f"The command {words[0]} is not installed in this environment: run `make setup`.")
        try:
            found[0].load()()
        except SystemExit as stop:
            if stop.code in (None, 0):
                return
            if stop.code == 1:
                raise UserError(f"The demo stopped, since this command ended with the error above: {shlex.join(words)}")
            raise


@contextmanager
def _typed(words: Sequence[str]) -> Iterator[None]:
    """Commands read their arguments from here, and note them in their results."""
    before = sys.argv
    sys.argv = list(words)
    try:
        yield
    finally:
        sys.argv = before


def _train(words: Sequence[str]) -> None:
    """``ns-train`` without its page of settings, going on from the run's own checkpoint, and ending when it is told to.

    nerfstudio's command swallows Ctrl-C, and goes on from a checkpoint only where it is named.
    """
    import tyro
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
    from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
    from nerfstudio.scripts.train import _set_random_seed
    from nerfstudio.utils import writer

    config: Any = tyro.cli(AnnotatedBaseConfigUnion, prog="ns-train", args=list(words))
    steps, config.pipeline.datamanager.data = config.max_num_iterations, config.data
    config.logging.local_writer.enable = False
    config.save_config()
    done = 0
    if any(config.get_checkpoint_dir().glob("step-*.ckpt")):
        config.load_dir = config.get_checkpoint_dir()
        done = int(find_checkpoint(config.load_dir).stem.removeprefix("step-")) + 1
        if done >= steps:
            return
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

        trainer.callbacks.insert(0, TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], show))
        try:
            trainer.train()
        finally:
            # They are global, and the next run's events would go to this run's log too.
            for event_writer in writer.EVENT_WRITERS:
                event_writer.tb_writer.close()
            writer.EVENT_WRITERS.clear()
