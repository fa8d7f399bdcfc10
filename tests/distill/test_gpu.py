"""What only a GPU shows; run by hand with ``pytest -m gpu tests/distill``."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from distill.cli import distil
from distill.recipes import choose_recipe
from distill.scenes import SceneCache, open_scenes
from distill.step import DistillLoss, EagerStep, GraphStep, StepInput, make_optimizer
from distill.student import load_student, prepare_training
from distill.targets import LiftedTargets
from fit3d_ns.support.processes import World

pytestmark = pytest.mark.gpu


def train(config):
    distil(config)
    losses = json.loads((config.output_dir / "metrics.json").read_text())["loss"]["l1"]
    return load_file(config.output_dir / "backbone.safetensors"), losses


@pytest.mark.parametrize("accelerated", ["graph", "compile"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation": 2}, {"schedule": "cosine", "warmup_steps": 5}])
def test_graph_equals_eager(make_scene, make_config, tmp_path, monkeypatch, options, accelerated):
    # Views of two sizes, and batches that are not full, which count less: two shapes of step.
    folders = [make_scene("a", views=7), make_scene("b", views=6, seed=1, size=(64, 48))]
    results = []
    replay, replays = torch.cuda.CUDAGraph.replay, []
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: replays.append(1) or replay(self))
    compile_, compiled = DistillLoss.compile, []
    monkeypatch.setattr(DistillLoss, "compile", lambda self, **kw: compiled.append(1) or compile_(self, **kw))
    for acceleration in ("none", accelerated):
        config = make_config(
            *folders,
            device="cuda",
            precision="fp32",
            acceleration=acceleration,
            batch_size=4,
            steps=20,
            lr=1e-4,
            log_every=1,
            output_dir=tmp_path / acceleration,
            **options,
        )
        results.append(train(config))
        assert len(replays) == (0 if acceleration == "none" else 20)
        assert len(compiled) == (acceleration == "compile")
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-3)
    assert max(float((results[0][0][name] - results[1][0][name]).abs().max()) for name in results[0][0]) < 1e-3


@pytest.mark.parametrize("acceleration", ["none", "graph"])
def test_a_gradient_that_is_not_finite_changes_no_weight(make_scene, make_config, acceleration):
    config = make_config(make_scene(), device="cuda", recipe="auto", lr=None)
    cuda = torch.device("cuda", 0)
    student = load_student(config, open_scenes(list(config.bundles), None), cuda)
    parameters = prepare_training(student, config)
    optimizer = make_optimizer(parameters, choose_recipe(config, 4, 1), cuda)
    step = EagerStep(DistillLoss(student, bf16=False), optimizer, parameters, 0.1)
    runner = GraphStep(step, optimizer, parameters) if acceleration == "graph" else step
    inputs = StepInput(
        torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8, device=cuda),
        torch.randn(2, 64, 3, 4, device=cuda),
        torch.ones(2, 3, 4, device=cuda),
        torch.tensor(24.0, device=cuda),
        torch.tensor(1.0, device=cuda),
    )
    assert torch.isfinite(runner.run(inputs))
    before = [parameter.detach().clone() for parameter in parameters]
    broken = replace(inputs, weights=inputs.weights * float("nan"))
    assert torch.isnan(runner.run(broken))
    assert all(torch.equal(old, new) for old, new in zip(before, parameters))
    assert torch.isfinite(runner.run(inputs))
    assert not torch.equal(before[3], parameters[3])


@pytest.mark.parametrize("acceleration", ["graph", "compile"])
def test_bf16_follows_fp32(make_scene, make_config, tmp_path, acceleration):
    folder = make_scene()
    curves = []
    for precision in ("fp32", "bf16"):
        config = make_config(
            folder, device="cuda", precision=precision, acceleration=acceleration, output_dir=tmp_path / precision
        )
        curves.append(train(config)[1])
    assert curves[1] == pytest.approx(curves[0], rel=3e-2)


def test_resumed_graph_goes_on(make_scene, make_config, tmp_path):
    folder = make_scene()
    whole = make_config(folder, device="cuda", precision="fp32", steps=12, lr=1e-4, output_dir=tmp_path / "whole")
    cut = make_config(folder, device="cuda", precision="fp32", steps=6, lr=1e-4, output_dir=tmp_path / "cut")
    expected = train(whole)[0]
    distil(cut)
    cut.steps, cut.resume = 12, True
    found = train(cut)[0]
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < 1e-3


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_placements_render_alike_and_as_the_cpu(make_scene, placement):
    scenes = open_scenes([make_scene(name, seed=seed) for seed, name in enumerate("abcd")], None)
    memory = None if placement == "device" else 2.5 * scenes[0].bundle.num_bytes() / 1e9
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    scene_cache = SceneCache(scenes, World(0, 1, cuda), placement, memory)
    reference = LiftedTargets(scenes, SceneCache(scenes, World(0, 1, cpu)), cpu, "weight", 0.5)
    targets = LiftedTargets(scenes, scene_cache, cuda, "weight", 0.5)
    for scene in (0, 3, 1, 2, 0):
        scene_cache.prefetch([(scene + 1) % 4])
        made, expected = targets.make(scene, [0, 2]), reference.make(scene, [0, 2])
        torch.testing.assert_close(made.maps.cpu(), expected.maps, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(made.weights.cpu(), expected.weights, atol=2e-3, rtol=2e-3)
    scene_cache.close()


@pytest.mark.parametrize("photo_memory", [0.0, 1.0])
def test_photos_and_targets_come_from_memory_or_again(make_scene, make_config, tmp_path, photo_memory):
    folders = [make_scene("a"), make_scene("b", seed=1)]
    results = [
        train(
            make_config(
                *folders,
                device="cuda",
                precision="fp32",
                photo_memory=memory,
                lr=1e-4,
                output_dir=tmp_path / str(number),
            )
        )[0]
        for number, memory in enumerate((None, photo_memory))
    ]
    assert max(float((results[0][name] - results[1][name]).abs().max()) for name in results[0]) < 1e-4
