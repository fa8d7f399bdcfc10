"""Command lines, each in a process of its own that is forked from one which has imported everything once.

What such a process prints goes to a log, how far it is to a small file, and it ends when the process that started it
does, however that ends. Importing nerfstudio and torch takes ten seconds, forking a twentieth of one.
"""

import logging
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from multiprocessing import connection, forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from filelock import FileLock

from fit3d_ns.support.errors import UserError, first_line
from fit3d_ns.support.files import atomic_write_json
from fit3d_ns.support.json_files import UNREADABLE, build, read_json

_BAD_FORK = 77
"""Exit status of a forked process that cannot use CUDA, since what it was forked from had."""
_SECONDS_BETWEEN_REPORTS = 0.5
_OWN = {
    "fit3d-distill": "distill.cli",
    "fit3d-export": "fit3d_ns.commands.export.cli",
    "fit3d-lift": "fit3d_ns.commands.lift.cli",
    "fit3d-loop-pictures": "fit3d_loop.comparison_pictures",
    "fit3d-probe": "probe.cli",
    "fit3d-rooms": "fit3d_rooms.cli",
}
"""Modules of this project's commands, each with a ``main``."""
_OF_THE_MOMENT = ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
"""Variables that may differ from those of the process that commands are forked from."""
_PROBE = "import sys; from probe.cli import main; sys.argv[0] = 'fit3d-probe'; main()"
"""The command, also where no script of its name is installed."""
_MEMORY = re.compile("out of memory|memory does not suffice|cannot allocate memory|MemoryError", re.IGNORECASE)
_KILLED = re.compile(r"Signal \d+ \((SIG\w+)\) received by PID")
"""What torchrun says of one of its processes."""
_TAKEN = re.compile(r"^Ended after ([\d.]+) s, ([\d.]+) s of processor time$", re.MULTILINE)
_running: set[BaseProcess] = set()
_starting = threading.Lock()
_fresh = threading.Event()
"""Set where processes must not be forked."""


class CommandFailed(UserError):
    """A command ended with the sentence that this carries."""


class CommandLost(UserError):
    """A command was killed, or ran out of memory: it may succeed elsewhere, or with fewer neighbours."""


class CommandEnded(CommandLost):
    """A command was ended by `end_all`, and is not tried again."""


@dataclass(frozen=True)
class Settings:
    """How commands are run."""

    threads: int
    """Processor threads of each."""
    gpu: str | None = None
    """``CUDA_VISIBLE_DEVICES``; None leaves it as it is."""
    keep_optimizer: bool = True
    """Whether ``ns-train`` keeps the optimizers' state in its last checkpoint."""


@dataclass(frozen=True)
class Taken:
    """What a command took."""

    seconds: float
    """On the wall clock."""
    cpu_seconds: float
    """Of all threads together."""


def run_words(words: Sequence[str], log: Path, progress: Path, lock: Path, settings: Settings) -> Taken:
    """Does what typing the words in a shell would do, in another process, and waits for it.

    Args:
        words: The command's name and its arguments.
        log: What it prints is appended here.
        progress: How far it is is written here: ``title``, ``done``, ``total``.
        lock: Held by that process as long as it lives, so that no two commands write to one scene.
        settings: How to run it.

    Returns:
        What it took.

    Raises:
        CommandFailed: If it ended with an error.
        CommandLost: If it was killed or ran out of memory; as `CommandEnded` if `end_all` did it.
    """
    for path in (log, progress, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    begin = log.stat().st_size if log.exists() else 0
    code = _start(words, log, progress, lock, settings)
    if code == _BAD_FORK:
        _fresh.set()
        code = _start(words, log, progress, lock, settings)
    printed = ""
    if log.exists():
        with log.open("rb") as file:
            file.seek(begin)
            printed = file.read().decode(errors="replace")
    if code != 0 and not printed:
        raise CommandLost(f"The process of {words[0]} ended with status {code} before it could begin.")
    if code == 0:
        seconds, cpu_seconds = map(float, _TAKEN.findall(printed)[-1])
        return Taken(seconds, cpu_seconds)
    killed = _KILLED.search(printed)
    if code < 0 or killed:
        name = killed[1] if killed else signal.Signals(-code).name
        raise CommandLost(f"{words[0]} was ended by {name} (out of memory?), see {log}.")
    sentence = _sentence(printed) or f"{words[0]} ended with status {code}, see {log}."
    raise (CommandLost if _MEMORY.search(sentence) else CommandFailed)(sentence)


def end_all() -> None:
    """Ends all processes that this one started."""
    for process in list(_running):
        _running.discard(process)
        with suppress(ValueError, AttributeError):
            process.kill()


def _sentence(printed: str) -> str | None:
    """The last sentence that a command ended with."""
    found = re.findall(r"^Error: (.+)$", printed, re.MULTILINE)
    return found[-1].strip() if found else None


_SERVER_ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for GPUs must not start CUDA in what others are forked from
    "OMP_NUM_THREADS": "1",  # torch's threads are set in each command; whatever else counts on them sums alike
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait without spinning, since scenes share the cores
}


