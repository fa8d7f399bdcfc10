"""A trained probe from the command line to the report."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fit3d_ns.support.console import rank
from fit3d_ns.support.curve_log import CurveLog
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import World, gather_objects, join_world, wait_for_all, world_size
from fit3d_ns.support.progress import progress
from probe.augment import training_crop_size
from probe.config import DepthConfig, TrainedProbeConfig
from probe.data.base import check_crops, check_data, data_identity
from probe.data.batches import check_batch_size
from probe.data.choice import Kind
from probe.data.loading import load_data
from probe.exact.run import run_exact
from probe.feature_sources import CachedSource, FeatureSource, OnlineSource, whole_size
from probe.features.partners import note_in_model_cards, require_one_each
from probe.features.rows import FrozenBackbones, Row, choose_rows, load_backbones, row_features
from probe.output_folder import PAGE_NAME, TABLE_NAME, ResultFolder, provenance, report_title, write_report
from probe.protocols import DepthRecipe, FastRecipe, Optimization, choose_fast_recipe, choose_recipe, override
from probe.tasks import TASKS, Task
from probe.training import Head, HeadTrainer, mean_losses

Panels = dict[int, dict[str, np.ndarray]]
"""By place in the split: pictures by row, and `truth`."""


@torch.no_grad()
def evaluate(
    task: Task, source: FeatureSource, split: str, heads: Sequence[Head], panels: Sequence[int] = ()
) -> tuple[dict[str, dict[str, Any]], Panels]:
    """Scores heads on all samples of a split, each counted once whatever the number of processes.

    Args:
        task: The probe.
        source: Of features.
        split: ``validation`` or ``test``.
        heads: Put into evaluation mode, and back.
        panels: Places of samples to make pictures of.

    Returns:
        Scores by head key; pictures, in the first process.
    """
    metrics = {head.key: task.new_metric().to(next(head.module.parameters()).device) for head in heads}
    pictures: Panels = {}
    for head in heads:
        head.module.eval()
    samples = getattr(task.data, split)
    total = len(range(rank(), len(samples), world_size()))
    with progress(f"evaluation ({split})", total) as advance:
        for place, features, target in source.evaluation(split):
            size = (target.shape[0], target.shape[1])
            for head in heads:
                prediction = source.predict(head.module, row_features(head.row, features), size)
                task.update(metrics[head.key], prediction, target)
                if place in panels:
                    pictures.setdefault(place, {"truth": task.picture(target)})
                    pictures[place][head.row.name] = task.picture(prediction)
            advance(1)
    for head in heads:
        head.module.train()
    merged: Panels = {}
    if panels:
        for part in gather_objects(pictures):
            merged.update(part)
    return {key: metric.scores() for key, metric in metrics.items()}, merged


_LOGGER = logging.getLogger(__name__)
_LOG_EVERY = 50


@dataclass
class _Setup:
    """What all seeds share."""

    config: TrainedProbeConfig
    task: Task
    rows: tuple[Row, ...]
    optimization: Optimization
    source: FeatureSource
    widths: tuple[int, int]
    device: torch.device
    results: ResultFolder
    settings: dict[str, Any]


def run_trained_probe(config: TrainedProbeConfig, kind: Kind) -> None:
    """Trains and scores every row for every seed that is not finished, and writes the report.

    Args:
        config: The user's choices.
        kind: Which probe.

    Raises:
        UserError: For everything that is wrong with flags, files or data, before training where it can be known.
    """
    config.check()
    with join_world(config.device) as world:
        if config.protocol == "exact":
            run_exact(config, kind, world)
        else:
            _run(config, kind, world)


def _run(config: TrainedProbeConfig, kind: Kind, world: World) -> None:
    device = world.device
    # The paper's depth and normals are read before the final norm, whatever a card says.
    spec, partners, sentence = config.find_backbones(config.norm, TASKS[kind].norm)
    require_one_each(partners, f"--protocol {config.protocol}")
    rows = choose_rows(config.assemblies, partners)
    if config.protocol == "paper" and config.long_side is not None:
        raise UserError("--long-side is for cached features, and the paper's photos keep their size: leave it out.")
    recipe = choose_recipe(kind, config.dataset)
    fast = choose_fast_recipe(kind, config.long_side) if config.protocol == "fast" else None
    base = fast.optimization if fast else recipe.optimization
    optimization = override(base, config.iterations, config.batch_size, config.learning_rates)
    check_batch_size(optimization.batch_size, recipe.loss_group if isinstance(recipe, DepthRecipe) else 1)
    if isinstance(config, DepthConfig) and isinstance(recipe, DepthRecipe):
        if config.gradient_loss and fast:
            raise UserError("--gradient-loss needs whole crops: it cannot be combined with --protocol fast.")
        recipe = replace(recipe, gradient_loss=config.gradient_loss)
    several = len(optimization.learning_rates) > 1
    data = load_data(config.choice(kind), config.validation_share if several else 0.0)
    checked = check_data(data)
    for remark in checked.remarks:
        _LOGGER.warning(remark)
    if kind != "segmentation" and not fast:
        check_crops(data, partial(training_crop_size, recipe=recipe))
    task = TASKS[kind](data, recipe)
    _LOGGER.info(sentence)
    backbones = load_backbones(spec, partners, rows, config.precision, device)
    protocol: dict[str, Any] = asdict(replace(fast, optimization=optimization) if fast else recipe)
    protocol["optimization"] = asdict(optimization)
    settings = {
        "probe": kind,
        "recipe": protocol,
        "rows": [row.name for row in rows],
        "backbones": backbones.identities,
        "precision": config.precision,
        "data": data_identity(data),
    }
    results = ResultFolder(config.output_dir, settings)
    if rank() == 0:
        results.start()
    wait_for_all()
    source, facts = _make_source(config, task, fast, backbones, device, results)
    widths = (backbones.info.width, _cls_width(backbones, device))
    setup = _Setup(config, task, rows, optimization, source, widths, device, results, settings)
    for position, seed in enumerate(config.seeds):
        if results.read_seed(seed) is None or (position == 0 and not results.panels.are_whole()):
            _run_seed(setup, seed, with_panels=position == 0)
        wait_for_all()
    if rank() == 0:
        notes = [*data.notes, *checked.remarks]
        facts |= {"labels_seen": checked.labels_seen, "valid_share": checked.valid_share}
        summary = {
            "probe": kind,
            "protocol": protocol["name"],
            "features": sentence,
            "data": {"name": data.name, "train": len(data.train), "test": len(data.test), "notes": notes},
            "backbone": asdict(backbones.info),
            "facts": facts,
            **provenance(device),
        }
        write_report(results, task, rows, widths[0], config.seeds, summary)
        note_in_model_cards(partners, f"{report_title(summary)} ({summary['protocol']})", results.folder / TABLE_NAME)
        _LOGGER.info("Report: %s", results.folder / PAGE_NAME)


def _make_source(
    config: TrainedProbeConfig,
    task: Task,
    fast: FastRecipe | None,
    backbones: FrozenBackbones,
    device: torch.device,
    results: ResultFolder,
) -> tuple[FeatureSource, dict[str, Any]]:
    """Makes the source of features; for the fast protocol, computes them first."""
    if fast is None:
        fill = torch.tensor(backbones.info.mean, device=device).view(1, 3, 1, 1)
        return OnlineSource(task, backbones, device, config.workers, fill), {}
    size = whole_size(task, backbones.info.patch_size, fast.long_side)
    source = CachedSource(task, fast, size, device, config.workers)
    start = time.monotonic()
    folder = config.cache_dir or results.folder / "features"
    description = {"backbones": backbones.identities, "precision": config.precision}
    stored = source.fill(backbones, description, folder)
    seconds = time.monotonic() - start
    return source, {"photo_size": list(size), "features_bytes": stored, "features_seconds": seconds}


def _run_seed(setup: _Setup, seed: int, with_panels: bool) -> None:
    """Trains and scores one seed's heads."""
    task, optimization, results = setup.task, setup.optimization, setup.results
    trainer = HeadTrainer(task, setup.rows, optimization, setup.widths, seed, setup.device)
    fingerprint = f"{results.fingerprint}-{seed}"
    first = trainer.load(results.checkpoint(seed), fingerprint, setup.device)
    log = None
    if rank() == 0:
        folder = results.folder / "curves" / f"seed_{seed}"
        log = CurveLog(folder, setup.config.vis, "fit3d-probe", {**setup.settings, "seed": seed}, first)
    seconds, trained = _train(setup, trainer, seed, first, fingerprint, log)
    if log is not None:
        log.close()
    validation: dict[str, dict[str, Any]] = {}
    if task.data.validation is not None:
        validation, _ = evaluate(task, setup.source, "validation", trainer.heads)
    chosen = _choose(task, setup.rows, trainer, validation)
    places = task.panel_places() if with_panels else []
    start = time.monotonic()
    scores, panels = evaluate(task, setup.source, "test", list(chosen.values()), places)
    evaluation_seconds = time.monotonic() - start
    if rank() == 0:
        for place, pictures in panels.items():
            results.panels.write(place, "photo", task.test_target(*task.read(task.data.test[place]))[0])
            for name, picture in pictures.items():
                results.panels.write(place, name, picture)
        if with_panels:
            results.panels.seal()
        content = {
            name: {
                "scores": scores[head.key],
                "learning_rate": head.learning_rate,
                "validation": {
                    f"{other.learning_rate:g}": validation[other.key][task.headline]
                    for other in trainer.heads
                    if other.row.name == name and other.key in validation
                },
            }
            for name, head in chosen.items()
        }
        timing = {
            "training_seconds": seconds,
            "images_per_second": trained / seconds if seconds else 0.0,
            "evaluation_seconds": evaluation_seconds,
        }
        results.write_seed(seed, content, timing)


