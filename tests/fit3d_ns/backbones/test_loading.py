"""One line loads a backbone: results of distillation, files, names; what it gives, and what it says when it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fit3d_ns.backbones import (
    ASSEMBLIES,
    BackboneSpec,
    hash_state_dict,
    load,
    load_backbone,
    resize_to_patches,
)
from fit3d_ns.support.errors import UserError

TINY = "test_vit"
LAYER = 2
pytestmark = pytest.mark.usefixtures("own_cache")


def changed(path: Path, noise: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    state_dict = load_file(path)
    return {
        key: value + noise * torch.randn(value.shape, generator=generator) if value.ndim > 1 else value
        for key, value in state_dict.items()
    }


@pytest.fixture
def result(tmp_path, teacher_weights) -> Path:
    """A folder as fit3d-distill leaves it, of a student that was trained at a block before the last."""
    folder = tmp_path / "distill"
    folder.mkdir()
    tuned = changed(teacher_weights, 0.05)
    save_file(tuned, folder / "backbone.safetensors")
    student = load_backbone(BackboneSpec(TINY, teacher_weights, LAYER, normalization="imagenet"), "cpu").identity
    card = {"student": student, "weights_sha256": hash_state_dict(tuned)}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(3))


def by_hand(weights: Path, images: Tensor) -> Tensor:
    """Patch tokens of the tiny backbone, with nothing of ours but the size of the images."""
    model: Any = timm.create_model(TINY, num_classes=0, dynamic_img_size=True).eval()
    model.load_state_dict(load_file(weights))
    resized = torch.nn.functional.interpolate(images, (48, 64), mode="bilinear", antialias=True)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    with torch.no_grad():
        tokens = model.forward_intermediates((resized - mean) / std, indices=[LAYER], norm=True, output_fmt="NCHW")[1]
    return tokens[0]


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and "--pipeline" not in message
    return message


def test_concat_is_both_backbones_beside_each_other(result, teacher_weights, images):
    backbone = load(str(result), assembly="concat", backbone_weights=teacher_weights)
    assert isinstance(backbone, torch.nn.Module) and not backbone.training
    expected = [by_hand(path, images) for path in (teacher_weights, result / "backbone.safetensors")]
    assert float((expected[0] - expected[1]).abs().max()) > 0.1
    features = backbone(images)
    assert features.shape == (2, backbone.width, 3, 4) == (2, 128, 3, 4)
    torch.testing.assert_close(features, torch.cat(expected, 1), rtol=1e-4, atol=1e-4)


def test_every_assembly(result, teacher_weights, images):
    original, tuned = (by_hand(path, images) for path in (teacher_weights, result / "backbone.safetensors"))
    expected = {
        "original": original,
        "duplicate": torch.cat([original, original], 1),
        "tuned": tuned,
        "add": original + tuned,
        None: torch.cat([original, tuned], 1),
    }
    for assembly, features in expected.items():
        backbone = load(result, assembly, backbone_weights=teacher_weights)
        assert backbone.width == features.shape[1]
        assert (backbone.original is None) == (assembly == "tuned")
        assert (backbone.tuned is None) == (assembly in ("original", "duplicate"))
        with torch.no_grad():
            torch.testing.assert_close(backbone(images), features, rtol=1e-4, atol=1e-4)
        cls = backbone.features(images).cls
        assert cls is not None and cls.shape == (2, 64)
    assert set(expected) - {None} == set(ASSEMBLIES) - {"linear", "concat"}


def test_images_of_any_size_enter_as_everywhere_else(result, teacher_weights):
    backbone = load(result, backbone_weights=teacher_weights, max_size=96)
    with torch.no_grad():
        for size, grid in (((50, 70), (3, 4)), ((16, 33), (1, 2)), ((400, 300), (6, 5)), ((96, 90), (6, 6))):
            images = torch.rand(1, 3, *size)
            features = backbone(images)
            assert features.shape[2:] == grid
            torch.testing.assert_close(features, backbone(resize_to_patches(images, 16, 96)))
        with pytest.raises(UserError, match="smaller than one patch"):
            backbone(torch.rand(1, 3, 8, 40))


def test_misuse_of_images_is_noticed(result, teacher_weights, images):
    def fresh():
        return load(result, backbone_weights=teacher_weights)

    with torch.no_grad():
        bytes_ = (images * 255).round().to(torch.uint8)
        torch.testing.assert_close(fresh()(bytes_), fresh()(bytes_.float() / 255))
        for wrong, said in (
            (images * 255, "RGB in .0, 1."),
            ((images - 0.45) / 0.225, "mean and std are applied"),
            (bytes_.int(), "uint8"),
            (images[0], "batch"),
            (images[:, :2], "batch"),
        ):
            with pytest.raises(ValueError, match=said):
                fresh()(wrong)
        half = fresh().bfloat16()
        assert half(images).dtype == torch.bfloat16


def test_original_weights_that_moved(result, teacher_weights, images, tmp_path, no_network):
    with pytest.raises(
        UserError, match="weights of test_vit.r160_in1k are not on this machine.*backbone_weights= PATH"
    ) as error:
        load(result)
    one_sentence(error)
    load(result, "tuned")  # needs no original
    other = tmp_path / "other.safetensors"
    save_file(changed(teacher_weights, 0.01), other)
    with pytest.raises(
        UserError, match="other.safetensors does not hold the weights that .*distill was fine-tuned"
    ) as e:
        load(result, backbone_weights=other)
    assert "backbone_weights=" in one_sentence(e)
    load(result, backbone_weights=str(teacher_weights))


def test_files_of_a_result_and_others(result, teacher_weights, images, tmp_path):
    state_dict = load_file(result / "backbone.safetensors")
    save_file({key: value.half() for key, value in state_dict.items()}, result / "backbone_fp16.safetensors")
    torch.save({"model": state_dict}, tmp_path / "bare.pth")
    whole = load(result / "backbone.safetensors", "tuned")
    with torch.no_grad():
        half = load(str(result / "backbone_fp16.safetensors"), "tuned")(images)
        torch.testing.assert_close(half, whole(images), rtol=0.05, atol=0.05)
        bare = load(tmp_path / "bare.pth", "tuned", backbone=TINY, layer=LAYER, normalization="imagenet")
        assert torch.equal(bare(images), whole(images))
        assert not torch.allclose(load(tmp_path / "bare.pth", "tuned", backbone=TINY)(images), whole(images))
    with pytest.raises(UserError, match=r'bare.pth does not say which backbone.*backbone="dinov2_small"') as error:
        load(tmp_path / "bare.pth")
    one_sentence(error)


def test_weights_and_card_have_to_belong_together(result, teacher_weights):
    save_file(changed(teacher_weights, 0.01), result / "backbone.safetensors")
    with pytest.raises(UserError, match="card.json beside it do not belong together"):
        load(result, "tuned")
    with pytest.raises(UserError, match="was fine-tuned from test_vit.r160_in1k, not from dinov2_small: name test_vit"):
        load(result, "tuned", backbone="dinov2_small")
    for content in ("", "[]", '{"student": {"name": 1, "layer": 2, "weights_sha256": "x"}, "weights_sha256": "x"}'):
        (result / "card.json").write_text(content)
        with pytest.raises(UserError, match="card.json is damaged, or fit3d-distill did not write it") as error:
            load(result)
        one_sentence(error)


def test_a_file_of_another_network_is_named_with_its_first_difference(teacher_weights, tmp_path):
    state_dict = load_file(teacher_weights)
    path = tmp_path / "strict.safetensors"
    for change, said in (
        ({"norm.weight": None}, "'norm.weight' is missing"),
        ({"extra.weight": torch.ones(2)}, "'extra.weight' is there but unknown"),
        ({"norm.weight": torch.ones(65)}, r"'norm.weight' has shape \(65,\) instead of \(64,\)"),
    ):
        save_file({key: value for key, value in {**state_dict, **change}.items() if value is not None}, path)
        with pytest.raises(UserError, match=f"strict.safetensors holds .*{said}") as error:
            load(path, "tuned", backbone=TINY)
        assert "give other weights to path_or_name" in one_sentence(error)


def test_names_of_original_backbones(teacher_weights, images, no_network, tmp_path, monkeypatch):
    backbone = load(TINY, backbone_weights=teacher_weights, layer=LAYER, normalization="imagenet")
    assert backbone.assembly == "original" and backbone.tuned is None
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), by_hand(teacher_weights, images), rtol=1e-4, atol=1e-4)
    assert load(f"timm/{TINY}", "duplicate", backbone_weights=teacher_weights).width == 128
    assert not no_network
    mistakes: tuple[tuple[Any, dict[str, Any], str], ...] = (
        (TINY, {"assembly": "concat"}, "assembly concat needs a fine-tuned backbone, and test_vit is an original one"),
        (TINY, {"backbone": TINY}, "leave one out"),
        (TINY, {"layer": 99}, "layer= 99: test_vit.r160_in1k has"),
        ("dinov2_smal", {}, "There is no file, folder or backbone dinov2_smal: neither.*did you mean dinov2_small"),
        (
            "dinov2_small",
            {},
            "download model.safetensors .*backbone_weights= PATH, or use backbone= dinov2_small_focus",
        ),
        ("nowhere/of/mine", {}, "There is no weight file nowhere/of/mine: check path_or_name"),
        ("./dinov2_small", {}, "There is no weight file dinov2_small: check path_or_name"),
        ("weights.pth", {}, "There is no weight file weights.pth"),
        (tmp_path / "gone", {}, "There is no weight file .*gone"),
        (tmp_path, {}, "holds 0 .safetensors files: name one"),
        (TINY, {"assembly": "linear"}, "load concat and put your layer behind it"),
        (TINY, {"assembly": "sum"}, "assembly sum is unknown: choose from original, duplicate"),
    )
    for name, options, said in mistakes:
        with pytest.raises(UserError, match=said) as error:
            load(name, **options)
        one_sentence(error)


def test_repositories_of_the_hub(result, teacher_weights, images, no_network, fill_hub_cache, monkeypatch, tmp_path):
    with pytest.raises(
        UserError, match="no file or folder me/distilled, and card.json and backbone.safetensors"
    ) as error:
        load("me/distilled")
    one_sentence(error)
    assert no_network
    files = {name: result / name for name in ("card.json", "backbone.safetensors")}
    fill_hub_cache("me/distilled", files)
    with torch.no_grad():
        expected = load(result, backbone_weights=teacher_weights)(images)
        assert torch.equal(load("me/distilled", backbone_weights=teacher_weights)(images), expected)

    # With a network, the hub is asked for what is newest there.
    newer = changed(teacher_weights, 0.02)
    save_file(newer, tmp_path / "backbone.safetensors")
    card = json.loads((result / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps({**card, "weights_sha256": hash_state_dict(newer)}))
    asked = []

    def download(repository, filename, revision):
        asked.append((repository, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    tuned = load("me/distilled@v2", "tuned").tuned
    assert tuned is not None and tuned.identity["weights_sha256"] == hash_state_dict(newer)
    assert asked == [("me/distilled", name, "v2") for name in ("card.json", "backbone.safetensors")]
