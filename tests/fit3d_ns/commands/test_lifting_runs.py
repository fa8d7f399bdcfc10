"""``fit3d-lift`` and ``--pipeline.model.features lift`` on the tiny room: runs in, runs out."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from lifted_runs import STEPS, assert_same_lift, opened, state_of
from nerfstudio.engine.callbacks import TrainingCallbackAttributes
from PIL import Image
from safetensors.torch import load_file

from fit3d_ns.commands.lift.cli import LiftCommand, run_lift
from fit3d_ns.commands.lift.sources import runs_below
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.runs.bundling import bundle_run, choose_runs
from fit3d_ns.runs.checkpoints import find_checkpoint
from fit3d_ns.scenes.views import resident_scene, streamed_scene
from fit3d_ns.support.errors import UserError


def test_splatfacto_run_becomes_a_run_like_a_trained_one(splatfacto_run, feature_run, lift_command, tmp_path):
    source = splatfacto_run()
    (config,) = run_lift(lift_command(load_config=source))
    assert config == source.parent / "lifts" / "fit3d-splat" / "test_vit" / "config.yml"
    record = json.loads((config.parent / "lift.json").read_text())
    tensors = load_file(config.parent / "lift.safetensors")

    trained = feature_run()
    lifted, reference = state_of(config), state_of(trained.base_dir)
    assert lifted["pipeline"].keys() == reference["pipeline"].keys()
    assert lifted["pipeline"]["_extra_state"].keys() == reference["pipeline"]["_extra_state"].keys()
    identities = [state["pipeline"]["_extra_state"]["teacher_identity"] for state in (lifted, reference)]
    assert identities[0] == identities[1] and identities[0]["name"].startswith("test_vit")
    geometry = state_of(source)["pipeline"]
    for name in ("means", "scales", "quats", "opacities", "features_dc", "features_rest"):
        assert torch.equal(lifted["pipeline"][f"_model.gauss_params.{name}"], geometry[f"_model.gauss_params.{name}"])
    count = len(geometry["_model.gauss_params.means"])
    assert tensors["fit3d_variance"].shape == tensors["fit3d_coverage"].shape == (count,)
    assert (tensors["fit3d_variance"] >= 0).all() and tensors["fit3d_variance"].any()

    assert find_checkpoint(config).name == f"step-{STEPS - 1:09d}.ckpt"
    _, pipeline = opened(config)
    metrics = pipeline.get_average_eval_image_metrics()
    for name in ("feature_cosine", "feature_l1"):
        assert metrics[name] == pytest.approx(record["metrics"][name], rel=1e-4)
    assert metrics["feature_cosine"] > trained.pipeline.get_average_eval_image_metrics()["feature_cosine"]

    runs, _ = choose_runs([config])
    bundle, existed = bundle_run(runs[0])
    assert not existed and len(bundle.info.views) == 16


def test_trained_run_keeps_its_teacher_and_training_can_go_on(feature_run, make_trainer, lift_command):
    trainer = feature_run()
    (config,) = run_lift(LiftCommand(load_config=trainer.base_dir))
    lifted = state_of(config)["pipeline"]
    assert lifted["_extra_state"]["teacher"] == state_of(trainer.base_dir)["pipeline"]["_extra_state"]["teacher"]
    assert lifted["_model.gauss_params.fit3d_features"].shape[1] == 8

    resumed = deepcopy(trainer.config)
    resumed.pipeline.model.features, resumed.timestamp = "lift", "resumed"
    resumed.load_checkpoint, resumed.max_num_iterations = find_checkpoint(config), STEPS + 6
    again = make_trainer(resumed)
    again.train()
    assert again.step == STEPS + 5
    assert again.pipeline.model.gauss_params["fit3d_features"].any()


def test_streamed_views_are_those_of_the_data_manager(feature_run, scene):
    """Masks and all, without the data manager's store of photos."""
    transforms = json.loads((scene / "transforms.json").read_text())
    (scene / "masks").mkdir()
    for frame in transforms["frames"]:
        mask = np.zeros((72, 96), np.uint8)
        mask[:, 40:] = 255
        frame["mask_path"] = f"masks/{Path(frame['file_path']).stem}.png"
        Image.fromarray(mask).save(scene / frame["mask_path"])
    (scene / "transforms.json").write_text(json.dumps(transforms))
    pipeline = feature_run(steps=1).pipeline
    pipeline.eval()
    resident = resident_scene(pipeline.datamanager, pipeline.model)
    streamed = streamed_scene(pipeline.datamanager, pipeline.model)
    pairs = [
        *zip(resident.training, streamed.training),
        *((a.view, b.view) for a, b in zip(resident.held_out, streamed.held_out)),
    ]
    assert len(pairs) == 16 and len(streamed.held_out) == 4
    for left, right in pairs:
        assert torch.equal(left.load(), right.load())
        assert left.weights is not None and right.weights is not None
        torch.testing.assert_close(left.weights, right.weights)
        assert (left.weights < 1).any()
        torch.testing.assert_close(left.camera.viewmat, right.camera.viewmat)
        torch.testing.assert_close(left.camera.K, right.camera.K)
        assert (left.camera.image_size, left.camera.grid) == (right.camera.image_size, right.camera.grid)


