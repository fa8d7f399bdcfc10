"""All cases shared among processes, each with a world of its own; results as JSON and as a table."""

import json
import multiprocessing
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from queue import Empty
from typing import Any

from benchmarks.faults.commands import Command, build_world, import_everything
from benchmarks.faults.damage import FAULTS, Case, all_cases, judge
from benchmarks.faults.kills import kill, start_two
from benchmarks.faults.limits import Limited, file_size, full_disk, read_only
from benchmarks.faults.reading import kind_of
from benchmarks.faults.world import World
from fit3d_loop.commands.worker import end_with_starter
from fit3d_ns.support.files import atomic_write_text


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
    again: bool = False
    """Run once more what ended badly."""

    @property
    def log(self) -> Path:
        """Where every case is written down as it ends, so that a start that was stopped is gone on with."""
        return self.output.with_suffix(".jsonl")


def run_all(config: FaultsConfig) -> tuple[list[dict[str, Any]], dict[str, list[tuple[str, str]]]]:
    """Runs what a configuration asks for, but for what an earlier start has recorded.

    Args:
        config: The user's choices.

    Returns:
        One record for each case, the first of a job's first; and the kinds of files that each command reads.
    """
    start = time.monotonic()
    records, commit = recorded(config), code_state()
    asked = config.damages + config.kills + config.limits
    if records:
        print(f"Going on after {len(records)} cases in {config.log}.", flush=True)
    import_everything()
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    processes = [context.Process(target=_work, args=(config, job, queue, start, records)) for job in range(config.jobs)]
    for process in processes:
        process.start()
    finished, reads, killed = 0, {}, set()
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with config.log.open("a") as log:
        while finished < len(processes):
            try:
                record = queue.get(timeout=10.0)
            except Empty:
                for job, process in enumerate(processes):
                    ended_by = -(process.exitcode or 0)
                    if ended_by > 0 and job not in killed:
                        killed.add(job)
                        finished += 1  # it could not say so
                        print(f"Process {job} was ended by signal {ended_by}: start again for its cases.", flush=True)
                continue
            if record is None:
                finished += 1
                continue
            if "reads" in record:
                reads = record["reads"]
                continue
            record["commit"] = commit
            record["text"] = record["text"].replace(str(config.folder), "").strip()[-700:]
            records.append(record)
            log.write(json.dumps(record) + "\n")
            log.flush()
            if not record["good"] or len(records) % 20 == 0:
                minutes = (time.monotonic() - start) / 60
                print(f"{len(records)} of {asked}, {minutes:.0f} min: {json.dumps(record)[:600]}", flush=True)
    for process in processes:
        process.join()
    return records, reads


def recorded(config: FaultsConfig) -> list[dict[str, Any]]:
    """Returns what an earlier start did, and leaves it in the log, without what is to be run again.

    Args:
        config: The user's choices. A start that was not stopped is gone on with only if asked for once more.
    """
    records = []
    if config.again and config.output.is_file() and not config.log.is_file():
        records = json.loads(config.output.read_text())["cases"]
    for line in config.log.read_text().splitlines() if config.log.is_file() else []:
        with suppress(json.JSONDecodeError):  # a line that a killed start did not end
            records.append(json.loads(line))
    records = [one for one in records if one["what"] != "harness" and (one["good"] or not config.again)]
    if records or config.log.is_file():
        atomic_write_text(config.log, "".join(json.dumps(record) + "\n" for record in records))
    return records


