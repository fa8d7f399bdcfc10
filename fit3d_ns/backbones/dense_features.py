"""Backbones as users load them: one line, images of any size in, a dense map out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fit3d_ns.backbones.architecture import resolve_architecture
from fit3d_ns.backbones.assembly import ASSEMBLIES, assemble, assembled_width, needs_original, needs_tuned
from fit3d_ns.backbones.backbone import Backbone, BackboneOutput, load_backbone
from fit3d_ns.backbones.registry import find_named
from fit3d_ns.backbones.sizing import DEFAULT_MAX_SIZE, resize_to_patches
from fit3d_ns.backbones.spec import Assembly, BackboneSpec
from fit3d_ns.backbones.students.fine_tuned import (
    FineTuned,
    check_original,
    find_fine_tuned,
    load_fine_tuned,
    looks_like_path,
)
from fit3d_ns.backbones.students.published import PUBLISHED_BACKBONES
from fit3d_ns.support.errors import UserError, flags_are

if TYPE_CHECKING:  # torch.hub's users have torch and timm, and need nothing else
    from jaxtyping import Float, UInt8


class DenseFeatures(nn.Module):
    """An original backbone, a fine-tuned one, or both, as one map of patch features.

    Attributes:
        original: The original backbone, or None where the assembly does not take it.
        tuned: The fine-tuned backbone, likewise; ``tuned.model`` is the plain timm model.
        assembly: How their features are put together.
        max_size: Upper limit of the long side at which images enter, pixels; None for no limit.
        patch_size: Side of a patch, pixels.
        width: Channels of the map: C of one backbone, or 2C.
    """

    def __init__(
        self, original: Backbone | None, tuned: Backbone | None, assembly: Assembly, max_size: int | None
    ) -> None:
        super().__init__()
        self.original = original
        self.tuned = tuned
        self.assembly: Assembly = assembly
        self.max_size = max_size
        first = original or tuned
        assert first is not None
        self.patch_size = first.info.patch_size
        self.width = assembled_width(assembly, first.info.width)
        self._range_is_known = False
        self.train(first.training)

    def forward(self, images: Float[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Computes the dense map; errors as `features`.

        Args:
            images: RGB of any size, float in [0, 1] or uint8.

        Returns:
            ``[B, width, h, w]``.
        """
        return self.features(images).patch_tokens

    def features(self, images: Float[Tensor, "B 3 H W"] | UInt8[Tensor, "B 3 H W"]) -> BackboneOutput:
        """Computes the dense map and the class token.

        Args:
            images: RGB of any height and width, in [0, 1], or in 0..255 as uint8; on the module's device. They are
                resized to multiples of the patch size (`input_size`: antialiased, shrunk to `max_size`, never
                enlarged by more than half a patch) and normalised in here.

        Returns:
            Patch tokens ``[B, width, h, w]``, (h, w) being the `patch_grid` of (H, W), and class token ``[B, C]``.

        Raises:
            ValueError: If the shape is another, or values of the first batch show that images are normalised already
                or reach up to 255.
            UserError: If the images are smaller than a patch.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images of shape {tuple(images.shape)}: give a batch [B, 3, H, W]")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        elif images.is_floating_point():
            self._check_range(images)
        else:
            raise ValueError(f"images of type {images.dtype}: give floats in [0, 1] or uint8")
        first = self.original or self.tuned
        assert first is not None
        # Resized in float32: torch has no antialiasing in half precision on a CPU.
        images = resize_to_patches(images.float(), self.patch_size, self.max_size).to(first.mean.dtype)
        original = None if self.original is None else self.original(images)
        return assemble(self.assembly, original, None if self.tuned is None else self.tuned(images))

    def extra_repr(self) -> str:
        """Says what ``print(module)`` shows beside the submodules."""
        return f"assembly={self.assembly}, width={self.width}, patch_size={self.patch_size}, max_size={self.max_size}"

    def _check_range(self, images: Tensor) -> None:
        # Checked on the first batch only: min() synchronises, and a caller that normalises does so from the start.
        if self._range_is_known or torch.compiler.is_compiling() or not images.numel():
            return
        low, high = float(images.min()), float(images.max())
        # Resizing may overshoot a little.
        if not -0.5 <= low <= high <= 1.5:
            raise ValueError(
                f"images range from {low:.3g} to {high:.3g}: give RGB in [0, 1], or uint8; mean and std are applied "
                "by the module"
            )
        self._range_is_known = True


def load(
    path_or_name: str | Path,
    assembly: Assembly | None = None,
    *,
    backbone: str | None = None,
    backbone_weights: str | Path | None = None,
    layer: int | None = None,
    norm: bool | None = None,
    normalization: Literal["own", "imagenet"] | None = None,
    max_size: int | None = DEFAULT_MAX_SIZE,
    device: str | torch.device = "cpu",
) -> DenseFeatures:
    """Loads a backbone, fine-tuned or not, as a module from images to dense features.

    What a fine-tuned backbone was fine-tuned from, at which layer and with which normalisation, is read from the card
    beside it; for any other file, ``backbone`` has to name it. Nothing is downloaded that is on this machine or named
    by an argument, except that a hub repository is asked for a newer version.

    Args:
        path_or_name: A fine-tuned backbone: a folder that fit3d-distill wrote, a weight file, ``user/repo`` of the
            Hugging Face hub, an https address of a weight file, or one of FiT3D's published ones such as
            ``dinov2_small_fine`` (see `find_fine_tuned`). Or an original one: a name of `NAMED_BACKBONES`, or a timm
            id. Names go before files; write ``./name`` for a file in the working folder.
        assembly: What the map is made of: ``original``, ``tuned``, their sum (``add``), both beside each other
            (``concat``, the paper's), or the original twice (``duplicate``, the control for width). None: what the
            card of a fine-tuned backbone says (``tuned`` where it was averaged with its original), else ``concat``;
            ``original`` of an original one.
        backbone: Name of the original backbone, where no card tells it.
        backbone_weights: Weight file of the original backbone, if it is not the one its name stands for.
        layer: Block whose output is taken, from 0 or from the end; None: the one fine-tuned at, else the last.
        norm: Whether the backbone's final norm is applied; None: as fine-tuned, which is the default of all stages.
        normalization: Mean and std: the backbone's own or ImageNet's; None: as fine-tuned, else its own.
        max_size: Long side to which larger images are shrunk, pixels; None for none.
        device: Where the module goes.

    Returns:
        The module, in evaluation mode and float32, with gradients enabled on its parameters: call it under
        ``torch.no_grad()`` unless you train.

    Raises:
        UserError: If there is no such backbone, the assembly needs a fine-tuned one and there is none, weights are
            missing, damaged or of another backbone, or the original's weights are not those that were fine-tuned.
    """
    if assembly == "linear":
        raise UserError(
            "assembly linear has a layer that is trained with a head: load concat and put your layer behind it."
        )
    if assembly is not None and assembly not in ASSEMBLIES:
        raise UserError(f"assembly {assembly} is unknown: choose from {', '.join(ASSEMBLIES)}.")
    overrides: dict[str, Any] = {
        name: value
        for name, value in (("layer", layer), ("norm", norm), ("normalization", normalization))
        if value is not None
    }
    weights = None if backbone_weights is None else Path(backbone_weights)
    with flags_are(backbone="backbone=", backbone_weights="backbone_weights=", backbone_layer="layer="):
        if _names_original(path_or_name):
            name = str(path_or_name)
            _check_alone(name, assembly, backbone)
            original = load_backbone(BackboneSpec(name, weights, **overrides), device)
            return DenseFeatures(original, None, assembly or "original", max_size)
        fine_tuned = find_fine_tuned(path_or_name, "path_or_name")
        assembly = assembly or fine_tuned.assembly
        spec = replace(_original_spec(fine_tuned, backbone), weights=weights, **overrides)
        tuned = None
        if needs_tuned(assembly):
            with flags_are(backbone="backbone=", backbone_weights="path_or_name", backbone_layer="layer="):
                tuned = load_fine_tuned(fine_tuned, spec, device)
        original = _load_original(fine_tuned, spec, device) if needs_original(assembly) else None
        return DenseFeatures(original, tuned, assembly, max_size)


def load_published(name: str, weights: str | Path | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Loads a fine-tuned backbone as the plain timm model that FiT3D's torch.hub entry points return.

    Args:
        name: A name of `PUBLISHED_BACKBONES`.
        weights: Other weights of that architecture: whatever `find_fine_tuned` finds; None: the published ones.
        device: Where the model goes.

    Returns:
        The timm model, without classifier, for images of any multiple of its patch size that are normalised with
        ImageNet's mean and std; in evaluation mode and float32.

    Raises:
        UserError: If the weights cannot be had, are damaged, or of another architecture.
    """
    spec = BackboneSpec(PUBLISHED_BACKBONES[name].original, normalization="imagenet")
    with flags_are(backbone="another entry point", backbone_weights="weights=", backbone_layer="layer="):
        return load_fine_tuned(find_fine_tuned(name if weights is None else weights, "weights="), spec, device).model


def _names_original(path_or_name: str | Path) -> bool:
    """Returns whether the user names a backbone that was not fine-tuned."""
    if isinstance(path_or_name, Path) or path_or_name in PUBLISHED_BACKBONES:
        return False
    if find_named(path_or_name) is not None:
        return True
    if Path(path_or_name).expanduser().exists() or looks_like_path(path_or_name):
        return False
    if "/" in path_or_name and not path_or_name.startswith("timm/"):
        return False
    with flags_are(
        backbone="There is no file, folder or backbone", backbone_weights="backbone_weights=", backbone_layer="layer="
    ):
        resolve_architecture(path_or_name)
    return True


def _check_alone(name: str, assembly: Assembly | None, backbone: str | None) -> None:
    if assembly is not None and needs_tuned(assembly):
        raise UserError(
            f"assembly {assembly} needs a fine-tuned backbone, and {name} is an original one: load the folder that "
            f"fit3d-distill wrote, or one of {', '.join(PUBLISHED_BACKBONES)}."
        )
    if backbone is not None:
        raise UserError(f"backbone={backbone} says what a weight file holds, and {name} is none: leave one out.")


def _original_spec(fine_tuned: FineTuned, backbone: str | None) -> BackboneSpec:
    known = fine_tuned.original
    if known is None:
        if backbone is None:
            raise UserError(
                f"{fine_tuned.source} does not say which backbone was fine-tuned (no card.json beside it): name it, as "
                'in backbone="dinov2_small".'
            )
        return BackboneSpec(backbone)
    check_original(fine_tuned, BackboneSpec(backbone or known.name))
    return known


def _load_original(fine_tuned: FineTuned, spec: BackboneSpec, device: str | torch.device) -> Backbone:
    original = load_backbone(spec, device)
    if fine_tuned.original_sha256 not in (None, original.identity["weights_sha256"]):
        what = f"{spec.weights} does not hold" if spec.weights else f"What {spec.name} stands for is not"
        raise UserError(
            f"{what} the weights that {fine_tuned.source} was fine-tuned from (their hashes differ): name the file "
            "that does with backbone_weights=."
        )
    return original
