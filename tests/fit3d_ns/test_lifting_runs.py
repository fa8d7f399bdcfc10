"""``fit3d-lift`` and ``--pipeline.model.features lift`` on the tiny room: runs in, runs out."""

import base64
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.utils.eval_utils import eval_setup
from PIL import Image
from plain_splatfacto import PlainSplatfacto
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation

from fit3d_ns.bundle_runs import bundle_run, choose_runs
from fit3d_ns.errors import UserError
from fit3d_ns.lifting.cli import LiftCommand, run_lift
from fit3d_ns.lifting.operator import FeatureOperator
from fit3d_ns.lifting.ply import read_ply
from fit3d_ns.lifting.report import disagreement_map
from fit3d_ns.lifting.scene import lift_scene
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.lifting.views import model_geometry, resident_scene, streamed_scene
from fit3d_ns.runs import find_checkpoint

STEPS = 12


@pytest.fixture
def parser():
    return NerfstudioDataParserConfig(load_3D_points=True, eval_mode="interval", eval_interval=4)


@pytest.fixture
def splatfacto_run(scene, make_config, make_trainer, parser):
    """A run of upstream's splatfacto; returns its config.yml."""

    def make(name="plain", steps=STEPS):
        config = make_config(scene, method="splatfacto", steps=steps)
        config.timestamp = name
        config.pipeline = VanillaPipelineConfig(
            datamanager=FullImageDatamanagerConfig(
                data=scene, cache_images="gpu", cache_images_type="uint8", dataparser=parser
            ),
            model=config.pipeline.model,
        )
        stored = deepcopy(config)
        config.pipeline.model._target = PlainSplatfacto
        trainer = make_trainer(config)
        trainer.train()
        stored.experiment_name = config.experiment_name
        stored.save_config()
        return config.get_base_dir() / "config.yml"

    return make


@pytest.fixture
def feature_run(scene, make_config, make_trainer, parser):
    """A run of fit3d-splat; keyword arguments set fields of the model."""

    def make(name="joint", steps=STEPS, **fields):
        config = make_config(scene, steps=steps, **fields)
        config.timestamp, config.pipeline.datamanager.dataparser = name, parser
        config.save_config()
        trainer = make_trainer(config)
        trainer.train()
        return trainer

    return make


@pytest.fixture
def command(teacher_weights):
    """Builds a command with the tiny teacher."""

    def make(lift=None, **fields):
        teacher = {"backbone": "test_vit", "backbone_weights": teacher_weights, "feature_dim": 8}
        return LiftCommand(**{**teacher, **fields}, lift=lift or LiftSettings())

    return make


def opened(config) -> Any:
    """A run as ns-eval opens it: its configuration and its pipeline."""
    loaded, pipeline, _, step = eval_setup(config, test_mode="test")
    assert step == int(find_checkpoint(config).stem.removeprefix("step-"))
    return loaded, pipeline


def state_of(config):
    return torch.load(find_checkpoint(config), weights_only=True)


def assert_same_lift(left, right):
    """Equal in everything that a checkpoint holds."""

    def compare(a, b, path):
        if isinstance(a, dict):
            assert a.keys() == b.keys(), path
            for name in a:
                compare(a[name], b[name], f"{path}/{name}")
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b), path
        else:
            assert a == b, path

    compare(state_of(left), state_of(right), "")


def test_splatfacto_run_becomes_a_run_like_a_trained_one(splatfacto_run, feature_run, command, tmp_path):
    source = splatfacto_run()
    (config,) = run_lift(command(load_config=source))
    assert config == source.parents[2] / "fit3d-splat" / "plain-lift" / "config.yml"
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


def test_trained_run_keeps_its_teacher_and_training_can_go_on(feature_run, make_trainer, command):
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


