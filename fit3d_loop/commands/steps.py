"""Commands that are run once: each has a record, which is written last and found by the next start."""

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fit3d_loop.commands.worker import CommandEnded, CommandLost, Settings, Taken, run_words
from fit3d_loop.records import Places
from fit3d_ns.support.console import CONSOLE
from fit3d_ns.support.files import atomic_write_text
from fit3d_ns.support.json_files import UNREADABLE, build, read_record, write_record

_ATTEMPTS = 2
_VIEWS_OF_A_GPU = 8
"""In a step, at least. Several processes do without a CUDA graph: two H200s took 59 views/s of one view each, one alone
351 of two; with 16 for each, two take 1.7 times those of one (docs/benchmarks.md)."""


@dataclass(frozen=True)
class Distributed:
    """A training that several GPUs may share."""

    module: str
    """What torchrun starts."""
    batch_size: int
    """Views of a step, over all processes."""
    num_parts: int = 1
    """Into which a process cuts its share (`--gradient-accumulation`)."""

    def num_processes(self, num_gpus: int) -> int:
        """Returns how many processes are worth their while, one a GPU.

        Args:
            num_gpus: Of the machine.
        """
        most = min(num_gpus, self.batch_size // _VIEWS_OF_A_GPU)
        fitting = (count for count in range(most, 1, -1) if self.batch_size % (count * self.num_parts) == 0)
        return next(fitting, 1)


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    """Names its record."""
    title: str
    """For humans."""
    words: tuple[str, ...]
    """As typed in a shell."""
    settings: Settings
    """How it is run."""
    key: str
    """Of what it is made from; with another one it is done anew."""
    folder: Path | None = None
    """Its output, which is deleted where it was begun with another key."""
    distributed: Distributed | None = None
    """How the GPUs of the machine share it, if they may."""
    is_whole: Callable[[Path], bool] = Path.is_dir
    """Whether what a finished one left in its folder can be used; if not, it is done anew."""


@dataclass(frozen=True)
class StepRecord:
    """A step that is done."""

    name: str
    """Unique in the loop."""
    title: str
    """For people."""
    command: list[str]
    """Its words."""
    key: str
    """What the step was made from."""
    seconds: float
    """On the wall clock, of the start that finished it."""
    cpu_seconds: float
    """Of all threads together."""
    resumed: bool
    """Whether an earlier start had begun it."""


class WholeMachine(Protocol):
    """Where a step may run."""

    def whole(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """See `fit3d_loop.scenes.runner.Engine`.

        Args:
            work: A function that another machine can import.
            *arguments: Of ``work``, each of which pickles.

        Returns:
            What ``work`` returns.
        """
        ...


class ThisMachine:
    """Runs steps where this process is."""

    def whole(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """See `WholeMachine`.

        Args:
            work: Any function.
            *arguments: Of ``work``.

        Returns:
            What ``work`` returns.
        """
        return work(*arguments)


def read_step(places: Places, name: str) -> StepRecord | None:
    """Returns the record of a step; None if it is not done.

    Args:
        places: Of the output folder.
        name: Of the step.
    """
    try:
        return build(StepRecord, read_record(places.step(name)))
    except UNREADABLE:
        return None


def is_done(places: Places, step: Step) -> bool:
    """Returns whether a step was done from what it would be made from now, and what it left is whole.

    Args:
        places: Of the output folder.
        step: With the key of what it would be made from now.
    """
    record = read_step(places, step.name)
    return record is not None and record.key == step.key and (step.folder is None or step.is_whole(step.folder))


def run_step(places: Places, step: Step, machine: WholeMachine) -> StepRecord:
    """Does a step, unless it is done.

    Args:
        places: Of the output folder.
        step: What to do.
        machine: Where.

    Returns:
        Its record.

    Raises:
        UserError: If it failed.
    """
    record = read_step(places, step.name)
    if record is not None and is_done(places, step):
        CONSOLE.print(f"{step.title}: done before", highlight=False)
        return record
    begun = places.step(f"{step.name}.begun")
    resumed = begun.is_file() and begun.read_text(errors="replace") == step.key
    if not resumed and step.folder is not None:
        shutil.rmtree(step.folder, ignore_errors=True)  # made from something else
    atomic_write_text(begun, step.key)
    now, log = time.strftime("%H:%M:%S"), places.log(step.name)
    CONSOLE.print(f"[bold]{step.title}[/bold] ({now}, log {log})", highlight=False, soft_wrap=True)
    taken = machine.whole(_do, places, step)
    record = StepRecord(step.name, step.title, list(step.words), step.key, taken.seconds, taken.cpu_seconds, resumed)
    write_record(places.step(step.name), asdict(record))
    begun.unlink(missing_ok=True)
    CONSOLE.print(f"{step.title}: {taken.seconds:.0f} s", highlight=False)
    return record


def run_steps(places: Places, steps: Sequence[Step], machine: WholeMachine, at_once: int) -> list[StepRecord]:
    """Does steps that do not need one another, as `run_step` does each.

    Args:
        places: Of the output folder.
        steps: What to do.
        machine: Where.
        at_once: How many side by side, at most.

    Returns:
        Their records, in the order of the steps.

    Raises:
        UserError: If one failed; none is begun after it.
    """
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="step")
    try:
        return list(pool.map(lambda step: run_step(places, step, machine), steps))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _do(places: Places, step: Step) -> Taken:
    words = step.words
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shared = step.distributed
    if shared is not None and (count := shared.num_processes(gpus)) > 1:
        words = ("torchrun", "--standalone", "--nproc-per-node", str(count), "-m", shared.module, *step.words[1:])
    log, progress, lock = (place(step.name) for place in (places.log, places.progress, places.lock))
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return run_words(words, log, progress, lock, step.settings)
        except CommandLost as error:
            if attempt == _ATTEMPTS or isinstance(error, CommandEnded):
                raise
    raise AssertionError
