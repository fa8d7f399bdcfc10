"""The folder that a training leaves: which files it holds, its card, and the layouts its weights are written in."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fit3d_ns.backbones.identity import check_identity, hash_state_dict
from fit3d_ns.backbones.students.other_formats import (
    to_dinov2_layout,
    write_onnx,
    write_timm_config,
    write_transformers,
)
from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.files import atomic_path, atomic_write_json, atomic_write_text
from fit3d_ns.support.json_files import build, read_record, write_record

WEIGHTS_NAME = "backbone.safetensors"
"""The result: a plain timm state dict, averaged with the original's weights if the recipe says so."""
STUDENT_NAME = "student.safetensors"
"""The student before that average; absent where nothing was averaged."""
HALF_NAME = "backbone_fp16.safetensors"
"""The result in half precision, on request."""
DINOV2_NAME = "backbone_dinov2.safetensors"
"""The result with the keys of facebookresearch/dinov2, on request."""
ONNX_NAME = "backbone.onnx"
"""The result as a graph from images to patch tokens, on request."""
TRANSFORMERS_NAME = "transformers"
"""Folder of the result in transformers' layout, on request."""
METRICS_NAME = "metrics.json"
"""What was measured after training."""
README_NAME = "README.md"
"""The model card, which the hub shows."""
PROBES_NAME = "probes.json"
"""Tables of the probes that were run on the result, for the model card."""
CARD_NAME = "card.json"
"""Where the weights come from, beside them."""
PAGE_NAME = "report.html"
"""What was learned, to look at."""
FILES = (WEIGHTS_NAME, STUDENT_NAME, METRICS_NAME, README_NAME, PROBES_NAME, CARD_NAME, PAGE_NAME)
"""That every result may have."""

_CHECKSUM = "checksum"
"""Field of a card: hash of all others."""

