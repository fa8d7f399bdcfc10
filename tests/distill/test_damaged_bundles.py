"""A bundle is as it was made, or does not open: no damage to it goes unnoticed, and its sentence names the file."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file, save_file

from benchmarks.faults.kinds import NotApplicable
from benchmarks.faults.mutations import apply, mutations_of
from distill.cli import distil
from fit3d_ns.runs.bundle import JSON_NAME, TENSORS_NAME, SceneBundle, find_bundles
from fit3d_ns.support.errors import UserError


@pytest.mark.parametrize("kind", mutations_of(Path(TENSORS_NAME)) | mutations_of(Path(JSON_NAME)))
@pytest.mark.parametrize("name", [TENSORS_NAME, JSON_NAME])
def test_no_damage_goes_unnoticed(make_scene, tmp_path, monkeypatch, name, kind):
    monkeypatch.setenv("FIT3D_FAULTS_MARKER", str(tmp_path / "marker"))
    folder = make_scene(masked=(1,))
    if kind not in mutations_of(folder / name):
        return
    for seed in range(3):
        before = (folder / name).read_bytes()
        try:
            apply(kind, folder / name, random.Random(seed))
        except NotApplicable:
            continue
        with pytest.raises(UserError) as caught:
            SceneBundle(folder).check()
        sentence = str(caught.value)
        assert (
            str(folder) in sentence
            and name in sentence
            and "again" in sentence
            and "\n" not in sentence
            or (kind == "missing" and "holds no scene.json" in sentence)
        )
        assert not (tmp_path / "marker").exists()
        if (folder / name).is_dir():
            (folder / name).rmdir()
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(before)
    SceneBundle(folder).check()


@pytest.mark.parametrize("name", ["means", "viewmats", "features"])
def test_distillation_refuses_what_is_not_finite(make_scene, make_config, name):
    """Also where it was made by a version that wrote no checksum."""
    folder = make_scene()
    tensors, stored = load_file(folder / TENSORS_NAME), json.loads((folder / JSON_NAME).read_text())
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, folder / TENSORS_NAME, {"id": stored["id"]})
    (folder / JSON_NAME).write_text(json.dumps({**stored, "schema": 1}))
    with pytest.raises(UserError, match=f"{TENSORS_NAME} is damaged .{name} holds NaN"):
        distil(make_config(folder))


def test_the_schema_of_0_1_0_opens(make_scene):
    folder = make_scene()
    expected = SceneBundle(folder).read_scene().tensors()
    stored = json.loads((folder / JSON_NAME).read_text())
    del stored["info"]["teacher_precision"]
    save_file(load_file(folder / TENSORS_NAME), folder / TENSORS_NAME, {"id": stored["id"]})
    (folder / JSON_NAME).write_text(json.dumps({**stored, "schema": 1}))
    bundle = SceneBundle(folder)
    bundle.check()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in bundle.read_scene().tensors().items())


WRITE = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import fit3d_ns.runs.bundle as module
bundle = module.SceneBundle(Path(sys.argv[1]))
write = module.atomic_write_json
def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
module.atomic_write_json = killed
scene = bundle.read_scene()
changed = replace(scene, features=scene.features * 0.5)
module.write_bundle(bundle.folder, bundle.info, changed, bundle.read_cameras(), bundle.read_patch_weights())
"""


def test_a_kill_between_the_writes_leaves_the_old_bundle(make_scene):
    folder = make_scene()
    expected = SceneBundle(folder).read_scene().tensors()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", WRITE, str(folder)], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    bundle = SceneBundle(folder)
    bundle.check()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in bundle.read_scene().tensors().items())
    assert find_bundles([folder.parent]) == [folder], "what the killed process left is no bundle"


def test_versions_of_what_renders_are_noted(make_scene):
    assert {"gsplat", "timm", "torch", "fit3d-ns"} <= SceneBundle(make_scene()).info.versions.keys()
