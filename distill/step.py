"""One optimizer step, plain, as one CUDA graph or with fused kernels, and the choice between them."""

import contextlib
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from distill.recipes import Recipe
from fit3d_ns.backbones import Backbone
from fit3d_ns.support.errors import UserError, first_line

Acceleration = Literal["none", "graph", "compile"]
_SAVED = 9e-11
"""Seconds that fused kernels save for each number of a block's output in a view: .83 ms of 9.5 million in a ViT-S/14 of
12 blocks at 518x784, .42 of 4.5 million in one of 9 blocks at 504x504, on an H200 (docs/benchmarks.md)."""
_START = 2.5
"""Seconds that compiling takes for each block of the student and size of photo: 30 for 12, the longest seen."""
_MOST_SIZES = 8
"""torch compiles a function for no more different shapes."""


@dataclass(frozen=True)
class StepInput:
    """This process's share of a batch, on the device."""

    images: UInt8[Tensor, "B 3 H W"]
    """Photos at the student's size."""
    targets: Float[Tensor, "B C h w"]
    """What the student should say."""
    weights: Float[Tensor, "B h w"]
    """How much each patch counts; zero for rows that only fill up the share."""
    total_weight: Float[Tensor, ""]
    """Sum of the weights over the whole batch, of all processes."""
    fullness: Float[Tensor, ""]
    """Views of the whole batch over the batch size, in (0, 1]: the gradient of a batch that is not full counts less,
    so that each view counts the same."""


