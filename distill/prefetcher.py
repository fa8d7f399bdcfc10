"""What each step needs, prepared ahead of it: targets rendered scene by scene, photos read in the background."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from distill.config import DistillConfig
from distill.photo_store import PhotoStore, ViewKey
from distill.sampler import Batch, BatchView, Sampler
from distill.scenes import Scene, SceneCache
from distill.step import StepInput
from distill.targets import TargetSource
from fit3d_ns.support.processes import World, sum_over_processes


@dataclass
class _Window:
    """Consecutive steps whose targets are made together."""

    batches: list[Batch]
    jobs: list[tuple[int, list[int]]]
    """Scene and views of one size that are still to be made."""
    made: dict[ViewKey, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Target map (half precision) and weights of each view."""


class Prefetcher:
    """Prepares this process's share of every batch.

    Steps are grouped into windows. While a window is trained on, the targets of the next are made, a few views of one
    scene at a time; on CUDA on a stream of their own, beside the training step. Which views are made together depends
    on the step alone, so a resumed run makes the same targets to the last bit.

    Args:
        scenes: As opened; a scene's number is its place in this list.
        sampler: Which views make up which step.
        source: Makes targets.
        scene_cache: Told which scenes are needed next.
        photos: Where photos are.
        config: The user's choices.
        world: This process among its fellows.
        kept_bytes: Device memory for targets: if those of all views fit, each is made once.
    """

    def __init__(
        self,
        scenes: list[Scene],
        sampler: Sampler,
        source: TargetSource,
        scene_cache: SceneCache,
        photos: PhotoStore,
        config: DistillConfig,
        world: World,
        kept_bytes: int = 0,
    ):
        self._scenes = scenes
        self._sampler = sampler
        self._source = source
        self._scene_cache = scene_cache
        self._photos = photos
        self._views_per_render = config.views_per_render
        self._share = sampler.batch_size // world.size
        self._window_steps = max(1, config.render_ahead // self._share)
        self._world = world
        self._kept: dict[ViewKey, tuple[Tensor, Tensor]] = {}
        self._keeps = _target_bytes(scenes) <= kept_bytes
        # Urgent: rendering waits for the device in between, and the next step cannot be launched meanwhile.
        self._stream = torch.cuda.Stream(world.device, priority=-1) if world.device.type == "cuda" else None

    def steps(self, start: int, stop: int) -> Iterator[tuple[Batch, StepInput]]:
        """Yields the steps from ``start`` to before ``stop``.

        Args:
            start: First step, from 0.
            stop: The step after the last.
        """
        if start >= stop:
            return
        windows = self._windows(start, stop)
        window = next(windows, None)
        if window is not None:
            self._work(window, len(window.jobs))
        while window is not None:
            self._hand_over(window)
            following = next(windows, None)
            steps = [batch for batch in window.batches if batch.step >= start]
            for number, batch in enumerate(steps):
                if following is not None:
                    self._work(following, math.ceil(len(following.jobs) / (len(steps) - number)))
                yield batch, self._assemble(batch, window)
            window = following

    def _windows(self, start: int, stop: int) -> Iterator[_Window]:
        first = start - start % self._window_steps
        batches = self._sampler.batches(first, stop)
        for _, members in groupby(batches, key=lambda batch: batch.step // self._window_steps):
            yield self._plan(list(members))

    def _plan(self, batches: list[Batch]) -> _Window:
        needed = sorted({(sample.scene, sample.view) for batch in batches for sample in self._local(batch)})
        self._photos.prefetch(needed)
        missing = [view for view in needed if view not in self._kept]
        jobs = []
        for (scene, _), members in groupby(missing, key=lambda view: (view[0], self._grid(view))):
            views = [view for _, view in members]
            for first in range(0, len(views), self._views_per_render):
                jobs.append((scene, views[first : first + self._views_per_render]))
        return _Window(batches, jobs)

    def _work(self, window: _Window, count: int) -> None:
        if not window.jobs:
            return
        for scene, views in window.jobs[:count]:
            with self._on_stream():
                targets = self._source.make(scene, views)
                # Apart from each other, so that no view keeps the memory of its neighbours.
                maps, weights = targets.maps.half().unbind(), targets.weights.unbind()
                for view, target_map, weight in zip(views, maps, weights):
                    window.made[scene, view] = (target_map.clone(), weight.clone())
        del window.jobs[:count]
        if not window.jobs:
            # Not earlier: making room for the next scenes must not evict those that this window still needs.
            last = window.batches[-1]
            upcoming = [scene for scene in last.next_block if self._needs(scene, window)]
            with self._on_stream():
                self._scene_cache.prefetch(upcoming, in_use=last.block)

    def _needs(self, scene: int, window: _Window) -> bool:
        """Whether a later window may ask the cache for a scene."""
        if not self._source.needs(scene):
            return False
        if not self._keeps:
            return True
        views = self._scenes[scene].info.indices("train")
        return any((scene, view) not in self._kept and (scene, view) not in window.made for view in views)

    def _hand_over(self, window: _Window) -> None:
        """Makes a window's targets safe to use on the training stream."""
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._world.device)
            stream.wait_stream(self._stream)
            for tensors in window.made.values():
                for tensor in tensors:
                    tensor.record_stream(stream)
        if self._keeps:
            self._kept.update(window.made)

    def _assemble(self, batch: Batch, window: _Window) -> StepInput:
        samples = self._local(batch)
        device = self._world.device
        # A process that is left without a view at the end of an epoch takes part with one that counts for nothing.
        shown = samples or list(batch.samples[:1])
        images = self._photos.get([(sample.scene, sample.view) for sample in shown])
        grid = self._grid((shown[0].scene, shown[0].view))
        pairs = [self._target((sample.scene, sample.view), window) for sample in samples]
        channels = self._scenes[0].info.teacher["width"]
        targets = torch.zeros(self._share, channels, *grid, device=device, dtype=torch.float16)
        weights = torch.zeros(self._share, *grid, device=device)
        if pairs:
            flips = torch.tensor([sample.flip for sample in samples]).to(device, non_blocking=True)
            images = _mirrored(images, flips)
            targets[: len(pairs)] = _mirrored(torch.stack([target_map for target_map, _ in pairs]), flips)
            weights[: len(pairs)] = _mirrored(torch.stack([weight for _, weight in pairs]), flips)
        if len(images) < self._share:
            images = torch.cat([images, images[:1].expand(self._share - len(images), -1, -1, -1)])
        total_weight = sum_over_processes(weights.sum())
        fullness = torch.tensor(len(batch.samples) / self._sampler.batch_size).to(device, non_blocking=True)
        return StepInput(images, targets, weights, total_weight, fullness)

    def _target(self, view: ViewKey, window: _Window) -> tuple[Tensor, Tensor]:
        return self._kept[view] if view in self._kept else window.made[view]

    def _local(self, batch: Batch) -> list[BatchView]:
        return list(batch.samples[self._world.rank :: self._world.size])

    def _grid(self, view: ViewKey) -> tuple[int, int]:
        return self._scenes[view[0]].info.patch_grid(view[1])

    def _on_stream(self) -> AbstractContextManager:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def _mirrored(values: Tensor, flips: Tensor) -> Tensor:
    """Mirrors the rows of a batch that ``flips`` [B] marks, along the last dimension."""
    return torch.where(flips.view(-1, *[1] * (values.dim() - 1)), values.flip(-1), values)


def _target_bytes(scenes: list[Scene]) -> int:
    """Memory of all training views' targets in half precision, with their weights."""
    width = scenes[0].info.teacher["width"]
    patches = sum(rows * columns for scene in scenes for rows, columns in scene.sampled_views().grids)
    return patches * (2 * width + 4)
