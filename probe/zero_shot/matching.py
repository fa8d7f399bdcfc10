"""Matching two views of a surface by their features, and measuring the matches: Probe3D's protocol."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from fit3d_ns.features.correspondences import SurfaceView, correspondences
from fit3d_ns.support.errors import UserError
from probe.features.rows import even_padding
from probe.heads import sample_map

ANGLE_BINS = ((0.0, 15.0), (15.0, 30.0), (30.0, 60.0), (60.0, 180.0))
"""Degrees between the two cameras' orientations."""
_OVERLAP_GRID = (12, 16)
_MIN_DISPLACEMENT = 0.05
"""Of the photo's width: pairs whose shared points move less say nothing."""
_CANDIDATES_PER_BIN = 3000
"""Pairs looked at for each range of angles: most views of a large scene see nothing in common."""
_SIMILARITIES_PER_STEP = 1 << 24


@dataclass(frozen=True)
class Matches:
    """The best matches of two views.

    Attributes:
        source: [M, 2] (x, y) in pixels of the first photo.
        target: [M, 2] (x, y) in pixels of the second, found by features.
        error: [M] distance in pixels between ``target`` and where the source's surface point really projects;
            infinite behind the camera.
    """

    source: Float[Tensor, "M 2"]
    target: Float[Tensor, "M 2"]
    error: Float[Tensor, "M"]


def match_views(
    features_a: Float[Tensor, "hw C"],
    features_b: Float[Tensor, "hw C"],
    a: SurfaceView,
    b: SurfaceView,
    grid: tuple[int, int],
    count: int,
) -> Matches:
    """Matches two views by their features and measures the matches.

    Every grid point of the first view with depth is matched with the one of the second, with depth, whose feature has
    the largest cosine; the ``count`` matches with the smallest ratio of nearest to second nearest distance are kept
    (Probe3D; Lowe's ratio test).

    Args:
        features_a: Features of the first view at the grid's cell centres, row by row; see `features_on_grid`.
        features_b: Of the second.
        a: First camera and depth.
        b: Second.
        grid: Rows and columns of the grid.
        count: Matches kept at most.

    Returns:
        The matches, best first; none if a view has no depth.
    """
    points_a, depth_a = _grid_depth(a, grid)
    points_b, depth_b = _grid_depth(b, grid)
    valid_a, valid_b = depth_a > 0, depth_b > 0
    if not bool(valid_a.any()) or int(valid_b.sum()) < 2:
        empty = points_a[:0]
        return Matches(empty, empty, empty[:, 0])
    device = features_a.device
    best, ratio = _nearest(
        F.normalize(features_a[valid_a.to(device)].float(), dim=1),
        F.normalize(features_b[valid_b.to(device)].float(), dim=1),
    )
    order = ratio.argsort(stable=True)[:count].cpu()
    source, target = points_a[valid_a][order], points_b[valid_b][best.cpu()[order]]
    true, in_front = _project(source, depth_a[valid_a][order], a, b)
    error = torch.where(in_front, (target - true).norm(dim=-1), torch.inf)
    return Matches(source.float(), target.float(), error.float())


def same_place_errors(a: SurfaceView, b: SurfaceView, grid: tuple[int, int]) -> Float[Tensor, "M"]:
    """Returns the errors, in pixels, of matching every point with depth to the same place in the other photo.

    Features that tell places of the picture rather than of the scene apart come close to this.

    Args:
        a: View whose points are matched.
        b: The other view.
        grid: Height and width of the grid of points.
    """
    points, depth = _grid_depth(a, grid)
    points, depth = points[depth > 0], depth[depth > 0]
    true, in_front = _project(points, depth, a, b)
    shift = torch.tensor([b.width / a.width, b.height / a.height], dtype=torch.float64)
    return torch.where(in_front, (points * shift - true).norm(dim=-1), torch.inf).float()


def features_on_grid(
    patch_map: Float[Tensor, "C h w"], size: tuple[int, int], patch_size: int, grid: tuple[int, int]
) -> Float[Tensor, "hw C"]:
    """Reads a map of patches between their centres, at the centres of a grid's cells on the photo.

    The backbones see a photo padded on all sides, so that its patches do not begin at its corner; Probe3D stretches the
    padded map over the photo instead, which shifts features by up to half a patch at the border.

    Args:
        patch_map: Features of the padded photo.
        size: Height and width of the photo, pixels.
        patch_size: Side of a patch, pixels.
        grid: Rows and columns of the grid.

    Returns:
        Features, row by row.
    """
    (top, rows), (left, columns) = (even_padding(side, patch_size) for side in size)
    x, y = _grid_centres(size, grid)
    places = torch.stack([(x + left) / (size[1] + columns), (y + top) / (size[0] + rows)], -1)
    return sample_map(patch_map[None], places[None].to(patch_map))[0].T


def recall(errors: Sequence[Tensor], pixels: float) -> float | None:
    """Returns the mean over pairs of the share of matches within some pixels; None without a pair.

    Args:
        errors: Of each pair of views, pixels.
        pixels: Largest error that counts as found.
    """
    shares = [float((error < pixels).float().mean()) for error in errors if error.numel()]
    return sum(shares) / len(shares) if shares else None


