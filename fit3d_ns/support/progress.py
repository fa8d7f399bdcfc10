"""Progress with the time that is left: a bar on a terminal, a line in the log now and then elsewhere."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fit3d_ns.support.console import CONSOLE, rank

_LOGGER = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 30.0
Item = TypeVar("Item")


class Advance(Protocol):
    """Takes the number of items done since the last call, maybe a part of one, and a remark to show from now on."""

    def __call__(self, count: float = 1, remark: str | None = None) -> None:
        """Moves the progress on."""
        ...


@contextmanager
def progress(title: str, total: int, done: int = 0, show: bool = True) -> Iterator[Advance]:
    """Shows how far a piece of work has come, and how long the rest will take.

    Nothing is shown where there is nothing to do, nor by any process but the first.

    Args:
        title: Of the work.
        total: Items to do in all.
        done: Items done before.
        show: Whether to show anything.

    Yields:
        The function to call with each item.
    """
    if not show or rank() or total <= done:
        yield lambda count=1, remark=None: None
        return
    if _watchers:
        yield _Watched(_watchers[-1], title, total, done)
        return
    if not CONSOLE.is_terminal:
        yield _LineLogger(title, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=CONSOLE) as bar:
        task = bar.add_task(title, total=total, completed=done, remark="")

        def advance(count: float = 1, remark: str | None = None) -> None:
            bar.advance(task, count)
            if remark is not None:
                bar.update(task, remark=remark)

        yield advance
        bar.update(task, completed=total)  # some end before the last item they had reckoned with


def tracked(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Goes through items under a `progress`.

    Args:
        items: Any.
        title: Of the work.
        total: How many there are.

    Yields:
        The items.
    """
    with progress(title, total) as advance:
        for item in items:
            yield item
            advance()


_watchers: list[Callable[[str, float, int], None]] = []


def watch(watcher: Callable[[str, float, int], None]) -> None:
    """Has all progress of this process told to a program instead of shown.

    Args:
        watcher: Called with the work's title, the items done and the items in all.
    """
    _watchers.append(watcher)


class _Watched:
    """Tells a watcher where the work stands."""

    def __init__(self, watcher: Callable[[str, float, int], None], title: str, total: int, done: int) -> None:
        self._watcher, self._title, self._total, self._done = watcher, title, total, float(done)

    def __call__(self, count: float = 1, remark: str | None = None) -> None:
        self._done += count
        self._watcher(self._title, self._done, self._total)


class _LineLogger:
    """Logs where the work stands, now and then and at its end."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._done, self._first = title, total, float(done), done
        self._start = self._last = time.monotonic()
        self._remark = ""

    def __call__(self, count: float = 1, remark: str | None = None) -> None:
        self._done += count
        if remark is not None:
            self._remark = remark
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and self._done < self._total:
            return
        self._last = now
        taken, gained = now - self._start, self._done - self._first
        left = taken / gained * (self._total - self._done) if gained > 0 else float("nan")
        where = f"{self._title}: {self._done:.0f}/{self._total}, {taken:.0f} s, {left:.0f} s left"
        _LOGGER.info("%s", f"{where}, {self._remark}" if self._remark else where)
