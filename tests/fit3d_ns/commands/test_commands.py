"""The nerfstudio commands as a user types them, in processes of their own and from other working directories."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import TINY_ROOM

COMMANDS = Path(sys.executable).parent


def start(command, *arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_FORCE")}
    environment["HF_HUB_OFFLINE"] = "1"
    words = [str(COMMANDS / command), *map(str, arguments)]
    return subprocess.Popen(
        words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(command, *arguments, cwd):
    process = start(command, *arguments, cwd=cwd)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-3000:]
    return output


def train_arguments(scene, weights, output, timestamp, steps):
    return [
        "fit3d-splat",
        *("--data", os.path.relpath(scene, scene.parent), "--output-dir", output, "--timestamp", timestamp),
        *("--vis", "tensorboard", "--viewer.quit-on-train-completion", "True"),
        *("--machine.device-type", "cpu", "--max-num-iterations", steps, "--steps-per-save", 10),
        *("--pipeline.datamanager.backbone", "test_vit", "--pipeline.datamanager.backbone-weights", weights),
        *("--pipeline.model.num-downscales", 0, "--pipeline.model.feature-dim", 8),
        *("--pipeline.model.warmup-length", 5, "--pipeline.model.refine-every", 5),
        *("--pipeline.model.reset-alpha-every", 8, "--pipeline.model.densify-grad-thresh", 2e-4),
        "nerfstudio-data",
        *("--eval-mode", "interval", "--eval-interval", 4),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, teacher_weights):
    """A run of 60 steps, trained from the scene's parent folder with relative paths."""
    import shutil

    folder = tmp_path_factory.mktemp("commands")
    scene = Path(shutil.copytree(TINY_ROOM, folder / "scene"))
    run("ns-train", *train_arguments(scene, teacher_weights, "outputs", "whole", 60), cwd=folder)
    return folder / "outputs" / "scene" / "fit3d-splat" / "whole"


def test_eval_from_another_directory(trained, tmp_path):
    run("ns-eval", "--load-config", trained / "config.yml", "--output-path", "metrics.json", cwd=tmp_path)
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    assert {"psnr", "ssim", "feature_l1", "feature_cosine"} <= results.keys()
    assert all(np.isfinite(value) for name, value in results.items() if not name.startswith("lpips"))


def test_render_from_another_directory(trained, tmp_path):
    arguments = ("--output-path", "renders", "--split", "test", "--rendered-output-names", "rgb", "depth")
    run("ns-render", "dataset", "--load-config", trained / "config.yml", *arguments, cwd=tmp_path)
    assert len(list((tmp_path / "renders" / "test" / "rgb").iterdir())) == 4


def test_export_from_another_directory(trained, tmp_path):
    from plyfile import PlyData

    run("ns-export", "gaussian-splat", "--load-config", trained / "config.yml", "--output-dir", "splat", cwd=tmp_path)
    assert len(PlyData.read(tmp_path / "splat" / "splat.ply")["vertex"]) > 100


def test_viewer_opens_the_run_without_waking_the_teacher(trained, tmp_path):
    cache = trained.parents[3] / "scene" / ".fit3d_cache"
    hidden = cache.rename(tmp_path / "hidden_cache")
    try:
        port = ("--viewer.websocket-host", "127.0.0.1", "--viewer.websocket-port", 17007)
        process = start("ns-viewer", "--load-config", trained / "config.yml", *port, cwd=tmp_path)
        lines = []
        assert process.stdout is not None
        deadline = time.monotonic() + 900
        for line in process.stdout:
            lines.append(line)
            if "viser" in line.lower() or "http" in line.lower() or time.monotonic() > deadline:
                break
        time.sleep(2)
        assert process.poll() is None, "".join(lines)
        process.kill()
        process.communicate()
        assert not cache.exists()
    finally:
        hidden.rename(cache)


def test_killed_run_resumes_to_the_same_result(trained, teacher_weights):
    folder = trained.parents[3]
    arguments = train_arguments(folder / "scene", teacher_weights, "outputs", "killed", 60)
    process = start("ns-train", *arguments, cwd=folder)
    checkpoints = trained.parent / "killed" / "nerfstudio_models"
    deadline = time.monotonic() + 900
    while not (found := list(checkpoints.glob("step-*[1-4]0.ckpt"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert found
    resumed = train_arguments(folder / "scene", teacher_weights, "outputs", "resumed", 60)
    run("ns-train", *resumed[:-5], "--load-dir", checkpoints, *resumed[-5:], cwd=folder)
    states = []
    for name in ("whole", "resumed"):
        (checkpoint,) = (trained.parent / name / "nerfstudio_models").glob("*.ckpt")
        assert checkpoint.name == "step-000000059.ckpt"
        states.append(torch.load(checkpoint, weights_only=True))
    for name, value in states[0]["pipeline"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1]["pipeline"][name]), name
