"""What a training leaves: weights that timm loads, a card that says where they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distill.config import DistillConfig
from distill.recipes import Recipe
from distill.scenes import Scene
from distill.trainer import TrainingResult
from fit3d_ns.backbones.students.averaging import default_assembly
from fit3d_ns.support.errors import UserError

_NOT_SETTINGS = (
    "name runs bundles validation_runs validation_bundles teacher average_only output_dir resume data_root bundle_dir "
    "cache_dir push_to_hub vis"
).split()
"""Choices that say where things are on one machine, and decide nothing."""


def make_card(
    config: DistillConfig,
    recipe: Recipe,
    scenes: Sequence[Scene],
    validation: Sequence[Scene],
    original: Mapping[str, Any],
    start_sha256: str,
    result: TrainingResult,
) -> dict[str, Any]:
    """Returns what there is to say about the result but its hashes, as JSON values without paths of this machine.

    Args:
        config: The user's choices.
        recipe: The numbers that were settled.
        scenes: The scenes that were trained on.
        validation: Those that were only measured.
        original: Identity of the original, with which the student is averaged.
        start_sha256: Hash of the weights that training started from.
        result: Of the training.
    """
    values = {**asdict(config), **asdict(recipe)}
    settings = {name: value for name, value in values.items() if name not in _NOT_SETTINGS}
    for name, value in settings.items():
        if isinstance(value, Path):
            settings[name] = value.name
        elif isinstance(value, tuple):
            settings[name] = list(value)
    return {
        "recipe": recipe.name,
        "interpolate": recipe.interpolate,
        "assembly": default_assembly(recipe.interpolate),
        "teacher": dict(scenes[0].info.teacher),
        "teacher_original": scenes[0].info.teacher_original,
        "student": dict(original),
        "start_sha256": start_sha256,
        "moving_average": recipe.ema_decay > 0,
        "feature_grid": scenes[0].info.feature_grid.to_dict(),
        "scenes": [_describe(scene) for scene in scenes],
        "validation_scenes": [_describe(scene) for scene in validation],
        "training_views": sum(len(scene.info.indices("train")) for scene in scenes),
        "steps": result.steps,
        "seconds": result.seconds,
        "views_per_second": result.views_per_second,
        "final_loss": result.losses[-1][1] if result.losses else None,
        "settings": settings,
        "versions": {name: version(name) for name in ("fit3d-ns", "torch", "timm", "safetensors")},
    }


def _describe(scene: Scene) -> dict[str, Any]:
    return {
        "name": scene.name,
        "bundle": scene.bundle.id,
        "training_views": len(scene.info.indices("train")),
        "held_out_views": len(scene.info.indices("eval")),
    }


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
        files: What to upload, the first of them at the top of the result folder.

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
            name = path.relative_to(files[0].parent).as_posix()
            api.upload_file(path_or_fileobj=str(path), path_in_repo=name, repo_id=repository)
    except Exception as error:  # the client's HTTP library, and so its errors, changed between releases
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"The result could not be uploaded to {repository} ({reason}): log in with `hf auth login`; the files are "
            f"in {files[0].parent}."
        ) from error
    return str(address)
