"""Heads of one shape, trained as one: their parameters lie in one tensor for each name, their outputs come at once."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fit3d_ns.backbones import BackboneOutput

StackLoss = Callable[[Sequence[Float[Tensor, "B K h w"]]], Float[Tensor, " H"]]
"""Returns the losses of heads from the outputs of each."""


class StackedHead(Protocol):
    """What a head must offer beside being a module."""

    fusion: nn.Module | None
    """A learned layer before all else, by which heads on the same features see other tokens."""

    def many(
        self, heads: Sequence[Any], parameters: dict[str, Tensor], features: BackboneOutput
    ) -> Sequence[Float[Tensor, "B K h w"]]:
        """Returns the outputs of heads of this one's shape on the same features.

        Args:
            heads: This one first.
            parameters: Of all of them, [n, ...], by name.
            features: What they see.

        Returns:
            [B, K, h, w] of each.
        """
        ...


class HeadStack:
    """Heads of one shape: several rows, each with one head for every learning rate."""

    def __init__(self, heads: Sequence[Sequence[Any]]) -> None:
        """Lays the heads' parameters into one tensor for each name and rate, which they show parts of from then on.

        Args:
            heads: Modules that are `StackedHead`, by row and rate.
        """
        self._heads = heads
        names = [name for name, _ in heads[0][0].named_parameters()]
        self.by_rate: list[dict[str, Tensor]] = []
        """For each rate, the parameters [rows, ...] by name: what an optimizer updates."""
        for rate in range(len(heads[0])):
            joint = {name: torch.stack([row[rate].get_parameter(name).detach() for row in heads]) for name in names}
            for name, values in joint.items():
                for row, value in zip(heads, values):
                    row[rate].get_parameter(name).data = value
                values.requires_grad_()
            self.by_rate.append(joint)
        for first, *others in heads:
            if first.fusion is None:  # all see the same tokens, so statistics of the tokens are theirs in common
                for other in others:
                    _share_buffers(first, other)

    def outputs(self, features: Sequence[BackboneOutput]) -> list[Float[Tensor, "B K h w"]]:
        """Returns what all heads say, row by row, and rate by rate within.

        Args:
            features: Of each row.

        Returns:
            [B, K, h, w] of each head.
        """
        of_rows = {
            name: torch.stack([joint[name] for joint in self.by_rate], 1).unbind()  # [rates, ...] for each row
            for name in self.by_rate[0]
        }
        return [
            output
            for number, (row, seen) in enumerate(zip(self._heads, features))
            for output in row[0].many(row, {name: values[number] for name, values in of_rows.items()}, seen)
        ]

    def clip_gradients(self, limit: float) -> None:
        """Scales each head's gradient down to a norm, as ``nn.utils.clip_grad_norm_`` does for one module.

        Args:
            limit: The largest norm.
        """
        for joint in self.by_rate:
            gradients = [values.grad for values in joint.values() if values.grad is not None]
            norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)  # [rows]
            factors = (limit / (norms + 1e-6)).clamp(max=1)
            for gradient in gradients:
                gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def shape_of(head: nn.Module) -> tuple:
    """Returns what heads must have in common to be stacked: their kind and their parameters' shapes.

    Args:
        head: One of them.
    """
    return (type(head), *((name, tuple(value.shape)) for name, value in head.named_parameters()))


def _share_buffers(first: nn.Module, other: nn.Module) -> None:
    for name, buffer in first.named_buffers():
        path, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(path), leaf, buffer)


def at_once(loss: Callable[[Float[Tensor, "B K h w"]], Tensor]) -> StackLoss:
    """Turns a loss on one head's outputs into one on those of many, with as many launches as for one.

    Args:
        loss: Returns a scalar.

    Returns:
        The loss of many.
    """
    return lambda outputs: torch.vmap(loss)(torch.stack(list(outputs)))


def one_by_one(loss: Callable[[Float[Tensor, "B K h w"]], Tensor]) -> StackLoss:
    """Likewise, where a loss takes much memory, or a processor's cache holds the outputs of one head only.

    Nothing of one head's loss but its gradient is kept while the next one is computed.

    Args:
        loss: Returns a scalar.

    Returns:
        The loss of many.
    """
    return lambda outputs: _OneByOne.apply(loss, *outputs)  # type: ignore[return-value]


class _OneByOne(torch.autograd.Function):
    """Losses of heads; their gradients are made on the way."""

    @staticmethod
    def forward(ctx: Any, loss: Callable[[Tensor], Tensor], *outputs: Tensor) -> Tensor:  # type: ignore[override]
        values, gradients = [], []
        for output in outputs:
            with torch.enable_grad():
                own = output.detach().requires_grad_()
                value = loss(own)
                gradients.append(torch.autograd.grad(value, own)[0])
            values.append(value.detach())
        ctx.save_for_backward(*gradients)
        return torch.stack(values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (None, *(gradient * scale for gradient, scale in zip(ctx.saved_tensors, grad_outputs[0])))
