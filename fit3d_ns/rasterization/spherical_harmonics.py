"""View-dependent colour from real spherical harmonics, in the order and sign convention of 3D Gaussian Splatting."""

import math

import torch
from torch import Tensor

from fit3d_ns.rasterization.projection import repeat_for_gaussians


def spherical_harmonics_colors(
    degree: int, means: Tensor, coefficients: Tensor, viewmats: Tensor, visible: Tensor
) -> Tensor:
    """Colours of the Gaussians as seen from every view: max(sum of bases times coefficients + 0.5, 0).

    Args:
        degree: Highest degree used, 0 to 4; ``(degree + 1) ** 2`` coefficients are read.
        means: World coordinates. [N, 3]
        coefficients: [N, K, 3] or [V, N, K, 3]
        viewmats: World to camera. [V, 4, 4]
        visible: Culled Gaussians get the colour 0.5, as in gsplat. [V, N] bool

    Returns:
        Colours [V, N, 3], not bounded above.
    """
    used = coefficients[..., : (degree + 1) ** 2, :]  # [(V,) N, B, 3]
    camera_centers = torch.linalg.inv(viewmats)[:, :3, 3]  # [V, 3]
    offsets = [means[:, k] - repeat_for_gaussians(camera_centers[:, k], len(means)) for k in range(3)]  # 3 of [V, N]
    directions = torch.nn.functional.normalize(torch.stack(offsets, dim=-1), dim=-1)  # [V, N, 3]
    colors = (_bases(degree, directions)[..., None] * used).sum(dim=-2)  # [V, N, 3]
    return torch.clamp_min(torch.where(visible[..., None], colors, 0) + 0.5, 0.0)


def _bases(degree: int, directions: Tensor) -> Tensor:
    """Real spherical harmonics of unit vectors. [..., 3] -> [..., (degree + 1) ** 2]."""
    x, y, z = directions.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    bases = [torch.full_like(x, 0.5 / math.sqrt(math.pi))]
    if degree >= 1:
        c = math.sqrt(3 / (4 * math.pi))
        bases += [-c * y, c * z, -c * x]
    if degree >= 2:
        c = math.sqrt(15 / (4 * math.pi))
        bases += [
            c * x * y,
            -c * y * z,
            math.sqrt(5 / (16 * math.pi)) * (3 * zz - 1),
            -c * x * z,
            0.5 * c * (xx - yy),
        ]
    if degree >= 3:
        a, b = math.sqrt(35 / (32 * math.pi)), math.sqrt(21 / (32 * math.pi))
        c = math.sqrt(105 / (4 * math.pi))
        bases += [
            -a * y * (3 * xx - yy),
            c * x * y * z,
            -b * y * (5 * zz - 1),
            math.sqrt(7 / (16 * math.pi)) * z * (5 * zz - 3),
            -b * x * (5 * zz - 1),
            0.5 * c * z * (xx - yy),
            -a * x * (xx - 3 * yy),
        ]
    if degree >= 4:
        a, b = math.sqrt(315 / (32 * math.pi)), math.sqrt(45 / (32 * math.pi))
        c, d = math.sqrt(315 / (16 * math.pi)), math.sqrt(45 / (16 * math.pi))
        bases += [
            c * x * y * (xx - yy),
            -a * y * z * (3 * xx - yy),
            d * x * y * (7 * zz - 1),
            -b * y * z * (7 * zz - 3),
            3 / (16 * math.sqrt(math.pi)) * (35 * zz * zz - 30 * zz + 3),
            -b * x * z * (7 * zz - 3),
            0.5 * d * (xx - yy) * (7 * zz - 1),
            -a * x * z * (xx - 3 * yy),
            0.25 * c * (xx * (xx - 3 * yy) - yy * (3 * xx - yy)),
        ]
    return torch.stack(bases, dim=-1)