def relative_angle(first: SurfaceView, second: SurfaceView) -> float:
    """Returns the angle between two cameras' orientations, degrees.

    Args:
        first: Any view.
        second: Any other.
    """
    rotation = second.viewmat[:3, :3].double() @ first.viewmat[:3, :3].double().T
    return math.degrees(math.acos(max(-1.0, min(1.0, (float(rotation.trace()) - 1) / 2))))


def choose_pairs_by_angle(
    views: Sequence[SurfaceView], per_bin: int, min_overlap: float
) -> list[tuple[int, int, float]]:
    """Chooses pairs of views that see the same surface, as many in each range of angles, without chance.

    Args:
        views: V views.
        per_bin: Most pairs in a range.
        min_overlap: Least share of the first view's surface that the second sees.

    Returns:
        (a, b, angle in degrees), a < b.

    Raises:
        UserError: If no pair overlaps enough.
    """
    surface = [max(1, len(correspondences(view, view, _OVERLAP_GRID, _OVERLAP_GRID))) for view in views]
    by_bin: list[list[tuple[int, int, float]]] = [[] for _ in ANGLE_BINS]
    candidates = [
        (a, b, relative_angle(views[a], views[b])) for a in range(len(views)) for b in range(a + 1, len(views))
    ]
    for number, (low, high) in enumerate(ANGLE_BINS):
        inside = [pair for pair in candidates if low <= pair[2] < high or pair[2] == high == 180.0]
        # Looked at in an order that is spread over the scene.
        inside.sort(key=lambda pair: (pair[0] * 7919 + pair[1] * 104729) % 65537)
        for a, b, angle in inside[:_CANDIDATES_PER_BIN]:
            points = correspondences(views[a], views[b], _OVERLAP_GRID, _OVERLAP_GRID)
            if len(points) < min_overlap * surface[a] or _displacement(points) < _MIN_DISPLACEMENT:
                continue
            by_bin[number].append((a, b, angle))
            if len(by_bin[number]) == per_bin:
                break
    pairs = sorted(pair for found in by_bin for pair in found)
    if not pairs:
        raise UserError("No two views of the scene see enough of the same surface: lower --min-overlap.")
    return pairs


def _grid_centres(size: tuple[int, int], grid: tuple[int, int]) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"]]:
    """Pixels x and y of a grid's cell centres, row by row."""
    rows, columns = grid
    y, x = torch.meshgrid(
        (torch.arange(rows, dtype=torch.float64) + 0.5) * size[0] / rows,
        (torch.arange(columns, dtype=torch.float64) + 0.5) * size[1] / columns,
        indexing="ij",
    )
    return x.reshape(-1), y.reshape(-1)


def _grid_depth(view: SurfaceView, grid: tuple[int, int]) -> tuple[Float[Tensor, "M 2"], Float[Tensor, "M"]]:
    """Pixels (x, y) of a grid's cell centres, and the depth there."""
    points = torch.stack(_grid_centres((view.height, view.width), grid), -1)
    rows, columns = view.depth.shape  # maybe of another size than the photo
    x, y = points.unbind(-1)
    inside = (y * rows / view.height).long(), (x * columns / view.width).long()  # the pixel that a centre lies in
    return points, view.depth[inside].double()


def _nearest(a: Float[Tensor, "M C"], b: Float[Tensor, "K C"]) -> tuple[Tensor, Tensor]:
    """For each of a: the place of the nearest of b by cosine, and the ratio of the two smallest distances."""
    places, ratios = [], []
    for part in a.split(max(1, _SIMILARITIES_PER_STEP // len(b))):
        cosines, indices = (part @ b.T).topk(2, dim=1)
        distances = (1 - cosines).clamp_min(1e-9)
        places.append(indices[:, 0])
        ratios.append(distances[:, 0] / distances[:, 1])
    return torch.cat(places), torch.cat(ratios)


def _project(
    points: Float[Tensor, "M 2"], depth: Float[Tensor, "M"], a: SurfaceView, b: SurfaceView
) -> tuple[Float[Tensor, "M 2"], Bool[Tensor, "M"]]:
    """Where the surface points that one view sees lie in the other, and whether in front of it."""
    homogeneous = torch.cat([points, torch.ones_like(points[:, :1])], 1)
    in_a = (homogeneous @ torch.linalg.inv(a.K.double()).T) * depth[:, None]
    a_to_b = b.viewmat.double() @ torch.linalg.inv(a.viewmat.double())
    in_b = in_a @ a_to_b[:3, :3].T + a_to_b[:3, 3]
    projected = in_b @ b.K.double().T
    in_front = in_b[:, 2] > 1e-6
    return projected[:, :2] / torch.where(in_front, projected[:, 2], 1.0)[:, None], in_front


def _displacement(points: Any) -> float:
    """Median shift of shared points between two photos laid over each other, as a share of the width."""
    rows, columns = _OVERLAP_GRID
    source = torch.stack([points.patch_index % columns, points.patch_index // columns], -1) + 0.5
    return float((points.target - source).norm(dim=-1).median()) / columns if len(points) else 0.0
