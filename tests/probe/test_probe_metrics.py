"""Losses and metrics against formulas written down a second time."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from fit3d_ns.support.errors import UserError
from probe.data.batches import check_batch_size
from probe.tasks.losses import cross_entropy, log_gradient, normal_distance, scale_invariant
from probe.tasks.metrics import DepthMetric, NormalMetric, SegmentationMetric, evaluation_mask


def _reference_segmentation(predictions, truths, classes):
    """Mmsegmentation's areas, with sets."""
    ious, accuracies, hits_total, truth_total = [], [], 0, 0
    for k in range(classes):
        hits = sum(int(((p == k) & (t == k)).sum()) for p, t in zip(predictions, truths))
        truth = sum(int((t == k).sum()) for t in truths)
        predicted = sum(int(((p == k) & (t != 255)).sum()) for p, t in zip(predictions, truths))
        union = truth + predicted - hits
        ious.append(hits / union if union else math.nan)
        accuracies.append(hits / truth if truth else math.nan)
        hits_total, truth_total = hits_total + hits, truth_total + truth
    return np.nanmean(ious), np.nanmean(accuracies), hits_total / truth_total, ious


def test_segmentation_scores_equal_the_reference():
    rng = np.random.default_rng(0)
    truths = [rng.integers(0, 4, (20, 30)).astype(np.uint8) for _ in range(3)]
    for truth in truths:
        truth[rng.random(truth.shape) < 0.1] = 255
    # Class 4 is only predicted, class 5 nowhere.
    predictions = [
        np.where(rng.random(t.shape) < 0.6, np.where(t == 255, 0, t), rng.integers(0, 5, t.shape)) for t in truths
    ]
    metric = SegmentationMetric(6)
    for prediction, truth in zip(predictions, truths):
        metric.update(torch.from_numpy(prediction)[None], torch.from_numpy(truth)[None].long())
    scores = metric.scores()
    miou, macc, aacc, ious = _reference_segmentation(predictions, truths, 6)
    assert scores["miou"] == pytest.approx(miou, abs=1e-12)
    assert scores["macc"] == pytest.approx(macc, abs=1e-12)
    assert scores["aacc"] == pytest.approx(aacc, abs=1e-12)
    np.testing.assert_allclose(scores["iou"], ious)
    assert scores["iou"][4] == 0 and math.isnan(scores["iou"][5])
    outside = MulticlassJaccardIndex(6, average="macro", ignore_index=255)
    accuracy = MulticlassAccuracy(6, average="micro", ignore_index=255)
    p, t = torch.from_numpy(np.stack(predictions)), torch.from_numpy(np.stack(truths)).long()
    assert scores["miou"] == pytest.approx(float(outside(p, t)), abs=1e-6)
    assert scores["aacc"] == pytest.approx(float(accuracy(p, t)), abs=1e-6)


def _segmentation_images() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randint(0, 3, (1, 9, 8), generator=generator), torch.randint(0, 3, (1, 9, 8), generator=generator))
        for _ in range(3)
    ]


def _depth_images() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(6)
    depths = [(1 + torch.rand(2, 9, 8, generator=generator)).unbind() for _ in range(3)]
    # The last has no valid pixel, and so counts nowhere.
    return [(depth, truth, torch.full((9, 8), number < 2)) for number, (depth, truth) in enumerate(depths)]


def _score(count: int, first: int, step: int) -> list[dict]:
    segmentation, depth = SegmentationMetric(3), DepthMetric()
    for image in _segmentation_images()[:count][first::step]:
        segmentation.update(*image)
    for image in _depth_images()[:count][first::step]:
        depth.update(*image)
    return [segmentation.scores(), depth.scores()]


def _score_as_one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        scores = [_score(count, rank, 2) for count in (3, 1)]
        with pytest.raises(UserError, match="--batch-size 6 cannot be shared by 2 processes in groups of 2"):
            check_batch_size(6, 2)
        check_batch_size(6, 1)
        Path(folder, f"{rank}.json").write_text(json.dumps(scores))
    finally:
        dist.destroy_process_group()


