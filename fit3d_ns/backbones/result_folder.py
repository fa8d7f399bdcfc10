"""The folder that a training leaves: which files it holds, its card, and the layouts its weights are written in."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fit3d_ns.backbones.identity import check_identity, hash_state_dict
from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.files import atomic_path, atomic_write_json
from fit3d_ns.support.json_files import build, read_json

WEIGHTS_NAME = "backbone.safetensors"
"""The result: a plain timm state dict, averaged with the original's weights if the recipe says so."""
STUDENT_NAME = "student.safetensors"
"""The student before that average; absent where nothing was averaged."""
HALF_NAME = "backbone_fp16.safetensors"
"""The result in half precision, on request."""
DINOV2_NAME = "backbone_dinov2.safetensors"
"""The result with the keys of facebookresearch/dinov2, on request."""
CARD_NAME = "card.json"
"""Where the weights come from, beside them."""


@dataclass(frozen=True)
class _Card:
    """The fields of a card that are used; it may hold others."""

    student: dict[str, Any]
    weights_sha256: str
    student_sha256: str | None = None
    assembly: str | None = None
    interpolate: float | None = None

    def __post_init__(self) -> None:
        for name in ("weights_sha256", "student_sha256"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
                raise ValueError(f"{name} is {value[:80]!r}, no SHA-256")
        if self.interpolate is not None and not 0 <= self.interpolate <= 1:
            raise ValueError(f"interpolate is {self.interpolate}, not from 0 to 1")


def read_card(folder: Path) -> dict[str, Any]:
    """Reads the card of a result folder and checks the fields that every card has.

    Args:
        folder: Where `fit3d-distill` put its result.

    Returns:
        The card: ``student`` is the identity of the original (see `make_identity`), ``weights_sha256`` the hash of
        `WEIGHTS_NAME`.

    Raises:
        UserError: If there is no card, or it is damaged.
    """
    path = folder / CARD_NAME
    try:
        card = read_json(path)
        build(_Card, {key: card[key] for key in _Card.__dataclass_fields__ if key in card})
        check_identity(card["student"], "student")
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {CARD_NAME}: name a folder that fit3d-distill wrote.") from None
    except (DamagedFile, TypeError) as error:
        raise damaged_card(folder, error) from None
    return card


def original_of(weights: Path | None, weights_sha256: str) -> dict[str, Any] | None:
    """Returns the identity of what a weight file was fine-tuned from; None if no card beside it knows these weights.

    Args:
        weights: A weight file, maybe of a result folder; None for the hub's.
        weights_sha256: Hash of the tensors in it.

    Raises:
        UserError: If the card is damaged.
    """
    if weights is None or not Path(weights).expanduser().with_name(CARD_NAME).is_file():
        return None
    card = read_card(Path(weights).expanduser().parent)
    return card["student"] if weights_sha256 in (card["weights_sha256"], card.get("student_sha256")) else None


def damaged_card(folder: Path, error: Exception) -> UserError:
    """Returns what is said of a card that cannot be used.

    Args:
        folder: Where it lies.
        error: What is wrong with it.
    """
    return UserError(
        f"{folder / CARD_NAME} is damaged, or fit3d-distill did not write it ({type(error).__name__}: {error}): copy "
        "it again from the training, or remove it and name the backbone yourself."
    )


def write_weights(
    folder: Path,
    student: Mapping[str, Tensor],
    averaged: Mapping[str, Tensor],
    card: Mapping[str, Any],
    half: bool,
    dinov2_layout: bool,
) -> list[Path]:
    """Writes a result: the student, what was averaged of it, other layouts, then the card that vouches for them.

    Each file is whole or absent. A process killed between two of them leaves weights that the card's hashes do not
    know, which every reader notices; the un-averaged student is written first, so the average can be made again.

    Args:
        folder: Where.
        student: The student's state dict, in timm's layout, fp32.
        averaged: The state dict to use.
        card: What else the card says; ``weights_sha256`` and ``student_sha256`` are added here.
        half: Whether to write `HALF_NAME`.
        dinov2_layout: Whether to write `DINOV2_NAME`.

    Returns:
        The files written.

    Raises:
        UserError: If the disk refuses, or the backbone has no DINOv2 layout.
    """
    hashes = {"weights_sha256": hash_state_dict(averaged), "student_sha256": hash_state_dict(student)}
    layouts: dict[str, Mapping[str, Tensor]] = {}
    if hashes["weights_sha256"] != hashes["student_sha256"]:
        layouts[STUDENT_NAME] = student
    layouts[WEIGHTS_NAME] = averaged
    if half:
        layouts[HALF_NAME] = {
            key: value.half() if value.is_floating_point() else value for key, value in averaged.items()
        }
    if dinov2_layout:
        layouts[DINOV2_NAME] = to_dinov2_layout(averaged, card["student"]["timm_id"])
    for name, tensors in layouts.items():
        with atomic_path(folder / name) as temporary:
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
    atomic_write_json(folder / CARD_NAME, {**card, **hashes})
    for name in {STUDENT_NAME, HALF_NAME, DINOV2_NAME} - set(layouts):
        (folder / name).unlink(missing_ok=True)  # of an earlier training, or another average
    files = [folder / name for name in layouts]
    files.sort(key=lambda path: path.name != WEIGHTS_NAME)
    return [*files, folder / CARD_NAME]


def check_dinov2(timm_id: str) -> None:
    """Refuses backbones that facebookresearch/dinov2 does not have.

    Args:
        timm_id: The architecture and weights tag, as timm names them.

    Raises:
        UserError: If ``timm_id`` is none of them.
    """
    if "dinov2" not in timm_id:
        raise UserError(f"--dinov2-layout is for DINOv2 backbones, and {timm_id} is none: leave it out.")


def to_dinov2_layout(weights: Mapping[str, Tensor], timm_id: str) -> dict[str, Tensor]:
    """Converts timm's keys of a DINOv2 to those of facebookresearch/dinov2.

    With registers, timm folds the class token's position embedding into the token; it is given back as zero, which
    is the same sum.

    Args:
        weights: timm's state dict.
        timm_id: The architecture.

    Returns:
        Tensors that Meta's ``vit_*`` modules load with ``strict=True``.

    Raises:
        UserError: If the backbone is no DINOv2.
    """
    check_dinov2(timm_id)
    converted = dict(weights)
    width = converted["cls_token"].shape[-1]
    if "reg_token" in converted:
        converted["register_tokens"] = converted.pop("reg_token")
        positions = converted["pos_embed"]  # [1, h * w, C]
        converted["pos_embed"] = torch.cat([positions.new_zeros(1, 1, width), positions], dim=1)
    converted["mask_token"] = converted["cls_token"].new_zeros(1, width)
    if "giant" in timm_id:  # SwiGLU
        renames = ((r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3."))
        for pattern, replacement in renames:
            converted = {re.sub(pattern, replacement, name): tensor for name, tensor in converted.items()}
    return converted
