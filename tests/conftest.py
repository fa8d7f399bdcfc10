"""Shared test set-up: the markers of what a machine may lack, the random seed, and a tiny teacher."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import viewer_page
from paths import LONGEST_FIRST
from safetensors.torch import save_file

TINY_TEACHER = "test_vit"
"""A timm ViT of 64 channels with patches of 16 pixels, made for tests."""


def pytest_addoption(parser):
    """Another seed shows whether a test passes by the luck of its random numbers."""
    parser.addoption("--random-seed", type=int, default=0, help="seed of the random numbers of every test")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seeds every test, and the fixtures that it is the first to need: the same numbers in every run."""
    seed = item.config.getoption("random_seed")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_collection_modifyitems(config, items):
    """Puts long files first; skips tests marked ``gpu`` without CUDA, ``browser`` without one, ``slow`` unasked."""
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
    asked = "slow" in config.getoption("markexpr")
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "browser": viewer_page.missing(),
        "slow": None if asked else "takes ten minutes: -m slow",
    }
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords and reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def teacher_weights(tmp_path_factory) -> Path:
    """Random weights of the tiny teacher, the same in every run."""
    import timm

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(TINY_TEACHER, num_classes=0)
    path = tmp_path_factory.mktemp("teacher") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path