class DistillLoss(nn.Module):
    """The student's weighted L1 distance from its targets, at patch resolution (FiT3D, equation 5).

    Divided by the weight of the whole batch, so that parts of a batch, and shares of processes, simply add up.

    Args:
        student: A backbone in training.
        bf16: Whether the student computes in bf16 (weights and loss stay fp32).
    """

    def __init__(self, student: Backbone, bf16: bool):
        super().__init__()
        self.student = student
        self._bf16 = bf16

    def forward(
        self,
        images: UInt8[Tensor, "B 3 H W"],
        targets: Float[Tensor, "B C h w"],
        weights: Float[Tensor, "B h w"],
        total_weight: Float[Tensor, ""],
    ) -> Float[Tensor, ""]:
        """Returns this part's summand of the batch's mean loss; see `StepInput`.

        Args:
            images: 8-bit RGB at the student's size.
            targets: Maps at patch resolution, in any precision.
            weights: How much each patch counts, in [0, 1].
            total_weight: Sum of the weights of the whole batch, over all parts and processes.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self._bf16):
            features = self.student(images.float() / 255.0).patch_tokens  # [B, C, h, w]
        distance = (features.float() - targets.float()).abs().mean(1)  # [B, h, w]
        # Where a whole batch is masked out the sum is zero, and so is the loss.
        return (distance * weights).sum() / total_weight.clamp_min(1e-6)


class StepRunner(Protocol):
    """Runs optimizer steps."""

    def run(self, inputs: StepInput) -> Float[Tensor, ""]:
        """Takes one step, without waiting for the device.

        Where a gradient is NaN or infinite no weight is changed, and NaN is returned.

        Args:
            inputs: This process's share of the batch, on the device.

        Returns:
            This process's summand of the loss.
        """
        ...


class EagerStep:
    """A step as it is written, also under DistributedDataParallel.

    Args:
        loss: `DistillLoss`, possibly wrapped or compiled.
        optimizer: Of ``parameters``.
        parameters: The trained weights.
        clip: Largest norm of the gradient; 0 for no limit.
        num_parts: Into so many parts the share of the batch is cut, one after the other.
        num_processes: DistributedDataParallel averages over so many; the loss is a sum.
    """

    def __init__(
        self,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        clip: float,
        num_parts: int = 1,
        num_processes: int = 1,
    ):
        self._loss = loss
        self._optimizer = optimizer
        self._parameters = parameters
        self._parts = num_parts
        self._clip = clip or math.inf
        self._num_processes = num_processes

    def run(self, inputs: StepInput) -> Float[Tensor, ""]:
        """See `StepRunner.run`.

        Args:
            inputs: This process's share of the batch, on the device.

        Returns:
            This process's summand of the loss; see `StepRunner.run`.
        """
        self._optimizer.zero_grad(set_to_none=True)
        total = self.forward_backward(inputs)
        norm = nn.utils.clip_grad_norm_(self._parameters, self._clip)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, inputs.fullness)  # after clipping, which would undo it
        broken = ~torch.isfinite(norm)
        if norm.is_cuda:
            # Fused optimizers read this on the device, where a CUDA graph cannot branch; see `make_optimizer`.
            self._optimizer.found_inf = broken.float()  # type: ignore[attr-defined]
            self._optimizer.step()
        elif not bool(broken):
            self._optimizer.step()
        return torch.where(broken, torch.nan, total)

    def forward_backward(self, inputs: StepInput) -> Float[Tensor, ""]:
        """Adds the gradients of all parts of the share.

        Args:
            inputs: This process's share of the batch, on the device.

        Returns:
            The summed loss of the parts.

        Raises:
            UserError: If torch.compile fails, which happens at the first step of each shape.
        """
        try:
            return self._forward_backward(inputs)
        except RuntimeError as error:
            if not _is_of_compiler(error):
                raise
            # What torch wraps, where it does, is the reason; the wrapper's first line only names the backend.
            reason = first_line(getattr(error, "inner_exception", error))
            raise UserError(
                f"torch.compile failed ({reason}): use --acceleration graph (on a single GPU) or none."
            ) from error

    def _forward_backward(self, inputs: StepInput) -> Float[Tensor, ""]:
        parts = list(
            zip(
                inputs.images.chunk(self._parts),
                inputs.targets.chunk(self._parts),
                inputs.weights.chunk(self._parts),
            )
        )
        total = inputs.total_weight.new_zeros(())
        for number, (images, targets, weights) in enumerate(parts, start=1):
            # Gradients need to be exchanged between processes only once.
            no_sync = getattr(self._loss, "no_sync", None)
            waits = no_sync is not None and number < len(parts)
            with no_sync() if waits and no_sync is not None else contextlib.nullcontext():
                loss = self._loss(images, targets, weights, inputs.total_weight)
                (loss * self._num_processes).backward()
            total = total + loss.detach()
        return total


def _is_of_compiler(error: RuntimeError) -> bool:
    # By name, for importing the compiler takes seconds.
    return any(kind.__module__.startswith(("torch._dynamo.", "torch._inductor.")) for kind in type(error).__mro__)


class GraphStep:
    """The same step captured once for each shape of input and replayed: one launch instead of thousands.

    Args:
        eager: The step to capture.
        optimizer: With tensors for learning rates, see `make_optimizer`.
        parameters: The trained weights.
    """

    def __init__(self, eager: EagerStep, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]):
        self._eager = eager
        self._optimizer = optimizer
        self._parameters = parameters
        self._graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, StepInput, Tensor]] = {}
        # Graphs never run at the same time, so all shapes can share the memory of the largest.
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, inputs: StepInput) -> Float[Tensor, ""]:
        """See `StepRunner.run`.

        Args:
            inputs: This process's share of the batch, on the device.

        Returns:
            This process's summand of the loss; see `StepRunner.run`.
        """
        if inputs.images.shape not in self._graphs:
            self._graphs[inputs.images.shape] = self._capture(inputs)
        graph, held, loss = self._graphs[inputs.images.shape]
        for name, tensor in vars(held).items():
            tensor.copy_(getattr(inputs, name))
        graph.replay()
        return loss.clone()

    def _capture(self, inputs: StepInput) -> tuple[torch.cuda.CUDAGraph, StepInput, Tensor]:
        held = StepInput(**{name: tensor.clone() for name, tensor in vars(inputs).items()})
        try:
            self._make_optimizer_state()
            # Libraries choose their algorithms and workspaces at first use, which a capture must not see.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._optimizer.zero_grad(set_to_none=True)
                    self._eager.forward_backward(held)
            torch.cuda.current_stream().wait_stream(side)
            self._optimizer.zero_grad(set_to_none=True)
            gc.collect()  # a graph of an earlier training that is collected meanwhile would end the capture
            graph = torch.cuda.CUDAGraph()
            # Photos and scenes arrive in other threads, whose calls must not break the capture.
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                loss = self._eager.run(held)
        except (torch.cuda.OutOfMemoryError, UserError):
            raise
        except RuntimeError as error:
            raise UserError(
                f"The training step could not be captured as a CUDA graph ({first_line(error)}): use --acceleration "
                "none."
            ) from error
        return graph, held, loss

    def _make_optimizer_state(self) -> None:
        """Creates the optimizer's state, which a captured first step would create anew at every replay."""
        groups = self._optimizer.param_groups
        if not self._optimizer.state:
            rates = [group["lr"].clone() for group in groups]
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
            for group in groups:
                group["lr"].zero_()  # neither the gradient nor weight decay moves anything
            self._optimizer.step()
            for state in self._optimizer.state.values():
                state["step"].zero_()
            for group, rate in zip(groups, rates):
                group["lr"].copy_(rate)
        for group in groups:
            group["capturable"] = True  # only now: torch warns of a capturable step outside a capture


