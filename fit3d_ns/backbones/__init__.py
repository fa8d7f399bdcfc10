"""Frozen or fine-tuned vision transformers as dense feature extractors; the only package that imports timm.

Importing this package imports neither timm nor torch: a name brings its module along when it is first used. So a
command that only shows its flags starts at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fit3d_ns.backbones.architecture import check_timm, describe_backbone
    from fit3d_ns.backbones.assembly import (
        ASSEMBLIES,
        assemble,
        assembled_width,
        needs_original,
        needs_tuned,
    )
    from fit3d_ns.backbones.backbone import Backbone, BackboneOutput, load_backbone
    from fit3d_ns.backbones.dense_features import DenseFeatures, load, load_published
    from fit3d_ns.backbones.identity import backbone_identity, hash_state_dict, spec_of_identity
    from fit3d_ns.backbones.registry import NAMED_BACKBONES, NamedBackbone
    from fit3d_ns.backbones.sizing import input_size, patch_grid, resize_to_patches
    from fit3d_ns.backbones.spec import Assembly, BackboneInfo, BackboneSpec
    from fit3d_ns.backbones.students.fine_tuned import FineTuned, find_fine_tuned, load_fine_tuned, student_spec
    from fit3d_ns.backbones.students.published import PUBLISHED_BACKBONES, PublishedBackbone
    from fit3d_ns.backbones.weights.finding import weights_available

__all__ = [
    "ASSEMBLIES",
    "NAMED_BACKBONES",
    "PUBLISHED_BACKBONES",
    "Assembly",
    "Backbone",
    "BackboneInfo",
    "BackboneOutput",
    "BackboneSpec",
    "DenseFeatures",
    "FineTuned",
    "NamedBackbone",
    "PublishedBackbone",
    "assemble",
    "assembled_width",
    "backbone_identity",
    "check_timm",
    "describe_backbone",
    "find_fine_tuned",
    "hash_state_dict",
    "input_size",
    "load",
    "load_backbone",
    "load_fine_tuned",
    "load_published",
    "needs_original",
    "needs_tuned",
    "patch_grid",
    "resize_to_patches",
    "spec_of_identity",
    "student_spec",
    "weights_available",
]

_HOMES = {
    "fit3d_ns.backbones.architecture": "check_timm describe_backbone",
    "fit3d_ns.backbones.assembly": "ASSEMBLIES assemble assembled_width needs_original needs_tuned",
    "fit3d_ns.backbones.backbone": "Backbone BackboneOutput load_backbone",
    "fit3d_ns.backbones.dense_features": "DenseFeatures load load_published",
    "fit3d_ns.backbones.students.fine_tuned": "FineTuned find_fine_tuned load_fine_tuned student_spec",
    "fit3d_ns.backbones.identity": "backbone_identity hash_state_dict spec_of_identity",
    "fit3d_ns.backbones.students.published": "PUBLISHED_BACKBONES PublishedBackbone",
    "fit3d_ns.backbones.registry": "NAMED_BACKBONES NamedBackbone",
    "fit3d_ns.backbones.sizing": "input_size patch_grid resize_to_patches",
    "fit3d_ns.backbones.spec": "Assembly BackboneInfo BackboneSpec",
    "fit3d_ns.backbones.weights.finding": "weights_available",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Imports the module that has a public name (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
