"""Bad input of ``fit3d-lift``: one sentence each, and other scenes go on."""

import re
import resource
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from lifted_runs import STEPS, lift_of, refused, splat_of, state_of, write_ply
from PIL import Image

from fit3d_ns.commands.lift.cli import main, run_lift
from fit3d_ns.runs.checkpoints import find_checkpoint
from fit3d_ns.support.errors import UserError


def test_nothing_or_too_much_named(lift_command, tmp_path):
    refused("one of --load-config, --runs and --ply", lift_command())
    refused("one of --load-config, --runs and --ply", lift_command(runs=tmp_path, ply=tmp_path))
    refused("--data names one scene", lift_command(runs=tmp_path, data=tmp_path))


def test_no_finished_runs(lift_command, tmp_path, splatfacto_run):
    refused("No finished run of splatfacto or fit3d-splat below", lift_command(runs=tmp_path))
    refused("nowhere does not exist", lift_command(runs=tmp_path / "nowhere"))
    unfinished = splatfacto_run()
    unfinished.write_text(unfinished.read_text().replace(f"max_num_iterations: {STEPS}", "max_num_iterations: 99"))
    refused("No finished run.*stopped after 12 of 99 steps", lift_command(runs=tmp_path))


def test_ply_that_cannot_be_used(lift_command, tmp_path, scene, splatfacto_run):
    path, splat = tmp_path / "splat.ply", splat_of(splatfacto_run())
    refused("does not exist: --ply needs the photos", lift_command(ply=path))
    refused("cannot be read", lift_command(ply=path, data=scene))
    path.write_bytes(b"not a ply at all")
    refused("is no PLY file", lift_command(ply=path, data=scene))
    write_ply(path, splat, drop=("opacity", "rot_2"))
    refused("splat.ply lacks the columns rot_2, opacity", lift_command(ply=path, data=scene))
    write_ply(path, splat, drop=("f_rest_4",))
    refused("no whole degree of spherical harmonics", lift_command(ply=path, data=scene))
    write_ply(path, splat)
    path.write_bytes(path.read_bytes()[:-100])
    refused("is damaged|truncated", lift_command(ply=path, data=scene))
    (tmp_path / "no_poses").mkdir()
    write_ply(path, splat)
    refused("neither transforms.json nor COLMAP", lift_command(ply=path, data=tmp_path / "no_poses"))
    broken = splat["opacities"].clone()
    broken[5] = float("nan")
    write_ply(path, {**splat, "opacities": broken})
    refused("1 of .* Gaussians in .*splat.ply have NaN or infinite `opacities`", lift_command(ply=path, data=scene))
    write_ply(path, {**splat, "means": splat["means"] + 30})
    refused("do not look like", lift_command(ply=path, data=scene, output_dir=tmp_path / "x"))


def test_scene_that_moved(lift_command, splatfacto_run, scene):
    source = splatfacto_run()
    moved = scene.rename(scene.with_name("elsewhere"))
    refused("scene of the run.*does not exist|does not exist.*--data", lift_command(load_config=source))
    assert run_lift(lift_command(load_config=source, data=moved))[0].is_file()


def test_photos_that_changed(lift_command, splatfacto_run, scene):
    source = splatfacto_run(steps=40)
    photos = sorted((scene / "images").iterdir())
    original = [path.read_bytes() for path in photos]
    noise = np.random.default_rng(0)
    for path in photos:
        Image.fromarray(noise.integers(0, 255, (72, 96, 3), dtype=np.uint8)).save(path)
    refused("photos of .* do not look like", lift_command(load_config=source))
    for path, content in zip(photos, original):
        path.write_bytes(content)
    with Image.open(photos[5]) as photo:
        photo.resize((48, 36)).save(photos[5])
    refused(f"photo {photos[5]} is 48x36 pixels, but its camera says 96x72", lift_command(load_config=source))
    photos[5].unlink()
    refused(f"{photos[5]} is missing", lift_command(load_config=source))


def spoil(run, name):
    """Makes one number of a run's checkpoint NaN."""
    state = state_of(run)
    state["pipeline"][f"_model.gauss_params.{name}"][3, 1] = float("nan")
    torch.save(state, find_checkpoint(run))


