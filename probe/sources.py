"""Where the heads' features come from: computed for every batch, or read from disk."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fit3d_ns.backbones import BackboneOutput, input_size
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_path, is_complete_safetensors
from fit3d_ns.support.processes import rank, wait_for_all, world_size
from fit3d_ns.support.progress import progress
from fit3d_ns.support.samples import evenly_spaced
from probe.augment import resize_nearest
from probe.data import Sample
from probe.data.batches import (
    NumberedSamples,
    local_numbers,
    ordered_samples,
    sample_index,
    sample_rng,
    training_batches,
)
from probe.features import FrozenBackbones
from probe.heads import LossFunction, sample_map
from probe.protocols import FastRecipe
from probe.tasks.task import Task

SCHEMA = 2
"""Raise it when the same question comes to be answered in another way."""
SHARD = 16
_TARGET = "target"


class FeatureStore:
    """Features of a list of photos, each resized to one size, and maybe of their mirror images."""

    def __init__(self, folder: Path, description: dict[str, Any], samples: Sequence[Sample], mirrored: bool) -> None:
        """Names the files; touches nothing but the photos' sizes and times of change.

        Args:
            folder: Where all stores are kept.
            description: What decides the features beside the photos; JSON-able.
            samples: The photos, in order.
            mirrored: Whether there is a second map for each photo, of its mirror image.
        """
        files = [
            (str(path.resolve()), *file_stamp(path)) for sample in samples for path in (sample.image, sample.target)
        ]
        lenses = [sample.intrinsics for sample in samples]
        content = json.dumps([SCHEMA, SHARD, mirrored, description, files, lenses], sort_keys=True)
        self._folder = folder / hashlib.blake2b(content.encode(), digest_size=12).hexdigest()
        self._count = len(samples)
        self._mirrored = mirrored
        self._open: dict[int, Any] = {}

    def fill(
        self,
        read: Callable[[int], dict[str, Any]],
        backbones: FrozenBackbones,
        device: torch.device,
        workers: int,
        title: str,
    ) -> None:
        """Computes the shards that are missing, shared by all processes.

        Args:
            read: Returns ``views`` uint8 [1, 3, h, w] of a photo, by its place in the list; and its ``target``, if
                that is to be stored too.
            backbones: Run on each photo.
            device: Where.
            workers: Processes that read ahead.
            title: What is computed.

        Raises:
            UserError: If a photo cannot be read or the disk is full.
        """
        shards = [k for k in range(-(-self._count // SHARD)) if not is_complete_safetensors(self._path(k))]
        wait_for_all()  # until all processes have looked, nobody may add a shard
        shards = shards[rank() :: world_size()]
        indices = [index for shard in shards for index in self._range(shard)]
        pending: list[dict[str, Any]] = []
        with progress(title, len(indices)) as advance:
            for index, sample in ordered_samples(read, indices, workers):
                pending.append(sample)
                shard = index // SHARD
                if index == self._range(shard)[-1]:
                    tensors = self._compute(pending, backbones, device)
                    with atomic_path(self._path(shard)) as temporary:
                        save_file(tensors, temporary)
                    advance(len(pending))
                    pending = []
        wait_for_all()

    def load(
        self, indices: Sequence[int], views: Sequence[int] | None, device: torch.device
    ) -> dict[str, BackboneOutput]:
        """Reads features.

        Args:
            indices: Photos, by their place in the list; B of them.
            views: For each, 0 for the photo, 1 for its mirror image; None: 0 for all.
            device: Where the result goes.

        Returns:
            By backbone: float32 patch tokens [B, C, h, w] and cls [B, C].
        """
        views = views or [0] * len(indices)
        found: dict[str, list[Tensor]] = {}
        for index, view in zip(indices, views):
            handle = self._handle(index // SHARD)
            for name in handle.keys():
                if name == _TARGET:
                    continue
                found.setdefault(name, []).append(handle.get_slice(name)[index % SHARD, view])
        tensors = {name: torch.stack(values).to(device).float() for name, values in found.items()}
        names = dict.fromkeys(name.partition(".")[0] for name in tensors)
        return {name: BackboneOutput(tensors[f"{name}.patch_tokens"], tensors.get(f"{name}.cls")) for name in names}

    def load_target(self, index: int) -> np.ndarray:
        """Reads the truth of a photo, at the size of the features' photo, where it was stored."""
        return self._handle(index // SHARD).get_slice(_TARGET)[index % SHARD].numpy()

    def size_bytes(self) -> int:
        """Returns the bytes on disk."""
        return sum(path.stat().st_size for path in self._folder.glob("*.safetensors"))

    def _compute(self, samples: list[dict[str, Any]], backbones: FrozenBackbones, device: torch.device) -> dict:
        """Returns a shard's tensors: [samples, views, ...] by backbone and token."""
        images = torch.cat([sample["views"] for sample in samples]).to(device).float() / 255
        views = [images, images.flip(-1)] if self._mirrored else [images]
        parts: dict[str, list[Tensor]] = {}
        for view in views:
            for name, output in backbones(view).items():
                parts.setdefault(f"{name}.patch_tokens", []).append(output.patch_tokens.half().cpu())
                if output.cls is not None:
                    parts.setdefault(f"{name}.cls", []).append(output.cls.half().cpu())
        tensors = {name: torch.stack(values, 1) for name, values in parts.items()}
        if "target" in samples[0]:
            tensors[_TARGET] = torch.stack([sample["target"] for sample in samples])
        return tensors

    def _handle(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self._path(shard), framework="pt")
        return self._open[shard]

    def _path(self, shard: int) -> Path:
        return self._folder / f"features_{shard:06d}.safetensors"

    def _range(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, self._count))


