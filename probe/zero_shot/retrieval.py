"""Segmentation by retrieval: each test patch takes the labels of its nearest training patches; nothing is trained."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.backbones import input_size
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import join_world, require_one_process
from fit3d_ns.support.progress import progress
from fit3d_ns.support.samples import evenly_spaced
from probe.augment import resize_image
from probe.config import RetrievalConfig
from probe.data.base import IGNORE, ProbeData, Sample, check_data, read_sample
from probe.data.batches import ordered_samples
from probe.data.loading import load_data
from probe.features.partners import require_one_each
from probe.features.rows import FrozenBackbones, Row, choose_untrained_rows, load_backbones, row_features
from probe.heads import resize_maps
from probe.output_folder import PAGE_NAME, ResultFolder, provenance, write_report
from probe.tasks.segmentation import SegmentationTask

_LOGGER = logging.getLogger(__name__)
_PANELS = 4


def run_retrieval(config: RetrievalConfig) -> None:
    """Scores the rows that need no training, and writes table.md, metrics.json and report.html.

    Args:
        config: The user's choices.

    Raises:
        UserError: As for the trained probes.
    """
    for flag, value, least in (
        ("--neighbours", config.neighbours, 1),
        ("--memory", config.memory, 1),
        ("--workers", config.workers, 0),
        ("--seed", config.seed, 0),
    ):
        if value < least:
            raise UserError(f"{flag} {value} is too small: at least {least}.")
    if config.temperature <= 0:
        raise UserError(f"--temperature {config.temperature:g} must be above 0.")
    with join_world(config.device) as world:
        _run(config, world.device)


@torch.no_grad()
def _run(config: RetrievalConfig, device: torch.device) -> None:
    require_one_process("retrieval")
    spec, partners, sentence = config.find_backbones(None)
    require_one_each(partners, "retrieval")
    rows = choose_untrained_rows(config.assemblies, partners, "retrieval")
    _LOGGER.info(sentence)
    data = load_data(config.choice("segmentation"))
    checked = check_data(data)
    backbones = load_backbones(spec, partners, rows, config.precision, device)
    settings = [config.neighbours, config.temperature, config.memory, config.seed, config.long_side]
    settings = {
        "probe": "retrieval",
        "settings": settings,
        "rows": [row.name for row in rows],
        "backbones": backbones.identities,
        "data": [data.name, len(data.train), len(data.test), list(data.classes)],
    }
    results = ResultFolder(config.output_dir, settings)
    results.start()
    task = SegmentationTask(data)
    memory = build_memory(config, data, rows, backbones, device)
    metrics = {row.name: task.new_metric().to(device) for row in rows}
    places = [data.test.index(sample) for sample in evenly_spaced(data.test, _PANELS)]
    read = partial(_read, data, data.test, backbones.info.patch_size, config.long_side)
    with progress("retrieval (test)", len(data.test)) as advance:
        for place, sample in ordered_samples(read, list(range(len(data.test))), config.workers):
            features = backbones(sample["image"][None].to(device).float() / 255)
            target = sample["target"].to(device)
            for row in rows:
                tokens = row_features(row, features).patch_tokens[0]
                votes = retrieve(tokens, *memory[row.name], config.neighbours, config.temperature)
                size = (target.shape[0], target.shape[1])
                prediction = resize_maps(votes[None], size)[0].argmax(0)
                task.update(metrics[row.name], prediction, target)
                if place in places:
                    results.panels.write(place, row.name, task.picture(prediction))
            if place in places:
                results.panels.write(place, "photo", task.read(data.test[place])[0])
                results.panels.write(place, "truth", task.picture(target))
            advance(1)
    scores = {name: {"scores": metric.scores(), "validation": {}} for name, metric in metrics.items()}
    results.write_seed(config.seed, scores, {})
    summary = {
        "probe": "retrieval",
        "protocol": f"retrieval-v1 ({config.neighbours} neighbours, temperature {config.temperature:g})",
        "features": sentence,
        "data": {"name": data.name, "train": len(data.train), "test": len(data.test), "notes": list(data.notes)},
        "backbone": asdict(backbones.info),
        "facts": {"labels_seen": checked.labels_seen},
        **provenance(device),
    }
    write_report(results, task, rows, backbones.info.width, (config.seed,), summary)
    _LOGGER.info("Report: %s", results.folder / PAGE_NAME)


def build_memory(
    config: RetrievalConfig,
    data: ProbeData,
    rows: Sequence[Row],
    backbones: FrozenBackbones,
    device: torch.device,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Collects patches of the training photos that have a label, as many from each photo.

    Args:
        config: The user's choices.
        data: With training photos.
        rows: Of the table.
        backbones: Run on each photo once.
        device: Where features are computed.

    Returns:
        By row: unit features [M, C], and the share of each class among the patch's labelled pixels [M, K].
    """
    per_photo = max(1, config.memory // len(data.train))
    parts: dict[str, list[Tensor]] = {row.name: [] for row in rows}
    labels: list[Tensor] = []
    read = partial(_read, data, data.train, backbones.info.patch_size, config.long_side)
    with progress("retrieval (memory)", len(data.train)) as advance:
        for place, sample in ordered_samples(read, list(range(len(data.train))), config.workers):
            features = backbones(sample["image"][None].to(device).float() / 255)
            grid = next(iter(features.values())).patch_tokens.shape[-2:]
            shares = patch_labels(sample["target"], (grid[0], grid[1]), len(data.classes)).flatten(1).T
            known = (shares.sum(1) > 0).nonzero()[:, 0].numpy()
            rng = np.random.default_rng(np.random.SeedSequence([config.seed, place]))
            taken = torch.from_numpy(np.sort(rng.permutation(known)[:per_photo]))
            labels.append(shares[taken])
            for row in rows:
                tokens = row_features(row, features).patch_tokens[0].flatten(1).T[taken.to(device)]
                parts[row.name].append(F.normalize(tokens, dim=1))
            advance(1)
    all_labels = torch.cat(labels).to(device)
    return {name: (torch.cat(values), all_labels) for name, values in parts.items()}


def patch_labels(labels: Tensor, grid: tuple[int, int], num_classes: int) -> Float[Tensor, "K h w"]:
    """Returns the share of each class among the labelled pixels of every patch; all zero where there is none.

    Args:
        labels: uint8 [H, W], 255 ignored.
        grid: (h, w) of the patches.
        num_classes: K.
    """
    valid = labels != IGNORE
    one_hot = F.one_hot(torch.where(valid, labels, 0).long(), num_classes).permute(2, 0, 1).float() * valid
    counts = F.adaptive_avg_pool2d(one_hot[None], grid)[0]
    return counts / counts.sum(0, keepdim=True).clamp_min(1e-12)


def retrieve(
    tokens: Float[Tensor, "C h w"],
    memory: Float[Tensor, "M C"],
    labels: Float[Tensor, "M K"],
    neighbours: int,
    temperature: float,
) -> Float[Tensor, "K h w"]:
    """Lets the nearest patches in memory vote on every patch's classes.

    Args:
        tokens: Features of a photo.
        memory: Unit features.
        labels: Class shares.
        neighbours: That vote.
        temperature: Of the softmax over their cosines, which weighs the votes.

    Returns:
        Class shares.
    """
    height, width = tokens.shape[-2:]
    queries = F.normalize(tokens.flatten(1).T, dim=1)
    cosines, places = (queries @ memory.T).topk(min(neighbours, len(memory)), dim=1)
    weights = (cosines / temperature).softmax(1)
    votes = (weights[..., None] * labels[places]).sum(1)
    return votes.T.reshape(-1, height, width)


def _read(data: ProbeData, samples: Sequence[Sample], patch_size: int, long_side: int, place: int) -> dict[str, Any]:
    image, target = read_sample(data, samples[place])
    size = input_size(image.shape[0], image.shape[1], patch_size, long_side)
    resized = resize_image(image, size)
    return {
        "image": torch.from_numpy(resized.transpose(2, 0, 1).copy()),
        "target": torch.from_numpy(np.ascontiguousarray(target)),
    }
