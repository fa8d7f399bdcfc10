"""A command forked from the process that has imported everything has the threads and the variables it was given."""

import json
import os
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


TELL = """
import json, os, sys
def main():
    with open(sys.argv[1], "w") as file:
        json.dump(dict(os.environ), file)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a command of a name and a source."""

    def make(name: str, source: str) -> Path:
        (tmp_path / f"{name}.py").write_text(source)
        installed = tmp_path / f"{name}-1.0.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (installed / "entry_points.txt").write_text(f"[console_scripts]\n{name} = {name}:main\n")
        return tmp_path / f"{name}.py"

    monkeypatch.syspath_prepend(str(tmp_path))
    return make


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_forked_command_has_its_threads_and_the_numbers_of_a_fresh_process(tmp_path, install, threads):
    command = install("computing", COMPUTE)
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


def test_a_forked_command_has_the_gpus_and_the_mps_of_the_moment(tmp_path, install, monkeypatch):
    """What it is forked from may be older than the daemon, as in the demo, whose rooms come first."""
    install("telling", TELL)

    def told(gpu: str | None) -> dict[str, str]:
        words = ["telling", str(tmp_path / "told")]
        worker.run_words(words, tmp_path / "log", tmp_path / "progress", tmp_path / "lock", Settings(1, gpu))
        found = json.loads((tmp_path / "told").read_text())
        return {name: value for name, value in found.items() if name.startswith("CUDA_")}

    for name in [name for name in os.environ if name.startswith("CUDA_")]:
        monkeypatch.delenv(name)
    assert told(None) == {} and told("1") == {"CUDA_VISIBLE_DEVICES": "1"}
    there = {"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_MPS_PIPE_DIRECTORY": "/pipes", "CUDA_MPS_LOG_DIRECTORY": "/logs"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    assert told(None) == there and told("1") == {**there, "CUDA_VISIBLE_DEVICES": "1"}
    for name in there:
        monkeypatch.delenv(name)
    assert told(None) == {}
