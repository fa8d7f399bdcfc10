"""Assemblies, heads and their training: many at once equal to each alone."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fit3d_ns.backbones import ASSEMBLIES, BackboneOutput, FineTuned, assemble, assembled_width
from fit3d_ns.support.errors import UserError
from probe.features.partners import Partner
from probe.features.rows import centre_pad, choose_rows, row_features
from probe.heads import SegmentationHead, TokenAndClassHead, expected_depth, resize_maps, sample_map
from probe.protocols import Optimization
from probe.stacks import at_once, one_by_one
from probe.tasks.losses import cross_entropy
from probe.training import HeadTrainer, first_beta, learning_rate_factor

WIDTH = 6


def _features(seed: int = 0) -> dict[str, BackboneOutput]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: BackboneOutput(
            torch.randn(4, WIDTH, 5, 7, generator=generator), torch.randn(4, WIDTH, generator=generator)
        )
        for name in ("original", "tuned", "control")
    }


def make_partner(group: str, number: int = 1) -> Partner:
    role = "control" if group == "control" else "tuned"
    name = group if number == 1 else f"{group}.{number}"
    return Partner(name, group, role, FineTuned(name, Path(name)))


class _Task:
    """The part of a task that a head trainer needs."""

    def make_head(self, width: int, cls_width: int, fuse: bool) -> torch.nn.Module:
        return SegmentationHead(width, 3, fuse)


def test_assemblies_have_their_width_and_the_right_class_token():
    features = _features()
    original, tuned = features["original"], features["tuned"]
    for name in ASSEMBLIES:
        tokens, cls = assemble(name, original, tuned)
        assert tokens.shape[1] == assembled_width(name, WIDTH)
        assert cls is (tuned.cls if name == "tuned" else original.cls)
    assert torch.equal(assemble("add", original, tuned).patch_tokens, original.patch_tokens + tuned.patch_tokens)
    assert torch.equal(assemble("concat", original, tuned).patch_tokens[:, WIDTH:], tuned.patch_tokens)
    assert torch.equal(assemble("duplicate", original).patch_tokens[:, WIDTH:], original.patch_tokens)
    with pytest.raises(ValueError, match="needs the fine-tuned"):
        assemble("concat", original)


def test_rows_follow_what_is_given():
    tuned, control = (make_partner(name) for name in ("tuned", "control"))
    assert [row.name for row in choose_rows(None, ())] == ["original", "duplicate"]
    assert [row.name for row in choose_rows(None, (tuned,))] == list(ASSEMBLIES)
    second = make_partner("tuned", number=2)
    assert choose_rows(None, (tuned, second)) == choose_rows(None, (tuned,)), "seeds share rows"
    named = choose_rows(("tuned", "add"), (make_partner("round2"),))
    assert [(row.name, row.partner) for row in named] == [("round2", "round2"), ("round2_add", "round2")]
    names = [row.name for row in choose_rows(("concat", "original", "tuned"), (tuned, control))]
    assert names == ["original", "tuned", "concat", "control", "control_concat"]
    features = _features()
    control = choose_rows(("concat",), (tuned, control))[-1]
    assert torch.equal(row_features(control, features).patch_tokens[:, WIDTH:], features["control"].patch_tokens)
    with pytest.raises(UserError, match="--tuned"):
        choose_rows(("concat",), ())


class _DepthTask:
    """Likewise, with the class token."""

    def make_head(self, width: int, cls_width: int, fuse: bool) -> torch.nn.Module:
        return TokenAndClassHead(width, cls_width, 3, fuse)


@pytest.mark.parametrize("task", [_Task(), _DepthTask()])
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("together", [at_once, one_by_one])
def test_heads_trained_together_equal_heads_trained_alone(task, clip, together):
    """Alone: one module, one optimizer, one clipping, as torch has them."""
    rates, steps = (1e-3, 1e-1), 8
    optimization = Optimization(steps, 4, rates, 1e-2, "poly", 0.2, 1e-6, clip=clip, beta1_cycle=True)
    labels = torch.randint(0, 3, (4, 20, 28), generator=torch.Generator().manual_seed(1))
    rows = choose_rows(None, (make_partner("tuned"),))
    trainer = HeadTrainer(task, rows, optimization, (WIDTH, WIDTH), 3, torch.device("cpu"))

    def loss(outputs):
        return cross_entropy(resize_maps(outputs, (20, 28)), labels)

    alone = [deepcopy(head.module) for head in trainer.heads]
    together_losses = [trainer.step(step, _features(step), together(loss)) for step in range(steps)]
    assert len(trainer.heads) == len(rows) * len(rates)
    for number, (head, module) in enumerate(zip(trainer.heads, alone)):
        optimizer = torch.optim.AdamW(module.parameters(), head.learning_rate, weight_decay=1e-2)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = head.learning_rate * learning_rate_factor(optimization, step)
                group["betas"] = (first_beta(optimization, step), 0.999)
            value = loss(module(row_features(head.row, _features(step))))
            optimizer.zero_grad()
            value.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            torch.testing.assert_close(together_losses[step][number], value.detach(), rtol=1e-4, atol=1e-5)
        for name, value in module.state_dict().items():
            torch.testing.assert_close(head.module.state_dict()[name], value, rtol=2e-3, atol=2e-4, msg=head.key + name)


def test_linear_fusion_is_trained_with_its_head():
    head = SegmentationHead(2 * WIDTH, 3, fuse=True)
    head(BackboneOutput(torch.randn(2, 2 * WIDTH, 4, 4), None)).square().mean().backward()
    assert head.fusion is not None and head.fusion.weight.grad is not None and head.fusion.weight.grad.any()
    assert head.classifier.weight.shape[1] == WIDTH


def test_depth_head_equals_the_reference_order_of_upsampling_and_convolution():
    """The reference appends the class token, upsamples fourfold and convolves last."""
    torch.manual_seed(0)
    tokens, cls = torch.randn(2, WIDTH, 5, 7), torch.randn(2, WIDTH)
    head = TokenAndClassHead(WIDTH, WIDTH, 16)
    joined = torch.cat([tokens, cls[:, :, None, None].expand_as(tokens)], 1)
    reference = head.convolution(F.interpolate(joined, scale_factor=4, mode="bilinear", align_corners=False))
    ours = F.interpolate(head(BackboneOutput(tokens, cls)), scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_expected_depth_by_hand():
    logits = torch.tensor([[-1.0, 0.9, 0.0]]).view(1, 3, 1, 1)
    # Weights .1, 1, .1 on depths 0, 5, 10.
    assert float(expected_depth(logits, 0.0, 10.0)) == pytest.approx((0.1 * 0 + 1.0 * 5 + 0.1 * 10) / 1.2)


def test_reading_between_patches_equals_resizing():
    values = torch.randn(1, 2, 3, 4)
    resized = F.interpolate(values, size=(9, 12), mode="bilinear", align_corners=False)
    rows, columns = torch.meshgrid(torch.arange(9), torch.arange(12), indexing="ij")
    positions = torch.stack([(columns + 0.5) / 12, (rows + 0.5) / 9], -1).reshape(1, -1, 2)
    torch.testing.assert_close(sample_map(values, positions), resized.flatten(2), rtol=1e-5, atol=1e-6)


def test_resizing_equals_torchs_with_its_gradient():
    maps = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    for size in ((5, 7), (17, 30), (3, 4), (20, 2)):
        wanted = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        found = resize_maps(maps, size)
        torch.testing.assert_close(found, wanted)
        upstream = torch.randn_like(wanted)
        gradients = [torch.autograd.grad(value, maps, upstream)[0] for value in (found, wanted)]
        torch.testing.assert_close(*gradients)


def test_padding_is_even_and_vanishes_in_the_network():
    fill = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    images = torch.rand(2, 3, 30, 45)
    padded = centre_pad(images, 14, fill)
    assert padded.shape == (2, 3, 42, 56)
    assert torch.equal(padded[:, :, 6:36, 5:50], images)
    assert float((padded - fill)[:, :, :6].abs().max()) == 0
    assert centre_pad(images[:, :, :28, :42], 14, fill).shape == (2, 3, 28, 42)


def test_schedules_at_known_steps():
    poly = Optimization(40_000, 16, (1e-3,), 0.0, "poly", 1500 / 40_000, 1e-6)
    assert learning_rate_factor(poly, 0) == pytest.approx(1e-6)
    assert learning_rate_factor(poly, 750) == pytest.approx((1 - 750 / 40_000) * (1 - 0.5 * (1 - 1e-6)))
    assert learning_rate_factor(poly, 20_000) == pytest.approx(0.5)
    cosine = Optimization(38_400, 16, (1e-4,), 0.0, "cosine", 12_800 / 38_400, 1e-3, beta1_cycle=True)
    assert learning_rate_factor(cosine, 0) == pytest.approx(1e-3)
    assert learning_rate_factor(cosine, 12_800) == pytest.approx(0.75)
    assert learning_rate_factor(cosine, 38_399) < 1e-7
    assert first_beta(cosine, 0) == pytest.approx(0.95)
    assert first_beta(cosine, 11_519) == pytest.approx(0.85)
    assert first_beta(cosine, 38_399) == pytest.approx(0.95)
    assert first_beta(poly, 5) == 0.9


def test_a_resumed_optimizer_is_that_of_its_device(tmp_path):
    rows, device = choose_rows(("original", "duplicate"), ()), torch.device("cpu")
    optimization = Optimization(10, 4, (1e-3, 1e-2), 1e-4, "poly", 0.1, 1e-6)
    trainers = [HeadTrainer(_Task(), rows, optimization, (WIDTH, 0), 0, device) for _ in range(2)]  # type: ignore[arg-type]
    loss = at_once(lambda outputs: outputs.square().mean())
    for step in range(2):
        trainers[0].step(step, _features(step), loss)
    trainers[0].save(tmp_path / "state.pt", 2, "same")
    assert trainers[1].load(tmp_path / "state.pt", "same", device) == 2
    for trainer in trainers:
        trainer.step(2, _features(2), loss)
    for first, second in zip(*(trainer.heads for trainer in trainers)):
        for name, value in first.module.state_dict().items():
            assert torch.equal(value, second.module.state_dict()[name]), (first.key, name)


def test_progress_of_a_version_with_one_optimizer_for_each_head_is_gone_on_with(tmp_path):
    row, device = choose_rows(("original",), ()), torch.device("cpu")
    optimization = Optimization(10, 4, (1e-3,), 1e-4, "poly", 0.1, 1e-6)
    trainer, after = (HeadTrainer(_Task(), row, optimization, (WIDTH, 0), 0, device) for _ in range(2))  # type: ignore[arg-type]
    (head,), module = trainer.heads, deepcopy(trainer.heads[0].module)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3 * learning_rate_factor(optimization, 0), weight_decay=1e-4)
    module(row_features(head.row, _features(0))).square().mean().backward()
    optimizer.step()
    state = {"step": 1, "fingerprint": "same", "heads": {head.key: module.state_dict()}}
    torch.save({**state, "optimizers": {head.key: optimizer.state_dict()}}, tmp_path / "state.pt")
    assert after.load(tmp_path / "state.pt", "same", device) == 1
    for step in range(2):
        trainer.step(step, _features(step), at_once(lambda outputs: outputs.square().mean()))
    after.step(1, _features(1), at_once(lambda outputs: outputs.square().mean()))
    for name, value in after.heads[0].module.state_dict().items():
        torch.testing.assert_close(value, trainer.heads[0].module.state_dict()[name])