def test_finished_lift_is_skipped_and_other_settings_ask_first(splatfacto_run, lift_command):
    source = splatfacto_run()
    (config,) = run_lift(lift_command(load_config=source))
    changed = find_checkpoint(config).stat().st_mtime_ns
    run_lift(lift_command(load_config=source, lift=LiftSettings(views_per_batch=3)))  # decides no outcome
    assert find_checkpoint(config).stat().st_mtime_ns == changed
    other = LiftSettings(refinements=0, decoder="fit")
    with pytest.raises(UserError, match="other settings.*lift.*--overwrite.*--name"):
        run_lift(lift_command(load_config=source, lift=other))
    (second,) = run_lift(lift_command(load_config=source, lift=other, name="fit"))
    assert second.parent == config.parent.with_name("fit")
    run_lift(lift_command(load_config=source, lift=other, overwrite=True))
    assert_same_lift(config, second)


def test_finished_lift_is_known_by_dims_checkpoint_and_weights(splatfacto_run, lift_command, teacher_weights, tmp_path):
    weights = Path(shutil.copy(teacher_weights, tmp_path))
    source, settings = splatfacto_run(), LiftSettings(report_dims=(4, 8))
    command = lift_command(load_config=source, backbone_weights=weights, lift=settings)
    (config,) = run_lift(command)
    checkpoint = find_checkpoint(config)
    changed = checkpoint.stat().st_mtime_ns
    run_lift(command)
    assert checkpoint.stat().st_mtime_ns == changed
    checkpoint.unlink()
    run_lift(command)
    assert checkpoint.is_file()
    os.utime(weights, (0, 0))
    with pytest.raises(UserError, match=r"other settings.*\(teacher\)"):
        run_lift(command)
    weights.unlink()
    with pytest.raises(UserError, match="weights .* cannot be read .*: check --backbone-weights"):
        run_lift(command)


def test_runs_of_one_name_do_not_replace_each_other(splatfacto_run, feature_run, lift_command, tmp_path):
    splatfacto_run("same")
    feature_run("same")
    found = run_lift(lift_command(runs=tmp_path / "outputs"))
    runs = [tmp_path / "outputs" / "scene" / method / "same" for method in ("fit3d-splat", "splatfacto")]
    assert [path.parents[3] for path in found] == runs
    written = [find_checkpoint(path).stat().st_mtime_ns for path in found]
    again = run_lift(lift_command(runs=tmp_path / "outputs", overwrite=True))
    assert again == found and [find_checkpoint(path).stat().st_mtime_ns for path in again] == written


def test_all_runs_below_a_folder(splatfacto_run, feature_run, make_config, lift_command, tmp_path, caplog):
    plain, joint = splatfacto_run(), feature_run().base_dir / "config.yml"
    unfinished = splatfacto_run("unfinished")
    unfinished.write_text(unfinished.read_text().replace(f"max_num_iterations: {STEPS}", "max_num_iterations: 99"))
    killed = plain.parents[1] / "killed" / "config.yml"  # before its first checkpoint
    killed.parent.mkdir()
    killed.write_text(plain.read_text())
    with caplog.at_level(logging.INFO):
        found = run_lift(lift_command(runs=tmp_path / "outputs"))
    assert sorted(path.parents[3].name for path in found) == ["joint", "plain"]
    assert f"{killed} holds no checkpoint, it stopped before one: left out." in caplog.text
    assert f"{unfinished} stopped after {STEPS} of 99 steps: left out" in caplog.text
    assert runs_below(tmp_path / "outputs")[1][-1].startswith("2 lifts below ")
    again = run_lift(lift_command(runs=tmp_path / "outputs"))  # what was lifted is not lifted again
    assert again == found
    assert plain.is_file() and joint.is_file()


