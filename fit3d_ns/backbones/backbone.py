"""A backbone as a module: images in [0, 1] in, a dense map of patch tokens out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fit3d_ns.backbones.architecture import build_model, check_memory, describe_backbone, resolve_architecture
from fit3d_ns.backbones.identity import hash_state_dict, load_weights, make_identity
from fit3d_ns.backbones.spec import BackboneInfo, BackboneSpec
from fit3d_ns.backbones.weights.finding import find_weights

if TYPE_CHECKING:  # torch.hub's users have torch and timm, and need nothing else
    from jaxtyping import Float


class BackboneOutput(NamedTuple):
    """What a backbone says about a batch of images."""

    patch_tokens: Float[Tensor, "B C h w"]
    """Dense map on the patch grid."""
    cls: Float[Tensor, "B C"] | None
    """Class token of the same layer, or None where the backbone has none."""


class Backbone(nn.Module):
    """A timm vision transformer behind the one interface of teacher, student and probe.

    Attributes:
        model: The timm model; ``model.state_dict()`` is a plain timm state dict. Where ``info.layer`` is not the
            last, later blocks exist but are not run.
        info: Width, patch size, layer taken and the like.
        identity: JSON-able description of everything that decides the features, as loaded.

    Args:
        model: A timm vision transformer without a classifier.
        info: What `describe_backbone` says of it.
        norm: Whether tokens pass the model's final norm.
        identity: See `fit3d_ns.backbones.identity.make_identity`.
    """

    mean: Tensor
    """[1, 3, 1, 1], of the images in [0, 1] that the backbone was trained on."""
    std: Tensor
    """[1, 3, 1, 1], likewise."""

    def __init__(self, model: nn.Module, info: BackboneInfo, norm: bool, identity: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.info = info
        self.norm = norm
        self.identity = identity
        self._has_cls = getattr(model, "cls_token", None) is not None
        self.register_buffer("mean", torch.tensor(info.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(info.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> BackboneOutput:
        """Computes dense features.

        Args:
            images: Batch ``[B, 3, H, W]``, RGB in [0, 1]; H and W multiples of the patch size (see
                `resize_to_patches`).

        Returns:
            Patch tokens ``[B, C, H / patch, W / patch]`` and class token ``[B, C]`` of the layer taken.

        Raises:
            ValueError: If H or W is no multiple of the patch size.
        """
        height, width = images.shape[-2:]
        patch = self.info.patch_size
        if height % patch or width % patch or not height or not width:
            raise ValueError(f"images of {height}x{width} pixels: sides must be multiples of the patch size {patch}")
        model: Any = self.model
        with_prefix = self.info.num_prefix_tokens > 0
        output = model.forward_intermediates(
            (images - self.mean) / self.std,
            indices=[self.info.layer],
            norm=self.norm,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
            return_prefix_tokens=with_prefix,
        )[0]
        if not with_prefix:
            return BackboneOutput(output, None)
        patch_tokens, prefix = output
        return BackboneOutput(patch_tokens, prefix[:, 0] if self._has_cls else None)


def load_backbone(spec: BackboneSpec, device: str | torch.device) -> Backbone:
    """Builds a backbone and loads its weights, strictly.

    The global random generators are left as they were. The result is in evaluation mode, in float32, with gradients
    enabled on its parameters.

    Args:
        spec: The user's choice.
        device: Where the model goes.

    Returns:
        The backbone.

    Raises:
        UserError: Unknown name, layer out of range, weights that do not fit into memory, are missing, damaged, of
            another architecture, or not to be had without a network.
    """
    info = describe_backbone(spec)
    architecture = resolve_architecture(spec.name)
    check_memory(architecture, device)
    state_dict = load_weights(spec, find_weights(spec))
    model = build_model(architecture, device)
    model.load_state_dict(state_dict, strict=True)
    identity = make_identity(spec, info, hash_state_dict(state_dict))
    return Backbone(model, info, spec.norm, identity).to(device).eval()
