"""Frozen or fine-tuned vision transformers as dense feature extractors; the only package that imports timm.

Importing this package imports no timm: the functions do, when called.
"""

from fit3d_ns.backbones.architecture import check_timm, describe_backbone
from fit3d_ns.backbones.assembly import (
    ASSEMBLIES,
    Assembly,
    assemble,
    assembled_width,
    needs_original,
    needs_tuned,
)
from fit3d_ns.backbones.backbone import Backbone, BackboneOutput, load_backbone
from fit3d_ns.backbones.dense_features import DenseFeatures, load, load_published
from fit3d_ns.backbones.fine_tuned import FineTuned, find_fine_tuned, load_fine_tuned, student_spec
from fit3d_ns.backbones.identity import backbone_identity, hash_state_dict, spec_of_identity
from fit3d_ns.backbones.published import PUBLISHED_BACKBONES, PublishedBackbone
from fit3d_ns.backbones.registry import NAMED_BACKBONES, NamedBackbone
from fit3d_ns.backbones.sizing import input_size, patch_grid, resize_to_patches
from fit3d_ns.backbones.spec import BackboneInfo, BackboneSpec
from fit3d_ns.backbones.weights import weights_available
from fit3d_ns.support.command_line import flags_named

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
    "flags_named",
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
