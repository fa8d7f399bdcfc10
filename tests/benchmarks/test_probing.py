"""The benchmark that sets the fast protocol against the full one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from paths import ROOT
from PIL import Image
from safetensors.torch import save_file

TINY = "test_vit"


@pytest.fixture
def blocks(tmp_path) -> Path:
    """Photos of coloured blocks whose colours are their classes."""
    rng = np.random.default_rng(3)
    palette = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 220]])
    for split, count in (("train", 4), ("test", 2)):
        for index in range(count):
            labels = rng.integers(0, 3, (3, 4)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
            for folder, picture in ((split, palette[labels].astype(np.uint8)), (f"{split}annot", labels)):
                path = tmp_path / "blocks" / folder / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
    return tmp_path / "blocks"


def test_the_difference_has_rows_of_controls_and_every_value_behind_it(tmp_path, blocks):
    for seed, name in enumerate(("original", "tuned", "control")):
        torch.manual_seed(seed)
        save_file(timm.create_model(TINY, num_classes=0).state_dict(), tmp_path / f"{name}.safetensors")
    command = [sys.executable, "-m", "benchmarks.probing", "difference", "--data", blocks, "--backbone", TINY]
    command += ["--backbone-weights", tmp_path / "original.safetensors", "--tuned", tmp_path / "tuned.safetensors"]
    command += ["--control", tmp_path / "control.safetensors", "--seeds", "0", "1", "--device", "cpu", "--workers", "0"]
    command += ["--iterations", "2", "--fast-iterations", "4", "--batch-size", "2"]
    command += ["--runs", tmp_path / "runs", "--output", tmp_path / "difference.json"]
    ended = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (line,) = json.loads((tmp_path / "difference.json").read_text())
    assert {"original", "tuned", "control", "control_concat"} <= line["rows"].keys()
    for name, row in line["rows"].items():
        fast, full = (line["metrics"][protocol]["rows"][name]["miou"] for protocol in ("fast", "full"))
        assert (row["fast"], row["full"]) == (fast, full) and row["difference"] == fast["mean"] - full["mean"]
    for protocol in ("fast", "full"):
        written = json.loads((tmp_path / "runs" / f"segmentation_{protocol}" / "metrics.json").read_text())
        assert line["metrics"][protocol] == written
    tuned, control = (line["rows"][name]["full"]["mean"] for name in ("tuned", "control"))
    assert tuned != control
