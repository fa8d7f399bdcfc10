"""Who works on scenes, and what is tried again."""

import json
import multiprocessing
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import TINY_ROOM
from tiny_scenes import digest, leftovers

from fit3d_loop.commands import steps, worker
from fit3d_loop.commands.steps import Distributed, Step, ThisMachine, is_done, run_step, run_steps
from fit3d_loop.commands.worker import CommandEnded, CommandFailed, CommandLost, Settings, Taken
from fit3d_loop.config import LoopConfig
from fit3d_loop.loop import run_loop
from fit3d_loop.records import ORIGINAL, Places, read_state
from fit3d_loop.scenes import runner
from fit3d_loop.scenes.machine import PhotoCounts
from fit3d_loop.scenes.runner import open_engine
from fit3d_loop.scenes.scene_list import SceneSource
from fit3d_loop.scenes.stages import Job
from fit3d_ns.data.points.splat_ply import write_splat_ply
from fit3d_ns.runs.checkpoints import read_checkpoint
from fit3d_ns.support.json_files import read_record


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
    with open_engine(config, PhotoCounts((8,) * len(names), 0.1), 1) as engine:
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


def ended(folder: Path, words: list[str]) -> int | None:
    """How a process ends that carries out a command."""
    arguments = words, *(str(folder / name) for name in ("log", "progress", "lock")), Settings(1), {}
    process = multiprocessing.get_context("fork").Process(target=worker._run, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("status", [-signal.SIGKILL, -signal.SIGTERM, 3, 0])
def test_a_command_ends_as_the_fresh_process_did_that_it_runs_in(tmp_path, monkeypatch, status):
    """Probes and torchrun have one: where it is killed, another attempt may help."""
    monkeypatch.setattr(worker, "_carry_out", lambda *_: status)
    assert ended(tmp_path, ["fit3d-probe"]) == status


@pytest.mark.parametrize(
    ("words", "fresh"), [("--workers 0", False), ("--workers=0", False), ("--workers 04", True), ("--seeds 0", True)]
)
def test_a_probe_is_forked_where_it_forks_nothing_itself(tmp_path, monkeypatch, words, fresh):
    monkeypatch.setattr(worker, "_in_a_fresh_process", lambda *_: 3)
    monkeypatch.setattr("probe.cli.main", lambda: sys.exit(4))
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: False)
    assert ended(tmp_path, ["fit3d-probe", "depth", *words.split()]) == (3 if fresh else 4)


@pytest.mark.parametrize("has_cuda", [True, False])
def test_a_fork_that_cannot_use_cuda_will_do_where_there_is_none(tmp_path, monkeypatch, has_cuda):
    """With torch's usual build on a machine without GPU, asking for one makes every later fork such a one."""
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: True)
    monkeypatch.setattr("distill.cli.main", lambda: sys.exit(4))
    monkeypatch.setitem(sys.modules, "fit3d_loop.commands.preload", SimpleNamespace(HAS_CUDA=has_cuda))
    assert ended(tmp_path, ["fit3d-distill"]) == (worker._BAD_FORK if has_cuda else 4)


@pytest.mark.parametrize(
    ("num_gpus", "batch_size", "num_parts", "processes"),
    [(1, 64, 1, 1), (2, 2, 1, 1), (8, 4, 1, 1), (2, 15, 1, 1), (2, 16, 1, 2), (8, 16, 1, 2), (4, 32, 1, 4)]
    + [(3, 32, 1, 2), (4, 24, 1, 3), (2, 25, 1, 1), (2, 16, 8, 2), (4, 48, 4, 4), (4, 32, 16, 2)],
)
def test_gpus_share_a_training_where_each_has_enough_to_do(
    tmp_path, monkeypatch, num_gpus, batch_size, num_parts, processes
):
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    monkeypatch.setattr(steps, "run_words", lambda words, *_: taken.append(words) or Taken(1.0, 1.0))
    words = ("fit3d-distill", "--targets", "lifted")
    shared = Distributed("distill", batch_size, num_parts)
    run_step(Places(tmp_path), Step("a", "a", words, Settings(1), "key", distributed=shared), ThisMachine())
    started = ("torchrun", "--standalone", "--nproc-per-node", str(processes), "-m", "distill", "--targets", "lifted")
    assert taken == [words if processes == 1 else started]
    assert batch_size % (processes * num_parts) == 0 or processes == 1


def test_steps_side_by_side(tmp_path):
    """Both wait until the other has begun."""
    begun = threading.Barrier(2)

    class Machine:
        def whole(self, work, *arguments):
            begun.wait(timeout=60)
            return Taken(1.0, 2.0)

    both = [Step(name, name, ("true",), Settings(1), "key") for name in ("a", "b")]
    records = run_steps(Places(tmp_path), both, Machine(), at_once=2)
    assert [record.name for record in records] == ["a", "b"]
    assert all(is_done(Places(tmp_path), step) for step in both)


def test_nothing_begins_after_a_step_that_failed(tmp_path):
    begun = []

    class Machine:
        def whole(self, work, *arguments):
            begun.append(arguments[1].name)
            raise CommandFailed("It ended.")

    three = [Step(name, name, ("true",), Settings(1), "key") for name in "abc"]
    with pytest.raises(CommandFailed, match="^It ended.$"):
        run_steps(Places(tmp_path), three, Machine(), at_once=1)
    assert begun[0] == "a" and "c" not in begun


