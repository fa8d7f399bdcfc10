"""How far the scenes are: one live table on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.live import Live
from rich.table import Table as RichTable

from fit3d_loop.commands.worker import read_progress
from fit3d_loop.records import Places
from fit3d_loop.scenes.runner import Outcome
from fit3d_loop.scenes.scene_list import scenes_in_words
from fit3d_ns.support.console import CONSOLE

_SECONDS_BETWEEN_LINES = 30.0
_MOST_ROWS = 24


class Table:
    """Shows the scenes of a round.

    Args:
        places: Of the output folder.
    """

    def __init__(self, places: Places) -> None:
        self._places = places

    @contextmanager
    def round(self, number: int, rounds: int, names: Sequence[str]) -> Iterator[Callable[[Sequence[Outcome]], None]]:
        """Shows a round while it lasts.

        Args:
            number: Of the round.
            rounds: All rounds.
            names: Its scenes.

        Yields:
            What to call now and then, with what has come to an end.
        """
        title = f"Round {number} of {rounds}"
        view = _View(self._places, title, names)
        if not CONSOLE.is_terminal:
            CONSOLE.print(f"{title}: {scenes_in_words(len(names))}", highlight=False)
            yield view.log
            return
        with Live(console=CONSOLE, refresh_per_second=2) as live:
            yield lambda done: live.update(view.table(done))


class _View:
    """Where a round stands."""

    def __init__(self, places: Places, title: str, names: Sequence[str]) -> None:
        self._places, self._title, self._names = places, title, names
        self._start = self._last = time.monotonic()
        self._said: set[str] = set()

    def _running(self) -> dict[str, str]:
        found = {}
        for name in self._names:
            said = read_progress(self._places.progress(name))
            if said is not None:
                found[name] = f"{said['title']}: {said['done']:.0f} of {said['total']}"
        return found

    def _summary(self, done: Sequence[Outcome], running: int) -> str:
        passed = time.monotonic() - self._start
        failed = sum(outcome.result != "done" for outcome in done)
        text = f"{len(done) - failed} done, {failed} failed, {running} running, "
        text += f"{max(len(self._names) - len(done) - running, 0)} waiting, {passed:.0f} s"
        if done:
            rate = len(done) / passed * 3600
            text += f", {rate:.0f} scenes an hour, {(len(self._names) - len(done)) / rate * 60:.0f} min left"
        return text

    def table(self, done: Sequence[Outcome]) -> RichTable:
        """The live table."""
        running = self._running()
        table = RichTable(title=self._title, caption=self._summary(done, len(running)), expand=True)
        table.add_column("scene")
        table.add_column("state")
        for name, what in list(running.items())[:_MOST_ROWS]:
            table.add_row(name, what)
        for outcome in [outcome for outcome in done if outcome.result != "done"][-_MOST_ROWS:]:
            table.add_row(outcome.job.source.name, f"[red]{outcome.sentence}[/red]")
        return table

    def log(self, done: Sequence[Outcome]) -> None:
        """Lines of a log."""
        for outcome in done:
            name = outcome.job.source.name
            if outcome.result != "done" and name not in self._said:
                self._said.add(name)
                CONSOLE.print(f"{name} failed: {outcome.sentence}", highlight=False, markup=False, soft_wrap=True)
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES or len(done) == len(self._names):
            self._last = now
            running = self._running()
            CONSOLE.print(f"{self._title}: {self._summary(done, len(running))}", highlight=False, soft_wrap=True)
