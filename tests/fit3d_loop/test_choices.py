"""What is refused before any work, what is planned, and how scenes share a machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

import fit3d_loop.loop as module
from fit3d_loop import plan
from fit3d_loop.loop import run_loop
from fit3d_loop.records import Places, SceneState, check_folder, read_state, try_lock, write_state
from fit3d_loop.rounds import distillation
from fit3d_loop.scenes import machine
from fit3d_loop.scenes.machine import PhotoCounts, choose_packing
from fit3d_ns.support.errors import UserError


@pytest.mark.parametrize(
    ("choice", "pattern"),
    [
        ({"rounds": 0}, "--rounds 0 is out of range"),
        ({"rounds": 9}, "--rounds 9 is out of range: 1 to 5, since students of students drift"),
        ({"geometry_steps": 1}, "--geometry-steps 1 is too small"),
        ({"threads": 0}, "--threads 0 is too small"),
        ({"scenes_at_once": 0}, "--scenes-at-once 0 is too small"),
        ({"allow_failures": -1}, "--allow-failures -1 is too small"),
        ({"shard": "3/2"}, "--shard 3/2 is out of range"),
        ({"shard": "0/2"}, "--shard 0/2 is out of range"),
        ({"shard": "two"}, "--shard two: give I/N"),
        ({"shard": "1/2", "ray_address": "auto", "engine": "auto"}, "exclude each other"),
        (
            {"mps": "on", "ray_address": "auto", "engine": "auto"},
            "--mps on is of this machine, and --ray-address leads",
        ),
        ({"ray_address": "auto"}, "--ray-address needs Ray: leave out --engine processes"),
        ({"distill_flags": "--lr '3"}, "--distill-flags=.* cannot be split into words"),
        ({"backbone": "nosuch"}, "--backbone nosuch: neither fit3d-ns nor timm"),
        ({"backbone_weights": Path("nosuch.pth")}, "no file nosuch.pth: check --backbone-weights"),
        ({"probe_data": Path("nowhere")}, "no folder nowhere: check --probe-data"),
    ],
)
def test_bad_choices_leave_nothing(scenes, loop_config, tmp_path, choice, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        run_loop(loop_config(scenes, tmp_path / "out", **choice))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_folder_of_another_command_is_refused(scenes, loop_config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yml").touch()
    with pytest.raises(UserError, match=r"holds files of another command \(config.yml\): choose another --output-dir"):
        run_loop(loop_config(scenes, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.yml"]


def test_empty_folders_are_nobodys(tmp_path):
    """A start that was killed early leaves such, and none of its settings."""
    (tmp_path / "out" / "geometry" / "a").mkdir(parents=True)
    check_folder(tmp_path / "out")
    (tmp_path / "out" / "geometry" / "a" / "x").touch()
    with pytest.raises(UserError, match=r"holds files of another command \(geometry\)"):
        check_folder(tmp_path / "out")


def test_two_loops_do_not_share_a_folder(scenes, loop_config, tmp_path):
    config = loop_config(scenes, tmp_path / "out")
    with try_lock(Places(tmp_path / "out").lock("driver-1-of-1")) as had:
        assert had
        with pytest.raises(UserError, match="Another fit3d is at work"):
            run_loop(config)


def test_a_plan_does_nothing_else(scenes, loop_config, tmp_path, capsys):
    run_loop(loop_config(scenes, tmp_path / "out", plan=True, rounds=3))
    text = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for part in ("geometry of 2 scenes, 10 steps each", "round 3: distil", "min  in all", "GB   of disk", "at once"):
        assert part in text, part


def test_a_disk_that_cannot_hold_it_is_refused(scenes, loop_config, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_disk", lambda folder: 0.001)
    with pytest.raises(
        UserError, match=r"About .* GB are needed \(.* a scene\) and 0.0 are free at .*: free some space"
    ):
        run_loop(loop_config(scenes, tmp_path / "out"))


def test_more_scenes_photos_and_rounds_take_more(scenes, loop_config, tmp_path):
    def disk(**fields):
        config = loop_config(scenes, tmp_path / "out", **fields)
        begun = module.Begun(config, {}, module.read_scenes(scenes)[0], "dinov2_small", 100)
        packing = choose_packing(PhotoCounts((8, 8), 0.3), 1, None)
        return plan.make_plan(
            begun, PhotoCounts((600, 600) if fields.get("keep_checkpoints") else (8, 8), 0.3), packing
        )

    few, kept, more = disk(), disk(keep_checkpoints=True), disk(rounds=3)
    assert few.disk_gigabytes < more.disk_gigabytes < kept.disk_gigabytes
    assert few.minutes < more.minutes


def test_scenes_that_use_a_gpu_side_by_side_are_planned_as_such(monkeypatch, tmp_path, scenes, loop_config):
    FakeGPU(monkeypatch, 1, 80)
    monkeypatch.setattr(machine, "num_cores", lambda: 8)
    photos = PhotoCounts((100,) * 8, 0.3)
    config = loop_config(scenes, tmp_path / "out", geometry_steps=5000)
    begun = module.Begun(config, {}, module.read_scenes(scenes)[0], "dinov2_small", 100)
    packing = choose_packing(photos, 1, None)
    in_turns, by_mps = (plan.make_plan(begun, photos, packing, by_mps).lines[0][1] for by_mps in (False, True))
    assert in_turns > 2 * by_mps > 0


@pytest.mark.parametrize(
    ("flags", "num_photos", "expected"),
    [("", 800, (2, 1)), ("--steps 9 --batch-size 32 --gradient-accumulation 2", 800, (32, 2))]
    + [("--batch-size=16", 800, (16, 1)), ("--batch_size 64", 800, (64, 1)), ("", 140_000, (16, 1))],
)
def test_the_batch_of_a_student_is_known_beforehand(scenes, loop_config, tmp_path, flags, num_photos, expected):
    """By the flags or as the recipe has it, so that GPUs share what is enough for them."""
    config = loop_config(scenes, tmp_path / "out", distill_flags=flags)
    begun = module.Begun(config, {}, module.read_scenes(scenes)[0], "dinov2_small", num_photos)
    shared = distillation(begun)
    assert (shared.module, shared.batch_size, shared.num_parts) == ("distill", *expected)


class FakeGPU:
    """As many GPUs as a test wants."""

    def __init__(self, monkeypatch, count: int, free: float) -> None:
        monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(machine.torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(machine, "_free_gpu_memory", lambda: (free * 1e9,) * count)


@pytest.mark.parametrize(
    ("gpus", "memory", "cores", "photos", "expected"),
    [
        (1, 80, 8, PhotoCounts((100,) * 40, 0.3), 8),  # cores: one a scene
        (1, 80, 64, PhotoCounts((100,) * 40, 0.3), 16),  # as many as were measured
        (1, 8, 16, PhotoCounts((100,) * 8, 0.3), 2),  # memory
        (2, 80, 8, PhotoCounts((100,) * 40, 0.3), 8),  # cores are shared between GPUs
        (1, 80, 16, PhotoCounts((600,), 12.0), 1),  # large photos
        (0, 0, 2, PhotoCounts((8,), 0.1), 2),
    ],
)
def test_scenes_share_a_machine_by_memory_cores_and_photos(monkeypatch, gpus, memory, cores, photos, expected):
    FakeGPU(monkeypatch, gpus, memory)
    monkeypatch.setattr(machine, "num_cores", lambda: cores)
    threads = machine.default_threads(len(photos.counts), gpus > 0) if gpus else 1
    packing = choose_packing(photos, threads, None)
    assert packing.at_once == expected
    assert packing.sentence.startswith("1 scene at once" if expected == 1 else f"{expected} scenes at once")
    assert packing.gpu_share == (min(1.0, gpus / expected) if gpus else 0.0)
    assert choose_packing(photos, threads, 3).at_once == 3


def test_a_damaged_state_is_begun_anew(tmp_path):
    places, geometry = Places(tmp_path), {"config": "config.yml", "made": 1, "seconds": 2.5}
    write_state(places, SceneState("a", {"path": "x"}, geometry))
    assert read_state(places, "a", {"path": "x"}).geometry == geometry
    places.state("a").write_text("{")
    assert read_state(places, "a", {"path": "x"}).geometry is None


def test_the_command_says_one_sentence(tmp_path):
    words = [sys.executable, "-m", "fit3d_loop", str(tmp_path / "gone"), "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("Error: There is no file or folder")


def test_help_imports_neither_torch_nor_numpy():
    code = "import sys; sys.argv = ['fit3d', '--help']\nfrom fit3d_loop.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'numpy', 'nerfstudio') if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]" and "--rounds" in done.stdout
