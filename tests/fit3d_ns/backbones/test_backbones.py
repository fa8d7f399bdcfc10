"""Backbones: names, description, sizes, dense features, identity."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from fit3d_ns.backbones import (
    NAMED_BACKBONES,
    Backbone,
    BackboneInfo,
    BackboneSpec,
    backbone_identity,
    check_timm,
    describe_backbone,
    hash_state_dict,
    input_size,
    load_backbone,
    patch_grid,
    resize_to_patches,
)
from fit3d_ns.backbones.architecture import IMAGENET_MEAN, OLDEST_TIMM
from fit3d_ns.support.errors import UserError

TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model(TINY, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path / "user-cache"))


def shrunken(timm_id: str, layer: int, norm: bool, **sizes: Any) -> Backbone:
    """A backbone of the given family with few, narrow blocks and random weights."""
    torch.manual_seed(0)
    model = timm.create_model(timm_id, num_classes=0, dynamic_img_size=True, depth=3, **sizes).eval()
    info = replace(describe_backbone(BackboneSpec(timm_id)), width=sizes["embed_dim"], num_layers=3, layer=layer)
    return Backbone(model, info, norm, {})


def test_importing_the_package_imports_no_timm():
    code = (
        "import sys; import fit3d_ns.backbones, fit3d_ns.backbones.registry; "
        "assert 'timm' not in sys.modules and 'onnx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "width", "patch", "layers", "prefix"),
    [
        ("dinov2_small", 384, 14, 12, 1),
        ("dinov2_base", 768, 14, 12, 1),
        ("dinov2_large", 1024, 14, 24, 1),
        ("dinov2_giant", 1536, 14, 40, 1),
        ("dinov2_reg_small", 384, 14, 12, 5),
        ("dinov2_reg_base", 768, 14, 12, 5),
        ("clip_base", 768, 16, 12, 1),
        ("mae_base", 768, 16, 12, 1),
        ("deit3_base", 768, 16, 12, 1),
        ("dinov2_small_focus", 384, 14, 9, 1),
        ("vit_small_patch16_dinov3", 384, 16, 12, 5),
        ("vit_so400m_patch14_siglip_378", 1152, 14, 27, 0),
    ],
)
def test_description_needs_no_weights(name, width, patch, layers, prefix):
    info = describe_backbone(BackboneSpec(name))
    assert (info.width, info.patch_size, info.num_layers, info.num_prefix_tokens) == (width, patch, layers, prefix)
    assert info.layer == layers - 1


def test_every_named_backbone_is_known_to_timm_and_reachable_by_its_id():
    for named in NAMED_BACKBONES.values():
        assert timm.models.is_model_pretrained(named.timm_id)
    assert describe_backbone(BackboneSpec("vit_base_patch16_224.mae")).name == "mae_base"
    assert describe_backbone(BackboneSpec("vit_small_patch14_dinov2")).name == "dinov2_small"
    assert describe_backbone(BackboneSpec("timm/" + TINY)) == describe_backbone(BackboneSpec(TINY))


def test_each_backbone_has_its_own_mean_unless_imagenets_is_asked_for():
    own = describe_backbone(BackboneSpec("clip_base"))
    imagenet = describe_backbone(BackboneSpec("clip_base", normalization="imagenet"))
    assert own.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert imagenet.mean == IMAGENET_MEAN


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("dinov2_smal", "did you mean dinov2_small"),
        ("vit_small_patch14_dinov2.nope", "did you mean vit_small_patch14_dinov2"),
        ("qqqqqqqqq", "the named ones are dinov2_small"),
        ("resnet18", "no plain vision transformer"),
        ("swin_tiny_patch4_window7_224", "no plain vision transformer"),
    ],
)
def test_unusable_names_get_one_sentence_with_the_flag(name, said):
    with pytest.raises(UserError, match=said) as caught:
        describe_backbone(BackboneSpec(name))
    assert f"--pipeline.datamanager.backbone {name}" in str(caught.value)


def test_layer_counts_from_either_end_and_out_of_range_names_the_flag():
    assert describe_backbone(BackboneSpec(TINY, layer=-12)).layer == 0
    assert describe_backbone(BackboneSpec(TINY, layer=3)).layer == 3
    for layer in (12, -13):
        with pytest.raises(UserError, match=f"--pipeline.datamanager.backbone-layer {layer}: .* from 0 to 11"):
            describe_backbone(BackboneSpec(TINY, layer=layer))


def test_old_or_missing_timm_is_one_sentence(monkeypatch):
    check_timm()
    monkeypatch.setattr(metadata, "version", lambda _: "0.6.7")
    with pytest.raises(UserError, match=rf'timm 0\.6\.7 is too old.*pip install "timm>={re.escape(OLDEST_TIMM)}"'):
        check_timm()

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UserError, match="timm is not installed"):
        describe_backbone(BackboneSpec())


@pytest.mark.parametrize(
    ("height", "width", "patch", "max_size", "expected"),
    [
        (584, 876, 14, 868, (574, 868)),  # what the paper fed for its photos
        (876, 584, 14, 868, (868, 574)),
        (480, 640, 14, 868, (476, 644)),  # nearest multiple, here one up and one down
        (480, 640, 14, None, (476, 644)),
        (3000, 4000, 16, 868, (656, 864)),
        (3000, 4000, 14, 0, (2996, 4004)),
        (14, 14, 14, 868, (14, 14)),
        (20, 4000, 14, 140, (14, 140)),  # the short side keeps at least one patch
        (861, 861, 14, 863, (854, 854)),  # rounding up would pass the limit
    ],
)
def test_input_size(height, width, patch, max_size, expected):
    assert input_size(height, width, patch, max_size) == expected
    assert patch_grid(height, width, patch, max_size) == (expected[0] // patch, expected[1] // patch)


def test_input_size_keeps_the_aspect_within_half_a_patch_and_the_limit():
    for height in range(200, 1400, 37):
        for width in range(200, 1400, 41):
            rows, columns = input_size(height, width, 14, 868)
            scale = 868 / max(height, width) if max(height, width) >= 875 else 1.0
            assert rows % 14 == 0 and columns % 14 == 0 and max(rows, columns) <= 868
            assert abs(rows - height * scale) <= 7 and abs(columns - width * scale) <= 7


def test_images_below_one_patch_are_refused():
    with pytest.raises(UserError, match="13x200 pixels is smaller than one patch"):
        input_size(13, 200, 14, 868)
    with pytest.raises(UserError, match="limit of 10 pixels"):
        input_size(100, 200, 14, 10)


def test_resize_keeps_content_in_place():
    ramp = torch.linspace(0, 1, 200).expand(1, 3, 100, 200)
    resized = resize_to_patches(ramp, 14, 112)
    assert resized.shape == (1, 3, 56, 112)
    centres = (torch.arange(112) + 0.5) / 112 * 200 - 0.5
    assert torch.allclose(resized[0, 0, 30, 2:-2], centres[2:-2] / 199, atol=2e-3)
    assert resize_to_patches(resized, 14, 868) is resized


@pytest.mark.parametrize(
    ("timm_id", "sizes", "has_cls"),
    [
        ("vit_small_patch14_dinov2", {"embed_dim": 32, "num_heads": 2}, True),
        ("vit_small_patch14_reg4_dinov2", {"embed_dim": 32, "num_heads": 2}, True),
        ("vit_base_patch16_siglip_256", {"embed_dim": 32, "num_heads": 2}, False),
        ("vit_small_patch16_dinov3", {"embed_dim": 32, "num_heads": 2}, True),
        ("eva02_tiny_patch14_224", {"embed_dim": 48, "num_heads": 3}, True),
        ("vit_medium_patch16_reg4_gap_256", {"embed_dim": 32, "num_heads": 2}, False),  # registers, no class token
    ],
)
def test_any_family_gives_the_right_grid_and_agrees_with_forward_features(timm_id, sizes, has_cls):
    backbone = shrunken(timm_id, layer=2, norm=True, **sizes)
    patch = backbone.info.patch_size
    images = torch.rand(2, 3, 3 * patch, 5 * patch)
    with torch.no_grad():
        patch_tokens, cls = backbone(images)
        tokens: Tensor = backbone.model.forward_features((images - backbone.mean) / backbone.std)  # type: ignore
    expected = tokens[:, backbone.info.num_prefix_tokens :].transpose(1, 2).reshape(patch_tokens.shape)
    assert patch_tokens.shape == (2, backbone.info.width, 3, 5)
    assert torch.allclose(patch_tokens, expected, atol=1e-6)
    assert (cls is not None) == has_cls
    if cls is not None:
        assert torch.allclose(cls, tokens[:, 0], atol=1e-6)


def test_layer_and_norm_mean_what_they_say_and_later_blocks_do_not_run():
    sizes = {"embed_dim": 32, "num_heads": 2}
    raw = shrunken("vit_small_patch14_dinov2", layer=1, norm=False, **sizes)
    normed = shrunken("vit_small_patch14_dinov2", layer=1, norm=True, **sizes)
    normed.model.norm.bias.data.fill_(3.0)  # type: ignore[union-attr]
    images = torch.rand(1, 3, 28, 42)
    model = raw.model
    tokens = model._pos_embed(model.patch_embed((images - raw.mean) / raw.std))  # type: ignore[operator]
    tokens = model.blocks[1](model.blocks[0](tokens))  # type: ignore[index]
    ran = []
    model.blocks[2].register_forward_hook(lambda *_: ran.append(True))  # type: ignore[index]
    assert torch.allclose(raw(images).patch_tokens.flatten(2), tokens[:, 1:].transpose(1, 2), atol=1e-6)
    expected = normed.model.norm(tokens)[:, 1:].transpose(1, 2)  # type: ignore[operator]
    assert torch.allclose(normed(images).patch_tokens.flatten(2), expected, atol=1e-5)
    assert not ran


def test_sides_that_are_no_multiples_are_a_value_error():
    backbone = shrunken("vit_small_patch14_dinov2", layer=2, norm=True, embed_dim=32, num_heads=2)
    with pytest.raises(ValueError, match="30x42.*multiples of the patch size 14"):
        backbone(torch.rand(1, 3, 30, 42))


def test_loaded_backbone_is_a_plain_timm_model_that_can_be_fine_tuned(tiny_weights):
    before = torch.random.get_rng_state()
    backbone = load_backbone(BackboneSpec(TINY, weights=tiny_weights), "cpu")
    assert torch.equal(torch.random.get_rng_state(), before), "loading a teacher must not shift the training's numbers"
    assert not backbone.training
    assert set(backbone.model.state_dict()) == set(timm.create_model(TINY, num_classes=0).state_dict())
    tokens = backbone(torch.rand(1, 3, 32, 32)).patch_tokens
    (tokens * torch.rand_like(tokens)).sum().backward()  # the plain sum of what a norm leaves is a constant
    gradient = backbone.model.patch_embed.proj.weight.grad  # type: ignore[union-attr]
    assert isinstance(gradient, Tensor) and gradient.abs().sum() > 0


def test_identity_is_the_same_from_file_and_module_and_is_json(tiny_weights):
    spec = BackboneSpec(TINY, weights=tiny_weights)
    backbone = load_backbone(spec, "cpu")
    assert backbone.identity == backbone_identity(spec) == json.loads(json.dumps(backbone.identity))
    assert backbone.identity["weights_sha256"] == hash_state_dict(backbone.model.state_dict())


def test_identity_changes_with_each_ingredient_only(tiny_weights, tmp_path):
    spec = BackboneSpec(TINY, weights=tiny_weights)
    state_dict = load_backbone(spec, "cpu").model.state_dict()
    torch.save({"model": state_dict}, tmp_path / "same.pth")
    state_dict["norm.bias"][5] += 1e-3
    save_file(state_dict, tmp_path / "other.safetensors")

    reference = backbone_identity(spec)
    assert backbone_identity(replace(spec, weights=tmp_path / "same.pth")) == reference, "same tensors, other container"
    assert backbone_identity(replace(spec, layer=-1)) == reference, "the last layer by another number"
    changes = {
        "weights": replace(spec, weights=tmp_path / "other.safetensors"),
        "layer": replace(spec, layer=10),
        "norm": replace(spec, norm=False),
        "normalization": replace(spec, normalization="imagenet"),
    }
    identities = [reference, *(backbone_identity(changed) for changed in changes.values())]
    assert len({json.dumps(identity, sort_keys=True) for identity in identities}) == len(identities)


def test_second_identity_reads_no_weights_but_notices_a_changed_file(tiny_weights, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    state_dict = load_backbone(BackboneSpec(TINY, weights=tiny_weights), "cpu").model.state_dict()
    save_file(state_dict, path)
    spec = BackboneSpec(TINY, weights=path)
    first = backbone_identity(spec)
    with monkeypatch.context() as patched:
        patched.setattr("fit3d_ns.backbones.identity.read_state_dict", lambda _: pytest.fail("weights were read"))
        assert backbone_identity(spec) == first
    state_dict["norm.bias"] += 1.0
    save_file(state_dict, path)
    assert backbone_identity(spec) != first


def test_identity_survives_a_cache_that_cannot_be_written(tiny_weights, tmp_path, monkeypatch):
    expected = backbone_identity(BackboneSpec(TINY, weights=tiny_weights))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path / "file"))
    assert backbone_identity(BackboneSpec(TINY, weights=tiny_weights)) == expected


def test_info_is_plain_data():
    info = describe_backbone(BackboneSpec(TINY))
    assert isinstance(info, BackboneInfo) and info.std == (0.5, 0.5, 0.5)