def code_state() -> str:
    """Returns the commit of the code that is run, with ``-dirty`` where files differ from it; else the version."""
    described = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    with suppress(OSError):
        ended = subprocess.run(described, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        if ended.returncode == 0:
            return ended.stdout.strip()
    return version("fit3d-ns")


def _work(config: FaultsConfig, job: int, queue: Any, start: float, recorded: list[dict[str, Any]]) -> None:
    end_with_starter()
    try:
        world, commands = build_world(config.folder / str(job), config.only)
        if job == 0:
            queue.put({"reads": {one.name: sorted(map(kind_of, (*one.inputs, *one.found))) for one in commands}})
        counts = Counter(record["what"] for record in recorded if record.get("seed") == config.seed)
        sources = [
            (config.damages - counts["damage"], _damages(config, job, world, commands, recorded)),
            (config.kills - counts["kill"], _kills(config, job, world, commands, recorded)),
            (config.limits - counts["limit"], _limits(config, job, world, commands, recorded)),
        ]
        for record in _in_turn(sources):
            queue.put({**record, "seed": config.seed})
            if config.minutes is not None and time.monotonic() - start > 60 * config.minutes:
                break
    except Exception as error:
        queue.put({"what": "harness", "good": False, "text": repr(error)[-4000:]})
        raise
    finally:
        queue.put(None)


def _in_turn(sources: list[tuple[int, Iterator[dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
    """Yields from each source as often as its share asks, so that whatever stops it early leaves some of each."""
    taken = [0.0 if count > 0 else float("inf") for count, _ in sources]
    while min(taken) < float("inf"):
        place = taken.index(min(taken))
        count, source = sources[place]
        record = next(source, None)
        if record is None:
            taken[place] = float("inf")
            continue
        taken[place] += 1 / count
        yield record


def _damages(
    config: FaultsConfig, job: int, world: World, chosen: list[Command], recorded: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    by_name = {command.name: command for command in chosen}
    mine = [record for record in recorded if record["what"] == "damage" and record["seed"] == config.seed]
    known = {Case(*(record[field.name] for field in fields(Case))).key for record in mine}
    done, share = 0, len(range(job, config.damages - len(mine), config.jobs))
    for number, case in enumerate(all_cases(chosen, world.root, config.seed)):
        if done >= share:
            return
        if number % config.jobs != job or case.key in known:
            continue
        verdict = judge(world, by_name[case.command], case)
        if verdict is not None:
            done += 1
            yield {"what": "damage", "good": verdict.end not in FAULTS, **verdict.plain()}


def _turns(config: FaultsConfig, job: int, what: str, count: int, recorded: list[dict[str, Any]]) -> list[int]:
    """Numbers of a job's cases that are still to be done."""
    mine = [record for record in recorded if record["what"] == what and record["seed"] == config.seed]
    known = {record["number"] for record in mine}
    return [number for number in range(count) if number % config.jobs == job and number not in known]


def _deck(chosen: list[Command]) -> list[Command]:
    """The commands that are killed, each as often as it says, spread out."""
    most = max((command.restarts for command in chosen), default=0)
    return [command for turn in range(most) for command in chosen if command.restarts > turn]


def _kills(
    config: FaultsConfig, job: int, world: World, chosen: list[Command], recorded: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    deck = _deck(chosen)
    for number in _turns(config, job, "kill", config.kills, recorded):
        command, rng = deck[number % len(deck)], random.Random(f"kill {config.seed} {number}")
        sent = signal.SIGTERM if number % 8 == 7 else signal.SIGKILL
        killed = kill(world, command, *command.first, rng, sent)
        yield {"what": "kill", "number": number, "good": killed.equal, **killed.plain()}


def _limits(
    config: FaultsConfig, job: int, world: World, chosen: list[Command], recorded: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    long = [command for command in chosen if command.restarts]
    for number in _turns(config, job, "limit", config.limits, recorded):
        command, which = long[number % len(long)], (number + number // len(long)) % 4
        expected, rng = command.first[0], random.Random(f"limit {config.seed} {number}")
        if which == 3:
            good, text = start_two(world, command, expected)
            limited = Limited(command.name, "two at once", good, text)
        elif which == 0:
            limited = file_size(world, command, expected, rng)
        elif which == 1:
            limited = full_disk(world, command, expected, rng)
        else:
            limited = read_only(world, command, expected)
        if limited is not None:
            yield {"what": "limit", "number": number, **limited.plain()}


def table(records: list[dict[str, Any]]) -> str:
    """Returns the tables of docs/reliability.md, and how many sentences name the damaged file.

    Args:
        records: Of `run_all`.
    """
    damaged = [record for record in records if record["what"] == "damage"]
    lines = ["| command | damaged files | equal or healed | one sentence | taken at its word | faults |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, mine in _by_command(damaged):
        ends = Counter(record["end"] for record in mine)
        shown = (len(mine), ends["equal"], ends["sentence"], ends["its word"], sum(ends[end] for end in FAULTS))
        lines.append(f"| {name} | " + " | ".join(map(str, shown)) + " |")
    lines += ["", "| command | kills | equal | limits | as promised |", "|---|---:|---:|---:|---:|"]
    for name, mine in _by_command([record for record in records if record["what"] in ("kill", "limit")]):
        good = {what: [record["good"] for record in mine if record["what"] == what] for what in ("kill", "limit")}
        lines.append(f"| {name} | " + " | ".join(f"{len(ends)} | {sum(ends)}" for ends in good.values()) + " |")
    sentences = [record for record in damaged if record["end"] == "sentence"]
    named = sum(bool(record["named"]) for record in sentences)
    return "\n".join([*lines, "", f"{named} of {len(sentences)} sentences name the damaged file."]) + "\n"


def _by_command(records: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    names = dict.fromkeys(record["command"] for record in records)
    return [*((name, [one for one in records if one["command"] == name]) for name in names), ("all", records)]


def write(
    config: FaultsConfig, records: list[dict[str, Any]], reads: dict[str, list[tuple[str, str]]], seconds: float
) -> None:
    """Writes all cases, in the place of what was written down as each ended.

    Args:
        config: The user's choices.
        records: Of `run_all`.
        reads: Of `run_all`.
        seconds: What this start took.
    """
    content = {"seed": config.seed, "minutes": round(seconds / 60, 1), "written": time.strftime("%Y-%m-%d")}
    content["commits"] = Counter(record["commit"] for record in records)
    content["reads"] = reads
    lines = ",\n".join(json.dumps(record) for record in records)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(f'{json.dumps(content)[:-1]}, "cases": [\n{lines}\n]}}\n')
    if config.minutes is None and all(record["what"] != "harness" for record in records):
        config.log.unlink(missing_ok=True)
