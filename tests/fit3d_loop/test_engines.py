"""Who works on scenes, and what is tried again."""

import threading
import time
from pathlib import Path

import pytest
from tiny_scenes import digest, leftovers

from fit3d_loop.commands import worker
from fit3d_loop.commands.worker import CommandFailed, CommandLost, Settings
from fit3d_loop.config import LoopConfig
from fit3d_loop.loop import run_loop
from fit3d_loop.records import ORIGINAL, Places, read_state
from fit3d_loop.scenes import runner
from fit3d_loop.scenes.machine import Photos
from fit3d_loop.scenes.runner import open_engine
from fit3d_loop.scenes.scene_list import SceneSource
from fit3d_loop.scenes.stages import Job


def make_jobs(folder: Path, names: str) -> list[Job]:
    """Jobs that nobody carries out."""
    sources = [SceneSource(name, "photos", folder / name, said="x") for name in names]
    return [Job(one, folder, 1, ORIGINAL, ("vit", None), 10, ((), ()), 42, Settings(1)) for one in sources]


def run_jobs(folder: Path, names: str, work, monkeypatch) -> dict[str, str]:
    """What becomes of jobs, two at once, where ``work(name, running)`` says what becomes of one."""
    running: set[str] = set()
    lock = threading.Lock()

    def fake(job: Job):
        with lock:
            running.add(job.source.name)
        time.sleep(0.05)
        with lock:
            seen = set(running)
        result = work(job.source.name, seen)
        with lock:
            running.discard(job.source.name)
        return result

    monkeypatch.setattr(runner, "work_on_scene", fake)
    config = LoopConfig(folder, folder, engine="processes", scenes_at_once=2)
    with open_engine(config, Photos((8,) * len(names), 0.1), 1) as engine:
        outcomes = engine.run(make_jobs(folder, names), lambda done: None)
    return {outcome.job.source.name: outcome.result for outcome in outcomes}


def test_a_scene_that_needs_the_whole_memory_is_tried_again_without_neighbours(tmp_path, monkeypatch):
    attempts = []

    def work(name, running):
        if name != "b":
            return "done", None
        attempts.append(running)
        return ("done", None) if len(running) == 1 else ("lost", "CUDA out of memory.")

    assert run_jobs(tmp_path, "abcd", work, monkeypatch) == dict.fromkeys("abcd", "done")
    assert len(attempts) == 2 and attempts[-1] == {"b"}
    assert not Places(tmp_path).state("b").exists()  # no failure is on record


def test_a_scene_that_is_lost_each_time_is_recorded(tmp_path, monkeypatch):
    def work(name, running):
        return ("lost", "It was ended by SIGKILL.") if name == "b" else ("done", None)

    assert run_jobs(tmp_path, "abc", work, monkeypatch) == {"a": "done", "b": "lost", "c": "done"}
    (job,) = make_jobs(tmp_path, "b")
    failure = read_state(Places(tmp_path), "b", job.source.identity).failure
    assert failure and failure["stage"] == "process"
    assert failure["sentence"] == "It was ended by SIGKILL. It was tried 3 times."


@pytest.mark.parametrize(
    ("sentence", "error"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", CommandLost),
        ("MemoryError", CommandLost),
        ("OSError: [Errno 12] Cannot allocate memory", CommandLost),
        ("The GPU's memory does not suffice for 4 views", CommandLost),
        ("There is no photo images/3.png", CommandFailed),
    ],
)
def test_only_what_may_succeed_elsewhere_is_tried_again(tmp_path, monkeypatch, sentence, error):
    def start(words, log, *_):
        log.write_text(f"$ ns-train\nsome line\nError: {sentence}\n")
        return 1

    monkeypatch.setattr(worker, "_start", start)
    with pytest.raises(error) as caught:
        worker.run_words(["ns-train"], tmp_path / "log", tmp_path / "progress", tmp_path / "lock", Settings(1))
    assert str(caught.value) == sentence and type(caught.value) is error


def test_two_nodes_of_a_cluster_and_one_of_them_lost(finished, scenes, loop_config, tmp_path):
    """The same student, though a node goes while a scene is trained on it."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    out = tmp_path / "out"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    lost = []

    def lose() -> None:
        until = time.monotonic() + 240
        while time.monotonic() < until:
            if len(list(out.glob("geometry/*/*/*/*/step-*.ckpt"))) == 2:  # both nodes are at work
                cluster.remove_node(second, allow_graceful=False)
                lost.append(second)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    try:
        config = loop_config(scenes, out, engine="auto", ray_address=cluster.address, geometry_steps=10)
        assert run_loop(config).complete
    finally:
        thread.join(1)
        cluster.shutdown()
    assert lost and digest(out) == digest(finished) and leftovers(out) == []
