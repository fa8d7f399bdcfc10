"""How well lifted features keep the teacher's content, and how well they agree between views.

`feature_l1` and `feature_cosine` compare a map with the teacher's map of the same view. `MatchedViews` compares maps of
different views: a feature that belongs to a point of the surface, not to a picture of it, finds that point again.
Mean cosine of matched points is no such measure, because features that are alike everywhere score high on it.
"""

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.features.correspondences import Correspondences, SurfaceView, ViewStack, correspondences
from fit3d_ns.support.samples import evenly_spaced

MATCH_RADIUS = 1.5
"""Distance, in patches, up to which a nearest neighbour counts as the true one."""

MATCH_VIEWS = 40
"""Most views of a scene whose maps are compared with each other; whoever has more takes evenly spaced ones. Bounds
memory, and time, which grows with the square of their number."""

_SIMILARITIES_PER_STEP = 1 << 22
"""Cosines held at a time by `match_rate`: 16 MiB in float32."""

_POINTS_PER_STEP = 1 << 17
"""Points that `choose_pairs` follows at a time; each takes about 1 kB."""


def feature_l1(
    pred: Float[Tensor, "C h w"], teacher: Float[Tensor, "C h w"], mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Mean absolute difference over channels and valid patches.

    Args:
        pred: [C, h, w] decoded map, any float dtype.
        teacher: [C, h, w] the teacher's map of the same view.
        mask: [h, w] bool, or weights of the patches in [0, 1]; all valid if None.

    Returns:
        float32 scalar, at least 0; NaN if no patch is valid (leave such a view out of an average).

    Raises:
        ValueError: If the shapes differ.
    """
    _check_maps(pred, teacher, mask)
    return _masked_mean((pred.float() - teacher.float()).abs().mean(0), mask)


def feature_cosine(
    pred: Float[Tensor, "C h w"], teacher: Float[Tensor, "C h w"], mask: Tensor | None = None
) -> Float[Tensor, ""]:
    """Mean over valid patches of the cosine between the two features; a zero feature counts as cosine 0.

    Args:
        pred: [C, h, w] decoded map, any float dtype.
        teacher: [C, h, w] the teacher's map of the same view.
        mask: [h, w] bool, or weights of the patches in [0, 1]; all valid if None.

    Returns:
        float32 scalar in [-1, 1]; NaN if no patch is valid (leave such a view out of an average).

    Raises:
        ValueError: If the shapes differ.
    """
    _check_maps(pred, teacher, mask)
    return _masked_mean(torch.nn.functional.cosine_similarity(pred.float(), teacher.float(), dim=0), mask)


def match_rate(
    map_a: Float[Tensor, "C ha wa"],
    map_b: Float[Tensor, "C hb wb"],
    points: Correspondences,
    radius: float = MATCH_RADIUS,
) -> tuple[int, int]:
    """Counts the points whose nearest neighbour by cosine, among all patches of b, lies where b sees them.

    Args:
        map_a: [C, ha, wa] feature map of the first view, any float dtype.
        map_b: [C, hb, wb] feature map of the second view, of any grid.
        points: Of `correspondences`, made for these two grids.
        radius: Distance in patches up to which the neighbour counts as the right one.

    Returns:
        (hits, total), with total = len(points).
    """
    features_a = _unit_features(map_a)  # [ha wa, C]
    features_b = _unit_features(map_b)  # [hb wb, C]
    patch_index = points.patch_index.to(map_a.device)  # [M]
    target = points.target.to(map_a.device)  # [M, 2]
    step = max(1, _SIMILARITIES_PER_STEP // features_b.shape[0])
    hits = torch.zeros((), dtype=torch.int64, device=map_a.device)
    for start in range(0, len(points), step):
        nearest = (features_a[patch_index[start : start + step]] @ features_b.T).argmax(1)  # [step]
        width = map_b.shape[-1]
        centre = torch.stack([nearest % width, nearest // width], -1).float() + 0.5  # [step, 2]
        hits += ((centre - target[start : start + step]).norm(dim=-1) <= radius).sum()
    return int(hits), len(points)


def choose_pairs(
    views: Sequence[SurfaceView],
    grids: Sequence[tuple[int, int]],
    *,
    min_overlap: float = 0.4,
    min_displacement: float = MATCH_RADIUS,
    max_pairs: int = 40,
) -> list[tuple[int, int]]:
    """Chooses the pairs of views that are worth comparing, by geometry alone and without chance.

    A pair is eligible if, in both directions, the other view sees at least ``min_overlap`` of a view's surface, and if
    the median displacement of the shared points between the two images is at least ``min_displacement`` patches. With
    less overlap, trained and random networks match about alike; with less displacement, features that know nothing but
    their place in the image would be counted as consistent. Of more than ``max_pairs`` eligible pairs, evenly spaced
    ones in the order of falling overlap are taken, so that near and far pairs keep their proportion.

    Args:
        views: V views.
        grids: (h, w) of each view's patch grid.
        min_overlap: Least share of a view's surface that the other view sees, in (0, 1].
        min_displacement: Least median displacement of the shared points, in patches.
        max_pairs: Most pairs returned.

    Returns:
        Pairs (a, b) with a < b, sorted; none if no pair is eligible.

    Raises:
        ValueError: If there are not as many grids as views.
    """
    if len(views) != len(grids):
        raise ValueError(f"{len(views)} views but {len(grids)} patch grids")
    # A third of the grid in each direction estimates the overlap well enough, nine times as fast.
    coarse = [(max(1, round(h / 3)), max(1, round(w / 3))) for h, w in grids]
    overlap, displacement = _overlaps(views, list(zip(coarse, grids)))
    eligible = []
    for a, b in itertools.combinations(range(len(views)), 2):
        least = min(overlap[a][b], overlap[b][a])
        if least >= min_overlap and min(displacement[a][b], displacement[b][a]) >= min_displacement:
            eligible.append((-least, a, b))
    return sorted((a, b) for _, a, b in evenly_spaced(sorted(eligible), max_pairs))


class MatchedViews:
    """Views that share surface, and which of their patches show the same points.

    Depends on no features: chosen once, any number of sets of maps is compared on the same pairs of views and the same
    points.

    Args:
        views: V views, at most `MATCH_VIEWS` of a scene.
        grids: (h, w) of each view's patch grid.
        pairs: Of `choose_pairs`, by which they are chosen if None.

    Attributes:
        num_pairs: Pairs of views that are compared.
        num_points: Points that are looked for, both directions of every pair counted.

    Raises:
        ValueError: If there are not as many grids as views.
    """

    def __init__(
        self,
        views: Sequence[SurfaceView],
        grids: Sequence[tuple[int, int]],
        pairs: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        pairs = choose_pairs(views, grids) if pairs is None else pairs
        self._grids = list(grids)
        self._points = [
            (a, b, correspondences(views[a], views[b], grids[a], grids[b]))
            for pair in pairs
            for a, b in (pair, (pair[1], pair[0]))
        ]
        self.num_pairs = len(pairs)
        self.num_points = sum(len(points) for _, _, points in self._points)

    def match(self, maps: Sequence[Float[Tensor, "C h w"]]) -> float | None:
        """Returns the share of surface points seen in two views that their features find again in the other view.

        For each pair and in both directions, the feature of a patch whose centre the other view sees too is looked up
        among all patches of that view; it is a hit if the one with the largest cosine lies within 1.5 patches of the
        true place. Chance is about 7 patches over the number of patches.

        Args:
            maps: [C, h, w], one feature map for each view, any float dtype.

        Returns:
            In [0, 1], over all points of all pairs; None where there is no point to match.

        Raises:
            ValueError: If there are not as many maps as views, or one is of another grid.
        """
        if [(feature_map.shape[-2], feature_map.shape[-1]) for feature_map in maps] != self._grids:
            raise ValueError(f"{len(maps)} maps do not fit {len(self._grids)} views with the patch grids {self._grids}")
        hits = sum(match_rate(maps[a], maps[b], points)[0] for a, b, points in self._points)
        return hits / self.num_points if self.num_points else None


def _check_maps(pred: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    if pred.ndim != 3 or pred.shape != teacher.shape:
        raise ValueError(f"expected two maps [C, h, w] of one shape, got {list(pred.shape)} and {list(teacher.shape)}")
    if mask is not None and mask.shape != pred.shape[1:]:
        raise ValueError(f"expected a mask {list(pred.shape[1:])}, got {list(mask.shape)}")


def _masked_mean(values: Float[Tensor, "h w"], mask: Tensor | None) -> Float[Tensor, ""]:
    if mask is None:
        return values.mean()
    weights = mask.to(values)
    # Not a product: a masked patch may hold anything, NaN included.
    return torch.where(weights > 0, values * weights, 0.0).sum() / weights.sum()


def _unit_features(feature_map: Float[Tensor, "C h w"]) -> Float[Tensor, "hw C"]:
    """Patches as unit vectors; NaN and infinity become 0, so that they never win a comparison."""
    features = torch.nan_to_num(feature_map.detach().float(), posinf=0.0, neginf=0.0).flatten(1).T
    return torch.nn.functional.normalize(features, dim=1)


def _overlaps(
    views: Sequence[SurfaceView], grids: Sequence[tuple[tuple[int, int], tuple[int, int]]]
) -> tuple[list[list[float]], list[list[float]]]:
    """Compares all views with all others.

    Args:
        views: V views.
        grids: (h, w) of the grid that each is looked at on, and of its own patch grid.

    Returns:
        For views a and b, which share of the surface that a sees b sees too, and the median shift of the shared points
        between the two images laid over each other, in patches of b; 0 where there is none.
    """
    if not views:
        return [], []
    stack, looked_at = ViewStack(views), [grid for grid, _ in grids]
    counts = torch.zeros(len(views), len(views), dtype=torch.float64, device=views[0].depth.device)
    shifts = torch.zeros_like(counts)
    patches = torch.tensor([(w, h) for _, (h, w) in grids], dtype=torch.float64, device=counts.device)
    widths = torch.tensor([(w, h) for h, w in looked_at], dtype=torch.float64, device=counts.device)
    for grid in dict.fromkeys(looked_at):
        height, width = grid
        place = torch.arange(height * width, device=counts.device)
        start = (torch.stack([place % width, place // width], -1) + 0.5) / widths.new_tensor([width, height])
        firsts = torch.tensor([index for index, other in enumerate(looked_at) if other == grid], device=counts.device)
        pairs = torch.cartesian_prod(firsts, torch.arange(len(views), device=counts.device))
        for a, b in (part.unbind(1) for part in pairs.split(max(1, _POINTS_PER_STEP // (height * width)))):
            valid, target = stack.follow(a, b, grid, looked_at)
            shift = ((target / widths[b, None] - start) * patches[b, None]).norm(dim=-1)
            counts[a, b] = valid.sum(1).to(counts)
            shifts[a, b] = torch.where(valid, shift, torch.nan).nanmedian(1).values.nan_to_num(0)
    return (counts / counts.diagonal().clamp_min(1)[:, None]).tolist(), shifts.tolist()
