"""The exact protocol from the command line to the report: features once, then every row solved and scored."""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fit3d_ns.backbones import needs_tuned
from fit3d_ns.support.console import rank
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import World, gather_objects, sum_over_processes, wait_for_all, world_size
from fit3d_ns.support.progress import progress
from fit3d_ns.support.samples import evenly_spaced
from probe.config import TrainedProbeConfig
from probe.data.base import ProbeData, Sample, check_data, data_identity
from probe.data.batches import ordered_samples
from probe.data.choice import Kind
from probe.data.loading import load_data
from probe.exact.patches import ORIGINAL, TrainingPatches, Unit, row_matrix, row_tokens
from probe.exact.report import write_exact_report
from probe.exact.solved_rows import SolvedRows
from probe.feature_sources import whole_size
from probe.features.partners import Partner, note_in_model_cards
from probe.features.rows import FrozenBackbones, Row, choose_rows, load_backbones
from probe.features.store import FeatureStore
from probe.output_folder import PAGE_NAME, TABLE_NAME, ResultFolder, provenance, report_title
from probe.protocols import ExactRecipe, choose_exact_recipe, choose_recipe
from probe.solvers.logistic import approach_logistic, choose_logistic
from probe.solvers.ridge import Choice, GramSums, LinearMap, choose_ridge, fit_ridge
from probe.tasks import TASKS, Task
from probe.tasks.metrics import segmentation_scores, segmentation_sums

_LOGGER = logging.getLogger(__name__)
_BLOCK = 10
"""Photos that are held out together."""
_TRAINED_ONLY = "is for heads that are trained: leave it out, or give --protocol fast or paper."


@dataclass
class _Setup:
    """What all rows share."""

    task: Task
    recipe: ExactRecipe
    size: tuple[int, int]
    """Height and width of every photo as the backbones see it, pixels."""
    grid: tuple[int, int]
    """Height and width of their maps, patches."""
    units: list[Unit]
    held_out: list[int]
    device: torch.device
    workers: int
    results: ResultFolder
    solved: SolvedRows


