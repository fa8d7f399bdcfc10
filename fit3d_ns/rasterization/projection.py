"""EWA projection of 3D Gaussians to the image plane, in torch, with gsplat's rules for culling.

Formulas: Zwicker et al., "EWA Splatting" (2002), eq. 26-31, as used by 3D Gaussian Splatting (Kerbl et al., 2023);
opacity compensation: Yu et al., "Mip-Splatting" (2024). Everything is written element by element on [V, N] columns:
faster than batches of 3x3 products, and bitwise independent of the number of threads.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below this ratio of determinants a Gaussian is compensated away; the floor keeps the square root's gradient finite.
_SMALLEST_RATIO = 1e-12


class ProjectedGaussians(NamedTuple):
    """V views of N Gaussians; entries whose radius is 0 are culled, and finite but meaningless."""

    radii: Tensor
    """Three standard deviations along the longer axis, rounded up. [V, N] int32 pixels"""
    means2d: Tensor
    """[V, N, 2] pixels"""
    depths: Tensor
    """z in the camera's frame. [V, N]"""
    conics: Tensor
    """Upper triangle of the inverse 2D covariance: xx, xy, yy. [V, N, 3] 1/pixels^2"""
    compensations: Tensor
    """sqrt(det(covariance) / det(blurred covariance)). [V, N] in [0, 1]"""


