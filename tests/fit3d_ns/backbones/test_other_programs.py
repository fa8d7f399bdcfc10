"""A result opens where people work: in plain timm, from a folder and the hub, in transformers, as an ONNX graph."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from distill.results.result import push_to_hub
from fit3d_ns.backbones import BackboneSpec, load, load_backbone
from fit3d_ns.backbones.architecture import describe_backbone
from fit3d_ns.backbones.identity import hash_state_dict, make_identity
from fit3d_ns.backbones.students.averaging import average_result
from fit3d_ns.backbones.students.fine_tuned import FineTuned, find_fine_tuned
from fit3d_ns.backbones.students.other_formats import check_onnx, write_onnx, write_transformers
from fit3d_ns.backbones.students.result_folder import add_probe, write_model_card, write_weights
from fit3d_ns.support.errors import UserError
from probe.features.partners import Partner, note_in_model_cards

pytestmark = pytest.mark.usefixtures("own_cache")


def randomised(name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return dict(model.state_dict())


def a_result(folder: Path, name: str = "test_vit", **options) -> Path:
    """What fit3d-distill leaves, of random weights; layer and normalisation are not the architecture's own."""
    spec = BackboneSpec(name, layer=-2, normalization="imagenet")
    weights = randomised(name)
    original = {key: value + 0.01 for key, value in weights.items()}
    card = {
        "recipe": "auto",
        "interpolate": 0.5,
        "assembly": "tuned",
        "student": make_identity(spec, describe_backbone(spec), hash_state_dict(original)),
        "scenes": [{"name": "a"}, {"name": "b"}],
        "training_views": 24,
        "steps": 9,
        "settings": {"targets": "lifted"},
    }
    averaged = {key: 0.5 * value + 0.5 * original[key] for key, value in weights.items()}
    write_weights(folder, weights, averaged, card, half=True, dinov2_layout=False, **options)
    measures = {"l1": (0.4, 0.3), "cosine": (0.81, 0.92)}
    mean = {f"{k}_{when}": v for k, pair in measures.items() for when, v in zip(("before", "after"), pair)}
    (folder / "metrics.json").write_text(json.dumps({"mean": mean, "validation": {"mean": {**mean, "l1_after": 0.35}}}))
    write_model_card(folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder: what is uploaded to it can be downloaded, by timm's own calls."""
    import huggingface_hub
    import timm.models._hub as timm_hub
    from huggingface_hub.utils import EntryNotFoundError

    store = tmp_path / "hub"

    class Api:
        def create_repo(self, repository, exist_ok):
            return f"https://hub/{repository}"

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            place = store / repo_id / path_in_repo
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path_or_fileobj, place)

    def download(repo_id=None, filename=None, revision=None, **_):
        if not (store / repo_id / filename).is_file():
            raise EntryNotFoundError(f"404 {filename}")
        return str(store / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(timm_hub, "hf_hub_download", download)
    return store


def features(model, images):
    with torch.no_grad():
        return model.forward_features(images)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])
