"""Weights as Hugging Face's `transformers` names them, renamed for timm: DINOv2, DINOv3, ViT, CLIP and SigLIP towers.

The names are those of its classes (`Dinov2Model`, `Dinov2WithRegistersModel`, `DINOv3ViTModel`, `ViTModel`,
`CLIPVisionModel`, `SiglipVisionModel`), in the spellings of versions 4 and 5. Where timm's own filters know the
original authors' layout (DINOv2's registers, DINOv3's biases), the result is in that.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

ANCHORS = (
    "embeddings.patch_embeddings.projection.weight",  # ViT, DINOv2
    "embeddings.patch_embeddings.weight",  # DINOv3
    "embeddings.patch_embedding.weight",  # CLIP, SigLIP
)
"""The parameter that each layout has once; what stands before it is where the backbone lies in the file."""

_TOP = (
    (r"embeddings\.patch_embeddings?\.(?:projection\.)?", "patch_embed.proj."),
    (r"embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
    (r"embeddings\.(?:position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"embeddings\.mask_token$", "mask_token"),
    (r"embeddings\.register_tokens$", "register_tokens"),
    (r"pre_layrnorm\.", "norm_pre."),  # as transformers spells it
    (r"(?:layernorm|post_layernorm|norm)\.", "norm."),
    (r"head\.probe$", "attn_pool.latent"),
    (r"head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"head\.layernorm\.", "attn_pool.norm."),
    (r"head\.mlp\.", "attn_pool.mlp."),
)
_IN_BLOCK = (
    (r"(?:norm1|layer_norm1|layernorm_before)\.", "norm1."),
    (r"(?:norm2|layer_norm2|layernorm_after)\.", "norm2."),
    (r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", "attn.proj."),
    (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
    (r"mlp\.weights_in\.", "mlp.w12."),
    (r"mlp\.weights_out\.", "mlp.w3."),
    (r"(?:intermediate\.dense|mlp\.fc1)\.", "mlp.fc1."),
    (r"(?:output\.dense|mlp\.fc2)\.", "mlp.fc2."),
)
_BLOCK = re.compile(r"(?:encoder\.|model\.)?layers?\.(\d+)\.(.+)")
_QKV = re.compile(r"(?:attention\.attention|attention|self_attn)\.(q|k|v)(?:uery|ey|alue|_proj)\.(weight|bias)")
_GATED = re.compile(r"mlp\.(gate|up|down)_proj\.(weight|bias)")


def from_transformers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Renames and joins the tensors of a vision tower.

    Args:
        tensors: By their names below the tower's root, one of `ANCHORS` among them.

    Returns:
        Tensors by the names of timm or of the original authors, and the names that no backbone has (poolers, heads).
    """
    is_dinov3 = ANCHORS[1] in tensors
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    left: list[str] = []
    for name, tensor in tensors.items():
        if "rope" in name:
            continue  # fixed, computed by timm
        block = _BLOCK.fullmatch(name)
        prefix, rest = (f"blocks.{block[1]}.", block[2]) if block else ("", name)
        if block and (match := _QKV.fullmatch(rest)):
            parts.setdefault(f"{prefix}attn.qkv.{match[2]}", {})[match[1]] = tensor
        elif block and (match := _GATED.fullmatch(rest)):
            parts.setdefault(f"{prefix}mlp.{match[2]}", {})[match[1]] = tensor
        elif match := re.fullmatch(r"head\.attention\.in_proj_(weight|bias)", name):
            width = len(tensor) // 3
            renamed[f"attn_pool.q.{match[1]}"], renamed[f"attn_pool.kv.{match[1]}"] = tensor[:width], tensor[width:]
        elif (new := _rename(rest, _IN_BLOCK if block else _TOP)) is not None:
            renamed[prefix + new] = tensor
        else:
            left.append(name)
    for name, part in parts.items():
        renamed.update(_join_qkv(name, part) if "qkv" in name else _join_gated(name, part, is_dinov3))
    for name, dimensions in (("cls_token", 3), ("pos_embed", 3)):
        while name in renamed and renamed[name].dim() < dimensions:
            renamed[name] = renamed[name][None]
    if is_dinov3 and "register_tokens" in renamed:
        renamed["storage_tokens"] = renamed.pop("register_tokens")  # by which timm tells DINOv3's own layout
    return renamed, left


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, new in rules:
        renamed, found = re.subn(f"^{pattern}", new, name)
        if found:
            return renamed
    return None


def _join_qkv(name: str, part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One tensor of three; DINOv3 has no bias of keys."""
    if "q" not in part or "v" not in part or ("k" not in part and name.endswith("weight")):
        return {f"{name}.{which}": tensor for which, tensor in part.items()}  # which is said to be unknown
    return {name: torch.cat([part["q"], part.get("k", torch.zeros_like(part["q"])), part["v"]])}


def _join_gated(name: str, part: Mapping[str, Tensor], is_dinov3: bool) -> dict[str, Tensor]:
    """DINOv2's packed SwiGLU, DINOv3's one in three pieces, or its plain two layers."""
    stem, kind = name.rsplit(".", 1)
    if "gate" not in part:
        names = {"up": "fc1", "down": "fc2"}
    elif is_dinov3 or "up" not in part:
        names = {"gate": "w1", "up": "w2", "down": "w3"}
    else:
        packed = {f"{stem}.w12.{kind}": torch.cat([part["gate"], part["up"]])}
        return packed | ({f"{stem}.w3.{kind}": part["down"]} if "down" in part else {})
    return {f"{stem}.{names[which]}.{kind}": tensor for which, tensor in part.items()}
