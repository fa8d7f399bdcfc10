"""The centres of Gaussians as point clouds, for Open3D, MeshLab, CloudCompare and the like."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.exporting.ply_table import Columns, write_ply_table
from fit3d_ns.exporting.splat_ply import visible_rows


def write_point_cloud(
    path: Path, gaussians: Mapping[str, Tensor], rgb: Float[Tensor, "N 3"], comments: Iterable[str] = ()
) -> int:
    """Writes one point for every Gaussian that `fit3d_ns.exporting.splat_ply.write_splat_ply` writes, in that order.

    Columns: ``x y z``, ``nx ny nz`` (the Gaussian's shortest axis, of either sign), ``red green blue`` (uchar) and
    ``opacity`` (float, 0 to 1, which Open3D's tensor reader finds and others skip).

    Args:
        path: The file; what stands there is replaced, in one step.
        gaussians: As of `fit3d_ns.exporting.splat_ply.write_splat_ply`.
        rgb: Colours, cut to [0, 1].
        comments: Lines for the header.

    Returns:
        The number of points.

    Raises:
        UserError: If no point is left, or the file cannot be written.
    """
    rows = visible_rows(gaussians).nonzero().squeeze(-1)
    columns = [
        Columns(("x", "y", "z"), gaussians["means"]),
        Columns(("nx", "ny", "nz"), shortest_axes(gaussians["quats"], gaussians["scales"])),
        Columns(("red", "green", "blue"), (rgb.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)),
        Columns(("opacity",), gaussians["opacities"].sigmoid()),
    ]
    write_ply_table(path, columns, rows, comments)
    return len(rows)


def shortest_axes(quats: Float[Tensor, "N 4"], scales: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
    """Returns the unit vector along which each Gaussian is thinnest: the normal of a flat one.

    Args:
        quats: wxyz, of any length.
        scales: Sizes along the axes, or their logarithms.
    """
    w, x, y, z = torch.nn.functional.normalize(quats.detach().float(), dim=1).unbind(1)
    columns = (
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], 1),
        torch.stack([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)], 1),
        torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], 1),
    )
    thinnest = scales.detach().argmin(1)
    return torch.stack(columns, 1)[torch.arange(len(quats), device=quats.device), thinnest.to(quats.device)]