def test_killed_command_resumes_to_the_same_result(splatfacto_run, lift_command, teacher_weights, tmp_path):
    first, second = splatfacto_run("a"), splatfacto_run("b")
    arguments = ["--runs", tmp_path / "outputs", "--output-dir", tmp_path / "killed", "--backbone", "test_vit"]
    arguments += ["--backbone-weights", teacher_weights, "--feature-dim", "8"]
    words = [sys.executable, "-m", "fit3d_ns.commands.lift.cli", *map(str, arguments)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lifts = {run: tmp_path / "killed/scene/splatfacto" / run / "lifts/fit3d-splat/test_vit" for run in "ab"}
    deadline = time.monotonic() + 900
    while not (lifts["a"] / "nerfstudio_models").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (lifts["b"] / "config.yml").exists()
    # Whether the kill came while a file was being written is chance; this makes sure of it.
    (lifts["a"] / "nerfstudio_models" / ".step-000000011.ckpt.1-0.tmp").write_bytes(b"half")
    resumed = run_lift(lift_command(runs=tmp_path / "outputs", output_dir=tmp_path / "killed"))
    whole = [run_lift(lift_command(load_config=run, output_dir=tmp_path / "whole"))[0] for run in (first, second)]
    assert [path.parent for path in resumed] == list(lifts.values())
    assert [path.parents[3].name for path in whole] == ["a", "b"]
    for left, right in zip(resumed, whole):
        assert_same_lift(left, right)
        assert not list(left.parent.rglob("*.tmp"))


def test_training_with_lifted_features(feature_run):
    """Geometry is that of joint training, to the bit; features come from one lift when training ends."""
    joint = feature_run("joint", steps=30)
    lifted = feature_run("lifted", steps=30, features="lift", lift=LiftSettings(refinements=2))
    left, right = (state_of(trainer.base_dir)["pipeline"] for trainer in (joint, lifted))
    assert left.keys() == right.keys()
    for name in ("means", "scales", "quats", "opacities", "features_dc", "features_rest"):
        assert torch.equal(left[f"_model.gauss_params.{name}"], right[f"_model.gauss_params.{name}"]), name
    assert right["_model.gauss_params.fit3d_features"].any()
    record = json.loads((lifted.base_dir / "lift.json").read_text())
    assert record["refinements"] == 2 and "where views disagree" in (lifted.base_dir / "lift.html").read_text()
    metrics = lifted.pipeline.get_average_eval_image_metrics()
    assert metrics["feature_cosine"] == pytest.approx(record["metrics"]["feature_cosine"], rel=1e-4)
    assert metrics["feature_cosine"] > joint.pipeline.get_average_eval_image_metrics()["feature_cosine"]


def test_lift_on_demand(feature_run, make_trainer):
    """Before the first lift nothing is measured; the viewer's button lifts at once, or after the step in training."""
    trainer = feature_run(steps=4, features="lift")
    pipeline, status = trainer.pipeline, trainer.pipeline.features.a_status
    features = pipeline.model.gauss_params["fit3d_features"].data
    features.zero_()
    assert "feature_cosine" not in pipeline.get_average_eval_image_metrics()
    attributes = TrainingCallbackAttributes(trainer.optimizers, trainer.grad_scaler, pipeline, trainer)
    callback = pipeline.get_training_callbacks(attributes)[-1]
    pipeline.lift_button.cb_hook(pipeline.lift_button)
    assert not features.any() and status.text == "Features are lifted after the current step."
    callback.run_callback(step=0)
    assert features.any()
    callback.run_callback(step=3)  # the last
    features.zero_()
    pipeline.lift_button.cb_hook(pipeline.lift_button)
    assert features.any() and status.text == "Features are lifted."

    _, pipeline = opened(trainer.base_dir / "config.yml")
    pipeline.model.gauss_params["fit3d_features"].data.zero_()
    pipeline.lift_button.cb_hook(pipeline.lift_button)
    assert pipeline.model.gauss_params["fit3d_features"].any() and not pipeline.training
    assert not {"cached_train", "cached_eval"} & set(vars(pipeline.datamanager))  # nothing trains: no photo is kept


def test_frozen_geometry_and_lift_leave_nothing_to_train(feature_run, make_config, make_trainer, scene):
    run = feature_run(steps=2).base_dir
    with pytest.raises(UserError, match="nothing to train: use `fit3d-lift"):
        make_trainer(make_config(scene, init_from=run, features="lift"))