def test_scores_of_two_processes_count_every_image_once(tmp_path):
    """Three images, and one, cannot be shared evenly: padding would count an image twice."""
    torch.multiprocessing.spawn(_score_as_one_of_two, (str(tmp_path),), nprocs=2)
    alone = [_score(count, 0, 1) for count in (3, 1)]
    for rank in range(2):
        for found, wanted in zip(json.loads((tmp_path / f"{rank}.json").read_text()), alone):
            assert found[0] == wanted[0]
            assert found[1] == pytest.approx(wanted[1], rel=1e-14)


def test_depth_scores_equal_the_reference():
    rng = np.random.default_rng(1)
    metric, values = DepthMetric(), []
    for number in range(4):
        truth, depth = rng.uniform(0.5, 9, (12, 16)), rng.uniform(0.5, 9, (12, 16))
        valid = rng.random((12, 16)) < (0.7 if number < 3 else 0.0)
        metric.update(torch.from_numpy(depth), torch.from_numpy(truth), torch.from_numpy(valid))
        if not valid.any():
            continue
        d, t = depth[valid], truth[valid]
        ratio = np.maximum(d / t, t / d)
        values.append(
            [
                np.sqrt(np.mean((d - t) ** 2)),
                np.mean(np.abs(d - t) / t),
                np.mean((d - t) ** 2 / t),
                np.sqrt(np.mean((np.log(d) - np.log(t)) ** 2)),
                np.mean(np.abs(np.log10(d) - np.log10(t))),
                *(np.mean(ratio < 1.25**k) for k in (1, 2, 3)),
            ]
        )
    # The image without a valid pixel is left out, and the mean is one over images, not pixels.
    np.testing.assert_allclose(list(metric.scores().values()), np.mean(values, 0), rtol=1e-12)


def test_normal_scores_by_hand():
    truth = torch.zeros(3, 1, 3)
    truth[2] = -1
    tilted = torch.tensor([[0.0, math.sin(0.3), 1.0], [0.0, 0.0, 0.0], [-1.0, -math.cos(0.3), 0.0]])[:, None]
    metric = NormalMetric()
    metric.update(tilted, truth, torch.ones(1, 3, dtype=torch.bool))
    scores = metric.scores()
    angles = [0.0, math.degrees(0.3), 90.0]
    assert scores["mean_angle"] == pytest.approx(np.mean(angles), abs=1e-3)
    assert scores["rmse_angle"] == pytest.approx(math.sqrt(np.mean(np.square(angles))), abs=1e-3)
    assert (scores["below_11"], scores["below_22"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_evaluation_crops_by_hand():
    depth = torch.full((480, 640), 2.0)
    depth[100, 100], depth[101, 100], depth[102, 100] = 0.0, 10.0, 11.0
    mask = evaluation_mask(depth, 1e-3, 10.0, "nyu_eigen")
    assert int(mask.sum()) == (471 - 45) * (601 - 41) - 3
    assert bool(mask[45, 41]) and bool(mask[470, 600]) and not bool(mask[44, 41]) and not bool(mask[45, 601])
    garg = evaluation_mask(torch.full((352, 1216), 5.0), 1e-3, 80.0, "garg")
    rows, columns = garg.any(1).nonzero()[:, 0], garg.any(0).nonzero()[:, 0]
    assert (int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])) == (143, 348, 43, 1171)
    assert int(evaluation_mask(depth, 1e-3, 10.0, "none").sum()) == 480 * 640 - 3


def test_cross_entropy_counts_ignored_pixels_in_the_mean():
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[0, :2] = 255
    probabilities = logits.softmax(1)
    total = 0.0
    for b in range(2):
        for y in range(4):
            for x in range(5):
                if labels[b, y, x] != 255:
                    total -= math.log(float(probabilities[b, int(labels[b, y, x]), y, x]))
    assert float(cross_entropy(logits, labels)) == pytest.approx(total / 40, rel=1e-5)
    assert float(cross_entropy(logits, torch.full_like(labels, 255))) == 0


