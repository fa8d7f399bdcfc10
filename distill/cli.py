"""The command ``fit3d-distill``: scenes in, a fine-tuned backbone out."""

import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from distill.config import DistillConfig, check_choices
from distill.recipes import INTERPOLATE
from fit3d_ns.support.command_line import run_command

if TYPE_CHECKING:  # torch comes with them, which --help does without
    from distill.scenes import Scene
    from fit3d_ns.support.processes import World

_LOGGER = logging.getLogger("distill.cli")  # not __main__, which `python -m` makes of __name__


def main() -> None:
    """Command line."""
    run_command(lambda: distil(tyro.cli(DistillConfig)))


def distil(config: DistillConfig) -> None:
    """Runs distillation from beginning to end, or averages a finished result anew.

    Args:
        config: The user's choices.

    Raises:
        UserError: Whatever is wrong with the scenes, the choices or the machine, before any long work.
        SystemExit: After SIGTERM; a checkpoint was saved.
    """
    if config.average_only is not None:
        from fit3d_ns.backbones.students.averaging import average_result

        amount = INTERPOLATE if config.interpolate is None else config.interpolate
        files = average_result(config.average_only, amount, config.original_weights)
        _LOGGER.info(f"Weights: {files[0]}, {amount:g} x student + {1 - amount:g} x original")
        return
    from fit3d_ns.support.output_folders import held_folder
    from fit3d_ns.support.processes import join_world

    with join_world(config.device, "start again with --resume") as world, ExitStack() as stack:
        _check(config, world)
        if world.is_main and not config.bundles_only:
            stack.enter_context(held_folder(config.output_dir, "--output-dir"))
        scenes, validation = _scenes(config, world)
        if not config.bundles_only:
            from distill.session import Session  # here, since averaging alone needs nothing of it

            Session(config, scenes, validation, world).run()


def _check(config: DistillConfig, world: "World") -> None:
    """Refuses what cannot be carried out, as far as that can be known before any scene is opened."""
    from distill.checkpoint import check_writable
    from distill.results.result import check_hub
    from fit3d_ns.backbones.students.result_folder import FILES
    from fit3d_ns.support.output_folders import check_names_are_free

    check_choices(config, world.size)
    if world.is_main and not config.bundles_only:
        check_writable(config.output_dir)
        check_names_are_free(config.output_dir, FILES, "--output-dir")
        if config.push_to_hub is not None:
            check_hub(config.push_to_hub)


def _scenes(config: DistillConfig, world: "World") -> "tuple[list[Scene], list[Scene]]":
    """Makes bundles in the first process, opens them in all; those to train on, and those to validate on."""
    import torch.distributed

    from distill.scenes import make_all_bundles, open_scenes
    from fit3d_ns.runs.bundle import check_bundles

    folders: tuple[list[Path], list[Path]] = ([], [])
    if world.is_main:
        folders = make_all_bundles(config)
        count = len(folders[0])
        _LOGGER.info("Distillation into %s: %d %s", config.output_dir, count, "scene" if count == 1 else "scenes")
        check_bundles([*folders[0], *folders[1]])
    if world.size > 1:
        shared = [folders]
        torch.distributed.broadcast_object_list(shared, src=0)
        folders = shared[0]
    training, validation = folders
    scenes = open_scenes([*training, *validation], config.data_root)
    return scenes[: len(training)], scenes[len(training) :]


if __name__ == "__main__":
    sys.exit(main())