class _RepeatForGaussians(torch.autograd.Function):
    @staticmethod
    def forward(ctx, per_view, num_gaussians):
        return per_view[:, None].expand(-1, num_gaussians)

    @staticmethod
    @once_differentiable
    def backward(ctx, *output_gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = output_gradients
        return torch.from_numpy(gradient.numpy().sum(axis=1)), None


def repeat_for_gaussians(per_view: Tensor, num_gaussians: int) -> Tensor:
    """Repeats one number per view for every Gaussian.

    The gradient is a sum over all Gaussians. The order in which torch sums depends on the number of threads; numpy's
    does not.

    Args:
        per_view: [V]
        num_gaussians: N

    Returns:
        A view [V, N].
    """
    return _RepeatForGaussians.apply(per_view, num_gaussians)


def project_gaussians(
    means: Tensor,  # [N, 3]
    quats: Tensor,  # [N, 4]
    scales: Tensor,  # [N, 3]
    viewmats: Tensor,  # [V, 4, 4]
    Ks: Tensor,  # [V, 3, 3]
    width: int,
    height: int,
    near_plane: float,
    far_plane: float,
    eps2d: float,
) -> ProjectedGaussians:
    """Projects every Gaussian into every view; differentiable in all tensors but ``Ks``.

    Args:
        means: World coordinates. [N, 3]
        quats: Rotations, wxyz, normalised here. [N, 4]
        scales: Standard deviations along the Gaussian's axes, world units. [N, 3]
        viewmats: World to camera, OpenCV axes. [V, 4, 4]
        Ks: Pinhole intrinsics in pixels. [V, 3, 3]
        width: Image width in pixels.
        height: Image height in pixels.
        near_plane: Gaussians nearer than this are culled.
        far_plane: Gaussians farther than this are culled.
        eps2d: Blur added to the diagonal of the 2D covariance, in pixels^2.

    Returns:
        The projected Gaussians.
    """
    num_gaussians = len(means)
    view = [
        [repeat_for_gaussians(viewmats[:, row, column], num_gaussians) for column in range(4)] for row in range(3)
    ]  # 3 x 4 of [V, N]
    mean_x, mean_y, mean_z = means.unbind(-1)  # [N] each
    x, y, z = (row[0] * mean_x + row[1] * mean_y + row[2] * mean_z + row[3] for row in view)  # [V, N]
    in_range = (z >= near_plane) & (z <= far_plane)  # [V, N]
    # Dividing by the depth of a culled Gaussian could give infinities, and zero times infinity in the gradient.
    x, y, safe_z = torch.where(in_range, x, 0), torch.where(in_range, y, 0), torch.where(in_range, z, 1)

    fx, fy, cx, cy = (Ks[:, row, column, None].detach() for row, column in ((0, 0), (1, 1), (0, 2), (1, 2)))  # [V, 1]
    over_z = 1 / safe_z
    tangent_x, tangent_y = x * over_z, y * over_z  # [V, N]
    means2d = torch.stack([fx * tangent_x + cx, fy * tangent_y + cy], dim=-1)  # [V, N, 2]

    # The linearisation is taken no farther out than 15% of the image beyond its border, as in 3DGS.
    margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
    tangent_x = torch.minimum(torch.maximum(tangent_x, -cx / fx - margin_x), (width - cx) / fx + margin_x)
    tangent_y = torch.minimum(torch.maximum(tangent_y, -cy / fy - margin_y), (height - cy) / fy + margin_y)
    scale_x, scale_y = fx * over_z, fy * over_z
    # cov2d = J W R S S' R' W' J' + eps2d I, with J the Jacobian of the projection and W the camera's rotation.
    jacobian = [
        [scale_x * (view[0][k] - tangent_x * view[2][k]) for k in range(3)],
        [scale_y * (view[1][k] - tangent_y * view[2][k]) for k in range(3)],
    ]  # J W: 2 x 3 of [V, N]
    rotation = gaussian_axes(quats)  # columns of R: 3 x 3 of [N]
    axes = scales.unbind(-1)  # [N] each
    # Columns of J W R S, the image-plane vectors of the three scaled axes: cov2d is the sum of their outer products.
    across, down = (
        [(row[0] * axis[0] + row[1] * axis[1] + row[2] * axis[2]) * size for axis, size in zip(rotation, axes)]
        for row in jacobian
    )  # 3 of [V, N] each
    sharp_xx = across[0] * across[0] + across[1] * across[1] + across[2] * across[2]
    covariance_xy = across[0] * down[0] + across[1] * down[1] + across[2] * down[2]
    sharp_yy = down[0] * down[0] + down[1] * down[1] + down[2] * down[2]
    sharp_determinant = sharp_xx * sharp_yy - covariance_xy * covariance_xy  # [V, N]
    covariance_xx, covariance_yy = sharp_xx + eps2d, sharp_yy + eps2d
    determinant = covariance_xx * covariance_yy - covariance_xy * covariance_xy
    invertible = determinant > 0
    over_determinant = 1 / torch.where(invertible, determinant, 1)
    compensations = torch.sqrt((sharp_determinant * over_determinant).clamp_min(_SMALLEST_RATIO))
    conics = torch.stack(
        [covariance_yy * over_determinant, -covariance_xy * over_determinant, covariance_xx * over_determinant], dim=-1
    )  # [V, N, 3]

    with torch.no_grad():
        half_trace = 0.5 * (covariance_xx + covariance_yy)
        largest_variance = half_trace + torch.sqrt((half_trace * half_trace - determinant).clamp_min(0.01))
        radius = torch.ceil(3 * torch.sqrt(largest_variance))  # [V, N]
        u, v = means2d.unbind(-1)
        visible = in_range & invertible & (radius > 0)
        visible &= (u + radius > 0) & (u - radius < width) & (v + radius > 0) & (v - radius < height)
        # A radius beyond the image covers all of it; int32 must not overflow.
        radii = torch.where(visible, radius.clamp_max(2.0**30), 0).to(torch.int32).contiguous()
    return ProjectedGaussians(radii, means2d, z, conics, compensations)


def gaussian_axes(quats: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """Returns the axes of Gaussians in world coordinates, the columns of their rotation matrices.

    Args:
        quats: wxyz, of any length but zero. [N, 4]

    Returns:
        3 unit vectors of 3 coordinates [N] each.
    """
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)  # [N] each
    return (
        (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)),
        (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)),
        (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)),
    )
