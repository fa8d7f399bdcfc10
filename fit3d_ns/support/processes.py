"""One process among any number, as ``torchrun`` starts them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

from fit3d_ns.support.errors import UserError

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


def rank() -> int:
    """Returns the number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Joins torchrun's processes, if started by it, and lends this process's device.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Yields:
        The device; under torchrun, the GPU of the local rank.

    Raises:
        UserError: If a GPU is asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device} is no device: give auto, cpu, cuda or cuda:N.") from None
    if chosen.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device} is not supported: give auto, cpu, cuda or cuda:N.")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no CUDA device is available, use --device cpu.")
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if chosen.type == "cuda":
        number = (chosen.index or 0) if alone else int(os.environ.get("LOCAL_RANK", "0"))
        if number >= torch.cuda.device_count():
            wanted = f"--device {device}" if alone else f"Process {number} of torchrun has no GPU of its own"
            raise UserError(f"{wanted}: this machine has {torch.cuda.device_count()} (cuda:0 is the first).")
        chosen = chosen if alone else torch.device("cuda", number)
    if alone:
        yield chosen
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # A shared step may wait for one process that caches the features.
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def require_one_process(probe: str) -> None:
    """Checks that a probe that has nothing to share is not started by torchrun.

    Raises:
        UserError: If it is.
    """
    if world_size() > 1:
        raise UserError(f"{probe} runs in one process: start it without torchrun.")


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces gradients by their mean over all processes."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    offset = 0
    for gradient in gradients:
        gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


def gather_objects(value: Any) -> list[Any]:
    """Returns every process's small value, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    """Returns when all processes have come here."""
    if world_size() > 1:
        dist.barrier()


class _SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on any device; in one process, torch's own.

    torch's SyncBatchNorm runs on GPUs only, and a protocol whose result depends on the number of processes could not
    be tested without them.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalizes [B, C, h, w]."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        count = torch.tensor([input.numel() / input.shape[1]], device=input.device)
        dist.all_reduce(count)
        mean = _SumOverProcesses.apply(input.sum((0, 2, 3))) / count
        centred = input - mean[None, :, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            momentum = self.momentum or 0.0
            with torch.no_grad():
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / (count - 1), momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked += 1
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        output = centred * scale[None, :, None, None]
        return output if self.bias is None else output + self.bias[None, :, None, None]