def test_other_scenes_go_on_and_the_end_says_which_failed_and_why(
    splatfacto_run, scene, teacher_weights, tmp_path, capsys
):
    """Through the command itself: the exit status, the summary, and no traceback."""
    broken, gone, whole, damaged = (splatfacto_run(name) for name in ("a", "b", "c", "d"))
    spoil(broken, "means")
    gone.write_text(gone.read_text().replace(f"- {scene.name}\n", "- gone\n"))
    checkpoint = find_checkpoint(damaged)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    words = ["--runs", tmp_path / "outputs", "--backbone", "test_vit", "--backbone-weights", teacher_weights]
    with pytest.raises(SystemExit) as left:
        main([*map(str, words), "--feature-dim", "8"])
    said = capsys.readouterr().err
    assert left.value.code == 1 and "Traceback" not in said
    assert "1 of 4 runs are lifted." in said
    summary = said.splitlines()[-1]
    assert summary.startswith("Error: 3 of 4 runs could not be lifted: ")
    for run, reason in (
        (broken, "1 of .* Gaussians in .* have NaN or infinite `means`"),
        (gone, "The scene .*gone of the run .* does not exist"),
        (damaged, "The checkpoint .* cannot be read"),
    ):
        assert re.search(f"{run.parent}: {reason}", summary)
        assert not (lift_of(run) / "config.yml").exists()
    assert (lift_of(whole) / "config.yml").is_file()


def test_an_error_that_nobody_foresaw_fails_one_scene_only(lift_command, splatfacto_run, tmp_path, monkeypatch):
    first, second = splatfacto_run("a"), splatfacto_run("b")
    from fit3d_ns.scenes import lift as scene

    real, calls = scene.lift_scene, []

    def out_of_memory_once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nMany more lines")
        return real(*arguments)

    monkeypatch.setattr(scene, "lift_scene", out_of_memory_once)
    said = refused("1 of 2 runs could not be lifted", lift_command(runs=tmp_path / "outputs"))
    assert f"{first.parent}: OutOfMemoryError: CUDA out of memory." in said
    assert (lift_of(second) / "config.yml").is_file()


def test_nothing_to_lift_sets_the_exit_status(tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        main(["--runs", str(tmp_path)])
    said = capsys.readouterr().err
    assert left.value.code == 1 and said.splitlines()[-1].startswith("Error: No finished run")
    assert said.count("\n") == 2 and "Lifting onto" in said.splitlines()[0]


@pytest.mark.parametrize("full_at", ["checkpoint", "record", "config"])
def test_full_disk(lift_command, splatfacto_run, monkeypatch, full_at):
    """The system's limit on the size of a file stops real writers in the middle, as a full disk does."""
    source = splatfacto_run()
    target = lift_of(source)
    if full_at == "checkpoint":
        (other,) = run_lift(lift_command(load_config=source, name="warm"))  # the teacher's maps are there
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (find_checkpoint(other).stat().st_size // 2, limits[1]))
        try:
            refused("(The lift|Cannot write) .*plain/lifts.*test_vit.*free", lift_command(load_config=source))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    else:
        writer = {
            "record": "fit3d_ns.commands.lift.lift_writer.write_record",
            "config": "fit3d_ns.trainer.atomic_write_text",
        }
        with monkeypatch.context() as patched:
            error = UserError("Cannot write it (No space left on device).")
            patched.setattr(writer[full_at], mock.Mock(side_effect=error))
            refused("No space left", lift_command(load_config=source))
    assert not any((target / name).exists() for name in ("config.yml", "lift.json")) and not list(
        target.rglob("*.ckpt")
    )
    assert not list(target.rglob("*.tmp"))
    assert run_lift(lift_command(load_config=source)) == [target / "config.yml"]


def test_too_little_space_is_noticed_before_writing(lift_command, splatfacto_run, monkeypatch):
    source = splatfacto_run()
    run_lift(lift_command(load_config=source, name="warm"))  # the teacher's maps are there
    monkeypatch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=10))
    refused("test_vit has 0 MB left: free some space", lift_command(load_config=source))


def test_sentences_name_the_flags_of_this_command(lift_command, splatfacto_run, tmp_path):
    source = splatfacto_run()
    said = refused("backbone nosuch", lift_command(load_config=source, backbone="nosuch", backbone_weights=None))
    assert said.startswith("--backbone nosuch") and "--pipeline" not in said
    said = refused("feature-dim 65", lift_command(load_config=source, feature_dim=65))
    assert said.startswith("--feature-dim 65 is out of range: 1 to the 64 channels")
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    said = refused("--feature-cache-dir", lift_command(load_config=source, feature_cache_dir=blocked))
    assert "--pipeline" not in said
