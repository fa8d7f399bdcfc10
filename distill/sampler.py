"""Which views make up which step: a pure function of the seed and the step.

A run that is killed and resumed, or cut over other numbers of processes, therefore sees the same batches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BatchView:
    """One view in a batch."""

    scene: int
    """Position of its scene."""
    view: int
    """Position of the view in its scene."""
    flip: bool
    """Whether photo and target are mirrored."""


@dataclass(frozen=True)
class Batch:
    """The views of one optimizer step, all of one size, over all processes together."""

    step: int
    """From 0."""
    samples: tuple[BatchView, ...]
    """At most ``batch_size``; fewer where views of this size have run out in this epoch."""
    block: tuple[int, ...] = ()
    """Scenes of the block that the views are from."""
    next_block: tuple[int, ...] = ()
    """Scenes of the block after this one, to be fetched meanwhile; empty where all scenes are one block."""


@dataclass(frozen=True)
class SceneViews:
    """What the sampler needs to know of a scene."""

    views: tuple[int, ...]
    """Views to train on."""
    grids: tuple[tuple[int, int], ...]
    """Patch grid (h, w) of each of them."""
    num_bytes: int
    """Memory that the scene takes on the device."""


class Sampler:
    """Shuffles views over all scenes, or over blocks of scenes that fit the device together.

    Every epoch shows every view exactly once. A batch holds views of one size.

    Args:
        scenes: As opened; a scene's number is its place in this list.
        batch_size: Views per step.
        seed: Of the order and of mirroring.
        flip: Share of views that are mirrored.
        block_bytes: Memory that the scenes of a block may take; None: all scenes are one block.
    """

    def __init__(
        self,
        scenes: Sequence[SceneViews],
        batch_size: int,
        seed: int,
        flip: float = 0.5,
        block_bytes: int | None = None,
    ):
        self._scenes = scenes
        self._batch_size = batch_size
        self._seed = seed
        self._flip = flip
        self.block_bytes = block_bytes

    @property
    def batch_size(self) -> int:
        """Most views of a step, over all processes."""
        return self._batch_size

    @property
    def num_views(self) -> int:
        """Views in an epoch."""
        return sum(len(scene.views) for scene in self._scenes)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Patch grid (h, w) of every view of an epoch."""
        return [grid for scene in self._scenes for grid in scene.grids]

    def epoch(self, epoch: int) -> list[tuple[BatchView, ...]]:
        """Returns the batches of an epoch, in order.

        Args:
            epoch: Its number, from 0.
        """
        return [samples for block in self._epoch_by_block(epoch)[1] for samples in block]

    def steps_of(self, epochs: float) -> int:
        """Returns how many steps so many epochs take, at least 1.

        Args:
            epochs: Passes over all views; a part of one counts.
        """
        whole = int(epochs)
        steps = sum(len(self.epoch(epoch)) for epoch in range(whole))
        if epochs > whole:
            steps += round((epochs - whole) * len(self.epoch(whole)))
        return max(steps, 1)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yields the batches of the steps from ``start`` to before ``stop``.

        Args:
            start: First step, from 0.
            stop: The step after the last.
        """
        epoch, step = 0, 0
        while step < stop:
            blocks, batches = self._epoch_by_block(epoch)
            following = [*blocks[1:], self._epoch_by_block(epoch + 1)[0][0]] if len(blocks) > 1 else [[]]
            for block, next_block, block_batches in zip(blocks, following, batches):
                for samples in block_batches:
                    if start <= step < stop:
                        yield Batch(step, samples, tuple(block), tuple(next_block))
                    step += 1
            epoch += 1

    def _epoch_by_block(self, epoch: int) -> tuple[list[list[int]], list[list[tuple[BatchView, ...]]]]:
        """The blocks of an epoch, and for each its batches."""
        random = np.random.default_rng([self._seed, epoch])
        blocks = self._blocks(random)
        return blocks, [self._block_batches(block, random) for block in blocks]

    def _blocks(self, random: np.random.Generator) -> list[list[int]]:
        order = [int(scene) for scene in random.permutation(len(self._scenes))]
        if self.block_bytes is None:
            return [order]
        blocks: list[list[int]] = []
        free = 0
        for scene in order:
            if not blocks or self._scenes[scene].num_bytes > free:
                blocks.append([])
                free = self.block_bytes
            blocks[-1].append(scene)
            free -= self._scenes[scene].num_bytes
        return blocks

    def _block_batches(self, block: list[int], random: np.random.Generator) -> list[tuple[BatchView, ...]]:
        views = [
            (scene, view, grid)
            for scene in sorted(block)
            for view, grid in zip(self._scenes[scene].views, self._scenes[scene].grids)
        ]
        flips = random.random(len(views)) < self._flip
        by_grid: dict[tuple[int, int], list[BatchView]] = {}
        for index in random.permutation(len(views)):
            scene, view, grid = views[index]
            by_grid.setdefault(grid, []).append(BatchView(scene, view, bool(flips[index])))
        size = self._batch_size
        batches = [
            tuple(samples[first : first + size])
            for _, samples in sorted(by_grid.items())
            for first in range(0, len(samples), size)
        ]
        return [batches[index] for index in random.permutation(len(batches))]
