"""Every number of both recipes, and that a given flag wins."""

import dataclasses

import pytest

from distill.config import DistillConfig
from distill.recipes import Recipe, choose_recipe, explain


def numbers(recipe: Recipe) -> dict:
    return {name: value for name, value in dataclasses.asdict(recipe).items() if name not in ("name", "given")}


def auto(num_views: int = 720, num_parts: int = 1, **flags) -> Recipe:
    return choose_recipe(DistillConfig(**flags), num_views, num_parts)


PAPER = {
    "batch_size": 2,
    "steps": None,
    "epochs": 1.0,
    "lr": 1e-5,
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
AUTO = {
    "batch_size": 2,
    "steps": 3000,
    "epochs": 1.0,
    "lr": 5e-5,
    "schedule": "cosine",
    "warmup_steps": 100,
    "weight_decay": 1e-4,
    "clip": 0.1,
    "flip": 0.5,
    "ema_decay": 0.999,
    "interpolate": 0.6,
    "accumulation": "weight",
    "precision": "auto",
}


@pytest.mark.parametrize("num_views", [1, 720, 140_451])
def test_paper_is_the_papers_whatever_the_scenes(num_views):
    recipe = choose_recipe(DistillConfig(recipe="paper"), num_views, 1)
    assert numbers(recipe) == PAPER and recipe.name == "paper" and recipe.given == ()


def test_auto_is_what_was_measured_and_the_default():
    recipe = auto()
    assert numbers(recipe) == AUTO and recipe.name == "auto" and recipe.given == ()


@pytest.mark.parametrize(
    "num_views, num_parts, batch_size, steps, lr",
    [
        (67, 1, 2, 920, 5e-5),
        (717, 1, 2, 3000, 5e-5),
        (112, 1, 2, 1200, 5e-5),
        (6000, 2, 2, 3000, 5e-5),
        (720, 8, 16, 1100, 1e-4),  # 1,000 steps were measured
        (720, 3, 18, 1000, 1e-4),
        (140_451, 1, 16, 8779, 1e-4),
    ],
)
def test_auto_follows_the_number_of_views(num_views, num_parts, batch_size, steps, lr):
    recipe = auto(num_views, num_parts)
    assert (recipe.batch_size, recipe.steps, recipe.lr) == (batch_size, steps, lr)
    assert recipe.batch_size % num_parts == 0
    assert (recipe.steps or 0) * recipe.batch_size >= num_views


def test_short_trainings_warm_up_and_average_over_a_part_of_their_steps():
    recipe = auto(steps=200)
    assert (recipe.steps, recipe.warmup_steps, recipe.ema_decay) == (200, 20, 0.985)
    assert auto(steps=2).ema_decay == 0.0
    by_epochs = auto(epochs=0.5)
    assert by_epochs.steps is None and by_epochs.epochs == 0.5 and by_epochs.warmup_steps == 18
    assert auto(steps=6000).ema_decay == 0.999


def test_low_rank_updates_have_a_rate_of_their_own():
    for recipe in ("auto", "paper"):
        assert auto(recipe=recipe, lora_rank=8).lr == 3e-4
        assert auto(recipe=recipe, lora_rank=8, lr=1e-3).lr == 1e-3


GIVEN = {
    "batch_size": 6,
    "steps": 17,
    "epochs": 3.0,
    "lr": 2e-3,
    "schedule": {"auto": "constant", "paper": "cosine"},
    "warmup_steps": 7,
    "weight_decay": 0.0,
    "clip": 0.0,
    "flip": 0.0,
    "ema_decay": 0.25,
    "interpolate": 0.0,
    "accumulation": "drop",
    "precision": "bf16",
}


def test_there_is_a_flag_for_every_number():
    assert set(GIVEN) == set(PAPER) == set(AUTO)


@pytest.mark.parametrize("recipe", ["auto", "paper"])
@pytest.mark.parametrize("name", GIVEN)
def test_a_given_flag_wins(recipe, name):
    value = GIVEN[name]
    value = value[recipe] if isinstance(value, dict) else value
    chosen = auto(recipe=recipe, **{name: value})
    assert getattr(chosen, name) == value and chosen.given == (name,)
    untouched = {"steps", "epochs", "lr", "warmup_steps", "ema_decay"}  # may follow from it
    before = numbers(auto(recipe=recipe))
    for other in set(before) - {name} - (untouched if name in ("batch_size", "steps", "epochs") else set()):
        assert getattr(chosen, other) == before[other], other


def test_what_was_chosen_is_said():
    text = explain(auto(lr=1e-4), DistillConfig(), 720, 8, 3000)
    for part in ("Recipe auto", "720 views of 8 scenes", "3,000 steps of 2", "each view 8.33 times", "cosine"):
        assert part in text
    assert "0.6 x student + 0.4 x original" in text and "Given: --lr." in text and "0.999" in text
    paper = choose_recipe(DistillConfig(recipe="paper"), 720, 1)
    assert "140,000 views" in explain(paper, DistillConfig(), 720, 8, 360)
    assert "hardly" not in explain(paper, DistillConfig(), 140_451, 230, 70_225)
    assert "not measured" in explain(auto(140_451), DistillConfig(), 140_451, 230, 8779)
    assert "learning rate of their own" in explain(auto(lora_rank=4), DistillConfig(lora_rank=4), 720, 8, 3000)
