"""Where a surface point seen in one view lies in another view.

Coordinates: pixel centres lie at +0.5, so an image spans [0, width) x [0, height) and patch (i, j) of an h x w grid
covers x in [j, j + 1) * width / w. Patch coordinates are (x * w / width, y * h / height): patch (i, j) has its centre
at (j + 0.5, i + 0.5).
"""

from dataclasses import dataclass
from typing import Optional

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class View:
    """A pinhole camera without distortion and the surface it sees.

    Attributes:
        viewmat: [4, 4] world to camera, OpenCV axes (x right, y down, z forward).
        K: [3, 3] intrinsics in pixels of ``width`` x ``height``, pixel centres at +0.5.
        width: image width in pixels.
        height: image height in pixels.
        depth: [H, W] z-depth in scene units, of any resolution that shows the same field of view; values that are not
            finite or not above 0 mean "no surface".
        accumulation: [H, W] opacity of the render in [0, 1], of the depth's size; all opaque if None.
    """

    viewmat: Float[Tensor, "4 4"]
    K: Float[Tensor, "3 3"]
    width: int
    height: int
    depth: Float[Tensor, "H W"]
    accumulation: Optional[Float[Tensor, "H W"]] = None

    def __post_init__(self) -> None:
        if self.viewmat.shape != (4, 4) or self.K.shape != (3, 3) or self.depth.ndim != 2:
            raise ValueError(
                "a view needs viewmat [4, 4], K [3, 3] and depth [H, W], got "
                f"{list(self.viewmat.shape)}, {list(self.K.shape)} and {list(self.depth.shape)}"
            )
        if self.accumulation is not None and self.accumulation.shape != self.depth.shape:
            raise ValueError(
                f"accumulation {list(self.accumulation.shape)} and depth {list(self.depth.shape)} differ in size"
            )


@dataclass(frozen=True)
class Correspondences:
    """Surface points at patch centres of one view, and where another view sees them.

    Attributes:
        patch_index: [M] row-major index of the patch in the first view's grid.
        target: [M, 2] (x, y) in patch coordinates of the second view's grid, float32.
    """

    patch_index: Int[Tensor, "M"]
    target: Float[Tensor, "M 2"]

    def __len__(self) -> int:
        return self.patch_index.shape[0]


def correspondences(
    view_a: View,
    view_b: View,
    grid_a: tuple[int, int],
    grid_b: tuple[int, int],
    *,
    relative_depth_tolerance: float = 0.03,
    min_accumulation: float = 0.5,
    max_round_trip: float = 0.5,
) -> Correspondences:
    """Finds the patches of view a whose centre's surface point view b sees too.

    A patch centre counts if the surface there is smooth and opaque in a, if it projects into b in front of the camera
    and inside the image, if b's own depth there (likewise smooth and opaque) agrees, and if b's surface point, brought
    back to a, lands where it started. So a point hidden from b, or floating in front of what b sees,
    is left out.

    Args:
        view_a: the view whose patch centres are followed.
        view_b: the view they are looked for in.
        grid_a: (h, w) of the first view's patch grid.
        grid_b: (h, w) of the second view's patch grid.
        relative_depth_tolerance: largest difference of two depths that agree, as a share of the depth; also the largest
            spread of the four depths around a point of a smooth surface.
        min_accumulation: least opacity at which a depth is believed.
        max_round_trip: largest distance, in patches of a, between a patch centre and its point brought back from b.

    Returns:
        The points, in order of their patches, on the device of ``view_a.depth``.
    """
    device = view_a.depth.device
    height, width = grid_a
    row, column = torch.meshgrid(
        torch.arange(height, device=device, dtype=torch.float64) + 0.5,
        torch.arange(width, device=device, dtype=torch.float64) + 0.5,
        indexing="ij",
    )
    centres = torch.stack([column, row], -1).reshape(-1, 2)
    patch_a = torch.tensor([view_a.width / width, view_a.height / height], dtype=torch.float64, device=device)
    patch_b = torch.tensor([view_b.width / grid_b[1], view_b.height / grid_b[0]], dtype=torch.float64, device=device)

    depth_a, valid = _surface_depth(view_a, centres * patch_a, relative_depth_tolerance, min_accumulation)
    points = _unproject(view_a, centres * patch_a, depth_a)
    in_b, z_in_b = _project(view_b, points)
    depth_b, valid_b = _surface_depth(view_b, in_b, relative_depth_tolerance, min_accumulation)
    # Never true behind b, where z is not above 0 and the depth is.
    agrees = (z_in_b - depth_b).abs() <= relative_depth_tolerance * z_in_b
    back_in_a, _ = _project(view_a, _unproject(view_b, in_b, depth_b))
    returns = (back_in_a / patch_a - centres).norm(dim=-1) <= max_round_trip
    valid = valid & valid_b & agrees & returns
    index = valid.nonzero()[:, 0]
    return Correspondences(index, (in_b / patch_b)[index].float())


