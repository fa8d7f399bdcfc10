"""Processes that read photos for a probe."""

import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
import os, signal, sys, time
from probe.data import batches

begin = batches._begin_reader

def begin_late(*arguments):
    if arguments[-1] == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1.0)  # the parent is gone before torch's own watch of it begins
    print(os.getpid(), flush=True)
    begin(*arguments)

batches._begin_reader = begin_late
for _ in batches.ordered_samples(lambda index: {"photo": index}, list(range(8)), workers=2):
    pass
"""


def test_readers_end_with_a_probe_that_is_killed_while_they_begin():
    """One that stayed would hold the lock of the output folder for ever."""
    probe = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    assert probe.stdout is not None
    first = int(probe.stdout.readline())
    assert probe.wait() == -signal.SIGKILL
    end = time.monotonic() + 30
    while Path(f"/proc/{first}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{first}").exists()
    probe.stdout.read()  # until no reader holds its other end
