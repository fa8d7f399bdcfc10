"""Where a surface point seen in one view lies in another view.

Coordinates: pixel centres lie at +0.5, so an image spans [0, width) x [0, height) and patch (i, j) of an h x w grid
covers x in [j, j + 1) * width / w. Patch coordinates are (x * w / width, y * h / height): patch (i, j) has its centre
at (j + 0.5, i + 0.5).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SURFACE_SIDE = 1600
"""Most pixels of the longer side of a view's surface that is kept: 40 views of 12 megapixels would take gigabytes, and
only the surface at patch centres is asked for."""


@dataclass(frozen=True)
class SurfaceView:
    """A pinhole camera without distortion and the surface it sees.

    Attributes:
        viewmat: [4, 4] world to camera, OpenCV axes (x right, y down, z forward).
        K: [3, 3] intrinsics in pixels of ``width`` x ``height``, pixel centres at +0.5.
        width: Image width in pixels.
        height: Image height in pixels.
        depth: [H, W] z-depth in scene units, of any resolution that shows the same field of view; values that are not
            finite or not above 0 mean "no surface".
        accumulation: [H, W] opacity of the render in [0, 1], of the depth's size; all opaque if None.
    """

    viewmat: Float[Tensor, "4 4"]
    K: Float[Tensor, "3 3"]
    width: int
    height: int
    depth: Float[Tensor, "H W"]
    accumulation: Float[Tensor, "H W"] | None = None

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

    def thinned(self, longest: int) -> "SurfaceView":
        """Returns the view with its surface at fewer pixels, evenly spaced ones, if it has more.

        Args:
            longest: Most pixels of the depth map's longer side, at least 1.
        """
        share = longest / max(self.depth.shape)
        if share >= 1:
            return self
        size = [max(1, round(side * share)) for side in self.depth.shape]

        def thin(values: Float[Tensor, "H W"]) -> Float[Tensor, "h w"]:
            return torch.nn.functional.interpolate(values[None, None], size, mode="nearest-exact")[0, 0]

        accumulation = None if self.accumulation is None else thin(self.accumulation)
        return replace(self, depth=thin(self.depth), accumulation=accumulation)


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
    view_a: SurfaceView,
    view_b: SurfaceView,
    grid_a: tuple[int, int],
    grid_b: tuple[int, int],
    *,
    relative_depth_tolerance: float = 0.03,
    min_accumulation: float = 0.5,
    max_round_trip: float = 0.5,
) -> Correspondences:
    """Finds the patches of view a whose centre's surface point view b sees too (see `ViewStack.follow`).

    Args:
        view_a: The view whose patch centres are followed.
        view_b: The view they are looked for in.
        grid_a: (h, w) of the first view's patch grid.
        grid_b: (h, w) of the second view's patch grid.
        relative_depth_tolerance: Largest difference of two depths that agree, as a share of the depth; also the largest
            spread of the four depths around a point of a smooth surface.
        min_accumulation: Least opacity in [0, 1] at which a depth is believed.
        max_round_trip: Largest distance, in patches of a, between a patch centre and its point brought back from b.

    Returns:
        The points, in order of their patches, on the device of ``view_a.depth``.
    """
    valid, target = ViewStack([view_a, view_b]).follow(
        torch.tensor([0]),
        torch.tensor([1]),
        grid_a,
        [grid_a, grid_b],
        relative_depth_tolerance=relative_depth_tolerance,
        min_accumulation=min_accumulation,
        max_round_trip=max_round_trip,
    )
    index = valid[0].nonzero()[:, 0]
    return Correspondences(index, target[0, index].float())


class ViewStack:
    """Several views side by side, so that surface points are followed between many pairs of them at once.

    Args:
        views: V views, whose depth maps may differ in size; the first one's device is that of the stack.
    """

    def __init__(self, views: Sequence[SurfaceView]) -> None:
        device = views[0].depth.device
        kind = {"dtype": torch.float64, "device": device}
        self._K = torch.stack([view.K.to(**kind) for view in views])  # [V, 3, 3]
        self._viewmat = torch.stack([view.viewmat.to(**kind) for view in views])  # [V, 4, 4]
        self._K_inverse, self._camera_to_world = torch.linalg.inv(self._K), torch.linalg.inv(self._viewmat)
        self._size = torch.tensor([[view.width, view.height] for view in views], **kind)  # [V, 2] pixels
        shapes = [(view.depth.shape[0], view.depth.shape[1]) for view in views]
        self._shape = torch.tensor(shapes, device=device)  # [V, 2] rows and columns of the depth maps
        counts = [rows * columns for rows, columns in shapes]
        self._start = torch.tensor([0, *itertools.accumulate(counts)][:-1], device=device)  # [V], in what follows
        self._depth = torch.cat([view.depth.to(device).flatten() for view in views])  # [all pixels of all views]
        self._opacity = None
        if any(view.accumulation is not None for view in views):
            opacities = (
                torch.ones_like(view.depth) if view.accumulation is None else view.accumulation for view in views
            )
            self._opacity = torch.cat([opacity.to(self._depth).flatten() for opacity in opacities])

    def follow(
        self,
        first: Int[Tensor, "P"],
        second: Int[Tensor, "P"],
        grid: tuple[int, int],
        grids: Sequence[tuple[int, int]],
        *,
        relative_depth_tolerance: float = 0.03,
        min_accumulation: float = 0.5,
        max_round_trip: float = 0.5,
    ) -> tuple[Bool[Tensor, "P M"], Float[Tensor, "P M 2"]]:
        """Looks for the patches of one view, for each of P pairs, whose centre's surface point the other sees too.

        A patch centre counts if the surface there is smooth and opaque in the first view, if it projects into the
        second in front of the camera and inside the image, if that view's own depth there (likewise smooth and opaque)
        agrees, and if its surface point, brought back to the first, lands where it started. So a point hidden from the
        second view, or floating in front of what it sees, is left out.

        Args:
            first: [P] positions of the views whose patch centres are followed.
            second: [P] positions of the views they are looked for in.
            grid: (h, w) of the patch grid of the first views, the same for all of them; M = h w.
            grids: (h, w) of every view's patch grid; used for the second views.
            relative_depth_tolerance: Share of the depth, as for `correspondences`.
            min_accumulation: In [0, 1], as for `correspondences`.
            max_round_trip: In patches of the first view, as for `correspondences`.

        Returns:
            [P, M] which patches of the first views, row by row, are seen in the second; and [P, M, 2] where, (x, y) in
            patches of the second view's grid, meaningless for the others.
        """
        device, (height, width) = self._depth.device, grid
        first, second = first.to(device), second.to(device)
        row, column = torch.meshgrid(
            torch.arange(height, device=device, dtype=torch.float64) + 0.5,
            torch.arange(width, device=device, dtype=torch.float64) + 0.5,
            indexing="ij",
        )
        centres = torch.stack([column, row], -1).reshape(1, -1, 2)  # [1, M, 2] patches
        patch_a = self._size[first, None] / torch.tensor(
            [width, height], dtype=torch.float64, device=device
        )  # [P, 1, 2]
        sizes_b = torch.tensor([(w, h) for h, w in grids], dtype=torch.float64, device=device)  # [V, 2]
        patch_b = (self._size / sizes_b)[second, None]  # [P, 1, 2] pixels

        # [P, M] each
        depth_a, valid = self._surface_depth(first, centres * patch_a, relative_depth_tolerance, min_accumulation)
        points = self._unproject(first, centres * patch_a, depth_a)  # [P, M, 3] world
        in_b, z_in_b = self._project(second, points)  # [P, M, 2] pixels, [P, M]
        depth_b, valid_b = self._surface_depth(second, in_b, relative_depth_tolerance, min_accumulation)
        # Never true behind the second view, where z is not above 0 and the depth is.
        agrees = (z_in_b - depth_b).abs() <= relative_depth_tolerance * z_in_b
        back_in_a, _ = self._project(first, self._unproject(second, in_b, depth_b))
        returns = (back_in_a / patch_a - centres).norm(dim=-1) <= max_round_trip  # [P, M]
        return valid & valid_b & agrees & returns, in_b / patch_b

    def _surface_depth(
        self, index: Int[Tensor, "P"], pixels: Float[Tensor, "P M 2"], tolerance: float, min_accumulation: float
    ) -> tuple[Float[Tensor, "P M"], Bool[Tensor, "P M"]]:
        """Depth at image positions (x, y), and whether a smooth, opaque surface is there.

        Between the four depths around a position, the inverse depth is interpolated: it is linear in the image on any
        plane, so planes come out exactly. Across an edge nothing is interpolated: such a position is not valid.
        """
        size = self._size[index, None]  # [P, 1, 2]
        rows, columns = self._shape[index].unbind(1)  # [P] each
        inside = (torch.isfinite(pixels) & (pixels >= 0) & (pixels < size)).all(-1)  # [P, M]
        scale = torch.stack([columns, rows], -1)[:, None] / size  # [P, 1, 2]
        position = torch.where(inside[..., None], pixels * scale, 0.5) - 0.5  # [P, M, 2]
        # Beside the outermost pixel centres the last two are continued: the fraction may lie a little outside [0, 1].
        last_row, last_column = (rows - 1)[:, None], (columns - 1)[:, None]
        column = position[..., 0].floor().long().clamp_min(0).minimum((last_column - 1).clamp_min(0))
        row = position[..., 1].floor().long().clamp_min(0).minimum((last_row - 1).clamp_min(0))
        fraction_x, fraction_y = position[..., 0] - column, position[..., 1] - row
        next_column, next_row = (column + 1).minimum(last_column), (row + 1).minimum(last_row)
        corner_rows = torch.stack([row, row, next_row, next_row])  # [4, P, M]
        corner_columns = torch.stack([column, next_column, column, next_column])
        places = self._start[index, None] + corner_rows * columns[:, None] + corner_columns  # [4, P, M]
        corners = self._depth[places].double()  # [4, P, M]
        known = (torch.isfinite(corners) & (corners > 0)).all(0)
        if self._opacity is not None:
            known = known & (self._opacity[places] >= min_accumulation).all(0)
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

    def _unproject(
        self, index: Int[Tensor, "P"], pixels: Float[Tensor, "P M 2"], depth: Float[Tensor, "P M"]
    ) -> Float[Tensor, "P M 3"]:
        homogeneous = torch.cat([pixels, torch.ones_like(pixels[..., :1])], -1)  # [P, M, 3]
        in_camera = (homogeneous @ self._K_inverse[index].mT) * depth[..., None]  # [P, M, 3]
        camera_to_world = self._camera_to_world[index]  # [P, 4, 4]
        return in_camera @ camera_to_world[:, :3, :3].mT + camera_to_world[:, None, :3, 3]

    def _project(
        self, index: Int[Tensor, "P"], points: Float[Tensor, "P M 3"]
    ) -> tuple[Float[Tensor, "P M 2"], Float[Tensor, "P M"]]:
        """Image positions (x, y) and z-depths; positions mean nothing where the depth is not above 0."""
        viewmat = self._viewmat[index]  # [P, 4, 4]
        in_camera = points @ viewmat[:, :3, :3].mT + viewmat[:, None, :3, 3]  # [P, M, 3]
        z = in_camera[..., 2]  # [P, M]
        homogeneous = in_camera @ self._K[index].mT  # [P, M, 3]
        return homogeneous[..., :2] / torch.where(z > 0, z, 1.0)[..., None], z
