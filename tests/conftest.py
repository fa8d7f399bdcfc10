"""Shared test set-up: GPU marker, quiet threads."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Skips tests marked ``gpu`` where no CUDA device is present."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
