"""The arithmetic of a step, worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from distill import trainer as trainer_module
from distill.cli import distil
from distill.photo_store import PhotoStore
from distill.prefetcher import Prefetcher
from distill.recipes import choose_recipe
from distill.sampler import Sampler
from distill.scenes import SceneCache, open_scenes
from distill.step import DistillLoss, EagerStep, StepInput, make_optimizer
from distill.student import load_student, prepare_training
from distill.targets import LiftedTargets
from fit3d_ns.backbones import BackboneOutput
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import World

CPU = torch.device("cpu")


def inputs_of(total: float = 12.0, fullness: float = 1.0) -> StepInput:
    generator = torch.Generator().manual_seed(0)
    return StepInput(
        images=torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8, generator=generator),
        targets=torch.randn(2, 64, 3, 4, generator=generator),
        weights=torch.rand(2, 3, 4, generator=generator),
        total_weight=torch.tensor(total),
        fullness=torch.tensor(fullness),
    )


def test_the_loss_is_the_weighted_mean_of_absolute_differences():
    class Constant(nn.Module):
        def forward(self, images):
            return BackboneOutput(torch.full((2, 3, 1, 2), 1.0), None)

    targets = torch.zeros(2, 3, 1, 2)
    targets[0, :, 0, 0] = torch.tensor([1.0, 3.0, -2.0])  # distances 0, 2, 3: a mean of 5/3
    weights = torch.tensor([[[0.5, 0.25]], [[1.0, 0.0]]])  # the other patches are 1 away
    images = torch.zeros(2, 3, 16, 32, dtype=torch.uint8)
    student: Any = Constant()
    loss = DistillLoss(student, bf16=False)(images, targets, weights, torch.tensor(7.0))
    assert float(loss) == pytest.approx((0.5 * 5 / 3 + 0.25 + 1.0) / 7)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_student_computes_in_the_precision_asked_for(make_scene, make_config, monkeypatch, bf16):
    config = make_config(make_scene(), precision="bf16" if bf16 else "fp32", steps=2)
    forward, seen = DistillLoss.forward, set()

    def watch(self, *inputs):
        hooks = [
            module.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
            for module in self.student.modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            return forward(self, *inputs)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(DistillLoss, "forward", watch)
    distil(config)
    assert seen == {torch.bfloat16 if bf16 else torch.float32}


@pytest.mark.parametrize("clip, fullness", [(0.01, 1.0), (0.01, 0.25), (0.0, 1.0), (0.0, 0.25)])
def test_a_batch_that_is_not_full_counts_for_its_views(make_scene, make_config, clip, fullness):
    config = make_config(make_scene())
    moved = []
    for share in (1.0, fullness):
        student = load_student(config, open_scenes(list(config.bundles), None), CPU)
        parameters = prepare_training(student, config)
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.SGD(parameters, lr=1.0)  # moves the weights by just the gradient
        EagerStep(DistillLoss(student, bf16=False), optimizer, parameters, clip).run(inputs_of(fullness=share))
        moved.append(torch.stack([(old - new.detach()).norm() for old, new in zip(before, parameters)]).norm())
    assert float(moved[1] / moved[0]) == pytest.approx(fullness, rel=1e-3)
    if clip:
        assert float(moved[0]) == pytest.approx(clip, rel=1e-3)


def test_the_feed_says_how_full_a_batch_is(make_scene, make_config):
    scenes = open_scenes([make_scene("a", views=7)], None)  # five training views
    scene_cache, photos = SceneCache(scenes, World(0, 1, CPU)), PhotoStore(scenes, 16, CPU)
    photos.fill(show=False)
    sampler = Sampler([scene.sampled_views() for scene in scenes], 4, seed=0)
    source = LiftedTargets(scenes, scene_cache, CPU, "weight", 0.5)
    prefetcher = Prefetcher(scenes, sampler, source, scene_cache, photos, make_config(), World(0, 1, CPU))
    shares = {len(batch.samples): float(inputs.fullness) for batch, inputs in prefetcher.steps(0, 2)}
    assert shares == {4: 1.0, 1: 0.25}


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_no_weight(make_scene, make_config, broken):
    config = make_config(make_scene(), recipe="auto")
    student = load_student(config, open_scenes(list(config.bundles), None), CPU)
    parameters = prepare_training(student, config)
    optimizer = make_optimizer(parameters, choose_recipe(config, 4, 1), CPU)
    step = EagerStep(DistillLoss(student, bf16=False), optimizer, parameters, 0.1)
    assert torch.isfinite(step.run(inputs_of()))
    before = [parameter.detach().clone() for parameter in parameters]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    hook = parameters[3].register_hook(lambda gradient: gradient * broken)  # the loss stays finite
    assert torch.isnan(step.run(inputs_of()))
    assert all(torch.equal(old, new) for old, new in zip(before, parameters))
    assert all(torch.equal(old, state["exp_avg"]) for old, state in zip(moments, optimizer.state.values()))
    hook.remove()
    assert torch.isfinite(step.run(inputs_of()))
    assert not torch.equal(before[3], parameters[3])


def test_the_batch_of_a_broken_gradient_is_named(make_scene, make_config, monkeypatch):
    config = make_config(make_scene(), steps=8, save_every=2)
    batches, run = [], EagerStep.run

    def break_fifth(self, inputs):
        batches.append(inputs)
        if len(batches) == 5:
            self._parameters[0].register_hook(lambda gradient: gradient * float("nan"))
        return run(self, inputs)

    monkeypatch.setattr(EagerStep, "run", break_fifth)
    with pytest.raises(
        UserError, match=r"loss of step 5, or its gradient, is NaN or infinite \(batch: scene/00\d\.png"
    ):
        distil(config)
    last = torch.load(config.output_dir / "checkpoints" / "step-00000004.pt", weights_only=True)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in last["model"].values())


def test_the_optimizer_has_the_recipes_numbers(make_config):
    recipe = choose_recipe(make_config(recipe="paper", lr=None), 10, 1)
    group = make_optimizer([nn.Parameter(torch.zeros(2))], recipe, CPU).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (1e-5, 1e-4, (0.9, 0.999), 1e-8)
    other = make_optimizer([nn.Parameter(torch.zeros(2))], replace(recipe, lr=2.0, weight_decay=0.5), CPU)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (2.0, 0.5)


def test_the_trainer_uses_the_recipes_clip_and_parts(make_scene, make_config, monkeypatch):
    made = []

    class Watched(EagerStep):
        def __init__(self, loss, optimizer, parameters, clip, num_parts=1, num_processes=1):
            made.append((clip, num_parts, num_processes))
            super().__init__(loss, optimizer, parameters, clip, num_parts, num_processes)

    monkeypatch.setattr(trainer_module, "EagerStep", Watched)
    distil(make_config(make_scene(), clip=None, gradient_accumulation=2, steps=1))
    assert made == [(0.1, 2, 1)]
