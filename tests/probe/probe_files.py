"""What the tests of the probes write: photos and PNGs; and the name of the backbone they all take."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from paths import ROOT
from PIL import Image

TINY = "test_vit"
"""A timm ViT of 64 channels with patches of 16 pixels, made for tests."""


def save_photo(path: Path, size: tuple[int, int] = (40, 56), seed: int = 0) -> None:
    """Writes a photo of random blocks, [height, width]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((size[1], size[0]), Image.Resampling.NEAREST).save(path, quality=95)


def save_png(path: Path, values: np.ndarray) -> None:
    """Writes an index or depth PNG; uint8 or uint16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def probe_in_two_processes(arguments: Sequence[object]) -> None:
    """Runs fit3d-probe under torchrun, on a CPU."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "probe.cli", *map(str, arguments)]
    command += ["--workers", "0", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
