"""Small files of every schema, kept for ever: this version opens each, or refuses it by its version."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from paths import DATA
from safetensors.torch import load_file

from distill.checkpoint import SCHEMA as CHECKPOINT_SCHEMA
from distill.checkpoint import load_checkpoint
from fit3d_ns.backbones.students.result_folder import read_card
from fit3d_ns.runs.bundle import SCHEMA, SceneBundle
from fit3d_ns.runs.checkpoints import read_lifted
from fit3d_ns.runs.record import read_disagreement
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.tensor_files import TensorSpec, read_tensors

FORMATS = DATA / "formats"


def test_bundles_of_every_schema_open():
    """Also: whoever raises the schema adds a bundle of it here."""
    folders = {int(folder.name.removeprefix("bundle-")): folder for folder in FORMATS.glob("bundle-*")}
    assert set(folders) == set(range(1, SCHEMA + 1))
    for folder in folders.values():
        bundle = SceneBundle(folder)
        bundle.check()
        scene = bundle.read_scene()
        assert len(scene.geometry) == 20 and scene.features.shape == (20, 4) and scene.decoder.shape == (64, 4, 3, 3)
        assert [view.split for view in bundle.info.views] == ["train", "eval"]
        assert bundle.info.views[1].photo.lens is not None and bundle.info.feature_grid.name == "fast"
        assert list(bundle.read_patch_weights()) == [0]
    newest = [SceneBundle(folder).read_scene().tensors() for folder in folders.values()]
    assert all(torch.equal(newest[0][name], newest[-1][name]) for name in newest[0])


@pytest.mark.parametrize("schema", [0, SCHEMA + 1, True, "2", None])
def test_a_bundle_of_a_later_version_is_refused_by_its_schema(tmp_path, schema):
    folder = Path(shutil.copytree(FORMATS / "bundle-2", tmp_path / "bundle"))
    content = json.loads((folder / "scene.json").read_text())
    (folder / "scene.json").write_text(json.dumps({**content, "schema": schema}))
    with pytest.raises(UserError, match=f"scene.json has the schema {schema}, this version reads 1 and {SCHEMA}"):
        SceneBundle(folder)


@pytest.mark.parametrize("version", [1, 2])
def test_cards_open(version):
    card = read_card(FORMATS / f"card-{version}")
    assert card["student"]["timm_id"] == "test_vit.r160_in1k" and card["weights_sha256"] == "2" * 64


@pytest.mark.parametrize("version", [1, 2])
def test_lifts_open(version):
    found = read_disagreement(FORMATS / f"lift-{version}")
    assert found is not None and [tensor.shape for tensor in found] == [(20,), (20,)]
    if version == 2:
        assert read_lifted(FORMATS / "lift-2", whole=True)["fit3d_features"].shape == (20, 4)


CACHES = {
    "teacher_map-2": {"patch_tokens": TensorSpec(torch.float16, (64, "h", "w"))},
    "photo-3": {"photo": TensorSpec(torch.uint8, (3, 16, 32))},
    "row-1": {"weight": TensorSpec(torch.float32, ("K", "C")), "bias": TensorSpec(torch.float32, ("K",))},
}


@pytest.mark.parametrize("name", CACHES)
def test_files_of_caches_open(name):
    path = FORMATS / f"{name}.safetensors"
    found = read_tensors(path, CACHES[name])
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in load_file(path).items())


@pytest.mark.parametrize("schema", [2, 3])
def test_a_checkpoint_of_distillation_opens(schema):
    assert schema <= CHECKPOINT_SCHEMA == 3
    student = json.loads((FORMATS / "card-1" / "card.json").read_text())["student"]
    state = load_checkpoint(FORMATS / f"distill-{schema}.pt", {"student": student, "seed": 0})
    assert state["step"] == 1 and state["model"]["w"].tolist() == [1, 1]
