"""The command line of the demo."""

import logging
from dataclasses import replace

import torch
import tyro

from demo.config import DemoConfig, complete, settings
from demo.runner import hold, keep_settings, run_stages, stored_settings
from demo.stages import places, stages
from fit3d_ns.backbones import BackboneSpec, weights_available
from fit3d_ns.runs.names import CONFIG
from fit3d_ns.support.command_line import run_command
from fit3d_ns.support.console import CONSOLE

_LOGGER = logging.getLogger(__name__)


def main() -> None:
    """Entry point."""
    run_command(lambda: run_demo(tyro.cli(DemoConfig, prog="python -m demo")))


def run_demo(config: DemoConfig) -> None:
    """Runs the demo from beginning to end, or from where it was stopped.

    Args:
        config: The user's choices.

    Raises:
        UserError: If the output folder, the installation or a choice cannot be used.
    """
    cuda = torch.cuda.is_available()
    with hold(config.output_dir):
        if config.backbone is None:
            # A demo that goes on keeps its backbone, whatever can be reached now.
            begun = stored_settings(config.output_dir) or {}
            config = replace(config, backbone=begun.get("backbone") or _choose_backbone())
        config = complete(config, cuda)
        keep_settings(config.output_dir, {**settings(config), "device": "cuda" if cuda else "cpu"})
        records = run_stages(config.output_dir, stages(config, cuda))
        CONSOLE.print("\n[bold]Write the report[/bold]")
        from demo.report import write_report

        path = write_report(config, records)
    seconds = sum(record.seconds for record in records)
    config_path = places(config).run(places(config).lifted_rooms[0]) / CONFIG
    CONSOLE.print(f"Report:  {path}  ({seconds:.0f} s)", highlight=False, soft_wrap=True)
    CONSOLE.print(f"Viewer:  .venv/bin/ns-viewer --load-config {config_path}", highlight=False, soft_wrap=True)


def _choose_backbone() -> str:
    if weights_available(BackboneSpec("dinov2_small"), reach_network=True):
        return "dinov2_small"
    _LOGGER.warning(
        "DINOv2-S weights are neither cached nor reachable: the demo uses dinov2_small_focus, a DINOv2-S whose "
        "author tuned it for saliency, cut to its first 9 blocks."
    )
    return "dinov2_small_focus"
