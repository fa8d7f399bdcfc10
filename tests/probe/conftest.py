"""A tiny backbone and a tiny data set, made by the tests themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from probe_files import TINY, save_png
from safetensors.torch import save_file

from probe.config import SegmentationConfig


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Random weights of the tiny backbone, and two slightly different copies."""
    import timm

    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = timm.create_model(TINY, num_classes=0).state_dict()
        paths = {}
        for name, noise in (("original", 0.0), ("tuned", 0.1), ("control", 0.2)):
            changed = {
                key: (value + noise * value.std() * torch.randn_like(value)) if value.ndim > 1 else value
                for key, value in state.items()
            }
            paths[name] = folder / f"{name}.safetensors"
            save_file({key: value.contiguous() for key, value in changed.items()}, paths[name])
    return paths


@pytest.fixture(autouse=True)
def one_thread():
    """On maps this small, a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def colored_blocks(tmp_path):
    """A folder data set whose classes are visible: red, green and blue halves, with ignored pixels; also depth."""

    def make(name: str = "blocks", train: int = 6, test: int = 3, size: tuple[int, int] = (48, 64)) -> Path:
        root = tmp_path / name
        rng = np.random.default_rng(3)
        palette = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220]])
        for split, count in (("train", train), ("test", test)):
            for index in range(count):
                labels = rng.integers(0, 3, (3, 4)).repeat(size[0] // 3, 0).repeat(size[1] // 4, 1).astype(np.uint8)
                noise = rng.integers(-20, 21, (*size, 3))
                image = (palette[labels] + noise).clip(0, 255).astype(np.uint8)
                depth = (1000 * (1 + labels.astype(np.uint16))).astype(np.uint16)
                labels[:2] = 255
                depth[:2] = 0
                (root / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(root / split / f"photo_{index}.png")
                save_png(root / f"{split}annot" / f"photo_{index}.png", labels)
                save_png(root / f"{split}depth" / f"photo_{index}.png", depth)
        return root

    return make


@pytest.fixture
def tiny_config(weights, colored_blocks, tmp_path):
    """Builds a probe of the tiny backbone and its tuned copy on colored blocks."""
    root = colored_blocks()

    def make(output: str, kind=SegmentationConfig, **options):
        fields = {
            "data": root,
            "backbone": TINY,
            "backbone_weights": weights["original"],
            "tuned": (str(weights["tuned"]),),
            "output_dir": tmp_path / output,
            "workers": 0,
            "device": "cpu",
        }
        return kind(**{**fields, **options})

    return make