def test_report_shows_views_where_they_disagree_and_what_was_measured(feature_run, command, scene):
    trainer = feature_run(steps=40)
    lift = LiftSettings(select="fidelity", refinements=3, report_dims=(4, 16))
    (config,) = run_lift(command(load_config=trainer.base_dir, lift=lift))
    page, record = (config.parent / "lift.html").read_text(), json.loads((config.parent / "lift.json").read_text())
    pictures = [re.search(r"src='data:image/png;base64,([^']+)'", figure) for figure in page.split("<figure")[1:]]
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1])))) for found in pictures if found]
    assert len(decoded) == 12  # photo, teacher, lifted and heat map of three views
    photo, teacher, lifted, heat = decoded[:4]
    assert photo.shape == (72, 96, 3) and teacher.shape == lifted.shape == (5, 6, 3) and heat.shape == (20, 24, 3)
    with Image.open(scene / "images" / "frame_00001.png") as first:
        assert np.array_equal(photo, np.asarray(first.convert("RGB")))  # interval of 4: the first view is held out
    assert all(len(np.unique(picture)) > 20 for picture in decoded)
    assert [point["dim"] for point in record["dim_curve"]] == [4, 8, 16]
    for point in [*record["curve"], *record["dim_curve"]]:
        assert f"{point['feature_cosine']:.4g}" in page
    assert all(stage in page for stage in ("teacher", "aggregation", "refinement", "evaluation"))


