"""The loop: same student however it is run, scenes that fail, what is left on disk."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest
from paths import ROOT
from tiny_scenes import VIEWS, break_scene, digest, leftovers, make_scene

from fit3d_loop.commands import worker
from fit3d_loop.loop import run_loop
from fit3d_loop.scenes import stages
from fit3d_ns.support.errors import UserError


def wait_for(condition, seconds: float = 240.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def command_line(config) -> list[str]:
    """The loop as typed."""
    words = [sys.executable, "-m", "fit3d_loop", str(config.scenes)]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name != "scenes" and value is not None and value != field.default:
            words.append(f"--{field.name.replace('_', '-')}={value}")
    return words


def test_a_finished_loop_leaves_a_backbone_its_story_and_nothing_else(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [scene["name"] for scene in metrics["scenes"]] == ["a", "b"] and metrics["failures"] == {}
    for scene in metrics["scenes"]:
        geometry = scene["geometry"]
        assert geometry["training_views"] + geometry["held_out_views"] == VIEWS and geometry["gaussians"] > 100
    (one,) = metrics["rounds"]
    assert one["scenes"] == 2 and one["steps"] == 6
    assert one["weights_sha256"] == json.loads((finished / "card.json").read_text())["weights_sha256"]
    page = (finished / "report.html").read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == ["What was gained", "Scenes", "Features", "Distillation", "Commands"]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert captions == ["photo", "original", "lifted", "student"] * 2
    assert leftovers(finished) == [] and not list(finished.glob("rounds/*/checkpoint*"))
    for checkpoint in finished.rglob("step-*.ckpt"):
        import torch

        assert torch.load(checkpoint, weights_only=True)["optimizers"] == {}


def test_a_finished_loop_does_nothing_again(finished, scenes, loop_config, monkeypatch):
    monkeypatch.setattr(worker, "_start", lambda *_: pytest.fail("a command was run"))
    before = digest(finished)
    assert run_loop(loop_config(scenes, finished)).complete and digest(finished) == before


def test_shards_give_the_same_student(finished, scenes, loop_config, tmp_path, capsys):
    out = tmp_path / "out"
    first = run_loop(loop_config(scenes, out, shard="1/2"))
    assert not first.complete and first.missing == "round 1 waits for b"
    assert not (out / "rounds").exists()
    assert run_loop(loop_config(scenes, out, shard="2/2")).complete
    assert digest(out) == digest(finished)


def test_a_killed_driver_goes_on_to_the_same_student(finished, scenes, loop_config, tmp_path):
    out = tmp_path / "out"
    config = loop_config(scenes, out)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(command_line(config), cwd=ROOT, env=environment)
    wait_for(lambda: list(out.glob("geometry/*/*/*/*/step-*.ckpt")) or driver.poll() is not None)
    children = processes_naming(str(out)) - {driver.pid}
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert children  # the commands of scenes end with it
    wait_for(lambda: not processes_naming(str(out)), 30)
    assert not (out / "backbone.safetensors").exists()
    assert run_loop(config).complete
    assert digest(out) == digest(finished) and leftovers(out) == []


def processes_naming(text: str) -> set[int]:
    """Processes whose log is below a folder, or whose command line names it."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "fd" / "1").startswith(text):
                found.add(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("when", ["geometry", "student1"])
def test_a_killed_command_is_tried_again(finished, scenes, loop_config, tmp_path, when, caplog):
    out = tmp_path / "out"
    killed: list[int] = []

    def kill() -> None:
        pattern = f"logs/*{when}.log"
        wait_for(lambda: any(path.stat().st_size for path in out.glob(pattern)))
        found = [pid for pid in processes_naming(str(out)) if when in os.readlink(f"/proc/{pid}/fd/1")]
        killed.extend(found[:1])
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert run_loop(loop_config(scenes, out)).complete
    assert killed and digest(out) == digest(finished)


def test_a_scene_added_later_takes_up_what_is_there(finished, scenes, loop_config, tmp_path):
    out, three = tmp_path / "out", tmp_path / "three.txt"
    make_scene(tmp_path / "c", 4)
    one = tmp_path / "one.txt"
    one.write_text(f"{scenes / 'a'}\n")
    assert run_loop(loop_config(one, out)).complete
    before = digest(out)
    trained = {path: path.stat().st_mtime_ns for path in out.glob("geometry/a/**/*") if path.is_file()}
    three.write_text(f"{scenes / 'a'}\n{scenes / 'b'}\n")
    assert run_loop(loop_config(three, out)).complete
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert digest(out) == digest(finished) != before and leftovers(out) == []


def test_a_second_round_is_taught_by_the_first(finished, scenes, loop_config, tmp_path):
    """Rounds can be added to a loop that is done."""
    out = tmp_path / "out"
    assert run_loop(loop_config(scenes, out)).complete
    assert digest(out) == digest(finished)
    assert run_loop(loop_config(scenes, out, rounds=2)).complete
    cards = [json.loads((out / "rounds" / number / "card.json").read_text()) for number in "12"]
    assert cards[1]["teacher"]["weights_sha256"] == cards[0]["weights_sha256"]
    assert cards[1]["student"] == cards[0]["student"]  # it starts from the original again
    metrics = json.loads((out / "metrics.json").read_text())
    assert [one["round"] for one in metrics["rounds"]] == [1, 2] and digest(out) != digest(finished)


def test_scenes_that_fail_are_named_and_the_others_go_on(finished, scenes, loop_config, tmp_path, monkeypatch, capsys):
    """In each stage: geometry, lift, bundle."""
    names = {}
    for name in ("geometry", "lift", "bundle"):
        names[name] = make_scene(tmp_path / name)
    break_scene(names["geometry"])
    moved = tmp_path / "moved.ply"
    moved.write_text("ply of nothing")
    every = [{"data": str(scenes / name)} for name in "ab"] + [
        {"data": str(names["geometry"])},
        {"ply": str(moved), "data": str(names["lift"])},
        {"data": str(names["bundle"])},
    ]
    (tmp_path / "list.yaml").write_text(json.dumps(every))
    words = stages.bundle_words

    def bundle_words(job, run, folder):
        return words(job, run if job.source.name != "bundle" else Path("nowhere"), folder)

    monkeypatch.setattr(stages, "bundle_words", bundle_words)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"^3 of 5 scenes failed \(--allow-failures 0\)") as caught:
        run_loop(loop_config(tmp_path / "list.yaml", out))
    for stage in names:
        assert re.search(rf"\b{stage} \({stage}\): [^|]+\.( \||$)", str(caught.value)), stage
    assert digest(out) == digest(finished)
    page = (out / "report.html").read_text()
    assert "Scenes that failed" in page and "moved.ply" in page
    assert run_loop(loop_config(tmp_path / "list.yaml", out, allow_failures=3)).complete  # tried again, and allowed


