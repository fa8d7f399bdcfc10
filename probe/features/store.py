"""Features of whole photos on disk, computed once and shared by processes and runs."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fit3d_ns.backbones import BackboneOutput
from fit3d_ns.support.console import rank
from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.files import discard
from fit3d_ns.support.processes import wait_for_all, world_size
from fit3d_ns.support.progress import progress
from fit3d_ns.support.tensor_files import read_tensors, write_tensors
from probe.data.base import Sample, file_stamp
from probe.data.batches import ordered_samples
from probe.features.rows import FrozenBackbones

_LOGGER = logging.getLogger(__name__)
SCHEMA = 3
"""Raise it when the same question comes to be answered in another way."""
SHARD = 16
_TARGET = "target"


class FeatureStore:
    """Features of a list of photos, each resized to one size, and maybe of their mirror images."""

    def __init__(
        self, folder: Path, description: dict[str, Any], samples: Sequence[Sample], mirrored: bool, with_truth: bool
    ) -> None:
        """Names the files; touches nothing but the photos' sizes and times of change.

        Args:
            folder: Where all stores are kept.
            description: What decides the features beside the photos; JSON-able.
            samples: The photos, in order.
            mirrored: Whether there is a second map for each photo, of its mirror image.
            with_truth: Whether the truth is stored too, or decides how photos are resized. Without, all tasks on the
                same photos share a store.
        """
        files = [
            (str(path.resolve()), *file_stamp(path))
            for sample in samples
            for path in ((sample.image, sample.target) if with_truth else (sample.image,))
        ]
        lenses = [sample.intrinsics for sample in samples] if with_truth else None
        content = json.dumps([SCHEMA, SHARD, mirrored, description, files, lenses], sort_keys=True)
        self._samples = samples
        self._folder = folder / hashlib.blake2b(content.encode(), digest_size=12).hexdigest()
        self._count = len(samples)
        self._mirrored = mirrored
        self._open: dict[int, dict[str, Tensor]] = {}

    def fill(
        self,
        read: Callable[[int], dict[str, Any]],
        backbones: FrozenBackbones,
        device: torch.device,
        workers: int,
        title: str,
    ) -> None:
        """Computes the shards that are missing or damaged, shared by all processes.

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
        shards = self._missing(backbones)
        wait_for_all()  # until all processes have looked, nobody may add a shard
        shards = shards[rank() :: world_size()]
        indices = [index for shard in shards for index in self.places(shard)]
        pending: list[dict[str, Any]] = []
        with progress(title, len(indices)) as advance:
            for index, sample in ordered_samples(read, indices, workers):
                pending.append(sample)
                shard = index // SHARD
                if index == self.places(shard)[-1]:
                    tensors = self._compute(pending, backbones, device)
                    self._check(tensors, shard)
                    discard(self._path(shard))
                    write_tensors(self._path(shard), tensors, sync=False)
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
            for name, tensor in handle.items():
                if name != _TARGET:
                    found.setdefault(name, []).append(tensor[index % SHARD, view])
        tensors = {name: torch.stack(values).to(device).float() for name, values in found.items()}
        names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        return {name: BackboneOutput(tensors[f"{name}.patch_tokens"], tensors.get(f"{name}.cls")) for name in names}

    def load_target(self, index: int) -> np.ndarray:
        """Reads the truth of a photo, at the size of the features' photo, where it was stored.

        Args:
            index: Of the photo, in the list.

        Returns:
            [H, W] or [H, W, 3], as the task reads it.
        """
        return self._handle(index // SHARD)[_TARGET][index % SHARD].numpy()

    def shards(self) -> range:
        """Returns the numbers of the shards."""
        return range(-(-self._count // SHARD))

    def load_shard(self, shard: int) -> dict[str, Tensor]:
        """Reads the tokens of a shard as they are stored.

        Args:
            shard: Its number, from 0.

        Returns:
            Half-precision patch tokens [photos, C, h, w] of the photos themselves, by backbone.
        """
        return {
            name.rpartition(".")[0]: tensor[:, 0]
            for name, tensor in self._handle(shard).items()
            if name.endswith(".patch_tokens")
        }

    def places(self, shard: int) -> range:
        """Returns the places of a shard's photos in the list.

        Args:
            shard: Its number, from 0.
        """
        return range(shard * SHARD, min((shard + 1) * SHARD, self._count))

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

    def _check(self, tensors: dict[str, Tensor], shard: int) -> None:
        """Refuses features that are not finite, which a fit would spread over everything."""
        for name, values in tensors.items():
            finite = torch.isfinite(values).flatten(1).all(1)
            if name != _TARGET and not finite.all():
                sample = self._samples[self.places(shard)[int((~finite).nonzero()[0])]]
                raise UserError(
                    f"The features of {name.rpartition('.')[0]} are not finite in half precision, for example for "
                    f"{sample.image}: its weights are damaged, or its training broke down; leave it out."
                )

    def _handle(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._open:
            try:
                self._open[shard] = read_tensors(self._path(shard), values=False).tensors
            except (FileNotFoundError, DamagedFile) as error:
                raise UserError(
                    f"The features {self._path(shard)} are missing or damaged ({error}): start again to make them anew."
                ) from error
        return self._open[shard]

    def _missing(self, backbones: FrozenBackbones) -> list[int]:
        """Returns the shards without a whole file; the first process tells of those that were damaged."""
        missing, damaged = [], []
        for shard in self.shards():
            path = self._path(shard)
            try:
                self._check_shard(read_tensors(path).tensors, shard, backbones)
            except FileNotFoundError:
                missing.append(shard)
            except DamagedFile as error:
                missing.append(shard)
                damaged.append(f"{path}: {error}")
        if damaged and rank() == 0:
            _LOGGER.warning(f"{len(damaged)} files of features are damaged and made anew, such as {damaged[0]}.")
        return missing

    def _check_shard(self, tensors: dict[str, Tensor], shard: int, backbones: FrozenBackbones) -> None:
        """Refuses tensors that are not this shard's, whose checksum is right."""
        photos = len(self.places(shard))
        for name in backbones.names:
            tokens = tensors.get(f"{name}.patch_tokens")
            if tokens is None or tokens.dtype != torch.float16 or tokens.shape[:2] != (photos, 1 + self._mirrored):
                raise DamagedFile(f"{name}.patch_tokens is missing, or of another type or shape")

    def _path(self, shard: int) -> Path:
        return self._folder / f"features_{shard:06d}.safetensors"
