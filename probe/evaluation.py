"""Scores of trained heads on a split, and pictures of some predictions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console

from probe.distributed import gather_objects, rank, world_size
from probe.features import row_features
from probe.progress import progress
from probe.sources import Source
from probe.task import Task
from probe.training import Head

Panels = dict[int, dict[str, np.ndarray]]
"""By place in the split: pictures by row, and `truth`."""


@torch.no_grad()
def evaluate(
    task: Task, source: Source, split: str, heads: Sequence[Head], console: Console, panels: Sequence[int] = ()
) -> tuple[dict[str, dict[str, Any]], Panels]:
    """Scores heads on all samples of a split, each counted once whatever the number of processes.

    Args:
        task: The probe.
        source: Of features.
        split: ``validation`` or ``test``.
        heads: Put into evaluation mode, and back.
        console: For progress.
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
    with progress(console, f"evaluation ({split})", total) as advance:
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