def run_exact(config: TrainedProbeConfig, kind: Kind, world: World) -> None:
    """Solves and scores every row that is not finished, and writes the report.

    Args:
        config: The user's choices.
        kind: Which probe.
        world: This process and its fellows.

    Raises:
        UserError: For everything that is wrong with flags, files or data.
    """
    _check_flags(config)
    device = world.device
    spec, partners, sentence = config.find_backbones(config.norm)
    rows = _choose_rows(config, partners)
    recipe = choose_exact_recipe(kind, config.long_side)
    data = load_data(config.choice(kind))
    checked = check_data(data)
    for remark in checked.remarks:
        _LOGGER.warning(remark)
    held_out = _hold_out(data, config.validation_share, recipe.held_out)
    task = TASKS[kind](data, choose_recipe(kind, config.dataset))
    _LOGGER.info(sentence)
    backbones = load_backbones(spec, partners, rows, config.precision, device)
    settings = {
        "probe": kind,
        "recipe": asdict(recipe),
        "rows": [row.name for row in rows],
        "backbones": backbones.identities,
        "precision": config.precision,
        "held_out": len(held_out),
        "data": data_identity(data),
    }
    results = ResultFolder(config.output_dir, settings)
    if rank() == 0:
        results.start()
    wait_for_all()
    units = [unit for row in rows for unit in _units_of(row, partners)]
    size = whole_size(task, backbones.info.patch_size, recipe.long_side)
    grid = (size[0] // backbones.info.patch_size, size[1] // backbones.info.patch_size)
    setup = _Setup(task, recipe, size, grid, units, held_out, device, config.workers, results, SolvedRows(results))
    start = time.monotonic()
    stores = _fill_stores(setup, config, backbones)
    seconds = time.monotonic() - start
    width = backbones.info.width
    facts = _fit_missing(setup, stores, width)
    _score_missing(setup, stores)
    if rank() == 0:
        facts |= {
            "labels_seen": checked.labels_seen,
            "valid_share": checked.valid_share,
            "photo_size": list(size),
            "held_out": len(held_out),
            "features_seconds": seconds,
            "features_bytes": sum(store.size_bytes() for pair in stores.values() for store in pair.values()),
        }
        notes = [*data.notes, *checked.remarks]
        summary = {
            "probe": kind,
            "protocol": recipe.name,
            "features": sentence,
            "data": {"name": data.name, "train": len(data.train), "test": len(data.test), "notes": notes},
            "backbone": asdict(backbones.info),
            "students": {partner.name: partner.found.source for partner in partners},
            "facts": facts,
            **provenance(device),
        }
        write_exact_report(results, task, recipe, units, partners, width, summary)
        note_in_model_cards(partners, f"{report_title(summary)} ({summary['protocol']})", results.folder / TABLE_NAME)
        _LOGGER.info("Report: %s", results.folder / PAGE_NAME)
    wait_for_all()


def _check_flags(config: TrainedProbeConfig) -> None:
    given = (
        ("--iterations", config.iterations is not None),
        ("--batch-size", config.batch_size is not None),
        ("--learning-rates", config.learning_rates is not None),
        ("--seeds", config.seeds != (0,)),
        ("--vis", config.vis != "none"),
        ("--gradient-loss", bool(getattr(config, "gradient_loss", 0.0))),
    )
    for flag, is_given in given:
        if is_given:
            raise UserError(f"{flag} {_TRAINED_ONLY}")


def _choose_rows(config: TrainedProbeConfig, partners: Sequence[Partner]) -> tuple[Row, ...]:
    """Returns the rows: without ``linear``, whose functions are those of ``concat``."""
    if config.assemblies and "linear" in config.assemblies:
        raise UserError(
            "--assemblies linear is concat once both are solved: leave it out, or give --protocol fast or paper."
        )
    names = ("original", "duplicate", "tuned", "add", "concat") if partners else ("original", "duplicate")
    return choose_rows(config.assemblies or names, partners)


def _units_of(row: Row, partners: Sequence[Partner]) -> list[Unit]:
    if not needs_tuned(row.assembly):
        return [Unit(row, None)]
    return [Unit(row, partner.name) for partner in partners if partner.group == row.partner]


def _hold_out(data: ProbeData, share: float, most: int) -> list[int]:
    """Returns photos in blocks all over the training photos: neighbours in a video belong to one side."""
    total = len(data.train)
    count = min(most, max(1, round(share * total)))
    if total - count < 1:
        raise UserError(f"{total} training samples are too few to hold some out: give more.")
    size = max(1, min(_BLOCK, total // 10))
    blocks = [range(start, min(start + size, total)) for start in range(0, total, size)]
    chosen = evenly_spaced(blocks, max(1, round(count / size)))
    return [place for block in chosen for place in block]


def _fill_stores(
    setup: _Setup, config: TrainedProbeConfig, backbones: FrozenBackbones
) -> dict[str, dict[str, FeatureStore]]:
    """Computes the features that are not on disk; returns where they are, by split and backbone."""
    task, data = setup.task, setup.task.data
    folder = config.cache_dir or setup.results.folder / "features"
    stores: dict[str, dict[str, FeatureStore]] = {"train": {}, "test": {}}
    for name, alone in backbones.one_by_one():
        description = {
            "protocol": "exact",
            "backbones": alone.identities,
            "precision": config.precision,
            "size": list(setup.size),
            # How photos are cut and resized before that.
            "fit": data.fit,
            "kitti_window": getattr(task.recipe, "kitti_window", False),
        }
        for split, samples in (("train", data.train), ("test", data.test)):
            store = FeatureStore(folder, description, samples, False, with_truth=data.fit == "image_to_target")
            read = partial(_read_photo, task, samples, setup.size)
            store.fill(read, alone, setup.device, setup.workers, f"features of {name} ({split})")
            stores[split][name] = store
    return stores


def _read_photo(task: Task, samples: Sequence[Sample], size: tuple[int, int], index: int) -> dict[str, Any]:
    """Reads a photo at the features' size, antialiased."""
    image, _ = task.test_target(*task.read(samples[index]))
    resized = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return {"views": torch.from_numpy(resized.transpose(2, 0, 1).copy())[None]}


def _read_patches(task: Task, grid: tuple[int, int], index: int) -> dict[str, Any]:
    """Reads the truth of a training photo's patches."""
    _, target = task.test_target(*task.read(task.data.train[index]))
    return {"target": torch.from_numpy(task.patch_truth(np.ascontiguousarray(target), grid))}


def _fit_missing(setup: _Setup, stores: dict[str, dict[str, FeatureStore]], width: int) -> dict[str, Any]:
    """Solves the rows that are not on disk; returns what was seen of the truth."""
    missing = [unit for unit in setup.units if not setup.solved.has_map(unit.key)]
    wait_for_all()
    labelled = setup.task.data.kind == "segmentation"
    num_outputs = setup.task.num_outputs
    read = partial(_read_patches, setup.task, setup.grid)
    patches = TrainingPatches(
        stores["train"], read, setup.workers, setup.held_out, num_outputs, labelled, width, setup.device
    )
    without = torch.tensor(float(patches.photos_without_truth), dtype=torch.float64, device=setup.device)
    sum_over_processes(without)
    facts: dict[str, Any] = {"training_photos_without_truth": int(without), "seconds": {}}
    names = list(stores["train"])
    first = setup.units[0]
    # The first row, by default the original's, chooses the decay of all: chosen row by row, on held-out photos of which
    # there are never many, it would add its own chance to every difference.
    decay = (setup.solved.read_facts(first.key) or {}).get("decay")
    partners: list[str | None] = [None, *(name for name in names if name != ORIGINAL)]
    partners.sort(key=lambda partner: partner != first.partner)
    class_counts: Tensor | None = None
    with progress("solving rows", len(missing)) as advance:
        for partner in partners:
            pending = [unit for unit in missing if unit.partner == partner]
            if not pending and not (labelled and class_counts is None):
                continue
            pair = [name for name in (ORIGINAL, partner) if name in names]
            if not pair:
                continue
            kept, held = (patches.sums(pair, one, num_outputs) for one in (False, True))
            class_counts = (kept + held).y
            _check_sums(setup.task, kept, held)
            for unit in pending:
                start = time.monotonic()
                choice = _solve(setup, patches, unit, kept, held, width, len(pair) == 2, decay)
                decay = choice.decay
                if rank() == 0:
                    setup.solved.write_map(unit.key, choice, time.monotonic() - start)
                advance(1, unit.key)
            if partner is not None:
                patches.release(partner)
    wait_for_all()
    if labelled and class_counts is not None:
        classes = setup.task.data.classes
        facts["classes_never_in_training"] = [name for name, count in zip(classes, class_counts) if not count]
    return facts


def _check_sums(task: Task, kept: GramSums, held: GramSums) -> None:
    for sums, which in ((kept, "training"), (held, "held-out training")):
        if not sums.count:
            raise UserError(f"No patch of the {which} photos of {task.data.name} has a truth: check the label files.")
    if task.data.kind == "segmentation" and int((kept.y > 0).sum()) < 2:
        raise UserError(
            f"Only one class occurs in the training photos of {task.data.name}, and a classifier needs two: check the "
            "label files and the class list."
        )


def _solve(
    setup: _Setup,
    patches: TrainingPatches,
    unit: Unit,
    kept: GramSums,
    held: GramSums,
    width: int,
    paired: bool,
    decay: float | None,
) -> Choice:
    matrix = row_matrix(unit.row.assembly, width, paired)
    kept, held = kept.of(matrix), held.of(matrix)
    if setup.task.data.kind != "segmentation":
        if decay is not None:
            return Choice(fit_ridge(kept + held, decay), decay, {})
        return choose_ridge(kept, held, setup.recipe.decays)
    kept_batches, held_batches = (patches.batches(unit, one) for one in (False, True))
    if decay is not None:

        def everything() -> Iterable[tuple[Tensor, Tensor]]:
            yield from kept_batches()
            yield from held_batches()

        fit = approach_logistic(everything, kept + held, decay, setup.recipe.decays, setup.recipe.tolerance)
        return Choice(fit.linear, decay, {})
    return choose_logistic(
        kept_batches,
        kept,
        held_batches,
        held,
        lambda linear: _patch_miou(held_batches(), linear, setup.task.num_outputs),
        setup.recipe.decays,
        setup.recipe.tolerance,
    )


def _patch_miou(batches: Iterable[tuple[Tensor, Tensor]], linear: LinearMap, num_classes: int) -> float:
    """Returns the mIoU of a classifier over patches of all processes."""
    weight, bias = linear.weight.float(), linear.bias.float()
    sums = torch.zeros(3 * num_classes, dtype=torch.float64, device=weight.device)
    for tokens, labels in batches:
        sums += segmentation_sums(torch.addmm(bias, tokens.float(), weight.T).argmax(1), labels, num_classes)
    sum_over_processes(sums)
    return float(segmentation_scores(sums)["miou"])


@torch.no_grad()
def _score_missing(setup: _Setup, stores: dict[str, dict[str, FeatureStore]]) -> None:
    """Scores the rows that have no sums on disk, in one pass over the test photos."""
    missing = [unit for unit in setup.units if setup.solved.read_sums(unit.key) is None]
    if not setup.results.panels.are_whole():
        missing = setup.units
    wait_for_all()
    if not missing:
        return
    task, data, device = setup.task, setup.task.data, setup.device
    maps = {unit.key: setup.solved.read_map(unit.key, device) for unit in missing}
    places = task.panel_places()
    indices = list(range(len(data.test)))[rank() :: world_size()]
    sums: dict[str, Tensor] = {}
    panels: dict[tuple[int, str], np.ndarray] = {}
    with progress("test photos", len(indices)) as advance:
        for index, sample in ordered_samples(partial(_read_truth, task), indices, setup.workers):
            target = sample["target"].to(device)
            features = {
                name: next(iter(store.load([index], None, device).values())).patch_tokens
                for name, store in stores["test"].items()
            }
            for unit in missing:
                tuned = features[unit.partner] if unit.partner else None
                tokens = row_tokens(unit.row.assembly, features.get(ORIGINAL), tuned)
                prediction = task.predict_solved(maps[unit.key](tokens), (target.shape[0], target.shape[1]))
                found = task.sums(prediction, target)
                sums.setdefault(unit.key, found.new_zeros(len(data.test), len(found)))[index] = found
                if index in places and unit.partner in (None, unit.row.partner):
                    panels[index, unit.row.name] = task.picture(prediction)
            if index in places:
                panels[index, "truth"] = task.picture(target)
                panels[index, "photo"] = task.test_target(*task.read(data.test[index]))[0]
            advance(1)
    for unit in missing:
        mine = sums.get(unit.key)
        if mine is None:  # more processes than photos
            mine = torch.zeros(len(data.test), _num_sums(task), dtype=torch.float64, device=device)
        sum_over_processes(mine)
        sums[unit.key] = mine
    for part in gather_objects(panels):
        panels.update(part)
    if rank() == 0:
        for (place, name), picture in panels.items():
            setup.results.panels.write(place, name, picture)
        setup.results.panels.seal()
        for unit in missing:
            setup.solved.write_sums(unit.key, sums[unit.key])
    wait_for_all()


def _num_sums(task: Task) -> int:
    return {"segmentation": 3 * task.num_outputs, "depth": 9, "normals": 6}[task.data.kind]


def _read_truth(task: Task, index: int) -> dict[str, Any]:
    _, target = task.test_target(*task.read(task.data.test[index]))
    return {"target": torch.from_numpy(np.ascontiguousarray(target))}
