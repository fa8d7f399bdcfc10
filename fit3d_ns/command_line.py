"""How the project's own commands end."""

import sys
from typing import Callable

from fit3d_ns.errors import UserError


def run_command(command: Callable[[], None]) -> None:
    """Runs a command; a ``UserError`` is printed as one sentence and ends the process with status 1.

    Args:
        command: The command, arguments bound.
    """
    try:
        command()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