def test_a_step_that_is_ended_on_purpose_is_not_begun_again(tmp_path):
    words = ("fit3d-rooms", str(tmp_path / "rooms"), "--scenes", "1", "--views", "4000")
    step, places = Step("rooms", "Rooms", words, Settings(1), "key"), Places(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_step, places, step, ThisMachine())
        until = time.monotonic() + 900
        while not (tmp_path / "rooms").exists() and not running.done() and time.monotonic() < until:
            time.sleep(0.05)
        worker.end_all()
        with pytest.raises(CommandEnded, match="^fit3d-rooms was ended with what had started it.$"):
            running.result(900)
    assert places.log("rooms").read_text().count("$ fit3d-rooms") == 1


def test_a_process_of_torchruns_that_was_killed_is_lost(tmp_path, monkeypatch):
    def start(words, log, *_):
        log.write_text("  exitcode  : -9 (pid: 7)\n  traceback : Signal 9 (SIGKILL) received by PID 7\n")
        return 1

    monkeypatch.setattr(worker, "_start", start)
    with pytest.raises(CommandLost, match="^torchrun was ended by SIGKILL"):
        worker.run_words(["torchrun"], tmp_path / "log", tmp_path / "progress", tmp_path / "lock", Settings(1))


def test_a_process_that_never_begins_is_tried_again(tmp_path, monkeypatch):
    """It wrote no log: what it was forked from had no memory left, or its node went."""
    monkeypatch.setattr(worker, "_start", lambda *_: 1)
    with pytest.raises(CommandLost, match="^The process of ns-train ended with status 1 before it could begin.$"):
        worker.run_words(["ns-train"], tmp_path / "log", tmp_path / "progress", tmp_path / "lock", Settings(1))


def test_gaussians_of_another_program_are_lifted_and_distilled(finished, scenes, loop_config, tmp_path):
    """Two rounds onto a PLY, beside which nothing is written."""
    checkpoint = next((finished / "geometry" / "a").rglob("step-*.ckpt"))
    parts = read_checkpoint(checkpoint)["pipeline"]
    prefix = "_model.gauss_params."
    gaussians = {name.removeprefix(prefix): value for name, value in parts.items() if name.startswith(prefix)}
    folder = tmp_path / "brought"
    folder.mkdir()
    write_splat_ply(folder / "cloud.ply", {k: v for k, v in gaussians.items() if not k.startswith("fit3d")})
    (tmp_path / "list.txt").write_text(f"brought/cloud.ply --data {scenes / 'a'}\n")
    out = tmp_path / "out"
    assert run_loop(loop_config(tmp_path / "list.txt", out, rounds=2)).complete
    assert [path.name for path in folder.iterdir()] == ["cloud.ply"]
    (state,) = (json.loads(path.read_text()) for path in out.glob("scenes/*.json"))
    assert state["source"]["kind"] == "ply" and set(state["rounds"]) == {"1", "2"}
    assert not (out / "geometry").exists() and leftovers(out) == []
    assert len(list(out.rglob("geometry-*.safetensors"))) == 1  # once; each round leaves its features alone
    cards = [json.loads((out / "rounds" / number / "card.json").read_text()) for number in "12"]
    assert cards[1]["teacher"]["weights_sha256"] == cards[0]["weights_sha256"]


def test_the_end_is_probed_beside_the_control(scenes, loop_config, tmp_path, teacher_weights):
    """Original, student and control in one table, whose numbers the loop's own page has."""
    out = tmp_path / "out"
    flags = "--long-side 56 --workers 0 --assemblies original tuned"
    config = loop_config(scenes, out, probe_data=TINY_ROOM, probe_dataset="rooms", probe_flags=flags)
    assert run_loop(config).complete
    assert (out / "controls" / "control-shift" / "card.json").is_file()
    metrics = json.loads((out / "metrics.json").read_text())
    for task, measure in (("segmentation", "miou"), ("depth", "rmse")):
        rows = metrics["probes"][task]["rows"]
        assert {"original", "tuned", "control"} <= set(rows), rows.keys()
        assert all(rows[name][measure]["mean"] > 0 for name in rows)
    headings = re.findall(r"<h2>(.*?)</h2>", (out / "report.html").read_text())
    assert headings[0] == "What was gained" and "control" in (out / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in (out / "probes").rglob("*") if path.is_file()}
    assert run_loop(config).complete  # nothing is probed again
    assert {path: path.stat().st_mtime_ns for path in before} == before
    numbers = out / "probes" / "depth" / "metrics.json"
    whole = json.loads(numbers.read_text())
    numbers.write_text(json.dumps({**whole, "facts": 7}))  # what the loop's own page has no use for
    assert run_loop(config).complete
    assert read_record(numbers)["facts"].keys() == whole["facts"].keys()


@pytest.mark.slow
def test_two_nodes_of_a_cluster_and_one_of_them_lost(finished, scenes, loop_config, tmp_path):
    """The same student, though a node goes while a scene is trained on it."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    out = tmp_path / "out"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    lost, over = [], threading.Event()

    def lose() -> None:
        while not over.is_set():
            if len(list(out.glob("geometry/*/*/*/*/step-*.ckpt"))) == 2:  # both nodes are at work
                cluster.remove_node(second, allow_graceful=False)
                lost.append(second)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=lose, daemon=True)
    thread.start()
    try:
        assert run_loop(loop_config(scenes, out, engine="auto", ray_address=cluster.address)).complete
    finally:
        over.set()
        thread.join()
        cluster.shutdown()
    assert lost and digest(out) == digest(finished) and leftovers(out) == []