def test_plain_timm_opens_the_folder_and_the_hub(name, tmp_path, hub):
    """In a process that imports timm and nothing of ours; at two sizes."""
    folder = a_result(tmp_path / "result", name)
    wanted = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    wanted.load_state_dict(load_file(folder / "backbone.safetensors"))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    push_to_hub("me/it", sorted(files, key=lambda path: path.name != "backbone.safetensors"))
    assert (hub / "me/it/README.md").is_file()
    for source in (f"local-dir:{folder}", "hf-hub:me/it"):
        model: Any = timm.create_model(source, pretrained=True).eval()
        assert tuple(model.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)  # the card's, not the architecture's
        for size in (160, 96):
            images = torch.rand(1, 3, size, size + 32)
            torch.testing.assert_close(features(model, images), features(wanted.eval(), images))
    code = (
        f"import sys, timm; m = timm.create_model('local-dir:{folder}', pretrained=True);"
        "print(m.num_classes, [n for n in sys.modules if n.split('.')[0] in ('fit3d_ns', 'distill')])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert told.stdout.split("\n")[-2] == "0 []"


def test_a_cut_backbone_keeps_its_depth(tmp_path):
    weights = {key: value for key, value in randomised("vit_small_patch14_dinov2").items()}
    kept = {k: v for k, v in weights.items() if not any(k.startswith(f"blocks.{n}.") for n in (9, 10, 11))}
    spec = BackboneSpec("dinov2_small_focus")
    card = {"student": make_identity(spec, describe_backbone(spec), "0" * 64)}
    write_weights(tmp_path, kept, kept, card, half=False, dinov2_layout=False)
    model: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert len(model.blocks) == 9


def test_the_model_card_has_the_numbers_of_the_files(tmp_path):
    folder = a_result(tmp_path / "result")
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: timm\nbase_model: timm/test_vit.r160_in1k\n")
    assert "2 scenes with 24 photos" in text and "0.5 x student + 0.5 x original" in text
    first, second = text.split("Held-out views of other scenes")
    assert "| L1 to the target (lower is better) | 0.4000 | 0.3000 |" in first
    assert "| L1 to the target (lower is better) | 0.4000 | 0.3500 |" in second
    assert "points that the features find" not in text  # not measured
    add_probe(folder, "Depth probe: test_vit on rooms (exact)", "| a |\n|---|\n| 1 |")
    add_probe(folder, "Depth probe: test_vit on rooms (exact)", "| a |\n|---|\n| 2 |")
    text = (folder / "README.md").read_text()
    assert text.count("## Depth probe") == 1 and "| 2 |" in text and "| 1 |" not in text
    (folder / "metrics.json").write_text("torn")
    assert "Measured" not in write_model_card(folder).read_text()


def test_other_formats_follow_a_new_average_and_old_probes_do_not(tmp_path, monkeypatch):
    name = "vit_small_patch14_dinov2"
    folder = a_result(tmp_path / "result", name, transformers_layout=True)
    add_probe(folder, "Depth probe", "| of the average before |")
    original = {key: value + 0.01 for key, value in randomised(name).items()}
    torch.save(original, tmp_path / "original.pth")
    before = (folder / "transformers" / "model.safetensors").read_bytes()
    average_result(folder, 0.25, tmp_path / "original.pth")
    assert (folder / "transformers" / "model.safetensors").read_bytes() != before
    text = (folder / "README.md").read_text()
    assert "0.25 x student" in text and "of the average before" not in text
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    torch.testing.assert_close(model.state_dict()["norm.bias"], original["norm.bias"] - 0.01 * 0.25)


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"]
)
def test_transformers_layout_reads_back(name, tmp_path):
    """With our own reader, which its own test compares with transformers."""
    from fit3d_ns.backbones.weights.state_dicts import read_state_dict, to_timm_layout

    model = timm.create_model(name, num_classes=0, depth=2)
    weights = dict(model.state_dict())
    info = describe_backbone(BackboneSpec(name))
    identity = {**make_identity(BackboneSpec(name), info, "0" * 64), "num_layers": 2}
    write_transformers(tmp_path, weights, identity)
    found = to_timm_layout(read_state_dict(tmp_path), model, tmp_path, name)
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["image_size"], config["patch_size"], config["hidden_size"]) == (518, 14, info.width)
    assert config["use_swiglu_ffn"] == ("giant" in name) and config.get("num_register_tokens", 0) == 4 * ("reg" in name)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_transformers_opens_its_folder(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = a_result(tmp_path / "result", name, transformers_layout=True)
    theirs = transformers.AutoModel.from_pretrained(folder / "transformers").eval()
    ours = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(1, 3, 518, 518)
    with torch.no_grad():
        found = theirs(pixel_values=images).last_hidden_state
    torch.testing.assert_close(found, features(ours, images), rtol=1e-3, atol=1e-3)


def test_other_backbones_have_no_transformers_layout(tmp_path):
    with pytest.raises(UserError, match="--transformers-layout is for DINOv2 backbones, and test_vit"):
        a_result(tmp_path / "result", transformers_layout=True)


def test_onnx_that_cannot_be_written_is_said(monkeypatch):
    monkeypatch.setattr("fit3d_ns.backbones.students.other_formats.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--onnx needs onnx and onnxscript: run `pip install onnx onnxscript`"):
        check_onnx()


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch14_reg4_dinov2"])
def test_the_onnx_graph_gives_the_same_features_at_every_size(name, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    weights = randomised(name)
    spec = BackboneSpec(name, tmp_path / "w.pth", layer=-2, normalization="imagenet")
    torch.save(weights, tmp_path / "w.pth")
    backbone = load_backbone(spec, "cpu")
    path = write_onnx(tmp_path / "backbone.onnx", weights, backbone.identity)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    patch = backbone.info.patch_size
    for batch, rows, columns in ((1, 5, 7), (3, 9, 4)):
        images = torch.rand(batch, 3, rows * patch, columns * patch)
        (found,) = session.run(["patch_tokens"], {"images": images.numpy()})
        with torch.no_grad():
            wanted = backbone(images).patch_tokens
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-3, atol=1e-4)


def test_our_own_loader_still_takes_the_folder(tmp_path):
    folder = a_result(tmp_path / "result")
    assert load(folder)(torch.rand(1, 3, 64, 64)).shape == (1, 64, 4, 4)


def test_a_probe_adds_its_table_where_the_folder_is_here(tmp_path):
    found = find_fine_tuned(a_result(tmp_path / "result"), "--tuned")
    bare = FineTuned("me/it", tmp_path / "elsewhere" / "backbone.safetensors")
    table = "| row | miou |\n|---|---|\n| tuned | 0.5 |\n"
    (tmp_path / "table.md").write_text(f"# Title\n\nA sentence.\n\n{table}\n`command`\n")
    partners = [Partner("tuned", "tuned", "tuned", found), Partner("other", "other", "tuned", bare)]
    note_in_model_cards(partners, "Segmentation probe", tmp_path / "table.md")
    text = (tmp_path / "result" / "README.md").read_text()
    assert text.endswith(f"## Segmentation probe\n\nA sentence.\n\n{table}")
