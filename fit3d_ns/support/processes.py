"""One process among any number, as ``torchrun`` starts them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fit3d_ns.support.errors import UserError

_LONGEST_WAIT = timedelta(hours=6)
"""Processes wait for the first one while it makes bundles, decodes photos or computes features."""


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

    def smallest(self, *numbers: int) -> list[int]:
        """Returns each number's smallest value over all processes.

        Args:
            *numbers: As many in every process.
        """
        values = torch.tensor(numbers, device=self.device)
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values.tolist()


@contextmanager
def join_world(device: str, again: str = "start again") -> Iterator[World]:
    """Joins the processes that ``torchrun`` started; alone without it.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; under torchrun, a GPU is that of the local rank.
        again: What to do after another process ended, for the sentence that says so.

    Yields:
        The world.

    Raises:
        UserError: If there is no such device, no GPU for this process, or another process ended.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    here = _choose_device(device, local_rank if size > 1 else None)
    world = World(int(os.environ.get("RANK", "0")), size, here, local_rank, local_size)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    if size == 1:
        yield world
        return
    backend, device_id = ("nccl", here) if here.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=_LONGEST_WAIT, device_id=device_id)
    try:
        yield world
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(word in str(error) for word in ("by peer", "gloo", "NCCL"))
        if isinstance(error, UserError) or not lost:
            raise
        raise UserError(f"Another process of this run ended: see its message, then {again}.") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _choose_device(name: str, local_rank: int | None) -> torch.device:
    """Returns the device that ``--device`` means to this process, with its number if it is a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported: give auto, cpu, cuda or cuda:N.")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch finds no CUDA device here; use --device cpu.")
    number, found = (device.index or 0) if local_rank is None else local_rank, torch.cuda.device_count()
    if number >= found:
        raise UserError(
            f"--device {name}: this machine has {found} (cuda:0 is the first)."
            if local_rank is None
            else f"Process {number} of this machine has no GPU of its own, there are {found}: lower --nproc-per-node."
        )
    return torch.device("cuda", number)


def world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def require_one_process(probe: str) -> None:
    """Checks that a probe that has nothing to share is not started by torchrun.

    Args:
        probe: Name of the probe, for the sentence.

    Raises:
        UserError: If it is.
    """
    if world_size() > 1:
        raise UserError(f"{probe} runs in one process: start it without torchrun.")


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces gradients by their mean over all processes.

    Args:
        parameters: The same ones, in the same order, in every process; those without a gradient are left out.
    """
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


def sum_over_processes(value: Tensor) -> Tensor:
    """Returns the sum of all processes' tensors.

    Args:
        value: This process's, of one shape everywhere; changed in place.
    """
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def gather_objects(value: Any) -> list[Any]:
    """Returns every process's small value, in the order of ranks.

    Args:
        value: Anything that pickles, small: it goes through every process.
    """
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
        """Normalizes [B, C, h, w].

        Args:
            input: [B, C, h, w], float32.

        Returns:
            [B, C, h, w], normalised by the mean and variance over all processes while training.
        """
        if not self.training or world_size() == 1:
            return super().forward(input)
        output = self.standardize(input)
        if self.weight is not None:
            output = output * self.weight[None, :, None, None]
        return output if self.bias is None else output + self.bias[None, :, None, None]

    def standardize(self, input: torch.Tensor) -> torch.Tensor:
        """Normalizes by the batch, without scale and shift, and follows its statistics, as training does.

        Args:
            input: [B, C, h, w], float32.

        Returns:
            [B, C, h, w], of mean 0 and variance 1 over all processes.
        """
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        momentum = self.momentum or 0.0
        self.num_batches_tracked.add_(1)
        if world_size() == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, None, None, True, momentum, self.eps)
        count = torch.tensor([input.numel() / input.shape[1]], device=input.device)
        dist.all_reduce(count)
        mean = _SumOverProcesses.apply(input.sum((0, 2, 3))) / count
        centred = input - mean[None, :, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * count / (count - 1), momentum)
        return centred * torch.rsqrt(variance + self.eps)[None, :, None, None]
