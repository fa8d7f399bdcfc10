"""Features of whole photos on disk, computed once and shared by processes and runs."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fit3d_ns.backbones import BackboneOutput
from fit3d_ns.support.console import rank
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_path, is_complete_safetensors
from fit3d_ns.support.processes import wait_for_all, world_size
from fit3d_ns.support.progress import progress
from probe.data.base import Sample, file_stamp
from probe.data.batches import ordered_samples
from probe.features import FrozenBackbones

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
        self._samples = samples
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
        shards = [k for k in self.shards() if not is_complete_safetensors(self._path(k))]
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
                    self._check(tensors, shard)
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
        names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        return {name: BackboneOutput(tensors[f"{name}.patch_tokens"], tensors.get(f"{name}.cls")) for name in names}

    def load_target(self, index: int) -> np.ndarray:
        """Reads the truth of a photo, at the size of the features' photo, where it was stored."""
        return self._handle(index // SHARD).get_slice(_TARGET)[index % SHARD].numpy()

    def shards(self) -> range:
        """Returns the numbers of the shards."""
        return range(-(-self._count // SHARD))

    def load_shard(self, shard: int) -> tuple[range, dict[str, Tensor]]:
        """Reads a shard as it is stored.

        Returns:
            The places of its photos in the list; half-precision patch tokens [photos, C, h, w] of the photos
            themselves by backbone, and their ``target``, if it was stored.
        """
        handle = self._handle(shard)
        tensors = {
            name.rpartition(".")[0]: handle.get_slice(name)[:, 0]
            for name in handle.keys()
            if name.endswith(".patch_tokens")
        }
        if _TARGET in handle.keys():
            tensors[_TARGET] = handle.get_tensor(_TARGET)
        return self._range(shard), tensors

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
                sample = self._samples[self._range(shard)[int((~finite).nonzero()[0])]]
                raise UserError(
                    f"The features of {name.rpartition('.')[0]} are not finite in half precision, for example for "
                    f"{sample.image}: its weights are damaged, or its training broke down; leave it out."
                )

    def _handle(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self._path(shard), framework="pt")
        return self._open[shard]

    def _path(self, shard: int) -> Path:
        return self._folder / f"features_{shard:06d}.safetensors"

    def _range(self, shard: int) -> range:
        return range(shard * SHARD, min((shard + 1) * SHARD, self._count))
