"""The named backbones: each is built with random weights and probed for its grid, width, prefix tokens, mean, std."""

from typing import Any

import pytest
import timm
import torch

from fit3d_ns.backbones import NAMED_BACKBONES, Backbone, BackboneSpec, describe_backbone, load_backbone
from fit3d_ns.backbones.architecture import check_memory, resolve_architecture, weights_bytes
from fit3d_ns.backbones.registry import ALIASES, NamedBackbone
from fit3d_ns.support.errors import UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# width, patch, blocks, prefix tokens, class token, mean and std, millions of parameters (of the papers, rounded)
FACTS = {
    "dinov2_small": (384, 14, 12, 1, True, IMAGENET, 22),
    "dinov2_base": (768, 14, 12, 1, True, IMAGENET, 86),
    "dinov2_large": (1024, 14, 24, 1, True, IMAGENET, 304),
    "dinov2_giant": (1536, 14, 40, 1, True, IMAGENET, 1136),
    "dinov2_reg_small": (384, 14, 12, 5, True, IMAGENET, 22),
    "dinov2_reg_base": (768, 14, 12, 5, True, IMAGENET, 86),
    "dinov2_reg_large": (1024, 14, 24, 5, True, IMAGENET, 304),
    "dinov2_reg_giant": (1536, 14, 40, 5, True, IMAGENET, 1136),
    "dinov3_small": (384, 16, 12, 5, True, IMAGENET, 22),
    "dinov3_small_plus": (384, 16, 12, 5, True, IMAGENET, 29),
    "dinov3_base": (768, 16, 12, 5, True, IMAGENET, 86),
    "dinov3_large": (1024, 16, 24, 5, True, IMAGENET, 303),
    "dinov3_huge_plus": (1280, 16, 32, 5, True, IMAGENET, 840),
    "dinov3_7b": (4096, 16, 40, 5, True, IMAGENET, 6716),
    "siglip2_base": (768, 16, 12, 0, False, HALF, 93),
    "siglip2_large": (1024, 16, 24, 0, False, HALF, 316),
    "siglip2_so400m": (1152, 14, 27, 0, False, HALF, 428),
    "eva02_base": (768, 14, 12, 1, True, CLIP, 86),
    "eva02_large": (1024, 14, 24, 1, True, CLIP, 303),
    "pe_core_base": (768, 16, 12, 1, True, HALF, 93),
    "pe_core_large": (1024, 14, 24, 1, True, HALF, 317),
    "pe_spatial_base": (768, 16, 12, 1, True, HALF, 86),
    "pe_spatial_large": (1024, 14, 24, 1, True, HALF, 304),
    "clip_base": (768, 16, 12, 1, True, CLIP, 86),
    "mae_base": (768, 16, 12, 1, True, IMAGENET, 86),
    "deit3_base": (768, 16, 12, 1, True, IMAGENET, 86),
    "dinov2_small_focus": (384, 14, 9, 1, True, IMAGENET, 17),
}
WIDEST = 1024
"""Wider ones are built on the meta device, where tensors have shapes alone."""


def test_the_table_is_whole():
    assert FACTS.keys() == NAMED_BACKBONES.keys()


@pytest.mark.parametrize("name", FACTS)
def test_what_is_said_of_a_backbone_without_weights(name):
    info = describe_backbone(BackboneSpec(name))
    width, patch, blocks, prefix, _, (mean, std), millions = FACTS[name]
    assert (info.width, info.patch_size, info.num_layers, info.num_prefix_tokens) == (width, patch, blocks, prefix)
    assert info.mean == pytest.approx(mean) and info.std == pytest.approx(std)
    assert weights_bytes(resolve_architecture(name)) / 4e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("name", FACTS)
def test_a_backbone_of_random_weights_gives_a_dense_map(name):
    """Two of its blocks, at a size that is not square and not its own; patch and class tokens are where they belong."""
    width, patch, _, prefix, has_cls, _, _ = FACTS[name]
    architecture = resolve_architecture(name)
    device = "cpu" if width <= WIDEST else "meta"
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = timm.create_model(architecture.timm_id, num_classes=0, dynamic_img_size=True, depth=2).eval()
        spec = BackboneSpec(name, layer=1)
        backbone = Backbone(model, describe_backbone(spec), True, {}).to(device)
        images = torch.rand(2, 3, 2 * patch, 5 * patch)
    with torch.no_grad():
        found = backbone(images)
        assert found.patch_tokens.shape == (2, width, 2, 5)
        assert (found.cls is not None) == has_cls
        if device == "meta":
            return
        tokens = model.forward_features((images - backbone.mean) / backbone.std)
    assert tokens.shape[1] == prefix + 10
    expected = tokens[:, prefix:].transpose(1, 2).reshape(found.patch_tokens.shape)
    torch.testing.assert_close(found.patch_tokens, expected)
    moved = images.clone()
    moved[:, :, patch:, 4 * patch :] += 1.0  # the last patch alone: its own token moves most
    with torch.no_grad():
        change = (backbone(moved).patch_tokens - found.patch_tokens).norm(dim=1)  # [2, 2, 5]
    assert (change.flatten(1).argmax(1) == 9).all()


def test_torch_hubs_names_mean_the_same_backbones():
    for alias, name in ALIASES.items():
        assert describe_backbone(BackboneSpec(alias)) == describe_backbone(BackboneSpec(name))
    assert describe_backbone(BackboneSpec("dinov2_vitl14_reg")).name == "dinov2_reg_large"


def test_a_backbone_that_this_timm_lacks_is_said():
    with pytest.raises(UserError, match=r"backbone new: timm .* does not have it yet \(as vit_new.tag\): run `pip"):
        check_memory(NamedBackbone("new", "vit_new.tag", "Of tomorrow."), "cpu")


@pytest.mark.parametrize(
    ("name", "gigabytes", "advice"),
    [
        ("dinov3_7b", 16, r"25.0 GiB in fp32, do not fit into the 14.9 GiB .*: dinov3_huge_plus \(3.1 GiB\) does"),
        ("dinov3_7b", 3, r"dinov3_base \(0.3 GiB\) does"),
        (
            "dinov2_large",
            2,
            r"1.1 GiB in fp32, do not fit into the 1.9 GiB .* on cpu: dinov2_reg_base \(0.3 GiB\) does",
        ),
        ("dinov2_small", 0.01, "take a machine with more"),
    ],
)
def test_what_does_not_fit_is_said_with_what_does(name, gigabytes, advice, monkeypatch):
    monkeypatch.setattr("fit3d_ns.backbones.architecture._free_memory", lambda device: int(gigabytes * 1e9))
    with pytest.raises(UserError, match=f"backbone {name}: its weights, .*{advice}"):
        load_backbone(BackboneSpec(name), "cpu")


def test_what_fits_is_let_through(monkeypatch):
    monkeypatch.setattr("fit3d_ns.backbones.architecture._free_memory", lambda device: int(3e9))
    check_memory(resolve_architecture("dinov2_large"), "cpu")
    monkeypatch.setattr("fit3d_ns.backbones.architecture._free_memory", lambda device: None)
    check_memory(resolve_architecture("dinov3_7b"), "cpu")
