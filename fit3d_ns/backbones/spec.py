"""What a user chooses about a backbone, and what can be said of it without its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Assembly = Literal["original", "duplicate", "tuned", "add", "linear", "concat"]
"""How features of an original and a fine-tuned backbone are put together."""


@dataclass(frozen=True)
class BackboneSpec:
    """A user's choice of dense features."""

    name: str = "dinov2_small"
    """A name of `registry.NAMED_BACKBONES`, or any timm id of a vision transformer with patch tokens."""
    weights: Path | None = None
    """Local weights in the key layout of timm, DINOv2, DINOv3, OpenCLIP, transformers or FiT3D, wrapped or sharded
    (`state_dicts.weight_files`); None: the hub's weights."""
    layer: int | None = None
    """Block whose output is taken, from 0; negative counts from the end; None: the last."""
    norm: bool = True
    """Whether the backbone's final norm is applied. A few timm models (pooled ones, EVA-02) have none for tokens."""
    normalization: Literal["own", "imagenet"] = "own"
    """Mean and std taken from the images: those the backbone was trained with, or ImageNet's (as the paper did)."""


@dataclass(frozen=True)
class BackboneInfo:
    """What is known of a backbone before any weight is read."""

    name: str
    """The registry's name, else the timm id."""
    timm_id: str
    """timm architecture and weights tag."""
    width: int
    """Channels C of a patch token."""
    patch_size: int
    """Side of a patch in pixels."""
    num_layers: int
    """Number of transformer blocks."""
    layer: int
    """Block whose output the spec takes, from 0."""
    mean: tuple[float, float, float]
    """Subtracted from images in [0, 1]."""
    std: tuple[float, float, float]
    """Divided by, after the mean is subtracted."""
    num_prefix_tokens: int
    """Tokens before the patches: class token and registers."""