def test_runs_and_plys_are_taken_as_they_are(finished, scenes, loop_config, tmp_path):
    run = next((finished / "geometry" / "a").rglob("config.yml")).parent
    (tmp_path / "list.txt").write_text(f"{run}\n")
    out = tmp_path / "out"
    assert run_loop(loop_config(tmp_path / "list.txt", out)).complete
    assert not (out / "geometry").exists()
    state = json.loads((out / "scenes" / "a.json").read_text())
    assert state["source"]["kind"] == "run" and state["rounds"]["1"]["bundle"]


def test_distillation_that_fails_ends_in_its_sentence(scenes, loop_config, tmp_path):
    with pytest.raises(UserError, match="--lr -1.0: give a number above 0"):
        run_loop(loop_config(scenes, tmp_path / "out", distill_flags="--steps 6 --lr -1"))
    assert not (tmp_path / "out" / "backbone.safetensors").exists()


def test_nothing_is_left_when_no_scene_is_good(loop_config, tmp_path, own_cache):
    break_scene(make_scene(tmp_path / "scenes" / "x"))
    with pytest.raises(UserError, match="^No scene is left for round 1: x: .*"):
        run_loop(loop_config(tmp_path / "scenes", tmp_path / "out"))


def test_other_settings_and_other_scenes_of_a_name_are_refused(finished, scenes, loop_config, tmp_path):
    with pytest.raises(UserError, match="was begun with --geometry-steps 10 instead of 11: go on with the same"):
        run_loop(loop_config(scenes, finished, geometry_steps=11))
    make_scene(tmp_path / "a")
    with pytest.raises(UserError, match="The scene a was .* before and is .* now: give it another name"):
        run_loop(loop_config(tmp_path, finished))


