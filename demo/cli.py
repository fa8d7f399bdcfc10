"""The command line of the demo."""

import tyro

from demo.config import DemoConfig, check
from fit3d_loop.commands.worker import fork_context
from fit3d_ns.support.command_line import run_command


def main() -> None:
    """Entry point."""
    config = tyro.cli(DemoConfig, prog="python -m demo")
    run_command(lambda: _run(config))


def _run(config: DemoConfig) -> None:
    check(config)
    fork_context()  # commands are forked from a process that imports what they need while this one imports
    from demo.run import run_demo

    run_demo(config)
