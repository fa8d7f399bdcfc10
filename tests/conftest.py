"""Shared test set-up: the GPU marker and a tiny teacher."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

TINY_TEACHER = "test_vit"
"""A timm ViT of 64 channels with patches of 16 pixels, made for tests."""


def pytest_collection_modifyitems(items):
    """Skips tests marked ``gpu`` where no CUDA device is present."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


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
