"""Entry points for ``torch.hub``, from a clone as it is; torch, timm, safetensors and huggingface_hub are enough.

The names ending in ``_fine`` are those of FiT3D's own repository and return what it returns: a fine-tuned timm model,
for code that is written for it. `load` returns original and fine-tuned features together, which is what the paper
evaluates; it is `fit3d_ns.backbones.load`.
"""

from torch import nn

# Nothing else that can be called may stand here under a public name: torch.hub would list it.
dependencies = ["torch", "timm", "safetensors", "huggingface_hub", "packaging", "numpy"]


def load(path_or_name: str, assembly: str | None = None, **options: object) -> nn.Module:
    """Any backbone, fine-tuned or not, as a module from images [B, 3, H, W], RGB in [0, 1], to [B, C or 2C, h, w].

    Args:
        path_or_name: A folder that fit3d-distill wrote, a weight file, USER/REPO of the Hugging Face hub, an https
            address, or a name such as dinov2_small_fine (FiT3D's) or dinov2_small (the original).
        assembly: tuned, concat, add, original, duplicate; None: what the card of a fine-tuned backbone says, or concat.
        options: As `fit3d_ns.backbones.load`: backbone, backbone_weights, layer, norm, normalization, max_size, device.
    """
    from fit3d_ns.backbones import load as load_dense_features

    return load_dense_features(path_or_name, assembly, **options)  # type: ignore


def dinov2_small_fine(weights: str | None = None) -> nn.Module:
    """DINOv2 ViT-S/14 as FiT3D fine-tuned it: a timm model for images normalised with ImageNet's mean and std.

    Args:
        weights: A file, folder or https address of other weights of this architecture; None: those published.
    """
    return _fine_tuned("dinov2_small_fine", weights)


def dinov2_base_fine(weights: str | None = None) -> nn.Module:
    """DINOv2 ViT-B/14 as FiT3D fine-tuned it; as `dinov2_small_fine`."""
    return _fine_tuned("dinov2_base_fine", weights)


def dinov2_reg_small_fine(weights: str | None = None) -> nn.Module:
    """DINOv2 ViT-S/14 with registers as FiT3D fine-tuned it; as `dinov2_small_fine`."""
    return _fine_tuned("dinov2_reg_small_fine", weights)


def clip_base_fine(weights: str | None = None) -> nn.Module:
    """CLIP ViT-B/16 as FiT3D fine-tuned it, on ImageNet's mean and std; as `dinov2_small_fine`."""
    return _fine_tuned("clip_base_fine", weights)


def mae_base_fine(weights: str | None = None) -> nn.Module:
    """MAE ViT-B/16 as FiT3D fine-tuned it; as `dinov2_small_fine`."""
    return _fine_tuned("mae_base_fine", weights)


def deit3_base_fine(weights: str | None = None) -> nn.Module:
    """DeiT-III ViT-B/16 as FiT3D fine-tuned it; as `dinov2_small_fine`."""
    return _fine_tuned("deit3_base_fine", weights)


def _fine_tuned(name: str, weights: str | None) -> nn.Module:
    from fit3d_ns.backbones import load_published

    return load_published(name, weights)