def _surface_depth(
    view: View, pixels: Float[Tensor, "M 2"], tolerance: float, min_accumulation: float
) -> tuple[Float[Tensor, "M"], Bool[Tensor, "M"]]:
    """Depth at image positions (x, y), and whether a smooth, opaque surface is there.

    Between the four depths around a position, the inverse depth is interpolated: it is linear in the image on any
    plane, so planes come out exactly. Across an edge nothing is interpolated: such a position is not valid.
    """
    depth = view.depth.to(pixels.device)
    rows, columns = depth.shape
    size = torch.tensor([view.width, view.height], dtype=pixels.dtype, device=pixels.device)
    inside = (torch.isfinite(pixels) & (pixels >= 0) & (pixels < size)).all(-1)
    scale = torch.tensor([columns / view.width, rows / view.height], dtype=pixels.dtype, device=pixels.device)
    position = torch.where(inside[:, None], pixels * scale, 0.5) - 0.5
    # Beside the outermost pixel centres the last two are continued, so the fraction may lie a little outside [0, 1].
    column = position[:, 0].floor().clamp(0, max(0, columns - 2)).long()
    row = position[:, 1].floor().clamp(0, max(0, rows - 2)).long()
    fraction_x, fraction_y = position[:, 0] - column, position[:, 1] - row
    next_column, next_row = (column + 1).clamp_max(columns - 1), (row + 1).clamp_max(rows - 1)
    corner_rows = torch.stack([row, row, next_row, next_row])
    corner_columns = torch.stack([column, next_column, column, next_column])
    corners = depth[corner_rows, corner_columns].to(pixels.dtype)
    known = (torch.isfinite(corners) & (corners > 0)).all(0)
    if view.accumulation is not None:
        opacity = view.accumulation.to(pixels.device)[corner_rows, corner_columns]
        known = known & (opacity >= min_accumulation).all(0)
    corners = torch.where(known, corners, 1.0)
    smooth = corners.amax(0) - corners.amin(0) <= tolerance * corners.amin(0)
    weights = torch.stack(
        [
            (1 - fraction_x) * (1 - fraction_y),
            fraction_x * (1 - fraction_y),
            (1 - fraction_x) * fraction_y,
            fraction_x * fraction_y,
        ]
    )
    return 1 / (weights / corners).sum(0), inside & known & smooth


def _unproject(view: View, pixels: Float[Tensor, "M 2"], depth: Float[Tensor, "M"]) -> Float[Tensor, "M 3"]:
    K, viewmat = view.K.to(pixels), view.viewmat.to(pixels)
    homogeneous = torch.cat([pixels, torch.ones_like(pixels[:, :1])], -1)
    in_camera = (homogeneous @ torch.linalg.inv(K).T) * depth[:, None]
    camera_to_world = torch.linalg.inv(viewmat)
    return in_camera @ camera_to_world[:3, :3].T + camera_to_world[:3, 3]


def _project(view: View, points: Float[Tensor, "M 3"]) -> tuple[Float[Tensor, "M 2"], Float[Tensor, "M"]]:
    """Image positions (x, y) and z-depths; positions mean nothing where the depth is not above 0."""
    K, viewmat = view.K.to(points), view.viewmat.to(points)
    in_camera = points @ viewmat[:3, :3].T + viewmat[:3, 3]
    z = in_camera[:, 2]
    homogeneous = in_camera @ K.T
    return homogeneous[:, :2] / torch.where(z > 0, z, 1.0)[:, None], z
