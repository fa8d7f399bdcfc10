"""Recipes: what ``--recipe`` stands for in numbers, and which of them the user gave."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from distill.config import PAPER_BATCH, DistillConfig

INTERPOLATE = 0.6
"""Share of the student in the result; from 0.5 to 0.75 all measured alike."""
MEASURED_VIEWS = 720
"""Training views of the eight scenes on which the automatic recipe was measured."""
_MEASURED_STEPS = 3000
"""Its steps there, of two views each; the same number of views is seen too often where there are fewer of them."""
_MOST_VIEWS_OF_SMALL_BATCHES = 2 * _MEASURED_STEPS
"""Up to here that many steps show every view; with more, larger batches do."""
_LARGE_BATCH = 16
_RATE, _LORA_RATE = 5e-5, 3e-4
"""Measured at two views a step; low-rank updates start from zero and need a higher rate."""


@dataclass(frozen=True)
class Recipe:
    """Every number that decides how the student learns; see the flags of the same names in `DistillConfig`."""

    name: Literal["auto", "paper"]
    """Which recipe."""
    batch_size: int
    """Views of a step, over all processes."""
    steps: int | None
    """Optimizer steps; None: as many as ``epochs`` take."""
    epochs: float
    """Passes over all views; a part of one counts."""
    lr: float
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"]
    """Whether the rate stays, or falls to zero along a cosine."""
    warmup_steps: int
    """Steps in which the rate rises linearly."""
    weight_decay: float
    """Of AdamW."""
    clip: float
    """Largest norm of the gradient."""
    flip: float
    """Share of views that are mirrored, in [0, 1]."""
    ema_decay: float
    """Of the moving average of the student's weights, in [0, 1); 0 for none."""
    interpolate: float
    """Share of the student in its average with the original, in [0, 1]."""
    accumulation: Literal["ignore", "weight", "drop"]
    """What the opacity of a rendered target means for its weight."""
    precision: Literal["auto", "bf16", "fp32"]
    """In which the student computes."""
    given: tuple[str, ...] = ()
    """Those that the user's flags decided."""


def choose_recipe(config: DistillConfig, num_views: int, num_parts: int) -> Recipe:
    """Settles every number: the user's where a flag was given, else the recipe's.

    ``paper`` is FiT3D's training: AdamW at a constant rate of 1e-5, one epoch, fp32, patches counted alike, nothing
    averaged. ``auto`` stays near the original: a rate that falls along a cosine, an average over the steps, and an
    average with the original's weights at the end. It was measured at 720 views with 3,000 steps of 2 views at 5e-5
    and with 1,000 steps of 16 views at 1e-4; rate and number of steps for other batches follow the power laws through
    these two points, and fewer views take fewer steps, as the square root.

    Args:
        config: The user's choices.
        num_views: Training views V of all scenes.
        num_parts: Into so many equal parts a batch must be cut, over all processes.

    Returns:
        The recipe.
    """
    values = _paper(config) if config.recipe == "paper" else _auto(config, num_views, num_parts)
    given = {field.name: getattr(config, field.name, None) for field in fields(Recipe) if field.name not in _OWN}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("precision") == "auto":
        del given["precision"]
    if "epochs" in given and "steps" not in given:
        values["steps"] = None
    return Recipe(**{**values, **given, "name": config.recipe, "given": tuple(given)})


_OWN = ("name", "given")


def _paper(config: DistillConfig) -> dict:
    return {
        "batch_size": PAPER_BATCH,
        "steps": None,
        "epochs": 1.0,
        # The paper trains all weights; low-rank updates would hardly move at its rate.
        "lr": _LORA_RATE if config.lora_rank else 1e-5,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 1e-4,
        "clip": 0.1,
        "flip": 0.5,
        "ema_decay": 0.0,
        "interpolate": 1.0,
        "accumulation": "ignore",
        "precision": "fp32",
    }


def _auto(config: DistillConfig, num_views: int, num_parts: int) -> dict:
    batch_size = config.batch_size or _batch_size(num_views, num_parts)
    growth = batch_size / 2  # over the batch that most was measured with
    steps = config.steps
    if steps is None and config.epochs is not None:
        steps = math.ceil(config.epochs * num_views / batch_size)  # for what depends on it; the sampler knows exactly
    if steps is None:
        measured = _MEASURED_STEPS * min(1.0, num_views / MEASURED_VIEWS) ** 0.5 * growth**-0.5
        steps = max(int(float(f"{measured:.2g}")), math.ceil(num_views / batch_size), 10)
    return {
        **_paper(config),
        "batch_size": batch_size,
        "steps": steps,
        "lr": float(f"{(_LORA_RATE if config.lora_rank else _RATE) * growth ** (1 / 3):.2g}"),
        "schedule": "cosine",
        "warmup_steps": min(100, steps // 10),
        # Looks back over a third of the training; an average that reached its start would be the original again.
        "ema_decay": round(min(0.999, max(0.0, 1 - 3 / steps)), 4),
        "interpolate": INTERPOLATE,
        "accumulation": "weight",
        "precision": "auto",
    }


def _batch_size(num_views: int, num_parts: int) -> int:
    if num_views <= _MOST_VIEWS_OF_SMALL_BATCHES and 2 % num_parts == 0:
        return 2
    return math.ceil(_LARGE_BATCH / num_parts) * num_parts


def explain(recipe: Recipe, config: DistillConfig, num_views: int, num_scenes: int, num_steps: int) -> str:
    """Returns what was chosen and why, in two or three sentences for the user.

    Args:
        recipe: See `choose_recipe`.
        config: The user's choices.
        num_views: Training views V of all scenes.
        num_scenes: Scenes that are trained on.
        num_steps: Optimizer steps that will be taken.
    """
    seen = num_steps * recipe.batch_size / max(num_views, 1)
    views = f"{num_views:,} views of {num_scenes} scene{'s' if num_scenes > 1 else ''}"
    warm = f" after {recipe.warmup_steps} steps of warm-up" if recipe.warmup_steps else ""
    rate = "falling to 0 along a cosine" if recipe.schedule == "cosine" else "constant"
    parts = [
        f"Recipe {recipe.name}: {views}, so {num_steps:,} steps of {recipe.batch_size} (each view {seen:.3g} times); "
        f"learning rate {recipe.lr:g}, {rate}{warm}"
    ]
    if recipe.ema_decay:
        parts.append(f"the student is averaged over its steps (decay {recipe.ema_decay:g})")
    if recipe.interpolate < 1:
        parts.append(
            f"the result is {recipe.interpolate:g} x student + {1 - recipe.interpolate:g} x original (--interpolate)"
        )
    text = "; ".join(parts) + "."
    if recipe.given:
        text += f" Given: {', '.join('--' + name.replace('_', '-') for name in recipe.given)}."
    if recipe.name == "paper" and recipe.lr * num_steps < 0.03:
        text += (
            f" This is made for 140,000 views and hardly changes a student on {num_views:,}: --recipe auto is made for "
            "that."
        )
    if recipe.name == "auto" and num_views > _MOST_VIEWS_OF_SMALL_BATCHES:
        text += " So many views were not measured: the batch is larger and every view is seen at least once."
    if config.lora_rank and "lr" not in recipe.given:
        text += (
            f" Low-rank updates of rank {config.lora_rank} have a learning rate of their own, and learn less than all."
        )
    return text