def draw_positions(target: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws pixels of a truth [H, W] or [H, W, 3], with repetition.

    Returns:
        Positions float32 [P, 2], (x, y) as shares of width and height, and the truth there, [P] or [P, 3].
    """
    height, width = target.shape[:2]
    row, column = rng.integers(0, height, count), rng.integers(0, width, count)
    return np.stack([(column + 0.5) / width, (row + 0.5) / height], -1).astype(np.float32), target[row, column]


def file_stamp(path: Path) -> tuple[int, int]:
    """Returns what tells a changed file: its size and the time of its last change.

    Raises:
        UserError: If there is no such file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the data folder.") from None
    return status.st_size, status.st_mtime_ns


Features = dict[str, BackboneOutput]
_SAMPLES_MEASURED = 25


class Source(ABC):
    """Features of training batches and of test photos."""

    @abstractmethod
    def training(self, seed: int, start: int, stop: int, batch_size: int) -> Iterator[tuple[Features, LossFunction]]:
        """Yields this process's features of each step, and the loss that belongs to them."""

    @abstractmethod
    def evaluation(self, split: str) -> Iterator[tuple[int, Features, Tensor]]:
        """Yields (place, features of all views, truth) of this process's share of ``validation`` or ``test``."""

    @abstractmethod
    def predict(self, head: torch.nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """Returns a head's prediction of the size of the truth (H, W)."""


@dataclass
class OnlineSource(Source):
    """The full protocol: every photo is read, changed at random and run through the backbones."""

    task: Task
    backbones: FrozenBackbones
    device: torch.device
    workers: int
    fill: Tensor
    """[1, 3, 1, 1] mean colour, in [0, 1]."""

    def training(self, seed: int, start: int, stop: int, batch_size: int) -> Iterator[tuple[Features, LossFunction]]:
        """See `Source`."""
        pin = self.device.type == "cuda"
        batches = training_batches(train_samples(self.task, seed), start, stop, batch_size, self.workers, pin)
        for step, batch in enumerate(batches, start=start):
            batch = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
            features = self.backbones(self.task.prepare_images(batch, self.fill))
            yield features, partial(self.task.loss, target=batch["target"], step=step)

    def evaluation(self, split: str) -> Iterator[tuple[int, Features, Tensor]]:
        """See `Source`."""
        samples = _split(self.task, split)
        indices = list(range(len(samples)))[rank() :: world_size()]
        for index, sample in ordered_samples(partial(_test_sample, self.task, samples), indices, self.workers):
            yield index, self.backbones(sample["views"].to(self.device).float() / 255), sample["target"].to(self.device)

    def predict(self, head: torch.nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """See `Source`."""
        return self.task.predict(head, features, size)


class CachedSource(Source):
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
            question = {**description, **truth} if training else description
            store = FeatureStore(folder, question, samples, mirrored=training and self._recipe.flip)
            read = partial(_whole_sample, self._task, samples, self._size, training)
            store.fill(read, backbones, self._device, self._workers, f"features ({split})")
            self._stores[split] = store
        return sum(store.size_bytes() for store in self._stores.values())

    def training(self, seed: int, start: int, stop: int, batch_size: int) -> Iterator[tuple[Features, LossFunction]]:
        """See `Source`."""
        store, count = self._stores["train"], len(self._task.data.train)
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
            yield features, partial(self._task.sampled_loss, values=truths, step=step)

    def evaluation(self, split: str) -> Iterator[tuple[int, Features, Tensor]]:
        """See `Source`."""
        samples = _split(self._task, split)
        indices = list(range(len(samples)))[rank() :: world_size()]
        for index, sample in ordered_samples(partial(_truth, self._task, samples), indices, self._workers):
            yield index, self._stores[split].load([index], None, self._device), sample["target"].to(self._device)

    def predict(self, head: torch.nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """See `Source`."""
        return self._task.predict_whole(head, features, size)


def train_samples(task: Task, seed: int) -> NumberedSamples:
    """Returns the full protocol's training samples by number, read and augmented by whoever asks."""
    return NumberedSamples(partial(_train_sample, task, task.data.train), len(task.data.train), seed)


def whole_size(task: Task, patch_size: int, long_side: int) -> tuple[int, int]:
    """Returns the size (H, W) that the fast protocol resizes photos to: that of the median shape of some of them."""
    shapes = [
        task.test_target(*task.read(sample))[0].shape for sample in evenly_spaced(task.data.train, _SAMPLES_MEASURED)
    ]
    height, width = sorted(shapes, key=lambda shape: shape[0] / shape[1])[len(shapes) // 2][:2]
    return input_size(height, width, patch_size, long_side)


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
