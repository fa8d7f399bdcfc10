"""The paper's protocol: its published numbers, which head is reported, and the mirrored test view."""

from dataclasses import astuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fit3d_ns.backbones import BackboneOutput
from probe.features.rows import Row
from probe.protocols import choose_recipe
from probe.run import _choose
from probe.tasks import TASKS


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("segmentation", (40_000, 16, (1e-3,), 1e-4, "poly", 0.0375, 1e-6, None, False)),
        ("depth", (38_400, 16, (1e-4,), 1e-2, "cosine", 1 / 3, 1e-3, 35.0, True)),
        ("normals", (38_400, 16, (1e-3,), 1e-2, "cosine", 1 / 3, 1e-3, 35.0, True)),
    ],
)
def test_heads_are_trained_with_the_published_numbers(kind, expected):
    for found, wanted in zip(astuple(choose_recipe(kind, "nyuv2").optimization), expected, strict=True):
        assert found == (pytest.approx(wanted) if isinstance(wanted, float) else wanted)


def test_segmentation_and_depth_have_the_published_sizes():
    recipe: Any = choose_recipe("segmentation", "ade20k")
    assert (recipe.short_side, recipe.long_side, recipe.crop) == (512, 2048, 512)
    assert (recipe.window, recipe.stride) == (512, 341)
    assert (recipe.scale_range, recipe.max_class_share) == ((0.5, 2.0), 0.75)
    recipe = choose_recipe("depth", "nyuv2")
    assert (recipe.crop, recipe.train_window, recipe.evaluation_crop) == ((416, 544), (45, 472, 43, 608), "nyu_eigen")
    assert (recipe.num_bins, recipe.upsample, recipe.min_depth, recipe.sigma_warmup) == (256, 4, 1e-3, 100)


@pytest.mark.parametrize(("kind", "metric", "best"), [("segmentation", "miou", 0.7), ("depth", "rmse", 0.2)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_rate_that_is_reported_is_the_best_wherever_it_stands(kind, metric, best, place):
    row = Row("original", "original")
    scores = [0.5, 0.5, 0.5]
    scores[place] = best
    heads = [SimpleNamespace(row=row, key=f"rate {k}") for k in range(3)]
    validation = {head.key: {metric: score} for head, score in zip(heads, scores)}
    task: Any = object.__new__(TASKS[kind])
    chosen = _choose(task, (row,), SimpleNamespace(heads=heads), validation)  # type: ignore[arg-type]
    assert chosen["original"] is heads[place]


@pytest.mark.parametrize("kind", ["depth", "normals"])
def test_the_mirrored_view_is_turned_back_before_the_mean(kind):
    """A head that is right on the photo and on its mirror image must give what it gives on the photo alone."""
    task: Any = TASKS[kind](SimpleNamespace(max_depth=10.0), choose_recipe(kind, "rooms"))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    channels = task.outputs
    values = torch.rand(1, channels, 5, 7, generator=generator)
    mirrored = values.flip(-1)
    if kind == "normals":
        values, mirrored = values - 0.5, (values - 0.5).flip(-1) * torch.tensor([-1.0, 1, 1])[:, None, None]
    head: Any = lambda features: features.patch_tokens  # noqa: E731
    both = task.predict(head, BackboneOutput(torch.cat([values, mirrored]), None), (20, 28))
    alone = task.predict_whole(head, BackboneOutput(values, None), (20, 28))
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-4)


def test_the_loss_of_normals_by_hand():
    """1 - cosine, the mean over known pixels; at the truth's resolution, and at some pixels of cached features."""
    task: Any = TASKS["normals"](SimpleNamespace(max_depth=10.0), choose_recipe("normals", "rooms"))  # type: ignore[arg-type]
    predicted = torch.tensor([[0.0, 0, -1], [1, 0, 0], [0, 0, 3], [1, 1, 0]])  # of four pixels
    truth = torch.tensor([[0.0, 0, -1], [0, 1, 0], [0, 0, -1], [0, 0, 0]])  # cosines 1, 0, -1; the last is not known
    pixels = predicted.T.reshape(1, 3, 2, 2)
    whole = task.loss(pixels, truth.reshape(1, 2, 2, 3), 0)
    assert float(whole) == pytest.approx((0 + 1 + 2) / 3)
    sampled = task.sampled_loss(predicted.T[None, :, :, None], truth[None], 0)
    assert float(sampled) == pytest.approx((0 + 1 + 2) / 3)
