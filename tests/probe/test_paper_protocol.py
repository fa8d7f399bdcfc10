"""The paper's protocol: its published numbers, which head is reported, and the mirrored test view."""

from dataclasses import astuple, fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fit3d_ns.backbones import BackboneOutput
from probe.feature_sources import CachedSource
from probe.features.rows import Row
from probe.protocols import FastRecipe, choose_exact_recipe, choose_fast_recipe, choose_recipe
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


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("segmentation", "segmentation-fast-v1", (2000, 8, (1e-3, 3e-3, 1e-2), 1e-4, "poly", 0.05, 1e-6, None, False)),
        ("depth", "depth-fast-v1", (2000, 8, (1e-3, 3e-3, 1e-2), 1e-2, "cosine", 0.1, 1e-3, 35.0, False)),
        ("normals", "normals-fast-v2", (2000, 8, (1e-3, 3e-3, 1e-2), 1e-2, "cosine", 0.1, 1e-3, 35.0, False)),
    ],
)
def test_the_fast_protocol_has_its_numbers(kind, name, expected):
    """A number that changes belongs to another version of the protocol, which its name says."""
    recipe = choose_fast_recipe(kind)
    assert astuple(recipe.optimization) == expected
    assert (recipe.name, recipe.long_side, recipe.positions, recipe.flip) == (name, 518, 384, True)
    assert choose_fast_recipe(kind, 224).long_side == 224
    assert len(fields(FastRecipe)) == 5  # all of them are above


@pytest.mark.parametrize(
    ("kind", "decays"),
    [
        ("segmentation", (1e-4, 1e-5, 1e-6, 1e-7)),
        ("depth", (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)),
        ("normals", (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)),
    ],
)
def test_the_exact_protocol_has_its_numbers(kind, decays):
    recipe = choose_exact_recipe(kind)
    assert recipe.decays == pytest.approx(decays, rel=1e-12)
    assert astuple(replace(recipe, decays=())) == (f"{kind}-exact-v2", (), 448, 1e-5, 1000, 1000)
    assert choose_exact_recipe(kind, 224).long_side == 224


@pytest.mark.parametrize(
    ("dataset", "own"),
    [
        ("nyuv2", {"train_window": (45, 472, 43, 608), "crop": (416, 544), "evaluation_crop": "nyu_eigen"}),
        ("scannet", {"crop": (416, 544), "evaluation_crop": "nyu_eigen"}),
        ("scannetpp", {"crop": (416, 544)}),
        (
            "kitti",
            {"kitti_window": True, "crop": (352, 704), "brightness": (0.9, 1.1), "evaluation_crop": "garg"},
        ),
        ("rooms", {}),
    ],
)
def test_depth_has_the_published_sizes_of_each_data_set(dataset, own):
    common = {
        "train_window": None,
        "kitti_window": False,
        "crop": None,
        "brightness": (0.75, 1.25),
        "evaluation_crop": "none",
        "num_bins": 256,
        "upsample": 4,
        "min_depth": 1e-3,
        "loss_group": 2,
        "gradient_loss": 0.0,
        "sigma_warmup": 100,
    }
    recipe = choose_recipe("depth", dataset)
    found = {name: value for name, value in vars(recipe).items() if name not in ("name", "optimization")}
    assert found == {**common, **own}
    assert recipe.name == ("depth-linear-v1" if dataset == "rooms" else f"depth-linear-v1/{dataset}")


def test_normals_change_colours_as_depth_does():
    recipe: Any = choose_recipe("normals", "rooms")
    assert (recipe.name, recipe.brightness) == ("normals-linear-v2", (0.75, 1.25))


def test_normals_are_mirrored_by_the_sign_of_x():
    task: Any = object.__new__(TASKS["normals"])
    values = np.array([[0.6, -0.8, 0.0], [0.0, 0.6, -0.8]], np.float32)
    assert np.array_equal(task.mirror_values(values), values * [-1, 1, 1])
    assert np.array_equal(task.mirror_values(task.mirror_values(values)), values)