DAMAGED = {
    "scenes/a.json": b"[]",
    "scenes/b.json": b"\xff\xfe",
    "steps/student1.json": b"[" * 100_000,
    "steps/pictures.json": b'{"name": 7}',
    "rounds/1/card.json": b'{"student": {}}',
    "rounds/1/backbone.safetensors": b"",
    "rounds/1/metrics.json": b'{"mean": 1}',
    "geometry/a/fit3d-splat/geometry/geometry.json": b"null",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_in_a_finished_loop_is_made_anew(finished, scenes, loop_config, name):
    before, metrics = digest(finished), json.loads((finished / "metrics.json").read_text())
    (finished / name).write_bytes(DAMAGED[name])
    assert run_loop(loop_config(scenes, finished)).complete
    assert digest(finished) == before and leftovers(finished) == []
    after = json.loads((finished / "metrics.json").read_text())
    assert after["rounds"] == metrics["rounds"]
    assert [scene["geometry"]["gaussians"] for scene in after["scenes"]] == [
        scene["geometry"]["gaussians"] for scene in metrics["scenes"]
    ]


def test_a_damaged_picture_is_left_out_of_the_report(finished, scenes, loop_config, caplog):
    picture = next((finished / "pictures").glob("*_lifted.png"))
    picture.write_text("text")
    assert run_loop(loop_config(scenes, finished)).complete
    assert "is damaged" in caplog.text and not picture.exists()
    caplog.clear()
    assert run_loop(loop_config(scenes, finished)).complete and "is damaged" not in caplog.text


def test_settings_that_were_changed_by_accident_are_refused(finished, scenes, loop_config):
    path = finished / "loop.json"
    whole = path.read_text()
    path.write_text(whole.replace('"seed": 42', '"seed": 43'))
    with pytest.raises(UserError, match="loop.json is damaged .*checksum"):
        run_loop(loop_config(scenes, finished))
    path.write_text(whole)


def test_a_plan_of_what_is_done_is_short(finished, scenes, loop_config, capsys):
    run_loop(loop_config(scenes, finished, plan=True))
    text = capsys.readouterr().out
    assert "geometry of 2 is there" in text and "Nothing is left to do." in text
    run_loop(loop_config(scenes, finished, plan=True, rounds=2))
    text = capsys.readouterr().out
    assert "round 2: lift features onto 2 scenes" in text and "geometry of 2 scenes" not in text


def test_settings_of_the_first_start_stay(finished):
    settings = json.loads((finished / "loop.json").read_text())
    assert settings["threads"] == 1 and settings["distill_threads"] >= 1


def ray_workers() -> list[int]:
    """Processes of Ray that have a task."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(b"ray::work_on_scene"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_the_same_student_with_a_worker_killed(finished, scenes, loop_config, tmp_path):
    out, killed = tmp_path / "out", []

    def kill() -> None:
        while not list(out.glob("geometry/*/*/*/*/step-*.ckpt")):
            time.sleep(0.02)
        killed.extend(ray_workers()[:1])
        for process in killed:
            os.kill(process, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    # One at a time: each worker has to import everything once.
    ends_on = signal.getsignal(signal.SIGTERM)
    assert run_loop(loop_config(scenes, out, engine="ray", scenes_at_once=1)).complete
    assert signal.getsignal(signal.SIGTERM) == ends_on  # Ray's own handler would outlive the loop
    assert killed and digest(out) == digest(finished) and leftovers(out) == []


def test_an_address_nobody_answers(scenes, loop_config, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(UserError, match=f"^No Ray cluster answers at {address}.*correct --ray-address.$"):
        run_loop(loop_config(scenes, tmp_path / "out", engine="auto", ray_address=address))
    assert time.monotonic() - start < 20
    with pytest.raises(UserError, match="--ray-address nonsense: give HOST:PORT, or auto"):
        run_loop(loop_config(scenes, tmp_path / "other", engine="auto", ray_address="nonsense"))
