"""What a training leaves: weights that timm loads, a card that says where they come from."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from distill.config import DistillConfig
from distill.scenes import Scene
from distill.trainer import TrainingResult
from fit3d_ns.backbones import hash_state_dict
from fit3d_ns.backbones.fine_tuned import CARD_NAME, DINOV2_NAME, HALF_NAME, WEIGHTS_NAME
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_bytes, atomic_write_json

_NOT_SETTINGS = ("runs", "bundles", "output_dir", "resume", "data_root", "bundle_dir", "cache_dir", "push_to_hub")
"""Choices that say where things are on one machine, and decide nothing."""


def make_card(
    config: DistillConfig,
    scenes: Sequence[Scene],
    student: Mapping[str, Any],
    result: TrainingResult,
    weights: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Returns everything there is to say about the result, as JSON values without paths of this machine.

    Args:
        config: The user's choices.
        scenes: The scenes.
        student: The student's identity before training.
        result: Of the training.
        weights: The state dict that is saved.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    if settings["student_weights"] is not None:
        settings["student_weights"] = Path(settings["student_weights"]).name
    return {
        "teacher": dict(scenes[0].info.teacher),
        "student": dict(student),
        "weights_sha256": hash_state_dict(weights),
        "moving_average": config.ema_decay > 0,
        "feature_grid": scenes[0].info.feature_grid.to_dict(),
        "scenes": [
            {
                "name": scene.name,
                "bundle": scene.bundle.id,
                "training_views": len(scene.info.indices("train")),
                "held_out_views": len(scene.info.indices("eval")),
            }
            for scene in scenes
        ],
        "training_views": sum(len(scene.info.indices("train")) for scene in scenes),
        "steps": result.steps,
        "seconds": result.seconds,
        "views_per_second": result.views_per_second,
        "final_loss": result.losses[-1][1] if result.losses else None,
        "settings": settings,
        "versions": {name: version(name) for name in ("fit3d-ns", "torch", "timm", "safetensors")},
    }


def write_result(
    output_dir: Path, weights: Mapping[str, Tensor], card: Mapping[str, Any], half: bool, dinov2_layout: bool
) -> list[Path]:
    """Writes the weights in the layouts asked for, deletes others that an earlier training left, then writes the card.

    Args:
        output_dir: Where.
        weights: See `distill.student.plain_state_dict`.
        card: See `make_card`.
        half: Whether to write half precision too.
        dinov2_layout: Whether to write DINOv2's own layout too.

    Returns:
        The files written.

    Raises:
        UserError: If the disk refuses, or the backbone is no DINOv2.
    """
    layouts = {WEIGHTS_NAME: dict(weights)}
    if half:
        layouts[HALF_NAME] = {
            name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()
        }
    if dinov2_layout:
        layouts[DINOV2_NAME] = to_dinov2_layout(weights, card["student"]["timm_id"])
    for name, tensors in layouts.items():
        atomic_write_bytes(output_dir / name, save({key: value.contiguous() for key, value in tensors.items()}))
    for name in {HALF_NAME, DINOV2_NAME} - set(layouts):
        (output_dir / name).unlink(missing_ok=True)
    atomic_write_json(output_dir / CARD_NAME, card)
    return [*(output_dir / name for name in layouts), output_dir / CARD_NAME]


def check_dinov2(timm_id: str) -> None:
    """Refuses backbones that facebookresearch/dinov2 does not have.

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
        positions = converted["pos_embed"]
        converted["pos_embed"] = torch.cat([positions.new_zeros(1, 1, width), positions], dim=1)
    converted["mask_token"] = converted["cls_token"].new_zeros(1, width)
    if "giant" in timm_id:  # SwiGLU
        renames = ((r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3."))
        for pattern, replacement in renames:
            converted = {re.sub(pattern, replacement, name): tensor for name, tensor in converted.items()}
    return converted


def check_hub(repository: str) -> None:
    """Checks, before any long work, that there is someone to upload as.

    Args:
        repository: ``user/name``.

    Raises:
        UserError: If the name is none, the hub cannot be reached, or nobody is logged in.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        HfApi().whoami()
    except Exception as error:  # as below
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--push-to-hub {repository} will fail ({reason}): log in with `hf auth login`, or leave it out and upload "
            "the files later."
        ) from error


def push_to_hub(repository: str, files: Sequence[Path]) -> str:
    """Uploads the result to the Hugging Face hub.

    Args:
        repository: ``user/name``; made if it does not exist.
        files: What to upload.

    Returns:
        The repository's address.

    Raises:
        UserError: If the hub refuses or cannot be reached; the files stay on disk.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        for path in files:
            api.upload_file(path_or_fileobj=str(path), path_in_repo=path.name, repo_id=repository)
    except Exception as error:  # the client's HTTP library, and so its errors, changed between releases
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"The result could not be uploaded to {repository} ({reason}): log in with `hf auth login`; the files are "
            f"in {files[0].parent}."
        ) from error
    return str(address)