def test_heat_map_is_bright_where_views_disagree(feature_run, command):
    trainer = feature_run(steps=2)
    pipeline = trainer.pipeline
    pipeline.eval()
    scene = resident_scene(pipeline.datamanager, pipeline.model)
    lift = lift_scene(pipeline.model, scene, LiftSettings())
    camera = scene.held_out[0].view.camera
    operator = FeatureOperator(model_geometry(pipeline.model), pipeline.model.feature_grid)
    x = (pipeline.model.means @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3])[:, 0]
    lift.variance = torch.where(x < 0, lift.feature_energy, 0.0)  # by as much as features are long, on the left
    heat = disagreement_map(operator, scene.held_out[0], lift)
    left, right = heat[:, : heat.shape[1] // 3], heat[:, -heat.shape[1] // 3 :]
    alpha = operator.low_maps([camera], torch.ones(len(x), 1))[0, 0].detach().numpy()
    assert left.mean() > 0.8 * alpha[:, : heat.shape[1] // 3].mean() > 0 and right.mean() < 0.2 * left.mean()


def test_finished_lift_is_skipped_and_other_settings_ask_first(splatfacto_run, command):
    source = splatfacto_run()
    (config,) = run_lift(command(load_config=source))
    changed = find_checkpoint(config).stat().st_mtime_ns
    run_lift(command(load_config=source, lift=LiftSettings(views_per_batch=3)))  # decides no outcome
    assert find_checkpoint(config).stat().st_mtime_ns == changed
    other = LiftSettings(refinements=0, decoder="fit")
    with pytest.raises(UserError, match="other settings.*lift.*--overwrite"):
        run_lift(command(load_config=source, lift=other))
    (second,) = run_lift(command(load_config=source, lift=other, suffix="fit"))
    assert second.parent.name == "plain-fit" and second != config
    run_lift(command(load_config=source, lift=other, overwrite=True))
    assert_same_lift(config, second)


def test_all_runs_below_a_folder(splatfacto_run, feature_run, make_config, command, tmp_path):
    plain, joint = splatfacto_run(), feature_run().base_dir / "config.yml"
    unfinished = splatfacto_run("unfinished")
    unfinished.write_text(unfinished.read_text().replace(f"max_num_iterations: {STEPS}", "max_num_iterations: 99"))
    found = run_lift(command(runs=tmp_path / "outputs"))
    assert sorted(path.parent.name for path in found) == ["joint-lift", "plain-lift"]
    again = run_lift(command(runs=tmp_path / "outputs"))  # what was lifted is not lifted again
    assert again == found
    assert plain.is_file() and joint.is_file()


def test_killed_command_resumes_to_the_same_result(splatfacto_run, command, teacher_weights, tmp_path):
    first, second = splatfacto_run("a"), splatfacto_run("b")
    arguments = ["--runs", tmp_path / "outputs", "--output-dir", tmp_path / "killed", "--backbone", "test_vit"]
    arguments += ["--backbone-weights", teacher_weights, "--feature-dim", "8"]
    words = [sys.executable, "-m", "fit3d_ns.lifting.cli", *map(str, arguments)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = tmp_path / "killed" / "scene" / "fit3d-splat"
    deadline = time.monotonic() + 200
    while not (runs / "a-lift" / "nerfstudio_models").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (runs / "b-lift" / "config.yml").exists()
    # Whether the kill came while a file was being written is chance; this makes sure of it.
    (runs / "a-lift" / "nerfstudio_models" / ".step-000000011.ckpt.1-0.tmp").write_bytes(b"half")
    resumed = run_lift(command(runs=tmp_path / "outputs", output_dir=tmp_path / "killed"))
    whole = [run_lift(command(load_config=run, output_dir=tmp_path / "whole"))[0] for run in (first, second)]
    assert [path.parent.name for path in resumed] == [path.parent.name for path in whole] == ["a-lift", "b-lift"]
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
    assert record["refinements"] == 2
    metrics = lifted.pipeline.get_average_eval_image_metrics()
    assert metrics["feature_cosine"] == pytest.approx(record["metrics"]["feature_cosine"], rel=1e-4)
    assert metrics["feature_cosine"] > joint.pipeline.get_average_eval_image_metrics()["feature_cosine"]


def test_lift_on_demand(feature_run, make_trainer):
    """Before the first lift nothing is measured; the viewer's button lifts at once, or after the step in training."""
    trainer = feature_run(steps=4, features="lift")
    trainer.pipeline.model.gauss_params["fit3d_features"].data.zero_()
    assert "feature_cosine" not in trainer.pipeline.get_average_eval_image_metrics()
    trainer.pipeline.lift_button.cb_hook(trainer.pipeline.lift_button)
    assert not trainer.pipeline.model.gauss_params["fit3d_features"].any()  # waits for the step to end
    for callback in trainer.callbacks[-1:]:
        callback.run_callback(step=0)
    assert trainer.pipeline.model.gauss_params["fit3d_features"].any()

    _, pipeline = opened(trainer.base_dir / "config.yml")
    pipeline.model.gauss_params["fit3d_features"].data.zero_()
    pipeline.lift_button.cb_hook(pipeline.lift_button)
    assert pipeline.model.gauss_params["fit3d_features"].any() and not pipeline.training


def test_frozen_geometry_and_lift_leave_nothing_to_train(feature_run, make_config, make_trainer, scene):
    run = feature_run(steps=2).base_dir
    with pytest.raises(UserError, match="nothing to train: use `fit3d-lift"):
        make_trainer(make_config(scene, init_from=run, features="lift"))


# --- PLY files ---


def write_ply(path, parameters, drop=()):
    """As ``ns-export gaussian-splat`` and 3DGS write it."""
    means = parameters["means"]
    columns = {name: means[:, i] for i, name in enumerate("xyz")}
    columns |= {f"f_dc_{i}": parameters["features_dc"][:, i] for i in range(3)}
    rest = parameters["features_rest"].transpose(1, 2).flatten(1)
    columns |= {f"f_rest_{i}": rest[:, i] for i in range(rest.shape[1])}
    columns |= {"opacity": parameters["opacities"][:, 0]}
    columns |= {f"scale_{i}": parameters["scales"][:, i] for i in range(3)}
    columns |= {f"rot_{i}": parameters["quats"][:, i] for i in range(4)}
    columns = {name: column for name, column in columns.items() if name not in drop}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(means)}"]
    header += [f"property float {name}" for name in columns] + ["end_header", ""]
    table = torch.stack(list(columns.values()), dim=1).numpy().astype("<f4")
    path.write_bytes("\n".join(header).encode() + table.tobytes())


def splat_of(run):
    state = state_of(run)["pipeline"]
    names = ("means", "scales", "quats", "opacities", "features_dc", "features_rest")
    return {name: state[f"_model.gauss_params.{name}"] for name in names}


def test_ply_round_trip(tmp_path, splatfacto_run):
    splat = splat_of(splatfacto_run())
    write_ply(tmp_path / "splat.ply", splat)
    for name, tensor in read_ply(tmp_path / "splat.ply").items():
        assert torch.equal(tensor, splat[name]), name


def as_colmap(scene, folder):
    """Writes the scene as COLMAP's text files, in a folder of its own."""
    transforms = json.loads((scene / "transforms.json").read_text())
    shutil.copytree(scene / "images", folder / "images")
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    values = [transforms[name] for name in ("w", "h", "fl_x", "fl_y", "cx", "cy")]
    (model / "cameras.txt").write_text("1 PINHOLE " + " ".join(map(str, values)) + "\n")
    lines = []
    for number, frame in enumerate(transforms["frames"], start=1):
        to_world = np.array(frame["transform_matrix"]) @ np.diag([1.0, -1, -1, 1])  # OpenGL to OpenCV axes
        to_camera = np.linalg.inv(to_world)
        x, y, z, w = Rotation.from_matrix(to_camera[:3, :3]).as_quat()
        numbers = " ".join(map(str, (w, x, y, z, *to_camera[:3, 3])))
        lines += [f"{number} {numbers} 1 {Path(frame['file_path']).name}", ""]
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("coordinates", ["nerfstudio", "scene", "colmap"])
def test_ply_in_either_coordinates(tmp_path, scene, splatfacto_run, command, coordinates):
    """ns-export writes nerfstudio's turned and scaled world, 3DGS that of the scene's files."""
    run = splatfacto_run(steps=40)
    splat = splat_of(run)
    if coordinates != "nerfstudio":
        stored = json.loads((run.parent / "dataparser_transforms.json").read_text())
        transform, scale = torch.tensor(stored["transform"]), stored["scale"]
        rotation = transform[:, :3]
        splat["means"] = (splat["means"] / scale - transform[:, 3]) @ rotation
        splat["scales"] = splat["scales"] - torch.log(torch.tensor(scale))
    write_ply(tmp_path / "splat.ply", splat)
    data = as_colmap(scene, tmp_path / "colmap" / "scene") if coordinates == "colmap" else scene
    (config,) = run_lift(command(ply=tmp_path / "splat.ply", data=data, output_dir=tmp_path / "from_ply"))
    assert config == tmp_path / "from_ply" / "scene" / "fit3d-splat" / "splat-lift" / "config.yml"
    loaded, pipeline = opened(config)
    parser = loaded.pipeline.datamanager.dataparser
    assert (parser.orientation_method == "none") == (coordinates != "nerfstudio")
    assert torch.equal(pipeline.model.means.detach(), splat["means"])
    assert pipeline.get_average_eval_image_metrics()["feature_cosine"] > 0.3


# --- Bad input: one sentence each ---


def refused(pattern, *arguments):
    with pytest.raises(UserError, match=pattern) as caught:
        run_lift(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_or_too_much_named(command, tmp_path):
    refused("one of --load-config, --runs and --ply", command())
    refused("one of --load-config, --runs and --ply", command(runs=tmp_path, ply=tmp_path))
    refused("--data names one scene", command(runs=tmp_path, data=tmp_path))


def test_no_finished_runs(command, tmp_path, splatfacto_run):
    refused("No finished run of splatfacto or fit3d-splat below", command(runs=tmp_path))
    refused("nowhere does not exist", command(runs=tmp_path / "nowhere"))
    unfinished = splatfacto_run()
    unfinished.write_text(unfinished.read_text().replace(f"max_num_iterations: {STEPS}", "max_num_iterations: 99"))
    refused("No finished run.*stopped after 12 of 99 steps", command(runs=tmp_path))


def test_ply_that_cannot_be_used(command, tmp_path, scene, splatfacto_run):
    path, splat = tmp_path / "splat.ply", splat_of(splatfacto_run())
    refused("does not exist: --ply needs the photos", command(ply=path))
    refused("cannot be read", command(ply=path, data=scene))
    path.write_bytes(b"not a ply at all")
    refused("is no PLY file", command(ply=path, data=scene))
    write_ply(path, splat, drop=("opacity", "rot_2"))
    refused("splat.ply lacks the columns rot_2, opacity", command(ply=path, data=scene))
    write_ply(path, splat, drop=("f_rest_4",))
    refused("no whole degree of spherical harmonics", command(ply=path, data=scene))
    write_ply(path, splat)
    path.write_bytes(path.read_bytes()[:-100])
    refused("is damaged|truncated", command(ply=path, data=scene))
    (tmp_path / "no_poses").mkdir()
    write_ply(path, splat)
    refused("neither transforms.json nor COLMAP", command(ply=path, data=tmp_path / "no_poses"))
    write_ply(path, {**splat, "means": splat["means"] + 30})
    refused("do not look like", command(ply=path, data=scene, output_dir=tmp_path / "x"))


def test_scene_that_moved(command, splatfacto_run, scene):
    source = splatfacto_run()
    moved = scene.rename(scene.with_name("elsewhere"))
    refused("scene of the run.*does not exist|does not exist.*--data", command(load_config=source))
    assert run_lift(command(load_config=source, data=moved))[0].is_file()


def test_photos_that_changed(command, splatfacto_run, scene):
    source = splatfacto_run(steps=40)
    photos = sorted((scene / "images").iterdir())
    original = [path.read_bytes() for path in photos]
    noise = np.random.default_rng(0)
    for path in photos:
        Image.fromarray(noise.integers(0, 255, (72, 96, 3), dtype=np.uint8)).save(path)
    refused("photos of .* do not look like", command(load_config=source))
    for path, content in zip(photos, original):
        path.write_bytes(content)
    with Image.open(photos[5]) as photo:
        photo.resize((48, 36)).save(photos[5])
    refused(f"photo {photos[5]} is 48x36 pixels, but its camera says 96x72", command(load_config=source))
    photos[5].unlink()
    refused(f"{photos[5]} is missing", command(load_config=source))


def test_one_failing_run_does_not_stop_the_others(command, splatfacto_run, tmp_path):
    broken, whole = splatfacto_run("a"), splatfacto_run("b")
    checkpoint = find_checkpoint(broken)
    state = state_of(broken)
    state["pipeline"]["_model.gauss_params.means"][3, 1] = float("nan")
    torch.save(state, checkpoint)
    said = refused("1 of 2 runs could not be lifted", command(runs=tmp_path / "outputs"))
    assert f"{broken.parent}: 1 of" in said and "NaN or infinite `means`" in said
    assert (whole.parents[2] / "fit3d-splat" / "b-lift" / "config.yml").is_file()
    assert not (whole.parents[2] / "fit3d-splat" / "a-lift" / "config.yml").exists()


def test_failure_sets_the_exit_status(tmp_path):
    words = [sys.executable, "-m", "fit3d_ns.lifting.cli", "--runs", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, check=False)
    assert done.returncode == 1 and "No finished run" in done.stderr and "Traceback" not in done.stderr


def test_full_disk(command, splatfacto_run, monkeypatch):
    source = splatfacto_run()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fit3d_ns.lifting.run_writer.torch.save", full)
        refused("Cannot write .*No space left", command(load_config=source))
    target = source.parents[2] / "fit3d-splat" / "plain-lift"
    assert not (target / "config.yml").exists() and not list(target.rglob("*.ckpt"))
    assert run_lift(command(load_config=source)) == [target / "config.yml"]


def test_run_of_another_kind(command, splatfacto_run, tmp_path):
    source = splatfacto_run()
    target = source.parents[2] / "fit3d-splat" / "plain-lift"
    target.mkdir(parents=True)
    (target / "config.yml").write_text("someone else's")
    refused("did not write: choose another --suffix", command(load_config=source))
    assert (target / "config.yml").read_text() == "someone else's"
