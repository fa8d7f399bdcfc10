"""Commands run in processes forked from one that has imported everything: a case takes what its work takes."""

import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.server import use_own_server, use_warm_server

TIMEOUT = 180.0
KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    """Exit status; 128 and the signal's number where a signal ended it."""
    text: str
    """All that it said."""
    seconds: float
    """How long it ran."""

    @property
    def sentence(self) -> str | None:
        """The sentence of an error that is one, None of any other end."""
        lines = [line for line in self.text.splitlines() if line.startswith("Error: ")]
        return lines[-1].removeprefix("Error: ") if lines and self.status and not self.crashed else None

    @property
    def crashed(self) -> bool:
        """Whether it ended in a traceback, or never."""
        return "Traceback (most recent call last)" in self.text or self.status == 128 + signal.SIGALRM


class Running:
    """A command that is running.

    Args:
        call: What it does.
        log: Where all that it says goes.
        limit: Bytes that a file may have (``ulimit -f``); None for no limit.
        user: Number of the user that it runs as; None for the own.
    """

    def __init__(self, call: Callable[[], None], log: Path, limit: int | None = None, user: int | None = None) -> None:
        self._log, self._start = log, time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        reading, writing = os.pipe()
        with log.open("wb") as file:  # by a process of its own, which the limits do not bind
            self._writer = subprocess.Popen(["cat"], stdin=reading, stdout=file)
        os.close(reading)
        self._pid = os.fork()
        if self._pid == 0:
            _be_a_command(call, writing, limit, user)
        os.close(writing)

    def signal(self, number: int) -> None:
        """Sends it a signal.

        Args:
            number: Such as SIGKILL.
        """
        os.kill(self._pid, number)

    def wait(self, until: float | None = None) -> Ended | None:
        """Waits for its end.

        Args:
            until: Seconds after its start at which to come back with None if it still runs; None: no such time.

        Returns:
            How it ended; None if it still runs.
        """
        while True:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            seconds = time.monotonic() - self._start
            if pid:
                self._writer.wait()
                code = os.waitstatus_to_exitcode(status)
                text = self._log.read_text(errors="replace")
                return Ended(128 - code if code < 0 else code, text, seconds)
            if until is not None and seconds >= until:
                return None
            if seconds > TIMEOUT:
                self.signal(signal.SIGALRM)
            time.sleep(0.005)


def run(call: Callable[[], None], log: Path, limit: int | None = None, user: int | None = None) -> Ended:
    """Runs a command to its end.

    Args:
        call: What typing the command would do.
        log: File for what it prints.
        limit: Most bytes of a file that it writes; None for no limit.
        user: Number of the user to become; None for this one.

    Returns:
        Status, seconds, and what was said.
    """
    ended = Running(call, log, limit, user).wait()
    assert ended is not None
    return ended


def _be_a_command(call: Callable[[], None], output: int, limit: int | None, user: int | None) -> None:
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        import torch

        from fit3d_ns.support.console import CONSOLE

        # Now, while there is one thread: the first use of the thread pool after a fork rebuilds it, and two threads
        # that do so at once find none ("Invalid thread pool").
        torch.set_num_threads(1)
        CONSOLE.file = sys.stderr
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        use_own_server() if limit is not None or user is not None else use_warm_server()
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if user is not None:
            os.setgid(user)
            os.setuid(user)
        call()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:  # as the interpreter would, the plugin's own hook included
        sys.excepthook(type(error), error, error.__traceback__)
        if sys.excepthook is sys.__excepthook__:
            traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
