"""Two processes see what one would, and notice when the other is gone."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file

from distill.cli import distil
from distill.config import DistillConfig
from distill.scenes import open_scenes
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import World, join_world

PLAIN_DESCENT = """
import torch
from distill import cli, trainer
trainer.make_optimizer = lambda parameters, recipe, device: torch.optim.SGD(parameters, lr=recipe.lr)
cli.main()
"""
"""The command with an optimizer that moves the weights by just the gradient: Adam would hide a wrong scale of it."""


def start(
    config: DistillConfig, rank: int, port: int, *extra: str, command: tuple[str, ...] = ("-m", "distill")
) -> subprocess.Popen:
    """Starts one of two processes as torchrun would."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    arguments = ["--bundles", *map(str, config.bundles), "--output-dir", str(config.output_dir), "--device", "cpu"]
    arguments += [
        "--recipe",
        config.recipe,
        "--lr",
        str(config.lr),
        "--clip",
        str(config.clip),
        "--batch-size",
        "4",
        "--workers",
        "1",
        *extra,
    ]
    return subprocess.Popen(
        [sys.executable, *command, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_equal_one(make_scene, make_config, tmp_path):
    # 9 training views of two sizes in batches of 4: the last batch of each size leaves a process short of views.
    folders = [make_scene("a", views=7, masked=(1,)), make_scene("b", views=6, seed=1, size=(64, 48))]
    alone = make_config(*folders, batch_size=4, steps=None, epochs=2, lr=1e-4, output_dir=tmp_path / "alone")
    distil(alone)
    config = make_config(*folders, lr=1e-4, output_dir=tmp_path / "pair")
    port = free_port()
    processes = [start(config, rank, port, "--epochs", "2") for rank in range(2)]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "on 2 CPU processes" in outputs[0] and "Report" not in outputs[1]
    one, two = (load_file(folder / "backbone.safetensors") for folder in (alone.output_dir, config.output_dir))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-5


def test_two_processes_have_the_gradient_of_one(make_scene, make_config, tmp_path, monkeypatch, teacher_weights):
    folders = [make_scene("a", views=7, masked=(1,)), make_scene("b", views=6, seed=1, size=(64, 48))]
    options = {"lr": 0.5, "clip": 0.0}
    alone = make_config(*folders, batch_size=4, steps=4, output_dir=tmp_path / "alone", **options)
    with monkeypatch.context() as patched:
        patched.setattr(
            "distill.trainer.make_optimizer", lambda parameters, recipe, device: torch.optim.SGD(parameters, recipe.lr)
        )
        distil(alone)
    config = make_config(*folders, output_dir=tmp_path / "pair", **options)
    port = free_port()
    processes = [start(config, rank, port, "--steps", "4", command=("-c", PLAIN_DESCENT)) for rank in range(2)]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    before = load_file(teacher_weights)
    one, two = (load_file(folder / "backbone.safetensors") for folder in (alone.output_dir, config.output_dir))
    moved = max(float((one[name] - before[name]).abs().max()) for name in one)
    assert moved > 0.01
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-3 * moved


def test_processes_with_unequal_memory_cut_the_same_blocks(make_scene, make_config, tmp_path):
    folders = [make_scene(name, views=4, seed=seed) for seed, name in enumerate("abcd")]
    poor = 2.5 * open_scenes(folders[:1], None)[0].bundle.num_bytes() / 1e9
    alone = make_config(*folders, batch_size=4, steps=4, lr=1e-4, scene_memory=poor, output_dir=tmp_path / "alone")
    distil(alone)
    config = make_config(*folders, lr=1e-4, output_dir=tmp_path / "pair")
    port = free_port()
    processes = [
        start(config, rank, port, "--steps", "4", "--scene-memory", str(memory))
        for rank, memory in enumerate((1, poor))
    ]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "memory-mapped from disk" in outputs[0]
    one, two = (load_file(folder / "backbone.safetensors") for folder in (alone.output_dir, config.output_dir))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 2e-5


def test_a_killed_process_ends_the_other_with_one_sentence(make_scene, make_config):
    config = make_config(make_scene())
    port = free_port()
    processes = [start(config, rank, port, "--steps", "100000", "--save-every", "5") for rank in range(2)]
    folder = config.output_dir / "checkpoints"
    wait_for_checkpoint(folder, processes[0])
    processes[1].send_signal(signal.SIGKILL)
    output = processes[0].communicate(timeout=900)[0]
    processes[1].communicate()
    assert processes[0].returncode == 1
    assert "Error: Another process of this run ended" in output and "--resume" in output
    assert "Traceback" not in output
    assert any(folder.glob("step-*.pt"))


def test_sigterm_to_one_process_stops_both_with_a_checkpoint(make_scene, make_config):
    config = make_config(make_scene())
    port = free_port()
    processes = [start(config, rank, port, "--steps", "100000", "--save-every", "5") for rank in range(2)]
    wait_for_checkpoint(config.output_dir / "checkpoints", processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert "go on with --resume" in outputs[0]


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 900
    while not (folder.is_dir() and any(folder.glob("step-*.pt"))):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)


def test_alone_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join_world("cpu") as world:
        assert isinstance(world, World) and world.is_main and world.size == 1


def test_shares_must_be_whole(make_scene, make_config):
    with pytest.raises(UserError, match="--batch-size 3 cannot be cut.*choose a multiple of 2"):
        distil(make_config(make_scene(), batch_size=3, gradient_accumulation=2))
