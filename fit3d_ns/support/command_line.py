"""Entry of the commands: what they log is shown, errors of the user become one sentence and an exit status."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fit3d_ns.support.errors import UserError


def run_command(command: Callable[[], None]) -> None:
    """Runs a command; a ``UserError`` is printed as one sentence and ends the process with status 1.

    Args:
        command: The command, arguments bound.
    """
    from fit3d_ns.support.console import show_log  # needs rich, which a backbone on its own does without

    show_log()
    try:
        command()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


BACKBONE_FLAG = "--pipeline.datamanager.backbone"
WEIGHTS_FLAG = "--pipeline.datamanager.backbone-weights"
LAYER_FLAG = "--pipeline.datamanager.backbone-layer"


@contextmanager
def flags_named(backbone: str, weights: str, layer: str) -> Iterator[None]:
    """Rewords errors of the block for callers whose flags or arguments are not those of ``ns-train``.

    Args:
        backbone: What names the backbone there, such as ``--backbone``.
        weights: What names its weight file.
        layer: What names its layer.

    Raises:
        UserError: That of the block, reworded.
    """
    try:
        yield
    except UserError as error:
        # The longer flags first: they begin with the shorter one.
        message = str(error).replace(WEIGHTS_FLAG, weights).replace(LAYER_FLAG, layer).replace(BACKBONE_FLAG, backbone)
        raise UserError(message) from None
