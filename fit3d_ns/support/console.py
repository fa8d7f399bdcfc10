"""What the commands tell: one console, fed by `logging` under the packages' names.

Library code logs (`logging.getLogger(__name__)`) and leaves it to its caller whether and where that is shown. The
commands, and the method inside nerfstudio's, show it on standard error, which leaves standard output to results.
"""

import logging
import sys

from rich.console import Console

CONSOLE = Console(stderr=True)
"""Where everything is shown that is meant for people: sentences, progress, headings."""

_PACKAGES = ("fit3d_ns", "fit3d_rooms", "distill", "probe", "fit3d_loop", "demo")


def rank() -> int:
    """Returns the number of this process among those that ``torchrun`` started; 0 before it has joined them."""
    dist = sys.modules.get("torch.distributed")  # not imported for this: a command's --help does without torch
    return dist.get_rank() if dist is not None and dist.is_initialized() else 0


class _ConsoleHandler(logging.Handler):
    """Shows bare sentences on a terminal, and lines with time and origin in a log; of one process among several."""

    def emit(self, record: logging.LogRecord) -> None:
        """Shows one record."""
        try:
            if rank() and record.levelno < logging.WARNING:
                return
            warning = record.levelno >= logging.WARNING
            kind = f"{record.levelname}: " if warning else ""
            text = self.format(record)
            if not CONSOLE.is_terminal:
                text = f"{self.formatter.formatTime(record)} {record.name}: {kind}{text}"  # type: ignore[union-attr]
            style = "yellow" if warning else None
            CONSOLE.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


def show_log() -> None:
    """Shows what the packages log from now on, `logging.INFO` and above, on the console."""
    for package in _PACKAGES:
        logger = logging.getLogger(package)
        if not any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
            handler = _ConsoleHandler()
            handler.setFormatter(logging.Formatter())
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
