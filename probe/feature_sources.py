"""Where the heads' features come from: computed for every batch, or read from disk."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fit3d_ns.backbones import BackboneOutput, input_size
from fit3d_ns.support.console import rank
from fit3d_ns.support.processes import world_size
from fit3d_ns.support.samples import evenly_spaced
from probe.augment import resize_nearest
from probe.data.base import Sample
from probe.data.batches import (
    NumberedSamples,
    local_numbers,
    ordered_samples,
    sample_index,
    sample_rng,
    training_batches,
)
from probe.features.rows import FrozenBackbones
from probe.features.store import FeatureStore
from probe.heads import sample_map
from probe.protocols import FastRecipe
from probe.stacks import StackLoss, at_once, one_by_one
from probe.tasks.task import Task

Features = dict[str, BackboneOutput]
_SAMPLES_MEASURED = 25


class FeatureSource(ABC):
    """Features of training batches and of test photos."""

    @abstractmethod
    def training(self, seed: int, start: int, stop: int, batch_size: int) -> Iterator[tuple[Features, StackLoss]]:
        """Yields this process's features of each step, and the loss of heads on them.

        Args:
            seed: Of order and augmentation.
            start: First step, from 0.
            stop: The step after the last.
            batch_size: Samples of a step over all processes.
        """

    @abstractmethod
    def evaluation(self, split: str) -> Iterator[tuple[int, Features, Tensor]]:
        """Yields (place, features of all views, truth) of this process's share of ``validation`` or ``test``.

        Args:
            split: ``validation`` or ``test``.
        """

    @abstractmethod
    def predict(self, head: torch.nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """Returns a head's prediction of the size of the truth (H, W).

        Args:
            head: In evaluation mode.
            features: Of all views of a photo.
            size: Height and width of the truth, pixels.
        """


@dataclass
class OnlineSource(FeatureSource):
    """The full protocol: every photo is read, changed at random and run through the backbones."""

    task: Task
    """The probe."""
    backbones: FrozenBackbones
    """Run on every batch."""
    device: torch.device
    """Where they run."""
    workers: int
    """Processes that read ahead."""
    fill: Tensor
    """[1, 3, 1, 1] mean colour, in [0, 1]."""

    def training(self, seed: int, start: int, stop: int, batch_size: int) -> Iterator[tuple[Features, StackLoss]]:
        """See `FeatureSource`."""
        pin = self.device.type == "cuda"
        batches = training_batches(train_samples(self.task, seed), start, stop, batch_size, self.workers, pin)
        for step, batch in enumerate(batches, start=start):
            batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
            features = self.backbones(self.task.prepare_images(batch, self.fill))
            yield features, one_by_one(partial(self.task.loss, target=batch["target"], step=step))

    def evaluation(self, split: str) -> Iterator[tuple[int, Features, Tensor]]:
        """See `FeatureSource`."""
        samples = _split(self.task, split)
        indices = list(range(len(samples)))[rank() :: world_size()]
        for index, sample in ordered_samples(partial(_test_sample, self.task, samples), indices, self.workers):
            yield index, self.backbones(sample["views"].to(self.device).float() / 255), sample["target"].to(self.device)

    def predict(self, head: torch.nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """See `FeatureSource`."""
        return self.task.predict(head, features, size)


class CachedSource(FeatureSource):
    """The fast protocol: features of whole photos, and of their mirror images, computed once and kept on disk."""

    def __init__(
        self, task: Task, recipe: FastRecipe, size: tuple[int, int], device: torch.device, workers: int
    ) -> None:
        """Takes the task; `fill` must be called before anything else.

        Args:
            task: The probe.
            recipe: The fast protocol's.
            size: Height and width of every photo as the backbones see it, multiples of the patch size.
            device: Where heads are trained.
            workers: Processes that read ahead.
        """
        self._task, self._recipe, self._size = task, recipe, size
        self._device, self._workers = device, workers
        self._stores: dict[str, FeatureStore] = {}

    def fill(self, backbones: FrozenBackbones, description: dict[str, Any], folder: Path) -> int:
        """Computes what is missing on disk.

        Args:
            backbones: Run on each photo once.
            description: What decides the features beside photos and size.
            folder: Where features are kept.

        Returns:
            Bytes on disk.
        """
        data = self._task.data
        # Name and fit decide how photos are cut and resized, the rest how the truth, stored beside them, is read.
        description = {**description, "size": list(self._size), "kind": data.kind, "data": [data.name, data.fit]}
        truth = {"labels": asdict(data.labels) if data.labels else None, "depth_scale": data.depth_scale}
        for split in ("train", "validation", "test"):
            samples = _split(self._task, split)
            if not samples:
                continue
            training = split == "train"
            settings = {**description, **truth} if training else description
            store = FeatureStore(folder, settings, samples, training and self._recipe.flip, with_truth=True)
            read = partial(_whole_sample, self._task, samples, self._size, training)
            store.fill(read, backbones, self._device, self._workers, f"features ({split})")
            self._stores[split] = store
        return sum(store.size_bytes() for store in self._stores.values())

    def training(self, seed: int, start: int, stop: int, batch_size: int) -> Iterator[tuple[Features, StackLoss]]:
        """See `FeatureSource`."""
        store, count = self._stores["train"], len(self._task.data.train)
        # A GPU waits for launches, so it takes all heads at once; a CPU's caches hold the outputs of one.
        together = at_once if self._device.type == "cuda" else one_by_one
        for step in range(start, stop):
            indices, mirrored, positions, values = [], [], [], []
            for number in local_numbers(step, batch_size):
                rng = sample_rng(seed, number)
                index = sample_index(seed, number, count)
                place, truth = draw_positions(store.load_target(index), self._recipe.positions, rng)
                if self._recipe.flip and rng.random() < 0.5:
                    place[:, 0] = 1 - place[:, 0]
                    truth = self._task.mirror_values(truth)
                    mirrored.append(1)
                else:
                    mirrored.append(0)
                indices.append(index)
                positions.append(torch.from_numpy(place))
                values.append(torch.from_numpy(truth))
            places = torch.stack(positions).to(self._device)
            # Everything up to the logits is affine, so it may be done on features read between the patches' centres.
            features = {
                name: BackboneOutput(sample_map(output.patch_tokens, places)[..., None], output.cls)
                for name, output in store.load(indices, mirrored, self._device).items()
            }
            truths = torch.stack(values).to(self._device)
            yield features, together(partial(self._task.sampled_loss, values=truths, step=step))

    def evaluation(self, split: str) -> Iterator[tuple[int, Features, Tensor]]:
        """See `FeatureSource`."""
        samples = _split(self._task, split)
        indices = list(range(len(samples)))[rank() :: world_size()]
        for index, sample in ordered_samples(partial(_truth, self._task, samples), indices, self._workers):
            yield index, self._stores[split].load([index], None, self._device), sample["target"].to(self._device)

    def predict(self, head: torch.nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """See `FeatureSource`."""
        return self._task.predict_whole(head, features, size)


def train_samples(task: Task, seed: int) -> NumberedSamples:
    """Returns the full protocol's training samples by number, read and augmented by whoever asks.

    Args:
        task: The probe.
        seed: Of order and augmentation.
    """
    return NumberedSamples(partial(_train_sample, task, task.data.train), len(task.data.train), seed)


def whole_size(task: Task, patch_size: int, long_side: int) -> tuple[int, int]:
    """Returns the size (H, W) that the fast protocol resizes photos to: that of the median shape of some of them.

    Args:
        task: The probe.
        patch_size: Of the backbones, pixels.
        long_side: Pixels of the longer side.
    """
    shapes = [
        task.test_target(*task.read(sample))[0].shape for sample in evenly_spaced(task.data.train, _SAMPLES_MEASURED)
    ]
    height, width = sorted(shapes, key=lambda shape: shape[0] / shape[1])[len(shapes) // 2][:2]
    return input_size(height, width, patch_size, long_side)


def draw_positions(target: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws pixels of a truth [H, W] or [H, W, 3], with repetition.

    Args:
        target: Truth, at the photo's size.
        count: Pixels P to draw.
        rng: This sample's own.

    Returns:
        Positions float32 [P, 2], (x, y) as shares of width and height, and the truth there, [P] or [P, 3].
    """
    height, width = target.shape[:2]
    row, column = rng.integers(0, height, count), rng.integers(0, width, count)
    return np.stack([(column + 0.5) / width, (row + 0.5) / height], -1).astype(np.float32), target[row, column]


def _split(task: Task, split: str) -> Sequence[Sample]:
    samples: Sequence[Sample] | None = getattr(task.data, split)
    return samples or ()


# Functions of a module, not closures: workers may have to pickle them.


def _train_sample(task: Task, samples: Sequence[Sample], index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return task.train_sample(samples[index], rng)


def _test_sample(task: Task, samples: Sequence[Sample], index: int) -> dict[str, Any]:
    return task.test_sample(samples[index])


def _whole_sample(
    task: Task, samples: Sequence[Sample], size: tuple[int, int], with_target: bool, index: int
) -> dict[str, Any]:
    sample = task.test_sample(samples[index], size)
    target = sample.pop("target")
    if with_target:
        sample["target"] = torch.from_numpy(resize_nearest(target.numpy(), size))
    return sample


def _truth(task: Task, samples: Sequence[Sample], index: int) -> dict[str, Any]:
    _, target = task.test_target(*task.read(samples[index]))
    return {"target": torch.from_numpy(np.ascontiguousarray(target))}
