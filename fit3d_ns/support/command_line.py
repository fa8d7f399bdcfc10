"""Entry of the commands: what they log is shown, errors of the user become one sentence and an exit status."""

import sys
from collections.abc import Callable

from fit3d_ns.support.errors import UserError
from fit3d_ns.support.threads import wait_without_spinning


def run_command(command: Callable[[], None]) -> None:
    """Runs a command; a ``UserError`` is printed as one sentence and ends the process with status 1.

    Args:
        command: The command, arguments bound.
    """
    from fit3d_ns.support.console import show_log  # needs rich, which a backbone on its own does without

    show_log()
    wait_without_spinning()
    try:
        command()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
