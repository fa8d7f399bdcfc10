"""Several lifts onto one geometry: what each adds, who opens them, and what becomes of broken ones."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from lifted_runs import lift_of, opened, refused, splat_of, state_of, write_ply
from safetensors.torch import load_file, save_file

from fit3d_ns.commands.export.cli import main as export
from fit3d_ns.commands.lift.cli import run_lift
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.runs.bundling import bundle_run, choose_runs
from fit3d_ns.runs.checkpoints import find_checkpoint, geometry_of, read_checkpoint
from fit3d_ns.support.errors import UserError


@pytest.fixture
def other_weights(teacher_weights, tmp_path) -> Path:
    """Those of a teacher of the same name that sees things differently."""
    weights = {name: tensor * 0.9 for name, tensor in load_file(teacher_weights).items()}
    save_file(weights, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def test_a_lift_adds_features_and_decoder_only(splatfacto_run, lift_command, other_weights):
    source = splatfacto_run()
    before = {path: path.read_bytes() for path in source.parent.rglob("*") if path.is_file()}
    (first,) = run_lift(lift_command(load_config=source))
    (second,) = run_lift(lift_command(load_config=source, backbone_weights=other_weights, name="other"))
    assert {path: path.read_bytes() for path in before} == before, "the run itself is left alone"
    for config in (first, second):
        tensors = load_file(config.parent / "lift.safetensors")
        assert {name: tensor.dtype for name, tensor in tensors.items()} == {
            "fit3d_features": torch.float16,
            "fit3d_decoder": torch.float32,
            "fit3d_variance": torch.float32,
            "fit3d_coverage": torch.float32,
        }
        alone = torch.load(find_checkpoint(config), weights_only=True)
        num_gaussians = len(tensors["fit3d_features"])
        largest = max(v.numel() for v in alone["pipeline"].values() if isinstance(v, torch.Tensor))
        assert largest < num_gaussians, "no tensor of Gaussians is stored again"
        assert geometry_of(find_checkpoint(config)) == find_checkpoint(source)
    states = [state_of(config)["pipeline"] for config in (first, second)]
    assert not torch.equal(*(state["_model.gauss_params.fit3d_features"] for state in states))
    for name, tensor in splat_of(source).items():
        assert all(torch.equal(state[f"_model.gauss_params.{name}"], tensor) for state in states), name


def test_a_new_lift_may_start_from_a_lift(splatfacto_run, lift_command, other_weights):
    source = splatfacto_run()
    (first,) = run_lift(lift_command(load_config=source))
    (second,) = run_lift(lift_command(load_config=first, backbone_weights=other_weights, name="other"))
    assert second.parent == lift_of(source, "other")
    assert geometry_of(find_checkpoint(second)) == find_checkpoint(source)
    assert run_lift(lift_command(load_config=second)) == [first], "and knows what is there already"


def test_a_run_may_move_with_its_lifts(splatfacto_run, lift_command, tmp_path):
    source = splatfacto_run()
    run_lift(lift_command(load_config=source))
    moved = Path(shutil.copytree(tmp_path / "outputs", tmp_path / "moved"))
    find_checkpoint(source).unlink()
    config = next(moved.rglob("lifts/*/*/config.yml"))
    assert read_checkpoint(find_checkpoint(config))["pipeline"]["_model.gauss_params.means"].any()
    export(["--load-config", str(config), "--output-dir", str(tmp_path / "exported"), "--no-video"])
    assert (tmp_path / "exported" / "splat.ply").is_file()


def test_lifts_elsewhere_name_the_geometry_where_it_is(splatfacto_run, lift_command, tmp_path):
    source = splatfacto_run()
    (config,) = run_lift(lift_command(load_config=source, output_dir=tmp_path / "lifted"))
    assert config.parents[3] == tmp_path / "lifted" / "scene" / "splatfacto" / source.parent.name
    shutil.copytree(tmp_path / "lifted", tmp_path / "copied")
    copy = tmp_path / "copied" / config.relative_to(tmp_path / "lifted")
    assert geometry_of(find_checkpoint(copy)) == find_checkpoint(source)
    _, pipeline = opened(config)
    assert torch.equal(pipeline.model.means.detach(), splat_of(source)["means"])


def test_geometry_that_is_gone_or_another_one_is_said(splatfacto_run, lift_command):
    source = splatfacto_run()
    (config,) = run_lift(lift_command(load_config=source))
    checkpoint, geometry = find_checkpoint(config), find_checkpoint(source)
    hidden = geometry.rename(geometry.with_suffix(".hidden"))
    with pytest.raises(UserError, match=f"geometry .*{geometry.name} that .*lifts.* is missing: restore it"):
        read_checkpoint(checkpoint)
    state = torch.load(hidden, weights_only=True)
    for name in list(state["pipeline"]):
        if "gauss_params" in name:
            state["pipeline"][name] = state["pipeline"][name][:-1]
    for optimizer in state["optimizers"].values():
        for moments in optimizer["state"].values():
            moments.update({name: moments[name][:-1] for name in ("exp_avg", "exp_avg_sq")})
    torch.save(state, geometry)
    with pytest.raises(UserError, match="is not the one that .*lifts.* was lifted onto"):
        read_checkpoint(checkpoint)
    os.truncate(geometry, 100)
    with pytest.raises(UserError, match="is not the one that"):
        read_checkpoint(checkpoint)
    hidden.rename(geometry)
    for size in (0, 100):
        os.truncate(config.parent / "lift.safetensors", size)
        with pytest.raises(UserError, match="lift.safetensors is damaged .*: lift again"):
            read_checkpoint(checkpoint)
    assert run_lift(lift_command(load_config=source)) == [config], "a broken lift is made anew"
    assert read_checkpoint(checkpoint)["pipeline"]["_model.gauss_params.fit3d_features"].any()


@pytest.mark.parametrize(
    "lost",
    ["config.yml", "lift.json", "lift.safetensors", "nerfstudio_models", "dataparser_transforms.json"],
)
def test_a_lift_that_is_not_whole_is_made_anew(splatfacto_run, lift_command, lost):
    source = splatfacto_run()
    (config,) = run_lift(lift_command(load_config=source))
    whole = state_of(config)["pipeline"]["_model.gauss_params.fit3d_features"]
    path = config.parent / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run_lift(lift_command(load_config=source)) == [config]
    assert torch.equal(state_of(config)["pipeline"]["_model.gauss_params.fit3d_features"], whole)
    assert json.loads((config.parent / "lift.json").read_text())["request"]


def test_runs_are_picked_by_teacher(splatfacto_run, feature_run, lift_command, other_weights, tmp_path):
    joint = feature_run().base_dir / "config.yml"
    (own,) = run_lift(lift_command(load_config=joint))
    runs, _ = choose_runs([tmp_path / "outputs"])
    assert [run.config_path for run in runs] == [own], "one teacher: the newest of its features"
    (other,) = run_lift(lift_command(load_config=joint, backbone_weights=other_weights, name="other"))
    with pytest.raises(UserError, match=r"several teachers \(test_vit-\w{8}, test_vit-\w{8}\): pick one"):
        choose_runs([tmp_path / "outputs"])
    hashes = {
        path: read_checkpoint(find_checkpoint(path))["pipeline"]["_extra_state"]["teacher_identity"]["weights_sha256"]
        for path in (own, other)
    }
    for path, weights_sha256 in hashes.items():
        (run,), notes = choose_runs([tmp_path / "outputs"], teacher=f"test_vit-{weights_sha256[:8]}")
        assert run.config_path == path and any("left out (--teacher" in note for note in notes)
        bundle, _ = bundle_run(run)
        assert bundle.info.teacher["weights_sha256"] == weights_sha256
        assert bundle.folder == path.parent / "bundle"
    (run,), _ = choose_runs([tmp_path / "outputs"], teacher=str(other_weights))
    assert run.config_path == other and run.label == "scene-joint-other"


def test_one_ply_file_is_stored_once(splatfacto_run, lift_command, scene, other_weights, tmp_path):
    write_ply(tmp_path / "splat.ply", splat_of(splatfacto_run(steps=40)))
    common = {"ply": tmp_path / "splat.ply", "data": scene, "output_dir": tmp_path / "from_ply"}
    (first,) = run_lift(lift_command(**common))
    (geometry,) = (tmp_path / "from_ply").rglob("geometry-*.safetensors")
    written = geometry.stat().st_mtime_ns
    (second,) = run_lift(lift_command(**common, backbone_weights=other_weights, name="other"))
    (third,) = run_lift(lift_command(load_config=second, lift=LiftSettings(refinements=0), name="third"))
    assert [path.parents[3] for path in (first, second, third)] == [geometry.parent] * 3
    assert list((tmp_path / "from_ply").rglob("geometry-*")) == [geometry]
    assert geometry.stat().st_mtime_ns == written
    for config in (first, second, third):
        _, pipeline = opened(config)
        assert torch.equal(pipeline.model.means.detach(), load_file(geometry)["_model.gauss_params.means"])
    geometry.write_bytes(geometry.read_bytes()[:200])
    refused("is not the one that", lift_command(load_config=third, lift=LiftSettings(refinements=2), name="fourth"))


def test_the_record_comes_after_the_checkpoint_that_it_vouches_for(feature_run, make_trainer):
    """Where the last checkpoint cannot be written, nothing says that features were lifted."""
    trainer = feature_run(steps=3)
    config = trainer.config
    config.timestamp, config.pipeline.model.features = "lifted", "lift"
    config.save_config()
    again = make_trainer(config)
    full = UserError("Cannot write it (No space left on device).")
    with (
        mock.patch.object(type(again), "save_checkpoint", side_effect=full),
        pytest.raises(UserError, match="No space"),
    ):
        again.train()
    assert not (again.base_dir / "lift.json").exists()
