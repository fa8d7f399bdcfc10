"""A command forked from the process that has imported everything computes with the threads it was given."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fit3d_loop.commands import worker
from fit3d_loop.commands.worker import Settings

COMPUTE = textwrap.dedent(
    """
    import hashlib, json, os, sys, threading, torch

    def main():
        out = sys.argv[1]
        num_threads = torch.get_num_threads()
        digests = {}

        def compute(name):  # sums of parts that are as many as the threads; matrices; the native pool's loops
            generator = torch.Generator().manual_seed(0)
            values = torch.randn(3_000_001, generator=generator)
            matrix = values[:1_000_000].view(1000, 1000)
            weight = values[:3 * 64 * 49].view(64, 3, 7, 7)
            map_ = torch.nn.functional.conv2d(values[: 3 * 300 * 300].view(1, 3, 300, 300), weight)
            found = [values.sum(), values.softmax(0), matrix @ matrix, map_, torch.sort(values)[0]]
            digests[name] = [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in found]

        both = [threading.Thread(target=compute, args=(name,)) for name in ("first", "second")]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        compute("alone")
        with open(out, "w") as file:
            tasks = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else None
            json.dump({"threads": num_threads, "tasks": tasks, "digests": digests}, file)

    if __name__ == "__main__":
        import torch
        torch.set_num_threads(int(sys.argv[2]))
        main()
    """
)


@pytest.fixture
def command(tmp_path, monkeypatch) -> Path:
    """An installed command that computes."""
    (tmp_path / "computing.py").write_text(COMPUTE)
    installed = tmp_path / "computing-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: computing\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[console_scripts]\ncomputing = computing:main\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "computing.py"


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_forked_command_has_its_threads_and_the_numbers_of_a_fresh_process(tmp_path, command, threads):
    for name in ("forked", "again"):
        words = ["computing", str(tmp_path / name)]
        worker.run_words(words, tmp_path / "log", tmp_path / "progress", tmp_path / "lock", Settings(threads))
    fresh = [sys.executable, str(command), str(tmp_path / "fresh"), str(threads)]
    subprocess.run(fresh, check=True, timeout=300)
    forked, again, alone = (json.loads((tmp_path / name).read_text()) for name in ("forked", "again", "fresh"))
    assert forked["threads"] == again["threads"] == alone["threads"] == threads
    assert forked["digests"] == again["digests"] == alone["digests"]
    assert len(set(map(tuple, forked["digests"].values()))) == 1
    if forked["tasks"] is not None:
        assert forked["tasks"] == alone["tasks"] + 1  # the thread that watches who started it
