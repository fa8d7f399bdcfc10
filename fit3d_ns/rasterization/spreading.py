"""Broadcasting a few numbers of the cameras over all Gaussians, with a gradient that no thread count changes."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _SpreadOverGaussians(torch.autograd.Function):
    @staticmethod
    def forward(ctx, per_view, number_of_gaussians):
        return per_view[:, None].expand(-1, number_of_gaussians)

    @staticmethod
    @once_differentiable
    def backward(ctx, *output_gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = output_gradients
        return torch.from_numpy(gradient.numpy().sum(axis=1)), None


def spread_over_gaussians(per_view: Tensor, number_of_gaussians: int) -> Tensor:
    """Repeats one number per view for every Gaussian.

    The gradient is a sum over all Gaussians. The order in which torch sums depends on the number of threads; numpy's
    does not.

    Args:
        per_view: [V]
        number_of_gaussians: N

    Returns:
        A view [V, N].
    """
    return _SpreadOverGaussians.apply(per_view, number_of_gaussians)
