"""Training samples as a pure function of (seed, number): no sampler state, nothing to save but the step."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fit3d_ns.support.console import rank
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import world_size


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, 0])).permutation(count)


def sample_index(seed: int, number: int, count: int) -> int:
    """Returns which of ``count`` samples the ``number``-th of the whole training is: epochs of permutations.

    Args:
        seed: Of the order.
        number: Of the sample in the whole training, from 0.
        count: Samples of the data set.
    """
    epoch, place = divmod(number, count)
    return int(_permutation(seed, epoch, count)[place])


def sample_rng(seed: int, number: int) -> np.random.Generator:
    """Returns the random generator of the ``number``-th sample of the whole training.

    Args:
        seed: Of the training.
        number: Of the sample in the whole training, from 0.
    """
    return np.random.default_rng(np.random.SeedSequence([seed, number, 1]))


def local_numbers(step: int, batch_size: int) -> list[int]:
    """Returns the numbers of this process's samples in a step: a contiguous share of the step's.

    Args:
        step: From 0.
        batch_size: Samples of a step over all processes, a multiple of their number.
    """
    share = batch_size // world_size()
    first = step * batch_size + rank() * share
    return list(range(first, first + share))


def check_batch_size(batch_size: int, group: int) -> None:
    """Checks that a batch can be shared out.

    Args:
        batch_size: Samples in a step.
        group: Samples that a loss takes together, and that must not be torn apart.

    Raises:
        UserError: If it cannot.
    """
    unit = world_size() * group
    if world_size() > 1 and batch_size % unit:
        together = f" in groups of {group}" if group > 1 else ""
        raise UserError(
            f"--batch-size {batch_size} cannot be shared by {world_size()} processes{together}: give a multiple of "
            f"{unit}."
        )


class NumberedSamples(Dataset):
    """Samples by their number in the whole training."""

    def __init__(self, make: Callable[[int, np.random.Generator], dict[str, Any]], count: int, seed: int) -> None:
        """Remembers how to make samples.

        Args:
            make: Returns a sample, given its index and random generator.
            count: Number of samples in the split.
            seed: Of order and augmentation.
        """
        self._make, self._count, self._seed = make, count, seed

    def __getitem__(self, number: int) -> Any:
        """Returns the sample, or the error that the user caused, which a worker's process would bury in a traceback."""
        try:
            return self._make(sample_index(self._seed, number, self._count), sample_rng(self._seed, number))
        except UserError as error:
            return error


class _Steps:
    """Batches of sample numbers from one step to another."""

    def __init__(self, start: int, stop: int, batch_size: int) -> None:
        self._steps, self._batch_size = range(start, stop), batch_size

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        return (local_numbers(step, self._batch_size) for step in self._steps)


def training_batches(
    samples: NumberedSamples, start: int, stop: int, batch_size: int, workers: int, pin: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields this process's batches of the steps from ``start`` to ``stop``.

    Args:
        samples: By number, read and augmented by whoever asks.
        start: First step, from 0.
        stop: The step after the last.
        batch_size: Samples of a step over all processes.
        workers: Processes that read ahead; 0 for none.
        pin: Whether batches go into page-locked memory.

    Raises:
        UserError: If a sample cannot be read.
    """
    steps: Any = _Steps(start, stop, batch_size)
    loader = DataLoader(
        samples,
        batch_sampler=steps,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=partial(_begin_reader, os.getpid()),
        prefetch_factor=4 if workers else None,
    )
    with _whole_readers():
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def ordered_samples(
    make: Callable[[int], dict[str, Any]], indices: list[int], workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (index, sample) one by one, read ahead by workers.

    Args:
        make: Takes an index to its sample.
        indices: In the order wanted.
        workers: Processes that read ahead; 0 for none.

    Raises:
        UserError: If a sample cannot be read.
    """
    begin = partial(_begin_reader, os.getpid())
    loader = DataLoader(_Indexed(make, indices), batch_size=None, num_workers=workers, worker_init_fn=begin)
    with _whole_readers():
        for index, sample in zip(indices, loader):
            if isinstance(sample, UserError):
                raise sample
            yield index, sample


@contextmanager
def _whole_readers() -> Iterator[None]:
    """Says in one sentence that a process which reads photos was ended."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            "A process that reads photos was ended (out of memory?): start again, with fewer --workers."
        ) from error


class _Indexed(Dataset):
    def __init__(self, make: Callable[[int], dict[str, Any]], indices: list[int]) -> None:
        self._make, self._indices = make, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> Any:
        try:
            return self._make(self._indices[place])
        except UserError as error:
            return error


def _collate(samples: list[Any]) -> Any:
    error = next((sample for sample in samples if isinstance(sample, UserError)), None)
    return error if error is not None else torch.utils.data.default_collate(samples)


def _begin_reader(reads_for: int, _: int) -> None:
    """Begins a process that reads photos, and ends it with the one that it reads for, whenever that is killed.

    torch's readers watch their parent from a moment later on, and take whatever is the parent then for it: one whose
    parent was gone by then stays for ever, and holds the output folder's lock.
    """
    torch.set_num_threads(1)
    threading.Thread(target=_end_without, args=(reads_for,), daemon=True).start()


def _end_without(process: int) -> None:
    while os.getppid() == process:
        time.sleep(1.0)
    os._exit(1)
