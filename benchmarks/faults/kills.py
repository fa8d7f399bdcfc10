"""Commands killed at random moments and started again: every value must be that of an undisturbed run."""

import os
import random
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.faults.commands import Command
from benchmarks.faults.running import Running, run
from benchmarks.faults.server import workers_below
from benchmarks.faults.world import World


@dataclass(frozen=True)
class Killed:
    """A command that was killed, and what came of it."""

    command: str
    """Its name."""
    signal: str
    """What the command itself got."""
    moments: list[float]
    """Seconds after each start at which it was killed."""
    equal: bool
    """Whether, started again, it came to the same values and left nothing behind."""
    text: str
    """What was not as it should be, or nothing."""
    workers: int = 0
    """How many of the kills met a process that the command had started, which tries again by itself."""

    def plain(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return asdict(self)


def kill(
    world: World, command: Command, expected: dict[str, Any], seconds: float, rng: random.Random, number: signal.Signals
) -> Killed:
    """Starts a command from nothing, kills it one to three times, and lets it end.

    Args:
        world: Restored first, without what the command makes.
        command: One that is meant to be started again.
        expected: Its values in an undisturbed run.
        seconds: What that took.
        rng: Draws the moments.
        number: SIGKILL, or SIGTERM.

    Returns:
        What came of it.
    """
    world.restore(without=world.made[command.name])
    moments, workers = [], 0
    for _ in range(rng.randint(1, 3)):
        victims: list[int] = []
        moment, at_worker = rng.uniform(0.0, seconds), rng.random() < 0.5
        running = Running(command.call, world.log)
        ended = running.wait(until=moment)
        if ended is None:
            victims = workers_below(world.root) if at_worker else []
            if victims:
                workers += 1
                with suppress(ProcessLookupError):
                    os.kill(rng.choice(victims), signal.SIGKILL)
            else:
                running.signal(number)
            ended = running.wait()
            moments.append(round(moment, 3))
        assert ended is not None
        by_itself = victims or ended.status not in (0, 128 + number)  # what its helpers say of its death is no matter
        if by_itself and (ended.crashed or ended.status):
            return Killed(command.name, number.name, moments, False, ended.text[-2000:], workers)
    ended = run(command.call, world.log)
    if ended.status:
        return Killed(command.name, number.name, moments, False, ended.text[-3000:], workers)
    found = command.values(world)
    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    left = [str(path) for path in world.files() if any(part.endswith(".tmp") for part in path.parts)]
    left = [path for path in left if "cache" not in path and not path.startswith("c/")]  # of caches after a day
    text = f"differing: {differing[:3]}, left behind: {left[:3]}" if differing or left else ""
    return Killed(command.name, number.name, moments, not text, text, workers)


def start_two(world: World, command: Command, expected: dict[str, Any]) -> tuple[bool, str]:
    """Starts a command twice at once: both come to the same values, or one refuses in a sentence.

    Args:
        world: Restored first, without what the command makes.
        command: One that is meant to be started again.
        expected: Its values in an undisturbed run.

    Returns:
        Whether it was so; and what was said otherwise.
    """
    world.restore(without=world.made[command.name])
    second_log = world.log.with_name("second.txt")
    both = [Running(command.call, log) for log in (world.log, second_log)]
    ends = [running.wait() for running in both]
    texts = [end.text[-1500:] for end in ends if end is not None and end.status and end.sentence is None]
    done = [end for end in ends if end is not None and end.status == 0]
    if not texts and not done:
        texts = [end.sentence or "" for end in ends if end is not None]
    if not texts and command.values(world) != expected:
        texts = ["other values"]
    os.sync()
    return not texts, "\n".join(texts)
