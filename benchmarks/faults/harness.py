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
from benchmarks.faults.kills import kill, start_two
from benchmarks.faults.limits import Limited, file_size, full_disk, read_only
from benchmarks.faults.reading import kind_of
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
    records = _recorded(config)
    import_everything()
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    processes = [context.Process(target=_work, args=(config, job, queue, start, records)) for job in range(config.jobs)]
    for process in processes:
        process.start()
    finished, reads = 0, {}
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with config.log.open("a") as log:
        while finished < len(processes):
            record = queue.get()
            if record is None:
                finished += 1
                continue
            if "reads" in record:
                reads = record["reads"]
                continue
            record["text"] = record["text"].replace(str(config.folder), "").strip()[-700:]
            records.append(record)
            log.write(json.dumps(record) + "\n")
            log.flush()
            if not record["good"] or len(records) % 20 == 0:
                print(len(records), json.dumps(record)[:600], flush=True)
    for process in processes:
        process.join()
    return records, reads


def _recorded(config: FaultsConfig) -> list[dict[str, Any]]:
    """What an earlier start did, which was stopped; the cases that ended badly are run again where it is asked for."""
    lines = config.log.read_text().splitlines() if config.log.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    if config.again:
        records = [record for record in records if record["good"]]
        config.log.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def _work(config: FaultsConfig, job: int, queue: Any, start: float, recorded: list[dict[str, Any]]) -> None:
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
    known = {(record["command"], record["file"], record["kind"], record["anew"]) for record in mine}
    done, share = 0, len(range(job, config.damages - len(mine), config.jobs))
    for number, case in enumerate(all_cases(chosen, world.root, config.seed)):
        if done >= share:
            return
        if number % config.jobs != job or (case.command, case.file, case.kind, case.anew) in known:
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
    content["reads"] = reads
    lines = ",\n".join(json.dumps(record) for record in records)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(f'{json.dumps(content)[:-1]}, "cases": [\n{lines}\n]}}\n')
    if config.minutes is None:
        config.log.unlink(missing_ok=True)
