"""One sentence for each mistake, before any long work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.cli import distil
from distill.photo_store import PhotoStore
from fit3d_ns.backbones import BackboneSpec
from fit3d_ns.errors import UserError


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
    refused(make_config(runs=(tmp_path / "outputs",)), r"No finished run.*is a run of nerfacto, not of fit3d-splat")


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


def test_values_that_make_no_sense(make_scene, make_config, tmp_path):
    folder = make_scene()
    refused(make_config(folder, steps=0), "--steps must be at least 1")
    refused(make_config(folder, lr=0.0), "--lr must be above 0")
    refused(make_config(folder, save_every=0), "--save-every 0: give at least 1")
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
    refused(make_config(folder), "scene.safetensors is missing or damaged: make the bundle again")
    (folder / "scene.json").write_text("{")
    refused(make_config(folder), "scene.json is damaged")


def test_the_command_ends_in_one_sentence(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "distill", "--bundles", str(tmp_path / "nowhere")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
