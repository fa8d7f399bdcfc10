"""The command ``fit3d``."""

import logging

import tyro

from fit3d_loop.config import LoopConfig
from fit3d_ns.support.command_line import run_command

_LOGGER = logging.getLogger("fit3d_loop.cli")  # not __main__, which `python -m` makes of __name__


def main() -> None:
    """Entry point."""
    config = tyro.cli(LoopConfig, prog="fit3d")
    run_command(lambda: _run(config))


def _run(config: LoopConfig) -> None:
    _LOGGER.info("Scenes of %s into %s", config.scenes, config.output_dir)
    from fit3d_loop.loop import run_loop  # torch comes with it, which --help does without

    run_loop(config)


if __name__ == "__main__":
    main()
