"""Solved probes, against scikit-learn and direct solutions, and what their statement promises."""

import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from probe.solvers import (
    GramSums,
    choose_logistic,
    choose_ridge,
    fit_logistic,
    fit_ridge,
    mean_squared_error,
)
from probe.tasks.patch_targets import majority_labels, patch_means


def make_patches(count: int = 3000, width: int = 10, num_classes: int = 4, seed: int = 0):
    """Correlated tokens of very different scale with an offset, classes and two numbers that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(7))
    plain = torch.randn(count, width, generator=generator) @ mixing
    truth = torch.randn(width, num_classes, generator=torch.Generator().manual_seed(8)) / width**0.5
    noise = -torch.log(-torch.log(torch.rand(count, num_classes, generator=generator)))
    labels = (plain @ truth + noise).argmax(1)
    values = (plain @ truth)[:, :2] + torch.randn(count, 2, generator=generator) + 1
    return (plain + 3) * torch.logspace(-2, 2, width), labels, values


def sums_of(tokens, targets, num_targets: int) -> GramSums:
    sums = GramSums.zeros(tokens.shape[1], num_targets)
    sums.add(tokens, targets)
    return sums


def shares(linear, tokens):
    return (tokens.double() @ linear.weight.T + linear.bias).softmax(1)


@pytest.mark.parametrize("decay", [1e-1, 1e-3, 1e-5])
def test_logistic_regression_equals_scikit_learns(decay):
    tokens, labels, _ = make_patches()
    sums = sums_of(tokens, labels, 4)
    fit = fit_logistic(lambda: [(tokens[:700], labels[:700]), (tokens[700:], labels[700:])], sums, decay, None, 1e-9)
    x = (tokens.double() - tokens.double().mean(0)) / tokens.double().std(0, correction=0) / tokens.shape[1] ** 0.5
    reference = LogisticRegression(C=1 / (decay * len(x)), tol=1e-10, max_iter=10_000).fit(x.numpy(), labels.numpy())
    expected = torch.from_numpy(reference.predict_proba(x.numpy()))
    assert (shares(fit.linear, tokens) - expected).abs().max() < 2e-3
    penalty = decay / 2 * float(np.square(reference.coef_).sum())
    loss = F.nll_loss(expected.log(), labels).item() + penalty
    assert fit.loss == pytest.approx(loss, abs=2e-6)


@pytest.mark.parametrize("decay", [1.0, 1e-2, 1e-6])
def test_ridge_equals_a_direct_solution(decay):
    tokens, _, values = make_patches()
    linear = fit_ridge(sums_of(tokens, values, 2), decay)
    x = (tokens.double() - tokens.double().mean(0)) / tokens.double().std(0, correction=0) / tokens.shape[1] ** 0.5
    # Ridge as least squares: the decay is ten more equations that want every weight to be 0.
    stretched = torch.cat([x, (decay * len(x)) ** 0.5 * torch.eye(x.shape[1], dtype=x.dtype)])
    right = torch.cat([values.double() - values.double().mean(0), torch.zeros(x.shape[1], 2)])
    expected = x @ torch.linalg.lstsq(stretched, right).solution + values.double().mean(0)
    found = tokens.double() @ linear.weight.T + linear.bias
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    error = (found - values).square().sum(1).mean()
    assert mean_squared_error(sums_of(tokens, values, 2), linear) == pytest.approx(error.item(), rel=1e-9)


def test_features_beside_themselves_are_the_same_problem():
    tokens, labels, values = make_patches()
    held, held_labels, held_values = make_patches(seed=1)
    choices = {}
    for name, copies in (("original", 1), ("duplicate", 2)):
        train, test = tokens.repeat(1, copies), held.repeat(1, copies)
        sums, held_sums = sums_of(train, labels, 4), sums_of(test, held_labels, 4)
        score = log_likelihood_on(test, held_labels)
        logistic = choose_logistic(
            lambda: [(train, labels)], sums, lambda: [(test, held_labels)], held_sums, score, tolerance=1e-7
        )
        ridge = choose_ridge(sums_of(train, values, 2), sums_of(test, held_values, 2))
        choices[name] = logistic, shares(logistic.linear, test), ridge, test.double() @ ridge.linear.weight.T
    original, duplicate = choices["original"], choices["duplicate"]
    assert original[0].decay == duplicate[0].decay
    torch.testing.assert_close(original[1], duplicate[1], rtol=0, atol=1e-3)
    assert original[2].decay == duplicate[2].decay
    torch.testing.assert_close(original[3], duplicate[3], rtol=0, atol=1e-5)


def log_likelihood_on(tokens, labels):
    return lambda linear: -F.nll_loss(shares(linear, tokens).log(), labels).item()


def test_the_decay_is_the_one_that_predicts_held_out_photos_best():
    generator = torch.Generator().manual_seed(0)
    # Little data, many channels, mostly noise: without decay the fit is worthless elsewhere.
    tokens, held = torch.randn(60, 40, generator=generator), torch.randn(400, 40, generator=generator)
    truth = torch.zeros(40, 1)
    truth[0] = 1.0
    values, held_values = (x @ truth + torch.randn(len(x), 1, generator=generator) for x in (tokens, held))
    labels, held_labels = (values[:, 0] > 0).long(), (held_values[:, 0] > 0).long()
    ridge = choose_ridge(sums_of(tokens, values, 1), sums_of(held, held_values, 1))
    for decay, score in ridge.scores.items():
        linear = fit_ridge(sums_of(tokens, values, 1), decay)
        direct = (held.double() @ linear.weight.T + linear.bias - held_values).square().mean().item()
        assert score == pytest.approx(-direct, rel=1e-9)
    assert ridge.decay == max(ridge.scores, key=ridge.scores.__getitem__) > min(ridge.scores)
    both = fit_ridge(sums_of(torch.cat([tokens, held]), torch.cat([values, held_values]), 1), ridge.decay)
    torch.testing.assert_close(ridge.linear.weight, both.weight)
    sums, held_sums = sums_of(tokens, labels, 2), sums_of(held, held_labels, 2)
    decays = (1e-1, 1e-2, 1e-3, 1e-4)
    score = log_likelihood_on(held, held_labels)
    found = choose_logistic(
        lambda: [(tokens, labels)], sums, lambda: [(held, held_labels)], held_sums, score, decays, tolerance=1e-7
    )
    expected = {
        decay: score(fit_logistic(lambda: [(tokens, labels)], sums, decay, None, 1e-9).linear) for decay in decays
    }
    for decay, value in found.scores.items():
        assert value == pytest.approx(expected[decay], abs=2e-3)
    assert found.decay == max(expected, key=expected.__getitem__) > min(decays)
    everything = torch.cat([tokens, held]), torch.cat([labels, held_labels])
    refit = fit_logistic(lambda: [everything], sums + held_sums, found.decay, None, 1e-9)
    torch.testing.assert_close(shares(found.linear, held), shares(refit.linear, held), rtol=0, atol=2e-3)


def test_a_class_that_never_occurs_is_never_predicted_and_changes_nothing():
    tokens, labels, _ = make_patches()
    gap = torch.where(labels >= 2, labels + 1, labels)  # no class 2
    plain = fit_logistic(lambda: [(tokens, labels)], sums_of(tokens, labels, 4), 1e-3).linear
    with_gap = fit_logistic(lambda: [(tokens, gap)], sums_of(tokens, gap, 5), 1e-3)
    expected = shares(plain, tokens)
    found = shares(with_gap.linear, tokens)
    torch.testing.assert_close(found[:, [0, 1, 3, 4]], expected, rtol=0, atol=1e-6)
    assert found[:, 2].max() == 0
    again = fit_logistic(lambda: [(tokens, gap)], sums_of(tokens, gap, 5), 1e-3, with_gap.linear)
    assert again.evaluations < with_gap.evaluations


def test_a_constant_channel_takes_no_part():
    tokens, labels, values = make_patches()
    constant = torch.cat([tokens, torch.full((len(tokens), 1), 3.7)], 1)
    assert fit_ridge(sums_of(constant, values, 2), 1e-3).weight[:, -1].abs().max() == 0
    linear = fit_logistic(lambda: [(constant, labels)], sums_of(constant, labels, 4), 1e-3).linear
    assert linear.weight[:, -1].abs().max() == 0 and torch.isfinite(linear.weight).all()


def test_sums_of_mapped_tokens_are_those_of_the_tokens_mapped():
    tokens, labels, _ = make_patches()
    matrix = torch.randn(3, tokens.shape[1], generator=torch.Generator().manual_seed(2))
    expected = sums_of(tokens.double() @ matrix.double().T, labels, 4)
    found = sums_of(tokens[:10], labels[:10], 4) + sums_of(tokens[10:], labels[10:], 4)
    for name, value in vars(found.of(matrix)).items():
        torch.testing.assert_close(value, getattr(expected, name))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_cannot_be_fitted_is_refused(bad):
    tokens, _, values = make_patches()
    tokens[5, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        fit_ridge(sums_of(tokens, values, 2), 1e-3)
    with pytest.raises(ValueError, match="no patches"):
        fit_ridge(GramSums.zeros(10, 2), 1e-3)


def test_two_processes_give_what_one_gives(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_fit_share, (port, tmp_path), nprocs=2)
    tokens, labels, values = make_patches()
    expected = fit_logistic(lambda: [(tokens, labels)], sums_of(tokens, labels, 4), 1e-3, None, 1e-9)
    ridge = fit_ridge(sums_of(tokens, values, 2), 1e-3)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["shares"], shares(expected.linear, tokens), rtol=0, atol=1e-3)
        torch.testing.assert_close(found["ridge"], ridge.weight)
        assert found["again"] < 10


def _fit_share(rank: int, port: int, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    tokens, labels, values = make_patches()
    share = slice(0, 1000) if rank == 0 else slice(1000, None)
    tokens, labels, values = tokens[share], labels[share], values[share]
    sums, numbers = sums_of(tokens, labels, 4), sums_of(tokens, values, 2)
    sums.all_reduce()
    numbers.all_reduce()
    fit = fit_logistic(lambda: [(tokens, labels)], sums, 1e-3, None, 1e-9)
    again = fit_logistic(lambda: [(tokens, labels)], sums, 1e-3, fit.linear, 1e-7)
    result = {
        "shares": shares(fit.linear, make_patches()[0]),
        "ridge": fit_ridge(numbers, 1e-3).weight,
        "again": again.evaluations,
    }
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_patch_has_the_label_of_most_of_its_labelled_pixels():
    labels = np.full((4, 6), 255, np.uint8)
    labels[:2, :2] = [[1, 1], [0, 2]]
    labels[:2, 2:4] = [[2, 255], [255, 255]]
    labels[2:, :2] = [[1, 1], [0, 0]]
    labels[2:, 4:] = [[7, 7], [7, 0]]  # 7 is no class
    assert majority_labels(labels, (2, 3), 3).tolist() == [[1, 2, 255], [0, 255, 0]]


def test_means_of_patches_leave_out_what_is_not_valid():
    values = np.arange(16.0).reshape(4, 4)
    valid = np.ones((4, 4), bool)
    valid[0, 0], valid[2:, 2:] = False, False
    values[0, 0], values[3, 3] = np.nan, np.inf
    means, valid_shares = patch_means(values, valid, (2, 2))
    assert means.tolist() == [[(1 + 4 + 5) / 3, (2 + 3 + 6 + 7) / 4], [(8 + 9 + 12 + 13) / 4, 0]]
    assert valid_shares.tolist() == [[0.75, 1], [1, 0]]
    vectors, _ = patch_means(np.stack([values, -values], -1), valid, (2, 2))
    assert np.array_equal(vectors[..., 0], means) and np.array_equal(vectors[..., 1], -means)


@pytest.mark.parametrize("num_numbers", [(), (3,)])
def test_a_photo_without_a_valid_pixel_gives_patches_of_no_weight(num_numbers):
    means, shares = patch_means(np.ones((6, 8, *num_numbers)), np.zeros((6, 8), bool), (3, 2))
    assert means.shape == (3, 2, *num_numbers) and not means.any()
    assert shares.shape == (3, 2) and not shares.any()


@pytest.mark.parametrize("size", [(60, 84), (57, 90), (50, 61)])
def test_labels_shifted_by_half_a_patch_lower_the_score(size):
    """Features that say what is seen in and around a patch, as a backbone's do: labels of another place must cost."""
    grid, num_classes = (12, 15), 3
    rng = np.random.default_rng(0)
    # Blobs of some patches' size, with borders that run anywhere through the patches.
    coarse = torch.from_numpy(rng.normal(size=(8, num_classes, 5, 6)))
    maps = F.interpolate(coarse, size, mode="bicubic").argmax(1).numpy()

    def score(shift: tuple[int, int]) -> float:
        tokens, labels = [], []
        for one in maps:
            seen, _ = patch_means(np.eye(num_classes)[one], np.ones(size, bool), grid)  # [h, w, K]
            padded = np.pad(seen, ((1, 1), (1, 1), (0, 0)), mode="edge")
            around = [padded[row : row + grid[0], column : column + grid[1]] for row in range(3) for column in range(3)]
            tokens.append(torch.from_numpy(np.concatenate(around, -1)).float())
            labels.append(torch.from_numpy(majority_labels(np.roll(one, shift, (0, 1)), grid, num_classes)))
        x, y = torch.stack(tokens).flatten(0, 2), torch.stack(labels).flatten()
        linear = fit_logistic(lambda: [(x, y)], sums_of(x, y, num_classes), 1e-6).linear
        logits = linear(torch.stack(tokens).permute(0, 3, 1, 2))
        found = F.interpolate(logits, size, mode="bilinear").argmax(1).numpy()
        both = [((found == k) & (maps == k)).sum() / ((found == k) | (maps == k)).sum() for k in range(num_classes)]
        return float(np.mean(both))

    half = (round(size[0] / grid[0] / 2), round(size[1] / grid[1] / 2))
    aligned = score((0, 0))
    assert aligned > 0.8
    for shift in ((half[0], half[1]), (-half[0], -half[1]), (half[0], -half[1]), (-half[0], half[1])):
        assert score(shift) < aligned - 0.005, shift
