"""Progress with the time that is left: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fit3d_ns.support.processes import rank

_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress(console: Console, title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Shows progress; lends a function that takes the number of items done since, and maybe a remark.

    Only the first process shows anything, and nothing is shown where there is nothing to do.
    """
    if rank() or total <= done:
        yield lambda count, remark="": None
        return
    if not console.is_terminal:
        yield _line_printer(console, title, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=done, remark="")

        def advance(count: int, remark: str = "") -> None:
            bar.advance(task, count)
            if remark:
                bar.update(task, remark=remark)

        yield advance


def _line_printer(console: Console, title: str, total: int, done: int) -> Callable[..., None]:
    start = last = time.monotonic()
    finished, first = done, done

    def advance(count: int, remark: str = "") -> None:
        nonlocal finished, last
        finished += count
        now = time.monotonic()
        if now - last < _SECONDS_BETWEEN_LINES and finished < total:
            return
        last = now
        left = (now - start) / max(1, finished - first) * (total - finished)
        console.print(f"{title}: {finished}/{total}, {now - start:.0f} s, {left:.0f} s left {remark}", highlight=False)

    return advance
