"""One process among any number, as ``torchrun`` starts them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from fit3d_ns.errors import UserError

_LONGEST_WAIT = timedelta(hours=6)
"""Processes wait for each other while bundles are made and photos decoded."""


@dataclass(frozen=True)
class World:
    """This process and its fellows."""

    rank: int
    """Number of this process, from 0."""
    size: int
    """Number of processes."""
    device: torch.device
    """Where this process computes."""
    local_rank: int = 0
    """Number of this process on its machine, from 0."""
    local_size: int = 1
    """Number of processes on this machine."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def say(self, sentence: str) -> None:
        """Prints a line, once for all processes."""
        if self.is_main:
            Console().print(sentence, markup=False, highlight=False, soft_wrap=True)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of a tensor over all processes; ``values`` itself is changed."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def smallest(self, *numbers: int) -> list[int]:
        """Returns each number's smallest value over all processes."""
        values = torch.tensor(numbers, device=self.device)
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values.tolist()


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Joins the processes that ``torchrun`` started; alone without it.

    Args:
        device: ``auto``, ``cuda`` or ``cpu``.

    Yields:
        The world.

    Raises:
        UserError: If there is no GPU for this process, or another process ended.
    """
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu, or install torch for CUDA.")
    kind = "cuda" if device == "cuda" or (device == "auto" and cuda) else "cpu"
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"Process {local_rank} of this machine finds only {torch.cuda.device_count()} GPUs: lower "
                "--nproc-per-node."
            )
        torch.cuda.set_device(local_rank)
    here = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    world = World(rank, size, here, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
    if size == 1:
        yield world
        return
    device_id = world.device if kind == "cuda" else None
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_LONGEST_WAIT, device_id=device_id)
    try:
        yield world
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(word in str(error) for word in ("by peer", "gloo", "NCCL"))
        if isinstance(error, UserError) or not lost:
            raise
        raise UserError(
            "Another process of this run ended: see its message, then start again with --resume."
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
