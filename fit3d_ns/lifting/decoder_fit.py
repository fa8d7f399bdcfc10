"""The decoder of a lifted scene: the teacher's basis as its centre tap, or nine taps by least squares."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.features.grid import sample_teacher
from fit3d_ns.features.pca import PCABasis
from fit3d_ns.lifting.operator import FeatureOperator
from fit3d_ns.lifting.solver import Advance, LiftView, stack_weights


def centre_tap(basis: PCABasis) -> Float[Tensor, "C D 3 3"]:
    """Returns the 3x3 kernel that brings coordinates in a basis back to features, and ignores neighbours.

    Args:
        basis: Uncentred basis of D directions, since the decoder has no bias.
    """
    weight = basis.components.new_zeros(*basis.components.T.shape, 3, 3)
    weight[:, :, 1, 1] = basis.components.T
    return weight


def fit_decoder(
    operator: FeatureOperator,
    views: Sequence[LiftView],
    values: Float[Tensor, "N D"],
    start: Float[Tensor, "C D 3 3"],
    ridge: float,
    advance: Advance = lambda count: None,
) -> Float[Tensor, "C D 3 3"]:
    """Fits all nine taps of the decoder to the teacher's maps, in one pass and one solve.

    The normal equations of ridge regression towards ``start``: a 9D x 9D matrix summed over the views.

    Args:
        operator: The renderer.
        views: Training views with the teacher's own maps, C channels.
        values: [N, D] lifted features.
        start: Kernel to stay near to.
        ridge: Pull towards ``start``, as a share of the mean squared input. Neighbouring taps see almost the same
            pixels, and what they tell apart is partly the view, not the scene.
        advance: Called with the number of views done.

    Returns:
        [C, D, 3, 3], the kernel that fits best.
    """
    width, dim = start.shape[:2]
    gram = torch.zeros(9 * dim, 9 * dim, dtype=torch.float64, device=values.device)
    moment = torch.zeros(9 * dim, width, dtype=torch.float64, device=values.device)
    for view in views:
        with torch.no_grad():
            low = operator.low_maps([view.camera], values)[0]  # [D, H, W]
        teacher = view.load().to(values)
        weights = stack_weights([view], teacher[None])[0].flatten(1)  # [1, hw]
        for offset in operator.offsets:
            windows = operator.feature_grid.windows(low, view.camera.grid, offset).flatten(0, 1).flatten(1)  # [9D, hw]
            weighted = windows * weights  # [9D, hw]
            gram += (weighted @ windows.T).double()
            moment += (weighted @ sample_teacher(teacher, offset).flatten(1).T).double()
        advance(1)
    kernel = start.flatten(1).T.to(moment)  # [9D, C]
    pull = max(ridge, 1e-8) * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    regularized = gram + pull * torch.eye(9 * dim, dtype=gram.dtype, device=gram.device)
    change = torch.linalg.solve(regularized, moment - gram @ kernel)  # [9D, C]
    return (kernel + change).T.reshape(width, dim, 3, 3).to(start)