MEASURES = {
    "l1": "L1 to the target (lower is better)",
    "cosine": "cosine to the target",
    "view_match": "points that the features find again in another view",
    "drift": "cosine to the original's features",
}
"""What is measured of views that were not trained on, by its name in `METRICS_NAME`."""


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
        card = read_record(path)
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
    transformers_layout: bool = False,
    onnx: bool = False,
) -> list[Path]:
    """Writes a result: the student, what was averaged of it, other layouts, then the card that vouches for them.

    With timm's config.json beside them, the weights are a folder that plain timm opens.

    Each file is whole or absent. A process killed between two of them leaves weights that the card's hashes do not
    know, which every reader notices; the un-averaged student is written first, so the average can be made again.

    Args:
        folder: Where.
        student: The student's state dict, in timm's layout, fp32.
        averaged: The state dict to use.
        card: What else the card says; ``weights_sha256`` and ``student_sha256`` are added here.
        half: Whether to write `HALF_NAME`.
        dinov2_layout: Whether to write `DINOV2_NAME`.
        transformers_layout: Whether to write `TRANSFORMERS_NAME`.
        onnx: Whether to write `ONNX_NAME`.

    Returns:
        The files written.

    Raises:
        UserError: If the disk refuses, the backbone has no such layout, or what writes it is not installed.
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
    others = [write_timm_config(folder, card["student"], WEIGHTS_NAME)]
    if onnx:
        others.append(write_onnx(folder / ONNX_NAME, averaged, card["student"]))
    if transformers_layout:
        others += write_transformers(folder / TRANSFORMERS_NAME, averaged, card["student"])
    card = {**card, **hashes}
    write_record(folder / CARD_NAME, card)
    # What is left of an earlier training, or another average.
    for name in {STUDENT_NAME, HALF_NAME, DINOV2_NAME, PROBES_NAME} - set(layouts):
        (folder / name).unlink(missing_ok=True)
    if not onnx:
        (folder / ONNX_NAME).unlink(missing_ok=True)
    if not transformers_layout:
        shutil.rmtree(folder / TRANSFORMERS_NAME, ignore_errors=True)
    files = [folder / name for name in layouts]
    files.sort(key=lambda path: path.name != WEIGHTS_NAME)
    return [*files, *others, folder / CARD_NAME]


def write_model_card(folder: Path) -> Path:
    """Writes the page that the hub shows, `README_NAME`, from the card, metrics.json and the probes' tables.

    Args:
        folder: A result.

    Returns:
        The file.

    Raises:
        UserError: If the card is damaged, or the disk refuses.
    """
    card = read_card(folder)
    student, settings = card["student"], card.get("settings", {})
    lines = [
        "---",
        "library_name: timm",
        f"base_model: timm/{student['timm_id']}",
        "pipeline_tag: image-feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in ("timm", "fit3d", "image-feature-extraction")),
        "---",
        "",
        f"# {student['name']}, fine-tuned on features lifted into 3D",
        "",
        f"[FiT3D](https://arxiv.org/abs/2407.20229): {student['name']} (`{student['timm_id']}`) learnt "
        + (
            "its own features, blended in 3D"
            if settings.get("targets", "lifted") == "lifted"
            else "a control's targets"
        )
        + f", of {len(card.get('scenes', []))} scenes with {card.get('training_views', '?')} photos. Recipe "
        + f"`{card.get('recipe', 'paper')}`, {card.get('steps', '?')} steps"
        + (
            f"; averaged: {card['interpolate']:g} x student + {1 - card['interpolate']:g} x original."
            if _is_mean(card)
            else "."
        ),
        "",
        "## Use",
        "",
        "```python",
        "import timm",
        'model = timm.create_model("local-dir:FOLDER", pretrained=True)  # "hf-hub:USER/REPO" where it was uploaded',
        f"tokens = model.forward_features(images)  # mean {_numbers(student['mean'])}, std {_numbers(student['std'])}",
        "```",
        "",
        f"Trained were the tokens of block {student['layer']}, {'after' if student['norm'] else 'before'} the final "
        f"norm, of photos whose sides are multiples of {student['patch_size']}. `fit3d_ns.backbones.load(FOLDER)` "
        f"takes them so, {_beside(card)}.",
    ]
    if (folder / TRANSFORMERS_NAME).is_dir():
        lines += ["", f'With transformers: `AutoModel.from_pretrained("FOLDER/{TRANSFORMERS_NAME}")`.']
    if (folder / ONNX_NAME).is_file():
        lines += ["", f"`{ONNX_NAME}`: images [B, 3, H, W], RGB in [0, 1], to patch tokens [B, C, h, w], at any size."]
    lines += _measured(folder)
    for title, table in _read_optional(folder / PROBES_NAME).items():
        lines += ["", f"## {title}", "", str(table).strip()]
    atomic_write_text(folder / README_NAME, "\n".join(lines) + "\n")
    return folder / README_NAME


def add_probe(folder: Path, title: str, table: str) -> Path:
    """Adds a probe's table to a result's model card, in place of an earlier one of that title.

    Args:
        folder: A result.
        title: Of the probe and its data.
        table: Markdown.

    Returns:
        The model card.

    Raises:
        UserError: If the card is damaged, or the disk refuses.
    """
    atomic_write_json(folder / PROBES_NAME, {**_read_optional(folder / PROBES_NAME), title: table})
    return write_model_card(folder)


def _measured(folder: Path) -> list[str]:
    """What metrics.json says of views that were not trained on, as a table."""
    metrics = _read_optional(folder / METRICS_NAME)
    lines: list[str] = []
    validation = metrics.get("validation") or {}
    for title, mean in (
        ("scenes that it was trained on", metrics.get("mean")),
        ("other scenes", validation.get("mean")),
    ):
        rows = [
            f"| {words} | {mean[f'{name}_before']:.4f} | {mean[f'{name}_after']:.4f} |"
            for name, words in MEASURES.items()
            if mean and f"{name}_before" in mean and f"{name}_after" in mean
        ]
        if rows:
            lines += ["", f"Held-out views of {title}:", "", "| | original | this |", "|---|---|---|", *rows]
    return ["", "## Measured", *lines] if lines else []


def _read_optional(path: Path) -> dict[str, Any]:
    try:
        return read_record(path)
    except (FileNotFoundError, DamagedFile):
        return {}


def _is_mean(card: Mapping[str, Any]) -> bool:
    return card.get("interpolate") not in (None, 1, 1.0)


def _beside(card: Mapping[str, Any]) -> str:
    return "alone" if card.get("assembly") == "tuned" else "beside the original's"


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