def fork_context() -> BaseContext:
    """Makes sure that the process to fork from is there, or on its way: what it imports is not waited for.

    Returns:
        What starts processes.
    """
    if _fresh.is_set():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    with _starting:
        before = {name: os.environ.get(name) for name in _SERVER_ENVIRONMENT}
        os.environ.update(_SERVER_ENVIRONMENT)
        try:
            context.set_forkserver_preload(["fit3d_loop.commands.preload"])
            forkserver.ensure_running()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    return context


def _start(words: Sequence[str], log: Path, progress: Path, lock: Path, settings: Settings) -> int:
    environment = {name: os.environ.get(name) for name in _OF_THE_MOMENT}
    if settings.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = settings.gpu
    process = fork_context().Process(  # type: ignore[attr-defined]
        target=_run, args=(list(words), str(log), str(progress), str(lock), settings, environment), name=words[0]
    )
    _running.add(process)
    try:
        process.start()
        process.join()
        if process not in _running:
            raise CommandEnded(f"{words[0]} was ended with what had started it.")
        return process.exitcode or 0
    finally:
        _running.discard(process)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()
        progress.unlink(missing_ok=True)


def _run(
    words: list[str], log: str, progress: str, lock: str, settings: Settings, environment: dict[str, str | None]
) -> None:
    """What the other process does."""
    os.setpgid(0, 0)  # Ctrl-C is the driver's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    code, begin = 1, time.perf_counter()
    with FileLock(lock):
        print(f"$ {shlex.join(words)}", flush=True)
        try:
            code = _carry_out(words, Path(progress), settings)
        except BaseException as error:
            traceback.print_exc()
            print(f"Error: {type(error).__name__}: {first_line(error)}", file=sys.stderr)
    times = os.times()
    cpu = times.user + times.system + times.children_user + times.children_system
    print(f"Ended after {time.perf_counter() - begin:.2f} s, {cpu:.2f} s of processor time")
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:  # as the fresh process was that did the work
        os.kill(os.getpid(), -code)
    os._exit(code)  # threads of data loaders and CUDA take their time otherwise


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.killpg(os.getpgid(0), signal.SIGTERM)  # torchrun ends its processes; this one has no handler, and ends
        os._exit(1)


def _carry_out(words: list[str], progress: Path, settings: Settings) -> int:
    import torch

    # Without NVML even asking for GPUs counts as use, which does no harm where there is none.
    server = sys.modules.get("fit3d_loop.commands.preload")
    if torch.cuda._is_in_bad_fork() and getattr(server, "HAS_CUDA", True):
        return _BAD_FORK
    from fit3d_ns.support.command_line import run_command
    from fit3d_ns.support.progress import watch

    torch.set_num_threads(settings.threads)  # while there is one thread: a fork's thread pool is rebuilt at first use
    watch(_Reporter(progress))
    logging.captureWarnings(True)
    sys.argv = list(words)
    try:
        if words[0] == "ns-train":
            from fit3d_ns.commands.training import train

            run_command(lambda: train(words[1:], settings.keep_optimizer))
        elif words[0] == "torchrun":
            return _in_a_fresh_process("-m", "torch.distributed.run", *words[1:])
        elif words[0] == "fit3d-probe" and not _reads_alone(words):
            # Its readers of photos are forked, and hang as forks of a fork.
            return _in_a_fresh_process("-c", _PROBE, *words[1:])
        elif words[0] in _OWN:
            run_command(__import__(_OWN[words[0]], fromlist=["main"]).main)
        else:
            found = tuple(entry_points(group="console_scripts", name=words[0]))
            if not found:
                raise UserError(f"The command {words[0]} is not installed in this environment.")
            run_command(found[0].load())
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(f"Error: {stop.code}", file=sys.stderr)
        return 1
    return 0


def _reads_alone(words: Sequence[str]) -> bool:
    """Whether a probe reads photos in its own process."""
    typed = " ".join(words).replace("=", " ")
    return re.search(r" --workers 0(?!\S)", typed) is not None


def _in_a_fresh_process(*words: str) -> int:
    """Runs Python with some arguments, which ends with this process; returns its status, negative for a signal."""
    return subprocess.run([sys.executable, *words], check=False, preexec_fn=end_with_starter).returncode


def end_with_starter() -> None:
    """Makes the process that calls it, before it becomes another program, end with the one that started it."""
    import ctypes

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class _Reporter:
    """Writes how far a command is to a file, now and then."""

    def __init__(self, path: Path) -> None:
        self._path, self._last, self._title = path, 0.0, ""

    def __call__(self, title: str, done: float, total: int) -> None:
        now = time.monotonic()
        if title == self._title and now - self._last < _SECONDS_BETWEEN_REPORTS:
            return
        self._last, self._title = now, title
        with suppress(UserError):  # a full disk is said by who writes results
            atomic_write_json(self._path, {"title": title, "done": done, "total": total})


def read_progress(path: Path) -> dict | None:
    """Returns what a running command last said; None if nothing.

    Args:
        path: File that the command writes its progress to.
    """
    try:
        return build(dict[str, Any], read_json(path))
    except UNREADABLE:
        return None