def test_the_score_of_normals_is_that_of_the_prediction():
    """Of a prediction that is turned by a known angle, both as a mean of photos and as a sum over pixels."""
    task: Any = object.__new__(TASKS["normals"])
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(6, 8, 3, generator=generator), dim=-1)
    truth[:2] = 0  # not known
    around = torch.nn.functional.normalize(torch.linalg.cross(truth, torch.randn(6, 8, 3, generator=generator)), dim=-1)
    angle = np.deg2rad(20.0)
    prediction = truth * np.cos(angle) + around * np.sin(angle)
    prediction[:2] = torch.tensor([0.0, 0.0, -1.0])
    metric = task.new_metric()
    task.update(metric, prediction, truth)
    sums = task.sums(prediction, truth)
    assert float(sums[0]) == 4 * 8
    for scores in (metric.scores(), task.scores(sums)):
        assert float(scores["mean_angle"]) == pytest.approx(20.0, abs=1e-3)
        assert float(scores["rmse_angle"]) == pytest.approx(20.0, abs=1e-3)
        shares = [float(value) for name, value in scores.items() if name not in ("mean_angle", "rmse_angle")]
        assert shares == [0.0, 1.0, 1.0]  # below 11.25, 22.5 and 30 degrees


@pytest.mark.parametrize("crop", ["none", "nyu_eigen"])
def test_the_score_of_depth_counts_what_is_in_range_and_in_the_crop(crop):
    recipe: Any = replace(choose_recipe("depth", "nyuv2"), evaluation_crop=crop)  # type: ignore[call-arg]
    task: Any = TASKS["depth"](SimpleNamespace(max_depth=10.0), recipe)  # type: ignore[arg-type]
    truth = torch.full((480, 640), 2.0)
    truth[100, 100], truth[200, 200], truth[300, 300] = 0.0, 5e-4, 11.0  # missing, too near, too far
    truth[0, 0] = 4.0  # outside the crop
    prediction = torch.full((480, 640), 3.0)
    counted = 480 * 640 - 3 if crop == "none" else (471 - 45) * (601 - 41) - 3
    sums = task.sums(prediction, truth)
    assert float(sums[0]) == counted
    metric = task.new_metric()
    task.update(metric, prediction, truth)
    expected = np.sqrt(1.0)
    assert float(task.scores(sums)["rmse"]) == pytest.approx(expected, rel=1e-12)
    assert float(metric.scores()["rmse"]) == pytest.approx(expected, rel=1e-12)


class _Mirrors:
    """Photos whose features are their truth, and their mirror images: normals that turn evenly from left to right."""

    def __init__(self, height: int = 6, width: int = 8) -> None:
        angle = torch.linspace(0.2, 1.2, width).expand(height, width)
        self._normals = torch.stack([angle.sin(), 0 * angle, -angle.cos()])  # [3, h, w]

    def load_target(self, index: int) -> np.ndarray:
        return self._normals.permute(1, 2, 0).numpy()

    def load(self, indices: list[int], mirrored: list[int], device: torch.device) -> dict[str, BackboneOutput]:
        seen = self._normals.flip(-1) * torch.tensor([-1.0, 1, 1])[:, None, None]
        maps = [seen if mirror else self._normals for mirror in mirrored]
        self.mirrored = sum(mirrored)
        return {"original": BackboneOutput(torch.stack(maps), None)}


def test_the_fast_protocol_mirrors_photo_and_truth_together():
    """A head that shows what it sees is right about photos and about their mirror images."""
    data: Any = SimpleNamespace(max_depth=10.0, train=list(range(5)))
    task: Any = TASKS["normals"](data, choose_recipe("normals", "rooms"))  # type: ignore[arg-type]
    source = CachedSource(task, choose_fast_recipe("normals"), (6, 8), torch.device("cpu"), 0)
    store = _Mirrors()
    source._stores["train"] = store  # type: ignore[assignment]
    (features, losses), *_ = source.training(seed=0, start=0, stop=1, batch_size=16)
    assert 0 < store.mirrored < 16
    seen = features["original"].patch_tokens  # [B, 3, P, 1]
    assert seen.shape == (16, 3, 384, 1)
    assert float(losses([seen])[0]) == pytest.approx(0.0, abs=1e-4)
    assert float(losses([seen.flip(2)])[0]) > 0.01  # positions of others
