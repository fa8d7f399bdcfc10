"""Weights as the field writes them: transformers' names, shards, levels of wrappers, and what a refusal says.

The files are made of a timm model's random weights, by renaming them as each library names them, and must give its
features back. Where transformers is installed, its own classes write them as well.
"""

import json
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fit3d_ns.backbones import BackboneSpec, backbone_identity, weights_available
from fit3d_ns.backbones.students.fine_tuned import student_spec
from fit3d_ns.backbones.weights.state_dicts import read_state_dict, to_timm_layout
from fit3d_ns.support.errors import UserError

pytestmark = pytest.mark.usefixtures("own_cache")

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}
MODELS = {
    "dinov2": ("vit_small_patch14_dinov2", {"img_size": 56}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    "dinov2 giant": ("vit_giant_patch14_dinov2", {"img_size": 56}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3 with biases": ("vit_small_patch16_dinov3_qkvb", {}),
    "dinov3 gated": ("vit_huge_plus_patch16_dinov3", {}),
    "vit": ("vit_small_patch16_224", {"img_size": 64}),
    "clip": ("vit_base_patch16_clip_224", {"img_size": 64}),
    "siglip": ("vit_base_patch16_siglip_224", {"img_size": 64}),
}


def make(kind: str) -> nn.Module:
    name, options = MODELS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def as_transformers(kind: str, weights: dict[str, Tensor], spelling: str) -> dict[str, Tensor]:
    """A model's weights under transformers' names, in the spelling of version 4 or 5."""
    old, out = spelling == "4", {}
    family = kind.split(maxsplit=1)[0]
    for name, value in weights.items():
        parts = name.split(".")
        kindof = parts[-1]
        if name == "cls_token":
            key = "embeddings.class_embedding" if family == "clip" else "embeddings.cls_token"
            out[key] = value[0, 0] if family == "clip" else value
        elif name == "reg_token":
            out["embeddings.register_tokens"] = value
        elif name == "pos_embed":
            if kind == "dinov2 with registers":  # transformers has the class token's position apart, as DINOv2
                first = torch.full_like(value[:, :1], 0.25)
                value = torch.cat([first, value], 1)
            alone = family in ("clip", "siglip")
            key = "embeddings.position_embedding.weight" if alone else "embeddings.position_embeddings"
            out[key] = value[0] if alone else value
        elif name.startswith("patch_embed"):
            key = {"dinov3": "patch_embeddings", "clip": "patch_embedding", "siglip": "patch_embedding"}.get(family)
            out[f"embeddings.{key or 'patch_embeddings.projection'}.{kindof}"] = value
        elif name.startswith("norm_pre"):
            out[f"pre_layrnorm.{kindof}"] = value
        elif name.startswith("norm."):
            key = {"dinov3": "norm", "clip": "post_layernorm", "siglip": "post_layernorm"}.get(family, "layernorm")
            out[f"{key}.{kindof}"] = value
        elif name.startswith("attn_pool."):
            out |= {"latent": {"head.probe": value}}.get(parts[1], {})
            rest = {"proj": "attention.out_proj", "norm": "layernorm"}.get(parts[1], ".".join(parts[1:-1]))
            if parts[1] == "q":
                out[f"head.attention.in_proj_{kindof}"] = torch.cat([value, weights[f"attn_pool.kv.{kindof}"]])
            elif parts[1] not in ("kv", "latent"):
                out[f"head.{rest}.{kindof}"] = value
        else:
            out |= _block(family, kind, parts, value, weights, old)
    if kind == "dinov2 with registers":
        out["embeddings.cls_token"] = out["embeddings.cls_token"] - 0.25
    if family.startswith("dino"):
        out["embeddings.mask_token"] = torch.zeros(1, 32)
    return out


def _block(family, kind, parts, value, weights, old) -> dict[str, Tensor]:
    number, rest, kindof = parts[1], ".".join(parts[2:-1]), parts[-1]
    stem = {"dinov3": "layer" if old else "model.layer", "clip": "encoder.layers", "siglip": "encoder.layers"}
    stem = f"{stem.get(family, 'encoder.layer' if old else 'layers')}.{number}."
    clip = family in ("clip", "siglip")
    query, key, val, out = ("q_proj", "k_proj", "v_proj", "o_proj")
    attention = "self_attn." if clip else "attention."
    if clip:
        out = "out_proj"
    elif old and family != "dinov3":
        attention, (query, key, val) = "attention.attention.", ("query", "key", "value")
    if rest == "attn.qkv":
        pieces = dict(zip((query, key, val), value.chunk(3)))
        return {f"{stem}{attention}{name}.{kindof}": piece for name, piece in pieces.items()}
    if kindof in ("q_bias", "v_bias"):
        return {f"{stem}{attention}{query if kindof == 'q_bias' else val}.bias": value}
    if rest == "attn.proj":
        dense = old and not clip and family != "dinov3"
        return {f"{stem}{'attention.output.dense' if dense else attention + out}.{kindof}": value}
    if rest in ("norm1", "norm2"):
        vit = {"norm1": "layernorm_before", "norm2": "layernorm_after"} if family == "vit" else {}
        return {f"{stem}{vit.get(rest) or (rest.replace('norm', 'layer_norm') if clip else rest)}.{kindof}": value}
    if rest in ("ls1", "ls2") or kindof.startswith("gamma_"):
        return {f"{stem}layer_scale{(rest or kindof)[-1]}.lambda1": value}
    names = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    if family == "vit" and old:
        names = {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    if kind == "dinov2 giant" and old:
        names = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
    elif kind == "dinov2 giant":
        if rest == "mlp.fc1":
            return dict(zip((f"{stem}mlp.gate_proj.{kindof}", f"{stem}mlp.up_proj.{kindof}"), value.chunk(2)))
        names = {"mlp.fc2": "mlp.down_proj"}
    elif family == "dinov3":
        names = {"mlp.fc1_g": "mlp.gate_proj", "mlp.fc1_x": "mlp.up_proj", "mlp.fc1": "mlp.up_proj"}
        names["mlp.fc2"] = "mlp.down_proj"
    return {f"{stem}{names[rest]}.{kindof}": value}


def assert_same_weights(converted: dict[str, Tensor], model: nn.Module) -> None:
    wanted = model.state_dict()
    assert converted.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(converted[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("spelling", ["4", "5"])
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_names_are_read(kind, spelling, tmp_path):
    model, path = make(kind), tmp_path / "model.safetensors"
    renamed = as_transformers(kind, dict(model.state_dict()), spelling)
    assert not set(renamed) & set(model.state_dict()) - {"norm.weight", "norm.bias"}
    save_file({name: value.contiguous() for name, value in renamed.items()}, path)
    assert_same_weights(to_timm_layout(read_state_dict(path), model, path, kind), model)


def test_a_tower_among_other_towers_is_read_and_the_rest_is_named(tmp_path, caplog):
    model, path = make("clip"), tmp_path / "model.safetensors"
    tower = as_transformers("clip", dict(model.state_dict()), "4")
    beside = {"text_model.embeddings.token_embedding.weight": torch.zeros(4, 8), "logit_scale": torch.zeros(1)}
    save_file({f"vision_model.{name}": value.contiguous() for name, value in tower.items()} | beside, path)
    with caplog.at_level(logging.INFO):
        assert_same_weights(to_timm_layout(read_state_dict(path), model, path, "clip"), model)
    assert "took the backbone vision_model, left out " in caplog.text
    assert "text_model.embeddings" in caplog.text and "logit_scale" in caplog.text


def test_a_head_that_the_model_lacks_is_left_out_and_named(tmp_path, caplog):
    model, path = make("siglip"), tmp_path / "model.safetensors"
    pooled = timm.create_model("vit_base_patch16_siglip_gap_224", **SMALL, img_size=64)
    renamed = as_transformers("siglip", dict(model.state_dict()), "4")
    save_file({f"vision_model.{name}": value.contiguous() for name, value in renamed.items()}, path)
    with caplog.at_level(logging.INFO):
        converted = to_timm_layout(read_state_dict(path), pooled, path, "siglip")
    assert converted.keys() == pooled.state_dict().keys() and "left out the head (attn_pool" in caplog.text


LEVELS = {
    "fsdp": lambda n: "_fsdp_wrapped_module." + n.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."),
    "activation checkpointing": lambda n: n.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."),
    "compiled": lambda n: "_orig_mod." + n,
    "chunks of blocks": lambda n: (
        "teacher.backbone." + n.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.7.1.")
    ),
    "deepspeed": lambda n: "module.model." + n,
}


@pytest.mark.parametrize("level", LEVELS)
def test_levels_within_names_are_taken_off(level, tmp_path):
    model, path = make("vit"), tmp_path / "weights.pt"
    weights = {LEVELS[level](name): value for name, value in model.state_dict().items()}
    assert weights.keys() != model.state_dict().keys()
    content: dict = weights
    if level == "deepspeed":
        content = {"module": weights, "ds_version": "0.15", "global_steps": 7, "param_shapes": [{"a": [1]}]}
    torch.save(content, path)
    assert_same_weights(to_timm_layout(read_state_dict(path), model, path, "vit"), model)


def sharded(folder, model, kind, ending="safetensors"):
    names = sorted(model.state_dict())
    halves = {f"model-0000{i + 1}-of-00002.{ending}": names[i::2] for i in range(2)}
    folder.mkdir(exist_ok=True)
    for file, part in halves.items():
        tensors = {name: model.state_dict()[name].contiguous() for name in part}
        save_file(tensors, folder / file) if ending == "safetensors" else torch.save(tensors, folder / file)
    index = folder / ("model.safetensors.index.json" if ending == "safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {n: f for f, part in halves.items() for n in part}}))
    return index


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("given", ["folder", "index"])
def test_shards_are_put_together(given, ending, tmp_path):
    model = make("dinov2")
    index = sharded(tmp_path / "shards", model, "dinov2", ending)
    path = index if given == "index" else index.parent
    assert_same_weights(to_timm_layout(read_state_dict(path), model, path, "dinov2"), model)


def test_a_folder_without_card_is_a_backbone_whose_identity_follows_its_shards(tmp_path):
    full = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    index = sharded(tmp_path / "shards", full, "vit")
    spec = BackboneSpec("vit_tiny_patch16_224", index.parent)
    assert student_spec(index.parent, "--backbone-weights") is None and weights_available(spec)
    before = backbone_identity(spec)["weights_sha256"]
    assert backbone_identity(spec)["weights_sha256"] == before
    full.blocks[0].norm1.weight.data += 1  # type: ignore
    sharded(tmp_path / "shards", full, "vit")
    assert backbone_identity(spec)["weights_sha256"] != before


def test_a_missing_shard_and_a_damaged_index_are_said(tmp_path):
    index = sharded(tmp_path / "shards", make("vit"), "vit")
    (index.parent / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"names 2 shards, and model-00002-of-00002.safetensors is not beside it: get"):
        read_state_dict(index)
    assert not weights_available(BackboneSpec("vit_tiny_patch16_224", index))
    index.write_text('{"weight_map": 3}')
    with pytest.raises(UserError, match=r"index.json is no index of shards: get it again"):
        read_state_dict(index.parent)
    with pytest.raises(UserError, match=r"empty holds no weights \(model.safetensors, .*\): check"):
        (tmp_path / "empty").mkdir()
        read_state_dict(tmp_path / "empty")


def test_what_cannot_be_placed_is_refused_with_its_facts(tmp_path):
    base = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, depth=3)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in base.state_dict().items()}}, tmp_path / "base.pth")
    wanted = make("dinov2")
    with pytest.raises(UserError) as caught:
        to_timm_layout(read_state_dict(tmp_path / "base.pth"), wanted, tmp_path / "base.pth", "dinov2_small")
    said = str(caught.value)
    assert (
        "base.pth holds weights of another architecture than dinov2_small: it is a ViT-B/14 of width 768 with" in said
    )
    assert "3 blocks and 4 registers, and dinov2_small is a ViT/14 of width 32 with 2 blocks and no registers" in said
    incomplete = dict(wanted.state_dict())
    del incomplete["blocks.1.ls2.gamma"]
    with pytest.raises(UserError, match=r"holds a ViT/14 of width 32 .*, as small is, but 'blocks.1.ls2.gamma' is mis"):
        to_timm_layout(incomplete, wanted, tmp_path / "part.pth", "small")


def test_biases_are_not_dropped_without_a_word(tmp_path):
    with_biases, without, path = make("dinov3 with biases"), make("dinov3"), tmp_path / "model.safetensors"
    renamed = as_transformers("dinov3", dict(with_biases.state_dict()), "4")
    save_file({name: value.contiguous() for name, value in renamed.items()}, path)
    with pytest.raises(UserError, match="has biases of queries and values, and dinov3_small has none: name .*_qkvb"):
        to_timm_layout(read_state_dict(path), without, path, "dinov3_small")
    for name, value in renamed.items():  # as those of the published models are
        value.mul_(0) if name.endswith("_proj.bias") and ".attention." in name and "o_proj" not in name else None
    save_file({name: value.contiguous() for name, value in renamed.items()}, path)
    to_timm_layout(read_state_dict(path), without, path, "dinov3_small")


@pytest.mark.parametrize(
    "kind", ["dinov2", "dinov2 with registers", "dinov2 giant", "dinov3 with biases", "vit", "clip", "siglip"]
)
def test_files_that_transformers_itself_saved_give_its_features(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 56}
    if "dinov2" not in kind:
        size |= {"patch_size": 16, "image_size": 64, "intermediate_size": 128}
    classes = {
        "dinov2": ("Dinov2Config", "Dinov2Model", {}),
        "dinov2 giant": ("Dinov2Config", "Dinov2Model", {"use_swiglu_ffn": True}),
        "dinov2 with registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", {"num_register_tokens": 4}),
        "dinov3 with biases": ("DINOv3ViTConfig", "DINOv3ViTModel", {"num_register_tokens": 4}),
        "vit": ("ViTConfig", "ViTModel", {"layer_norm_eps": 1e-6}),
        "clip": ("CLIPVisionConfig", "CLIPVisionModel", {"hidden_act": "gelu"}),
        "siglip": ("SiglipVisionConfig", "SiglipVisionModel", {"hidden_act": "gelu"}),
    }
    config, model_class, options = classes[kind]
    torch.manual_seed(0)
    theirs = getattr(transformers, model_class)(getattr(transformers, config)(**size, **options)).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path)
    name, more = MODELS[kind]
    if kind == "dinov2 giant":
        more = {**more, "mlp_ratio": 2 * theirs.state_dict()["encoder.layer.0.mlp.down_proj.weight"].shape[1] / 32}
    ours = timm.create_model(name, **SMALL, **more).eval()
    ours.load_state_dict(to_timm_layout(read_state_dict(tmp_path), ours, tmp_path, kind), strict=True)
    images = torch.rand(1, 3, size["image_size"], size["image_size"])
    with torch.no_grad():
        wanted = theirs(pixel_values=images).last_hidden_state
        found = ours.forward_features(images)  # type: ignore
    if kind == "clip":
        wanted = theirs.post_layernorm(wanted) if hasattr(theirs, "post_layernorm") else wanted
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
