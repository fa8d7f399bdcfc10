"""All cases shared among processes, each with a world of its own; results as JSON and as a table."""

import json
import multiprocessing
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.commands import Command, build_world, import_everything
from benchmarks.faults.damage import FAULTS, all_cases, judge
from benchmarks.faults.kills import kill, start_two, undisturbed
from benchmarks.faults.limits import file_size, full_disk, read_only
from benchmarks.faults.world import World


@dataclass
class FaultsConfig:
    """Damages, kills and starves the commands, and says what came of it."""

    output: Path = Path("benchmarks/results/faults.json")
    """Where every case is written."""
    folder: Path = Path("/dev/shm/fit3d-faults")
    """Where the worlds are; a folder in memory is best."""
    damages: int = 400
    """Damaged files; 0 for none."""
    kills: int = 200
    """Commands killed; 0 for none."""
    limits: int = 40
    """Commands on full disks, under limits and two at a time; 0 for none."""
    jobs: int = 2
    """Processes."""
    minutes: float | None = None
    """After which no further case is begun; None: all are."""
    seed: int = 0
    """Of what is drawn."""
    only: tuple[str, ...] = ()
    """Names of commands; all if none is named."""


def run_all(config: FaultsConfig) -> list[dict[str, Any]]:
    """Runs what a configuration asks for.

    Args:
        config: The user's choices.

    Returns:
        One record for each case, the first of a job's first.
    """
    start = time.monotonic()
    import_everything()
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    processes = [context.Process(target=_work, args=(config, job, queue, start)) for job in range(config.jobs)]
    for process in processes:
        process.start()
    records: list[dict[str, Any]] = []
    finished = 0
    while finished < len(processes):
        record = queue.get()
        if record is None:
            finished += 1
            continue
        records.append(record)
        if not record["good"] or len(records) % 20 == 0:
            print(len(records), json.dumps(record)[:600], flush=True)
    for process in processes:
        process.join()
    return records


def _work(config: FaultsConfig, job: int, queue: Any, start: float) -> None:
    try:
        world, commands = build_world(config.folder / str(job))
        chosen = [command for command in commands if not config.only or command.name in config.only]
        sources = [
            (config.damages, _damages(config, job, world, chosen)),
            (config.kills, _kills(config, job, world, chosen)),
            (config.limits, _limits(config, job, world, chosen)),
        ]
        for record in _in_turn(sources):
            queue.put(record)
            if config.minutes is not None and time.monotonic() - start > 60 * config.minutes:
                break
    except Exception as error:
        queue.put({"what": "harness", "good": False, "text": repr(error)[-4000:]})
        raise
    finally:
        queue.put(None)


def _in_turn(sources: list[tuple[int, Iterator[dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
    """Yields from each source as often as its share asks, so that whatever stops it early leaves some of each."""
    taken = [0.0 if count else float("inf") for count, _ in sources]
    while min(taken) < float("inf"):
        place = taken.index(min(taken))
        count, source = sources[place]
        record = next(source, None)
        if record is None:
            taken[place] = float("inf")
            continue
        taken[place] += 1 / count
        yield record


def _damages(config: FaultsConfig, job: int, world: World, chosen: list[Command]) -> Iterator[dict[str, Any]]:
    by_name = {command.name: command for command in chosen}
    whole: dict[str, dict[str, Any]] = {}
    done, share = 0, len(range(job, config.damages, config.jobs))
    for case in all_cases(chosen, world.root, config.seed)[job :: config.jobs]:
        if done >= share:
            return
        if case.command not in whole:
            world.restore(by_name[case.command].without)
            whole[case.command] = _values_of_a_second_start(world, by_name[case.command])
        verdict = judge(world, by_name[case.command], case, whole[case.command])
        if verdict is not None:
            done += 1
            yield {"what": "damage", "good": verdict.end not in FAULTS, **verdict.plain()}


def _kills(config: FaultsConfig, job: int, world: World, chosen: list[Command]) -> Iterator[dict[str, Any]]:
    long = [command for command in chosen if command.restarts]
    fresh: dict[str, tuple[dict[str, Any], float]] = {}
    rng = random.Random(f"{config.seed} {job}")
    for number in range(job, config.kills, config.jobs):
        command = long[number // config.jobs % len(long)]
        if command.name not in fresh:
            fresh[command.name] = undisturbed(world, command)
        sent = signal.SIGTERM if number % 8 == 7 else signal.SIGKILL
        killed = kill(world, command, *fresh[command.name], rng, sent)
        yield {"what": "kill", "good": killed.equal, **killed.plain()}


def _limits(config: FaultsConfig, job: int, world: World, chosen: list[Command]) -> Iterator[dict[str, Any]]:
    long = [command for command in chosen if command.restarts]
    fresh: dict[str, dict[str, Any]] = {}
    rng = random.Random(f"limits {config.seed} {job}")
    for number in range(job, config.limits, config.jobs):
        place = number // config.jobs
        command, which = long[place % len(long)], (place + place // len(long)) % 4
        if command.name not in fresh:
            fresh[command.name] = undisturbed(world, command)[0]
        expected = fresh[command.name]
        if which == 3:
            good, text = start_two(world, command, expected)
            yield {"what": "limit", "command": command.name, "limit": "two at once", "good": good, "text": text}
            continue
        if which == 0:
            limited = file_size(world, command, expected, rng)
        elif which == 1:
            limited = full_disk(world, command, expected, rng)
        else:
            limited = read_only(world, command, expected)
        if limited is not None:
            yield {"what": "limit", **limited.plain()}


def _values_of_a_second_start(world: World, command: Command) -> dict[str, Any]:
    """What a command gives in the world as it is, where most of its work is done already."""
    from benchmarks.faults.running import run

    ended = run(command.call, world.log)
    if ended.status:
        raise RuntimeError(f"{command.name} failed in a whole world:\n{ended.text}")
    return command.values(world)


def table(records: list[dict[str, Any]]) -> str:
    """Returns the table of docs/reliability.md.

    Args:
        records: Of `run_all`.
    """
    lines = ["| command | damaged files | equal or healed | one sentence | taken at its word | faults |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    damaged = [record for record in records if record["what"] == "damage"]
    for name in dict.fromkeys(record["command"] for record in damaged):
        ends = Counter(record["end"] for record in damaged if record["command"] == name)
        faults = sum(ends[end] for end in FAULTS)
        shown = (ends.total(), ends["equal"], ends["sentence"], ends["its word"], faults)
        lines.append(f"| {name} | " + " | ".join(map(str, shown)) + " |")
    lines += ["", "| command | kills | equal | limits | as promised |", "|---|---:|---:|---:|---:|"]
    others = [record for record in records if record["what"] in ("kill", "limit")]
    for name in dict.fromkeys(record["command"] for record in others):
        counts = []
        for what in ("kill", "limit"):
            mine = [record for record in others if record["command"] == name and record["what"] == what]
            counts += [len(mine), sum(record["good"] for record in mine)]
        lines.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines) + "\n"


def write(config: FaultsConfig, records: list[dict[str, Any]], seconds: float) -> None:
    """Writes all cases, without the places of this machine.

    Args:
        config: The user's choices.
        records: Of all cases, as JSON values.
        seconds: That all took.
    """
    for record in records:
        record["text"] = record["text"].replace(str(config.folder), "").strip()[-700:]
    content = {"seed": config.seed, "minutes": round(seconds / 60, 1), "written": time.strftime("%Y-%m-%d")}
    lines = ",\n".join(json.dumps(record) for record in records)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(f'{json.dumps(content)[:-1]}, "cases": [\n{lines}\n]}}\n')
