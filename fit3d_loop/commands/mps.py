"""NVIDIA's MPS, with which several processes use a GPU side by side instead of in turns."""

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from fit3d_loop.commands.worker import end_with_starter
from fit3d_loop.config import MPS
from fit3d_ns.support.errors import UserError

_LOGGER = logging.getLogger(__name__)
_CONTROL = "nvidia-cuda-mps-control"
_PIPES, _LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
_USUAL_PIPES = Path("/tmp/nvidia-mps")
"""Where a daemon that the machine's owner has started listens, and CUDA looks by itself."""
_TRY = "import torch; print(torch.ones(8, device='cuda').sum().item())"
_SECONDS_TO_TRY = 60.0
_SECONDS_TO_END = 15.0


def offers_mps(choice: MPS) -> bool:
    """Returns whether MPS would be tried here; whether it works is not known before.

    Args:
        choice: The user's.
    """
    there = _is_running() or shutil.which(_CONTROL) is not None
    return choice != "off" and torch.cuda.is_available() and there


def _is_running() -> bool:
    return _PIPES in os.environ or (_USUAL_PIPES / "control").exists()


@contextmanager
def mps(choice: MPS) -> Iterator[bool]:
    """Has an MPS daemon for the processes that are started meanwhile.

    It is this process's own: it listens in a folder that nobody else knows, ends with this process however that ends,
    and changes no setting of the card. Where one listens already, as on some clusters, that is used.

    Args:
        choice: ``auto`` goes without where there is none or it does not work.

    Yields:
        Whether there is one.

    Raises:
        UserError: If it is ``on`` and there is none, or it does not work.
    """
    if choice == "off" or not torch.cuda.is_available():
        if choice == "on":
            raise UserError("--mps on needs an NVIDIA GPU, and there is none: leave it out.")
        yield False
        return
    if _is_running():
        yield True
        return
    program = shutil.which(_CONTROL)
    if program is None:
        if choice == "on":
            raise UserError(f"NVIDIA's MPS ({_CONTROL}) is not installed here: leave out --mps on.")
        yield False
        return
    with tempfile.TemporaryDirectory(prefix="fit3d-mps-", ignore_cleanup_errors=True) as folder:
        with _daemon(program, folder) as reason:
            if reason is not None and choice == "on":
                raise UserError(f"NVIDIA's MPS does not work here ({reason}): leave out --mps on.")
            if reason is not None:
                _LOGGER.warning(f"NVIDIA's MPS does not work here ({reason}): scenes take turns on the GPU.")
            yield reason is None


@contextmanager
def _daemon(program: str, folder: str) -> Iterator[str | None]:
    """Yields why it does not work; None if it does."""
    # It numbers the GPUs of the machine; which of them a process may use is that process's own variable.
    machine = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    own = {_PIPES: folder, _LOGS: folder}
    daemon = subprocess.Popen(
        [program, "-f"],
        env={**machine, **own},
        preexec_fn=end_with_starter,  # noqa: PLW1509 - it calls no Python that another thread may have locked
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        reason = _try(own)
        if reason is None:
            os.environ.update(own)
        yield reason
    finally:
        for name in own:
            os.environ.pop(name, None)
        with suppress(OSError, subprocess.TimeoutExpired):
            # Processes that still use it are not waited for.
            end = "quit -t 2\n"
            subprocess.run(
                [program], input=end, text=True, env={**machine, **own}, timeout=_SECONDS_TO_END, check=False
            )
        with suppress(subprocess.TimeoutExpired):
            daemon.wait(2.0)
        daemon.kill()
        daemon.wait()


def _try(own: dict[str, str]) -> str | None:
    """Why a process cannot use the daemon, which may hang; None if it can."""
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _TRY],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=_SECONDS_TO_TRY,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"a process that uses it did not answer in {_SECONDS_TO_TRY:.0f} s"
    return (
        None if tried.returncode == 0 else tried.stderr.strip().rpartition("\n")[2] or "a process that uses it failed"
    )
