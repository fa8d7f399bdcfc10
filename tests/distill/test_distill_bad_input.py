"""One sentence for each mistake, before any long work."""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from paths import ROOT
from torch._dynamo.exc import TorchDynamoException

from distill.cli import distil
from distill.photo_store import PhotoStore
from distill.step import DistillLoss, EagerStep, GraphStep, StepInput
from fit3d_ns.backbones import BackboneSpec
from fit3d_ns.backbones.students.result_folder import FILES
from fit3d_ns.support.errors import UserError

FILL = PhotoStore.fill


@pytest.fixture(autouse=True)
def no_long_work(monkeypatch):
    """Photos are decoded, and steps taken, only after everything was checked."""
    monkeypatch.setattr(PhotoStore, "fill", lambda *_, **__: pytest.fail("photos were decoded"))


def refused(config, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        distil(config)
    assert "\n" not in str(error.value)


def test_nothing_to_distil(make_config, tmp_path):
    refused(make_config(), "name trained runs with --runs, or scene bundles with --bundles")
    refused(make_config(average_only=tmp_path / "nowhere"), "There is no folder .*nowhere")
    refused(make_config(average_only=tmp_path), "holds no card.json: name a folder that fit3d-distill wrote")
    refused(make_config(runs=(tmp_path / "nowhere",)), "neither a folder nor a run's config.yml")
    (tmp_path / "empty").mkdir()
    refused(make_config(runs=(tmp_path / "empty",)), "No finished run of fit3d-splat below")
    refused(make_config(tmp_path / "empty"), "holds no scene bundle")
    refused(make_config(tmp_path / "nowhere"), "is no folder")


def test_runs_of_other_methods_and_unfinished_runs(make_config, tmp_path):
    run = tmp_path / "outputs" / "scene" / "nerfacto" / "today"
    (run / "nerfstudio_models").mkdir(parents=True)
    (run / "nerfstudio_models" / "step-000000010.ckpt").write_bytes(b"")
    (run / "config.yml").write_text("!!python/object/apply:os.system ['echo hacked']\nmethod_name: nerfacto\n")
    refused(
        make_config(runs=(tmp_path / "outputs",)),
        r"No finished run.*is a run of nerfacto, not of fit3d-splat: left out\): train",
    )


def test_scenes_that_do_not_belong_together(make_scene, make_config, teacher_weights):
    first = make_scene("a")
    other_layer = make_scene("b", seed=1, spec=BackboneSpec("test_vit", teacher_weights, layer=1))
    other_grid = make_scene("c", seed=1, grid="paper")
    refused(make_config(first, other_layer), r"scenes a \(.*\) and b \(.*\) differ in the teacher's layer \(5 and 1\)")
    refused(make_config(first, other_grid), "differ in the feature grid.*distil them apart")


def test_another_teacher_than_the_scenes_were_lifted_with(make_scene, make_config, tmp_path, teacher_weights):
    from safetensors.torch import load_file, save_file

    weights = load_file(teacher_weights)
    weights["cls_token"] += 1
    save_file(weights, tmp_path / "other.safetensors")
    refused(
        make_config(make_scene(), student_weights=tmp_path / "other.safetensors"), "hashes differ.*--student-weights"
    )


def test_a_student_of_another_width(make_scene, make_config):
    refused(make_config(make_scene(), student="dinov2_small_focus"), "384 channels.*features have 64")


def test_a_student_that_cannot_be_had_names_this_commands_flags(make_scene, make_config, tmp_path):
    folder = make_scene()
    refused(make_config(folder, student="nonsense"), "^--student nonsense: neither")
    refused(make_config(folder, student_layer=40), "^--student-layer 40: .* has 6 layers")
    refused(make_config(folder, student_weights=tmp_path / "gone.pth"), "gone.pth: check --student-weights")
    info = json.loads((folder / "scene.json").read_text())
    info["info"]["teacher_weights"] = str(tmp_path / "moved.safetensors")
    info["schema"] = 1  # whose JSON is not hashed
    (folder / "scene.json").write_text(json.dumps(info))
    refused(make_config(folder), "moved.safetensors: check --student-weights")


def test_an_output_folder_that_cannot_take_the_result(make_scene, make_config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    # Said before bundles are made, of which there are none here.
    refused(
        make_config(output_dir=tmp_path / "file" / "out", runs=(tmp_path,)),
        "file/out cannot be written to .*--output-dir",
    )
    folder, usage = make_scene(), shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    refused(make_config(folder), r"Checkpoints and weights need .* has 0\.00 GB left: .*--output-dir")


@pytest.mark.parametrize("name", FILES)
def test_a_folder_where_a_file_of_the_result_goes(make_scene, make_config, tmp_path, name):
    config = make_config(make_scene("room"))
    (config.output_dir / name).mkdir(parents=True)
    refused(config, f"{name} is a folder, and a file of the result goes there: move it away, or choose another --out")
    assert [path.name for path in config.output_dir.iterdir()] == [name]


def test_a_repository_that_cannot_be_pushed_to(make_scene, make_config, monkeypatch):
    import huggingface_hub

    folder = make_scene()
    refused(make_config(folder, push_to_hub="not a name"), "--push-to-hub not a name")

    def refuse(self):
        raise OSError("no token")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", refuse)
    refused(make_config(folder, push_to_hub="me/it"), r"--push-to-hub me/it.*no token.*hf auth login")


def test_values_that_make_no_sense(make_scene, make_config, tmp_path):
    folder = make_scene()
    for field, value, sentence in (
        ("steps", 0, "--steps 0: give at least 1"),
        ("epochs", 0.0, "--epochs 0.0: give a number above 0"),
        ("epochs", math.inf, "--epochs inf: give a number above 0"),
        ("lr", math.nan, "--lr nan: give a number above 0"),
        ("weight_decay", -1.0, "--weight-decay -1.0: give at least 0"),
        ("clip", -1.0, "--clip -1.0: give at least 0"),
        ("ema_decay", 1.0, "--ema-decay 1.0: give 0 to below 1"),
        ("flip", 1.5, "--flip 1.5: give 0 to 1"),
        ("min_accumulation", 3.0, "--min-accumulation 3.0: give 0 to 1"),
        ("seed", -1, "--seed -1: give at least 0"),
        ("workers", -1, "--workers -1: give at least 0"),
        ("lora_rank", -1, "--lora-rank -1: give at least 0"),
        ("warmup_steps", -3, "--warmup-steps -3: give at least 0"),
        ("scene_memory", -1.0, "--scene-memory -1.0: give a number above 0"),
        ("photo_memory", -1.0, "--photo-memory -1.0: give at least 0"),
        ("save_every", 0, "--save-every 0: give at least 1"),
        ("validate_every", 0, "--validate-every 0: give at least 1"),
        ("interpolate", 1.5, "--interpolate 1.5: give a number from 0"),
        ("interpolate", -0.1, "--interpolate -0.1: give a number from 0"),
        ("interpolate", math.nan, "--interpolate nan: give a number from 0"),
    ):
        refused(make_config(folder, **{field: value}), sentence)
    refused(make_config(folder, data_root=tmp_path / "nowhere"), "--data-root .* is no folder")
    refused(make_config(folder, dinov2_layout=True), "--dinov2-layout is for DINOv2")
    refused(make_config(folder, acceleration="graph"), "--acceleration graph needs CUDA")


def test_missing_photos_and_damaged_bundles(make_scene, make_config):
    folder = make_scene()
    photo = next((folder.parents[1] / "photos" / "scene").glob("*.png"))
    content = photo.read_bytes()
    photo.unlink()
    refused(make_config(folder), f"{photo.name} is missing.*--data-root")
    photo.write_bytes(content)
    tensors = folder / "scene.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:5000])
    refused(make_config(folder), "scene.safetensors is damaged .*: make the bundle again")
    (folder / "scene.json").write_text("{")
    refused(make_config(folder), "scene.json is damaged")


@pytest.mark.parametrize(
    "message, cause, reason",
    [
        ("no bytecode\nsecond line", None, "no bytecode"),
        ("backend='inductor' raised:\nOSError: no compiler", OSError("no compiler\n"), "no compiler"),
        ("", None, "TorchDynamoException"),
    ],
)
def test_a_compiler_that_fails(make_scene, make_config, monkeypatch, message, cause, reason):
    error = TorchDynamoException(message)
    if cause is not None:
        monkeypatch.setattr(error, "inner_exception", cause, raising=False)  # as BackendCompilerFailed has it
    compiled = Mock(side_effect=error)
    monkeypatch.setattr(PhotoStore, "fill", FILL)
    monkeypatch.setattr(DistillLoss, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", compiled))
    sentence = rf"^torch.compile failed \({reason}\): use --acceleration graph .* or none"
    refused(make_config(make_scene(), acceleration="compile"), sentence)


def test_a_step_that_cannot_be_captured(monkeypatch):
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    loss = torch.nn.Linear(2, 2)
    parameters = list(loss.parameters())
    optimizer = torch.optim.AdamW(parameters)
    step = GraphStep(EagerStep(loss, optimizer, parameters, clip=0.1), optimizer, parameters)
    inputs = StepInput(*(torch.zeros(1) for _ in range(5)))
    for failure, sentence in (
        (RuntimeError(), r"captured as a CUDA graph \(RuntimeError\): use --acceleration none\."),
        (UserError("torch.compile failed"), "^torch.compile failed$"),
    ):
        monkeypatch.setattr(step, "_make_optimizer_state", Mock(side_effect=failure))
        with pytest.raises(UserError, match=sentence):
            step.run(inputs)


def test_a_benchmarks_folder_of_other_scenes(tmp_path):
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "distillation.py"))
    choices = benchmark["Benchmark"](backbone="test_vit", size=(48, 64), scenes=2, gaussians=50, views=2)
    folder = tmp_path / "scenes"
    for _ in range(2):
        benchmark["_make_scenes"](choices, folder)
    assert len(list(folder.glob("bundles/*"))) == 2
    with pytest.raises(UserError, match="--folder .*scenes holds no scenes of these choices .*name another"):
        benchmark["_make_scenes"](replace(choices, size=(64, 64)), folder)


def test_the_command_ends_in_one_sentence(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "distill", "--bundles", str(tmp_path / "nowhere")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