def test_scale_invariant_loss_is_taken_over_groups():
    rng = np.random.default_rng(2)
    depth, truth = rng.uniform(1, 5, (4, 6, 7)), rng.uniform(1, 5, (4, 6, 7))
    truth[:, 0] = 0
    values = []
    for k in (0, 2):
        valid = truth[k : k + 2] > 0
        g = np.log(depth[k : k + 2][valid] + 1e-3) - np.log(truth[k : k + 2][valid] + 1e-3)
        values.append(math.sqrt(np.var(g, ddof=1) + 0.15 * np.mean(g) ** 2))
    ours = scale_invariant(torch.from_numpy(depth), torch.from_numpy(truth), 2)
    assert float(ours) == pytest.approx(np.mean(values), rel=1e-6)
    truth[:2] = 0
    alone = scale_invariant(torch.from_numpy(depth), torch.from_numpy(truth), 2)
    assert float(alone) == pytest.approx(values[1] / 2, rel=1e-6)
    nothing = torch.from_numpy(depth).requires_grad_()
    loss = scale_invariant(nothing, torch.zeros_like(nothing), 2)
    loss.backward()
    assert loss.item() == 0 and nothing.grad is not None and not nothing.grad.any()


def _reference_gradient_loss(depth: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """The published gradient loss: strides along batch and channel of a BxCxHxW tensor."""
    total = depth.sum() * 0
    for scale in range(4):
        step = 2**scale
        d, t = depth[::step, ::step], truth[::step, ::step]
        error = (d.clamp_min(1e-3).log() - t.clamp_min(1e-3).log()) * (t > 0)
        total = total + (error[:-2] - error[2:]).abs().sum() + (error[:, :-2] - error[:, 2:]).abs().sum()
    return total


def test_gradient_loss_sees_edges_where_the_published_one_sees_nothing():
    truth = torch.full((2, 8, 8), 2.0)
    depth = truth.clone()
    depth[:, :, 4:] = 3.0
    depth.requires_grad_()
    published = _reference_gradient_loss(depth[:, None], truth[:, None])
    assert published.item() == 0 and not torch.autograd.grad(published, depth)[0].any()
    ours = log_gradient(depth, truth)
    assert ours.item() > 0 and bool(torch.autograd.grad(ours, depth)[0].any())
    assert float(log_gradient(truth * 1.5, truth)) == pytest.approx(0, abs=1e-6)


def test_normal_distance_leaves_unknown_pixels_out():
    truth = F.normalize(torch.randn(2, 3, 4, 5), dim=1)
    truth[:, :, 0] = 0
    assert float(normal_distance(truth * 3, truth)) == pytest.approx(0, abs=1e-6)
    assert float(normal_distance(-truth, truth)) == pytest.approx(2, abs=1e-6)


def test_losses_of_halves_average_to_that_of_the_whole():
    """What two processes take, however the pixels without truth are spread over the photos."""
    generator = torch.Generator().manual_seed(0)
    truth, depth = (1 + torch.rand(4, 8, 8, generator=generator) for _ in range(2))
    truth[0, :6], truth[2:] = 0, 0
    truth[3, :2] = 1.5
    normals, guesses = (F.normalize(torch.randn(4, 3, 8, 8, generator=generator), dim=1) for _ in range(2))
    normals = normals * (truth > 0)[:, None]
    for loss, found, wanted in (
        (partial(scale_invariant, group=2), depth, truth),
        (partial(scale_invariant, group=2, variance=False), depth, truth),
        (log_gradient, depth, truth),
        (normal_distance, guesses, normals),
        (cross_entropy, torch.randn(4, 5, 8, 8, generator=generator), torch.where(truth > 0, 3, 255)),
    ):
        halves = [loss(found[part], wanted[part]) for part in (slice(0, 2), slice(2, 4))]
        assert float(loss(found, wanted)) == pytest.approx(float(sum(halves)) / 2, rel=1e-5)
