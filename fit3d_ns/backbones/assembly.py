"""Ways to put the features of an original and a fine-tuned backbone together."""

from typing import get_args

import torch

from fit3d_ns.backbones.backbone import BackboneOutput
from fit3d_ns.backbones.spec import Assembly

ASSEMBLIES: tuple[Assembly, ...] = get_args(Assembly)
"""`duplicate` is the original beside itself: the control for what width alone brings. `linear` is fed as `concat`; the
learned 2C -> C layer that makes it an assembly of its own is trained with whatever reads it."""


def needs_tuned(assembly: Assembly) -> bool:
    """Returns whether an assembly takes the fine-tuned backbone's features.

    Args:
        assembly: One of `ASSEMBLIES`.
    """
    return assembly not in ("original", "duplicate")


def needs_original(assembly: Assembly) -> bool:
    """Returns whether an assembly takes the original backbone's features.

    Args:
        assembly: One of `ASSEMBLIES`.
    """
    return assembly != "tuned"


def assembled_width(assembly: Assembly, width: int) -> int:
    """Returns the channels of assembled patch tokens, given the width C of one backbone.

    Args:
        assembly: One of `ASSEMBLIES`.
        width: Channels C of one backbone.
    """
    return 2 * width if assembly in ("duplicate", "linear", "concat") else width


def assemble(
    assembly: Assembly, original: BackboneOutput | None = None, tuned: BackboneOutput | None = None
) -> BackboneOutput:
    """Puts features together.

    Args:
        assembly: One of `ASSEMBLIES`.
        original: Features of the original backbone, patch tokens ``[B, C, h, w]``, cls ``[B, C]``; needed unless the
            assembly is `tuned`.
        tuned: Features of the fine-tuned one, of the same shape; needed unless the assembly is `original` or
            `duplicate`.

    Returns:
        Patch tokens ``[B, C, h, w]`` or ``[B, 2C, h, w]``. The class token is never widened: it is the original's, as
        in the paper, and the fine-tuned one's for `tuned`.

    Raises:
        ValueError: If the assembly is unknown, or features that it needs are missing.
    """
    if assembly not in ASSEMBLIES:
        raise ValueError(f"unknown assembly {assembly!r}: one of {', '.join(ASSEMBLIES)}")
    if needs_tuned(assembly) and tuned is None:
        raise ValueError(f"the assembly {assembly!r} needs the fine-tuned backbone's features")
    if assembly == "tuned":
        assert tuned is not None
        return tuned
    if original is None:
        raise ValueError(f"the assembly {assembly!r} needs the original backbone's features")
    if assembly == "original":
        return original
    if assembly == "duplicate":
        return BackboneOutput(torch.cat([original.patch_tokens] * 2, 1), original.cls)
    assert tuned is not None
    if assembly == "add":
        return BackboneOutput(original.patch_tokens + tuned.patch_tokens, original.cls)
    return BackboneOutput(torch.cat([original.patch_tokens, tuned.patch_tokens], 1), original.cls)