def _train(
    setup: _Setup, trainer: HeadTrainer, seed: int, first: int, fingerprint: str, log: CurveLog | None
) -> tuple[float, int]:
    """Trains heads from a step on; returns the seconds it took and the photos seen."""
    optimization, total = setup.optimization, setup.optimization.iterations
    batches = setup.source.training(seed, first, total, optimization.batch_size)
    start = time.monotonic()
    with progress(f"training (seed {seed})", total, first) as advance:
        for step, (features, loss) in enumerate(batches, start=first):
            losses = trainer.step(step, features, loss)
            last = step + 1 == total
            remark = ""
            if (step + 1) % _LOG_EVERY == 0 or last:
                by_head = mean_losses(trainer, losses)
                if log is not None:
                    log.write(step + 1, {f"loss/{name}": value for name, value in by_head.items()})
                remark = f"loss {next(iter(by_head.values())):.3f}"
            if (step + 1) % setup.config.checkpoint_every == 0 or last:
                trainer.save(setup.results.checkpoint(seed), step + 1, fingerprint)
            advance(1, remark)
    return time.monotonic() - start, (total - first) * optimization.batch_size


def _choose(
    task: Task, rows: tuple[Row, ...], trainer: HeadTrainer, validation: dict[str, dict[str, Any]]
) -> dict[str, Head]:
    """Returns each row's head: the only one, or the best on the validation split."""
    chosen: dict[str, Head] = {}
    for row in rows:
        best: Head | None = None
        for head in trainer.heads:
            if head.row != row:
                continue
            if best is None or task.is_better(validation[head.key][task.headline], validation[best.key][task.headline]):
                best = head
        assert best is not None
        chosen[row.name] = best
    return chosen


def _cls_width(backbones: FrozenBackbones, device: torch.device) -> int:
    patch = backbones.info.patch_size
    outputs = backbones(torch.zeros(1, 3, patch, patch, device=device))
    cls = next(iter(outputs.values())).cls
    return 0 if cls is None else cls.shape[1]
