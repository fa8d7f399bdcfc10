import io
import logging

import pytest

from fit3d_ns.support import progress as progress_module
from fit3d_ns.support.console import CONSOLE, show_log
from fit3d_ns.support.progress import progress


@pytest.fixture
def shown(monkeypatch):
    """What the console shows, and a function that makes it a terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(CONSOLE, "_file", stream)  # not `file`, whose undoing would pin the standard error of this test
    show_log()
    return stream, lambda: monkeypatch.setattr(CONSOLE, "_force_terminal", True)


@pytest.mark.parametrize(
    "package", ["fit3d_ns.data.photos.bundled", "fit3d_rooms.cli", "distill.trainer", "probe.run", "demo"]
)
def test_what_packages_log_is_shown_once_with_time_and_origin(shown, package):
    show_log()  # once more
    long = "x" * 300 + " [bold]/path/[0].png[/bold]"
    logging.getLogger(package).info("%s", long)
    logging.getLogger(package).warning("odd")
    logging.getLogger(package).debug("hidden")
    first, second = shown[0].getvalue().splitlines()
    assert first.startswith("20") and first.endswith(f" {package}: {long}")
    assert second.endswith(f" {package}: WARNING: odd")


def test_a_terminal_shows_bare_sentences(shown, monkeypatch):
    shown[1]()
    monkeypatch.setattr(CONSOLE, "_color_system", None)
    logging.getLogger("probe").info("Report: /a/[b]/report.html")
    logging.getLogger("probe").warning("odd")
    assert shown[0].getvalue() == "Report: /a/[b]/report.html\nodd\n"


def test_only_the_first_process_talks_and_all_warn(shown, monkeypatch):
    monkeypatch.setattr("fit3d_ns.support.console.rank", lambda: 1)
    logging.getLogger("distill").info("Weights: here")
    logging.getLogger("distill").warning("odd")
    assert shown[0].getvalue().splitlines()[0].endswith("distill: WARNING: odd")
    assert shown[0].getvalue().count("\n") == 1


def test_progress_without_a_terminal_logs_a_line_now_and_then(shown, monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with progress("Training", 10, done=4) as advance:
        for step in range(4, 10):
            now[0] += 20
            advance(remark=f"L1 .{step}")
    lines = [record.message for record in caplog.records]
    assert lines == [
        "Training: 6/10, 40 s, 80 s left, L1 .5",
        "Training: 8/10, 80 s, 40 s left, L1 .7",
        "Training: 10/10, 120 s, 0 s left, L1 .9",
    ]


def test_progress_on_a_terminal_is_a_bar_that_ends_full(shown):
    shown[1]()
    with progress("Lifting", 4) as advance:
        advance(0.5, "room_000: rays")
        advance(2)
        logging.getLogger("fit3d_ns").info("above the bar")
    text = shown[0].getvalue()
    assert "Lifting" in text and "4/4" in text and "room_000: rays" in text and "above the bar" in text


@pytest.mark.parametrize(("total", "done", "show"), [(0, 0, True), (3, 3, True), (3, 0, False)])
def test_nothing_to_do_shows_nothing(shown, total, done, show):
    for terminal in (False, True):
        if terminal:
            shown[1]()
        with progress("Reading", total, done, show) as advance:
            advance(total - done)
        assert shown[0].getvalue() == ""
