"""Pieces of work that depend on each other, each done once: its record is written last, and found by the next run."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_json


@dataclass(frozen=True)
class Piece:
    """One step of the evidence.

    Attributes:
        name: Unique; also the place of its record below the folder of records.
        stage: Which steps of the command line it belongs to.
        lane: Pieces of a lane share a number of places.
        work: Does it; what it returns is the record.
        needs: Names of the pieces whose outcome it uses.
        seconds: Expected, alone on an H100.
        rank: Of the pieces that could start, the one with the lowest rank does.
    """

    name: str
    stage: str
    lane: str
    work: Callable[[], dict[str, Any]]
    needs: tuple[str, ...] = ()
    seconds: float = 0.0
    rank: int = 0


class Records:
    """What the pieces that are done left.

    Args:
        folder: Where their JSON files are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, name: str) -> Path:
        """Returns the place of a piece's record.

        Args:
            name: Of a piece.
        """
        return self._folder / f"{name}.json"

    def has(self, name: str) -> bool:
        """Returns whether a piece is done.

        Args:
            name: Of a piece.
        """
        return self.path(name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """Returns a piece's record.

        Args:
            name: Of a piece that is done.
        """
        return json.loads(self.path(name).read_text())

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        """Marks a piece as done.

        Args:
            name: Of a piece.
            record: JSON-able.
        """
        atomic_write_json(self.path(name), record)


def to_do(
    pieces: Sequence[Piece], records: Records, stages: Sequence[str] = (), pattern: str | None = None
) -> list[Piece]:
    """Returns the pieces that have no record yet, in the order of their ranks.

    Args:
        pieces: All there are.
        records: Of those that are done.
        stages: Which stages; all if empty.
        pattern: Regular expression that is found in the names; any name if None.

    Raises:
        UserError: If the pattern is none.
    """
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise UserError(f"--pieces {pattern} is no regular expression: {error}.") from error
    missing = [
        piece
        for piece in pieces
        if not records.has(piece.name) and (not stages or piece.stage in stages) and wanted.search(piece.name)
    ]
    return sorted(missing, key=lambda piece: piece.rank)


def run_pieces(pieces: Sequence[Piece], records: Records, places: Mapping[str, int]) -> None:
    """Does pieces side by side, each as soon as what it needs is there.

    Args:
        pieces: In the order in which they are to start if they can.
        records: Of the pieces that are done, and of these when they are.
        places: How many pieces of each lane run at a time.

    Raises:
        UserError: After all others are done, if some failed or could not start.
    """
    waiting, running, failed = list(pieces), dict[Future, Piece](), dict[str, str]()
    with ThreadPoolExecutor(sum(places.values())) as threads:
        while True:
            for piece in list(waiting):
                used = sum(other.lane == piece.lane for other in running.values())
                if used < places[piece.lane] and all(records.has(name) for name in piece.needs):
                    waiting.remove(piece)
                    running[threads.submit(_do, piece, records)] = piece
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                piece, error = running.pop(future), future.exception()
                if error is not None:
                    failed[piece.name] = str(error) or type(error).__name__
                    print(f"failed: {piece.name}: {failed[piece.name]}", flush=True)
    if failed or waiting:
        stuck = f"; {len(waiting)} more need what is missing ({waiting[0].name} and others)" if waiting else ""
        listed = "; ".join(f"{name}: {reason}" for name, reason in failed.items()) or "nothing failed"
        raise UserError(f"{len(failed)} steps failed ({listed}){stuck}.")


def _do(piece: Piece, records: Records) -> None:
    start = time.perf_counter()
    record = piece.work()
    seconds = time.perf_counter() - start
    records.write(piece.name, {**record, "seconds": round(seconds, 2)})
    print(f"{time.strftime('%H:%M:%S')} {piece.name}: {seconds:.1f} s", flush=True)


def run_command(command: Sequence[str | Path], log: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs a command of the product, its output in a file.

    Args:
        command: Program and arguments.
        log: Where its output goes.
        environment: Its environment variables.

    Returns:
        The command, for the record.

    Raises:
        UserError: If it fails; with the last line it printed.
    """
    words = [str(word) for word in command]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        done = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, env=dict(environment), check=False)
    if done.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        raise UserError(
            f"{' '.join(words[:4])} ... ended with status {done.returncode} ({lines[-1][:300]}): see {log}."
        )
    return {"command": " ".join(words)}
