"""What a training leaves can be used elsewhere."""

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.results.result import push_to_hub
from distill.student import plain_state_dict
from fit3d_ns.backbones import BackboneSpec, load_backbone
from fit3d_ns.backbones.students.other_formats import to_dinov2_layout
from fit3d_ns.backbones.students.result_folder import write_weights
from fit3d_ns.support.errors import UserError


@pytest.mark.parametrize(
    "name, registers", [("vit_small_patch14_dinov2.lvd142m", 0), ("vit_small_patch14_reg4_dinov2.lvd142m", 4)]
)
def test_dinov2_layout_reads_back_as_the_same_backbone(tmp_path, name, registers):
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = plain_state_dict(timm.create_model(name, num_classes=0))
    converted = to_dinov2_layout(weights, name)
    width = 384
    assert converted["pos_embed"].shape == (1, 1370, width)  # the shape of Meta's own checkpoints
    assert converted["mask_token"].shape == (1, width)
    assert "reg_token" not in converted and ("register_tokens" in converted) == bool(registers)
    save_file(weights, tmp_path / "timm.safetensors")
    save_file(converted, tmp_path / "meta.safetensors")
    image = torch.rand(1, 3, 28, 42)
    with torch.no_grad():
        maps = [
            load_backbone(BackboneSpec(name, tmp_path / f"{layout}.safetensors"), "cpu")(image).patch_tokens
            for layout in ("timm", "meta")
        ]
    torch.testing.assert_close(maps[0], maps[1])


def test_giant_has_its_own_names():
    weights = {"blocks.0.mlp.fc1.weight": torch.ones(2), "blocks.0.mlp.fc2.bias": torch.ones(2)}
    weights["cls_token"] = torch.ones(1, 1, 3)
    converted = to_dinov2_layout(weights, "vit_giant_patch14_dinov2.lvd142m")
    assert {"blocks.0.mlp.w12.weight", "blocks.0.mlp.w3.bias"} <= set(converted)


def test_other_backbones_have_no_dinov2_layout():
    with pytest.raises(UserError, match="--dinov2-layout is for DINOv2"):
        to_dinov2_layout({}, "vit_base_patch16_224.mae")


def test_files_are_whole_and_the_hub_gets_them(tmp_path, monkeypatch):
    weights = {"weight": torch.randn(3, 2), "count": torch.tensor(3)}
    card = {"student": {"name": "test_vit", "mean": [0.5] * 3, "std": [0.5] * 3}}
    files = write_weights(tmp_path, weights, weights, card, half=True, dinov2_layout=False)
    assert [path.name for path in files] == [
        *("backbone.safetensors", "backbone_fp16.safetensors", "config.json", "card.json")
    ]
    assert load_file(files[1])["weight"].dtype == torch.float16 and load_file(files[1])["count"] == 3
    files = write_weights(tmp_path, weights, weights, card, half=False, dinov2_layout=False)
    assert sorted(tmp_path.iterdir()) == sorted(files)  # nothing of the training before lies beside the new card
    uploaded = []

    class Hub:
        def create_repo(self, repository, exist_ok):
            return f"https://hub/{repository}"

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            uploaded.append((path_in_repo, repo_id))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert push_to_hub("me/it", files) == "https://hub/me/it"
    assert uploaded == [(path.name, "me/it") for path in files]
    monkeypatch.setattr(Hub, "upload_file", lambda *_, **__: (_ for _ in ()).throw(OSError("401 no token")))
    with pytest.raises(UserError, match="could not be uploaded to me/it.*401 no token.*log in"):
        push_to_hub("me/it", files)
