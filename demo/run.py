"""The demo from beginning to end."""

import logging
import time
from dataclasses import replace

import torch

from demo.config import DemoConfig, complete, settings
from demo.stages import after_the_loop, as_typed, before_the_loop, loop_config, places, write_scene_list
from fit3d_loop.commands.steps import StepRecord, ThisMachine, read_step, run_step, run_steps
from fit3d_loop.commands.worker import end_all
from fit3d_loop.loop import run_loop
from fit3d_loop.records import Places, keep_settings, stored_settings, try_lock
from fit3d_ns.backbones import BackboneSpec, weights_available
from fit3d_ns.runs.names import CONFIG
from fit3d_ns.support.console import CONSOLE
from fit3d_ns.support.errors import UserError

_LOGGER = logging.getLogger(__name__)
_SETTINGS = "demo.json"


def run_demo(config: DemoConfig) -> None:
    """Runs the demo from beginning to end, or from where it was stopped.

    Args:
        config: The user's choices.

    Raises:
        UserError: If the output folder, the installation or a choice cannot be used.
    """
    cuda, own = torch.cuda.is_available(), Places(config.output_dir)
    with try_lock(own.lock("demo")) as had:
        if not had:
            raise UserError(
                f"Another demo is at work in {config.output_dir}: wait for it, or choose another --output-dir."
            )
        if config.backbone is None:
            # A demo that goes on keeps its backbone, whatever can be reached now.
            begun = stored_settings(config.output_dir, _SETTINGS)
            config = replace(config, backbone=begun.get("backbone") or _choose_backbone())
        config = complete(config, cuda)
        device = {"device": "cuda" if cuda else "cpu"}
        keep_settings(config.output_dir, {**settings(config), **device}, {}, _SETTINGS)
        start = time.time()
        try:
            records = [run_step(own, before_the_loop(config), ThisMachine())]
            write_scene_list(config)
            loop = loop_config(config, cuda)
            CONSOLE.print("\n[bold]The loop[/bold], which is this command:", highlight=False)
            CONSOLE.print(" ".join(as_typed(loop)), style="dim", highlight=False, markup=False, soft_wrap=True)
            run_loop(loop)
            records += _of_the_loop(config)
            steps = after_the_loop(config)
            # Each fills the cores of a CPU by itself, and hardly a GPU.
            records += run_steps(own, steps, ThisMachine(), at_once=len(steps) if cuda else 1)
        finally:
            end_all()
        from demo.report import write_report

        path = write_report(config, records, as_typed(loop))
    config_path = places(config).run(places(config).lifted_rooms[0]) / CONFIG
    CONSOLE.print(f"Report:  {path}  ({time.time() - start:.0f} s)", highlight=False, soft_wrap=True)
    CONSOLE.print(f"Viewer:  .venv/bin/ns-viewer --load-config {config_path}", highlight=False, soft_wrap=True)


def _of_the_loop(config: DemoConfig) -> list[StepRecord]:
    names = ["student1", *(["control"] if config.control else []), "probe_segmentation", "probe_depth"]
    return [record for name in names if (record := read_step(places(config).loop, name)) is not None]


def _choose_backbone() -> str:
    if weights_available(BackboneSpec("dinov2_small"), reach_network=True):
        return "dinov2_small"
    _LOGGER.warning(
        "DINOv2-S weights are neither cached nor reachable: the demo uses dinov2_small_focus, a DINOv2-S whose "
        "author tuned it for saliency, cut to its first 9 blocks."
    )
    return "dinov2_small_focus"