def make_optimizer(parameters: Sequence[nn.Parameter], recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    """Returns AdamW for the student; on CUDA in one kernel, with its learning rate where a CUDA graph can read it.

    Args:
        parameters: Those that are trained.
        recipe: Learning rate and weight decay.
        device: Of the parameters.
    """
    cuda = device.type == "cuda"
    lr = torch.tensor(recipe.lr, device=device) if cuda else recipe.lr
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=recipe.weight_decay, fused=cuda or None)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate, in place where a CUDA graph reads it.

    Args:
        optimizer: Of `make_optimizer`.
        lr: For all groups of parameters.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def learning_rate(recipe: Recipe, step: int, num_steps: int) -> float:
    """Returns the learning rate of a step: linear warm-up, then constant or half a cosine to zero.

    Args:
        recipe: Rate, schedule and warm-up.
        step: From 0.
        num_steps: Of the whole training.
    """
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    progress = (step - recipe.warmup_steps) / max(num_steps - recipe.warmup_steps, 1)
    return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Work:
    """What a training has to do."""

    views: int
    """Views of all steps together."""
    grids: Sequence[tuple[int, int]]
    """Patch grid (h, w) of every view of an epoch."""
    width: int
    """Channels of the student."""
    depth: int
    """Its blocks."""


def choose_acceleration(
    asked: Literal["auto", "none", "compile", "graph"],
    cuda: bool,
    processes: int,
    work: Work,
    compiles: Callable[[], bool],
) -> tuple[Acceleration, str]:
    """Chooses how the step is run.

    Args:
        asked: ``--acceleration``.
        cuda: Whether it runs on a GPU.
        processes: That share it.
        work: Of the whole training, so that a resumed one goes on as it began.
        compiles: Whether torch.compile works here; only asked where it would be used.

    Returns:
        The choice, and a sentence with its reason.

    Raises:
        UserError: If what was asked for cannot be had.
    """
    graphs = cuda and processes == 1
    if asked == "graph" and not graphs:
        raise UserError("--acceleration graph needs CUDA and a single process: use compile or none.")
    if asked != "auto":
        return asked, f"The step is run with --acceleration {asked}."
    otherwise: Acceleration = "graph" if graphs else "none"
    if not cuda:
        return otherwise, "The step is run as it is written: on a CPU compiling it does not pay."
    if processes > 1:
        return otherwise, "The step is run as it is written: what compiling saves several processes was not measured."
    sizes = len(set(work.grids))
    if sizes > _MOST_SIZES:
        return otherwise, f"The step is a CUDA graph: photos of {sizes} sizes are too many to compile it for each."
    tokens = sum(height * width for height, width in work.grids) / len(work.grids)
    saved, start = work.views * tokens * work.width * work.depth * _SAVED, sizes * work.depth * _START
    costs = f"compiling it would save {saved:.0f} s of {work.views:,} views and take {start:.0f}"
    if saved <= start:
        return otherwise, f"The step is a CUDA graph: {costs}."
    if not compiles():
        return otherwise, f"The step is a CUDA graph: {costs}, but torch.compile does not work here."
    return "compile", f"The step is compiled, in a CUDA graph: that saves about {saved:.0f} s and takes {start:.0f}."
