"""Light, baked once per room: soft direct light from windows, sun and lamps, and three bounces between all surfaces.

Light lives on the nodes of `fit3d_rooms.geometry.PackedScene`, so every view sees exactly the same shading.
Values are irradiance divided by pi: times a surface's albedo they give its radiance.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from fit3d_rooms.building.objects import Bulb
from fit3d_rooms.building.shell import REVEAL, Room
from fit3d_rooms.geometry import PackedScene, RayScene

SKY = np.array([2.6, 2.95, 3.3], np.float32)
GROUND = np.array([0.85, 0.85, 0.7], np.float32)
WARM = np.array([1.0, 0.84, 0.65], np.float32)
SUN = np.array([3.4, 2.9, 2.3], np.float32)
# The additive sequence of the plastic number (Roberts 2018): evenly spread for any count.
_STEP = np.array([0.7548776662466927, 0.5698402909980532])
_WINDOW_POINTS = 20
_CHUNK = 16384
_GATHER_RAYS = 72
_BOUNCES = 3
_ALBEDO_FOOTPRINT = 0.06


@dataclass
class WindowLight:
    """A bright rectangle: corner and edges (metres, [3] each) and the unit normal into the room."""

    corner: np.ndarray
    """[3], metres."""
    edge_s: np.ndarray
    """[3], from the corner, metres."""
    edge_t: np.ndarray
    """[3], from the corner, metres."""
    normal: np.ndarray
    """[3], into the room."""


@dataclass
class Lights:
    """Everything that shines: windows, lamps, and the direction towards the sun (None: overcast)."""

    windows: list[WindowLight]
    """Of all walls."""
    bulbs: list[Bulb]
    """Of all lamps."""
    sun: np.ndarray | None = None
    """[3], towards it; None where it is overcast."""
    strength: float = field(default=1.0)
    """Of the daylight, relative."""


def make_lights(room: Room, bulbs: Sequence[Bulb], rng: np.random.Generator) -> Lights:
    """Collects the lights of a room and draws the weather.

    Args:
        room: With its windows.
        bulbs: Of all lamps, in the room's frame.
        rng: Draws what differs from room to room.

    Returns:
        Windows, lamps and, on most days, the sun.
    """
    windows = []
    for wall in room.walls:
        for hole in wall.windows:
            corner = np.array(wall.point(hole.start, -REVEAL + 0.04, hole.low))
            edge_s = np.array([*(wall.direction * (hole.end - hole.start)), 0.0])
            edge_t = np.array([0.0, 0.0, hole.high - hole.low])
            windows.append(WindowLight(corner, edge_s, edge_t, np.array([*wall.normal, 0.0])))
    sun = None
    if rng.random() < 0.7:
        window = windows[rng.integers(len(windows))]
        bearing = np.arctan2(-window.normal[1], -window.normal[0]) + rng.uniform(-0.7, 0.7)
        elevation = rng.uniform(0.5, 0.8)
        sun = np.array([np.cos(bearing) * np.cos(elevation), np.sin(bearing) * np.cos(elevation), np.sin(elevation)])
    return Lights(windows, list(bulbs), sun, float(rng.uniform(0.8, 1.2)))


def _lattice(count: int) -> np.ndarray:
    """A low-discrepancy point set [count, 2] in the unit square."""
    return np.mod(0.5 + np.arange(count)[:, None] * _STEP, 1.0).astype(np.float32)


def _jitter(scene: PackedScene, rng: np.random.Generator, stride: int, period: int, points: int) -> np.ndarray:
    """Shift of the sample pattern of every node, float32 [M, 2].

    ``period`` x ``period`` neighbours share one long sequence, each taking its own ``points`` samples of it. The error
    then repeats with that period, and a filter of the same width removes it.

    Args:
        scene: the room.
        rng: shifts whole patches against each other.
        stride: 1 where all nodes are used, 2 where every second one is.
        period: in used nodes, 2 or 4.
        points: samples per node.
    """
    jitter = np.empty((scene.node_total, 2))
    order = np.array([[0, 2], [3, 1]])
    if period == 4:
        order = np.block([[4 * order + k for k in row] for row in order])
    shifts = rng.random((len(scene.nodes), 2))
    for (ns, nt), start, shift in zip(scene.nodes, scene.node_start, shifts):
        i, j = (np.arange(n) // (stride if n > 8 else 1) % period for n in (ns, nt))
        turn = order[i[:, None], j[None]].reshape(-1, 1) * points
        jitter[start : start + ns * nt] = np.mod(shift + turn * _STEP, 1.0)
    return jitter.astype(np.float32)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def _tangents(normals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors perpendicular to each normal and to each other (Duff et al. 2017)."""
    x, y, z = normals.T
    sign = np.where(z >= 0, 1.0, -1.0).astype(normals.dtype)
    a = -1.0 / (sign + z)
    b = x * y * a
    return np.stack([1 + sign * x * x * a, sign * b, -sign * x], 1), np.stack([b, sign + y * y * a, -y], 1)


def _lit(opaque: RayScene, origins: np.ndarray, towards: np.ndarray, facing: np.ndarray, reach: float) -> np.ndarray:
    """Indices of the nodes that face the light in direction ``towards`` [N, 3] and are reached by it."""
    turned = np.flatnonzero(facing > 0)
    if not len(turned):
        return turned
    return turned[~opaque.blocked(origins[turned], towards[turned], reach)]


def _direct(
    opaque: RayScene, lights: Lights, positions: np.ndarray, normals: np.ndarray, jitter: np.ndarray
) -> np.ndarray:
    """Light that reaches the nodes [N, 3] straight from its source, float32 [N, 3]."""
    total = np.zeros(positions.shape, np.float32)
    origins = positions + np.float32(0.002) * normals
    for window in lights.windows:
        corner, edge_s, edge_t, normal = (
            v.astype(np.float32) for v in (window.corner, window.edge_s, window.edge_t, window.normal)
        )
        points = _lattice(_WINDOW_POINTS)
        share = float(np.linalg.norm(edge_s) * np.linalg.norm(edge_t) / np.pi / len(points) * lights.strength)
        before = _dot(origins - corner, normal) > 0
        for point in points:
            place = np.mod(point + jitter, np.float32(1))
            towards = corner + place[:, :1] * edge_s + place[:, 1:] * edge_t - origins
            facing = np.where(before, _dot(towards, normals), np.float32(0))
            lit = _lit(opaque, origins, towards, facing, 0.999)
            towards = towards[lit]
            square = np.maximum(_dot(towards, towards), np.float32(0.01))
            weight = facing[lit] * -_dot(towards, normal) / square**2 * share
            upward = np.clip(towards[:, 2] / np.sqrt(square) * 2.2 + 0.55, 0.0, 1.0)[:, None]
            total[lit] += weight[:, None] * (GROUND + (SKY - GROUND) * upward)
    for bulb in lights.bulbs:
        points = _lattice(6)
        centre = np.asarray(bulb.centre, np.float32) - origins
        for point in points:
            place = np.mod(point + jitter, np.float32(1))
            z = 1 - 2 * place[:, 0]
            ring = np.sqrt(np.maximum(1 - z * z, 0)) * bulb.radius
            around = np.float32(2 * np.pi) * place[:, 1]
            towards = centre + np.stack([ring * np.cos(around), ring * np.sin(around), z * bulb.radius], 1)
            facing = _dot(towards, normals)
            lit = _lit(opaque, origins, towards, facing, 0.999)
            towards = towards[lit]
            square = np.maximum(_dot(towards, towards), np.float32(0.02))
            # A shade lets more light out at its two ends than through its side.
            beam = 0.45 + 0.55 * towards[:, 2] ** 2 / square
            weight = facing[lit] / np.sqrt(square) / square * beam * (bulb.power / len(points))
            total[lit] += weight[:, None] * WARM
    if lights.sun is not None:
        points = _lattice(8)
        across, up = (v[0] for v in _tangents(lights.sun[None]))
        for point in points:
            place = np.mod(point + jitter, np.float32(1))
            radius, angle = 0.012 * np.sqrt(place[:, :1]), np.float32(2 * np.pi) * place[:, 1:]
            towards = (lights.sun + radius * (np.cos(angle) * across + np.sin(angle) * up)).astype(np.float32)
            facing = _dot(towards, normals)
            lit = _lit(opaque, origins, towards, facing, 100.0)
            total[lit] += (facing[lit] / len(points))[:, None] * SUN
    return total


def _buried(full: RayScene, scene: PackedScene, positions: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Which nodes lie inside a solid, bool [N]: most of what they see are inner sides."""
    across, up = _tangents(normals)
    inner = np.zeros(len(positions))
    angles = 2 * np.pi * (np.arange(5) + 0.3) / 5
    for angle in angles:
        towards = normals + 1.1 * (np.cos(angle) * across + np.sin(angle) * up)
        inner += _sees_inner_side(full, scene, positions + 0.002 * normals, towards)[0]
    return inner >= 3


def _sees_inner_side(full: RayScene, scene: PackedScene, origins: np.ndarray, towards: np.ndarray):
    """Whether rays end on the inner side of a solid, bool [N]; and the triangles and uv they hit."""
    faces, uv, _ = full.first_hit(origins, towards)
    struck = faces.clip(0)
    back = _dot(scene.face_normals[struck, 0], towards) > 0
    return back & (faces >= 0) & ~scene.two_sided[scene.face_patch[struck]], faces, uv


def _gather(
    full: RayScene, scene: PackedScene, positions: np.ndarray, normals: np.ndarray, jitter: np.ndarray
) -> np.ndarray:
    """Nodes seen from each node over its hemisphere, cosine-weighted: int32 [N, _GATHER_RAYS], -1 for dark."""
    across, up = _tangents(normals)
    origins = positions + np.float32(0.002) * normals
    seen = np.empty((len(positions), _GATHER_RAYS), np.int32)
    for k, point in enumerate(_lattice(_GATHER_RAYS)):
        place = np.mod(point + jitter, np.float32(1))
        radius, angle = np.sqrt(place[:, 0]), np.float32(2 * np.pi) * place[:, 1]
        towards = (radius * np.cos(angle))[:, None] * across + (radius * np.sin(angle))[:, None] * up
        towards += np.sqrt(1 - place[:, 0])[:, None] * normals
        inner, faces, uv = _sees_inner_side(full, scene, origins, towards)
        patch, st = scene.surface_points(faces.clip(0), uv)
        count = scene.nodes[patch]
        cell = np.rint(st.clip(0, 1) * (count - 1)).astype(np.int64)
        node = scene.node_start[patch] + cell[:, 0] * count[:, 1] + cell[:, 1]
        seen[:, k] = np.where(inner | (faces < 0), -1, node)
    return seen


def _mend(scene: PackedScene, values: np.ndarray, buried: np.ndarray, width: Callable[[int], int]) -> None:
    """Fills buried nodes from their neighbours and smooths each patch, in place.

    Args:
        scene: the room.
        values: on the nodes, [M, 3].
        buried: [M].
        width: of the filter, in nodes, for a patch with that many nodes along one side.
    """
    for (ns, nt), start in zip(scene.nodes, scene.node_start):
        part = slice(start, start + ns * nt)
        bad = buried[part].reshape(ns, nt)
        grid = values[part].reshape(ns, nt, 3)
        if bad.any() and not bad.all():
            weighted = np.concatenate([grid, np.ones_like(grid[..., :1])], axis=2) * ~bad[..., None]
            for _ in range(12):
                spread = _smooth(_smooth(weighted, 2, 0), 2, 1)
                new = (weighted[..., 3:] == 0) & (spread[..., 3:] > 0)
                if not new.any():
                    break
                weighted = np.where(new, spread / np.maximum(spread[..., 3:], 1e-12), weighted)
            grid = weighted[..., :3]
        values[part] = _smooth(_smooth(grid, width(ns), 0), width(nt), 1).reshape(-1, 3)


def _smooth(grid: np.ndarray, width: int, axis: int) -> np.ndarray:
    """Box filter of an even ``width`` along one axis of [A, B, K], with half weight at its two ends."""
    count = grid.shape[axis]
    padded = grid.take(_padding(count, width // 2), axis=axis)
    total = np.zeros_like(grid)
    for k in range(width + 1):
        share = (0.5 if k in (0, width) else 1.0) / width
        total += share * (padded[k : k + count] if axis == 0 else padded[:, k : k + count])
    return total


@cache
def _spaced(count: int) -> np.ndarray:
    """Places [count] of nodes along a side, 0..1."""
    return np.linspace(0, 1, count)


@cache
def _padding(count: int, half: int) -> np.ndarray:
    """Places [half + count + half] of a row's values, mirrored beyond its ends, or repeated where it is too short."""
    return np.pad(np.arange(count), half, mode="reflect" if count > half else "edge")


def _coarse_nodes(scene: PackedScene) -> np.ndarray:
    """Every second node of large patches in both directions, all of small ones: indices [K]."""
    chosen = []
    for (ns, nt), start in zip(scene.nodes, scene.node_start):
        rows = np.unique(np.append(np.arange(0, ns, 2 if ns > 8 else 1), ns - 1))
        columns = np.unique(np.append(np.arange(0, nt, 2 if nt > 8 else 1), nt - 1))
        chosen.append((start + rows[:, None] * nt + columns[None]).ravel())
    return np.concatenate(chosen)


def _spread(scene: PackedScene, values: np.ndarray) -> None:
    """Fills the nodes between those of `_coarse_nodes` linearly, in place."""
    for (ns, nt), start in zip(scene.nodes, scene.node_start):
        grid = values[start : start + ns * nt].reshape(ns, nt, 3)
        if nt > 8:
            odd = np.arange(1, nt - 1, 2)
            grid[:, odd] = (grid[:, odd - 1] + grid[:, odd + 1]) / 2
        if ns > 8:
            odd = np.arange(1, ns - 1, 2)
            grid[odd] = (grid[odd - 1] + grid[odd + 1]) / 2


def bake(scene: PackedScene, lights: Lights, rng: np.random.Generator, workers: int) -> np.ndarray:
    """Computes the light on every node, float32 [M, 3].

    Args:
        scene: the room.
        lights: what shines.
        rng: drawn from before any work is shared out, so the result does not depend on ``workers``.
        workers: threads.

    Returns:
        Light on every node, float32 [M, 3].
    """
    full = RayScene(scene)
    lamps = (scene.glow > 0) & ~(scene.gloss > 0)
    opaque = RayScene(scene, ~lamps)
    positions, normals, owner = scene.node_frames()
    positions, normals = positions.astype(np.float32), normals.astype(np.float32)
    jitter = _jitter(scene, rng, 1, 2, _WINDOW_POINTS)
    wide_jitter = _jitter(scene, rng, 2, 4, _GATHER_RAYS)
    sheets = np.flatnonzero(scene.two_sided[owner])
    # Sheets are lit from both sides: their nodes come twice, the second time turned round.
    all_positions, all_normals = (
        np.concatenate([positions, positions[sheets]]),
        np.concatenate([normals, -normals[sheets]]),
    )
    all_jitter, all_wide = (np.concatenate([j, j[sheets]]) for j in (jitter, wide_jitter))
    coarse = _coarse_nodes(scene)
    coarse = np.concatenate([coarse, np.flatnonzero(scene.two_sided[owner[sheets]]) + len(positions)])

    with ThreadPoolExecutor(workers) as pool:

        def chunked(function, count: int) -> np.ndarray:
            parts = [slice(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
            return np.concatenate(list(pool.map(function, parts)))

        direct = chunked(
            lambda c: _direct(opaque, lights, all_positions[c], all_normals[c], all_jitter[c]), len(all_positions)
        )
        buried = chunked(lambda c: _buried(full, scene, positions[c], normals[c]), len(positions))

        def gather(c: slice) -> np.ndarray:
            nodes = coarse[c]
            return _gather(full, scene, all_positions[nodes], all_normals[nodes], all_wide[nodes])

        seen = chunked(gather, len(coarse))
        direct = _fold(direct, sheets, len(positions))
        _mend(scene, direct, buried, lambda count: 2)
        places = [
            np.stack(np.meshgrid(_spaced(ns), _spaced(nt), indexing="ij"), -1).reshape(-1, 2) for ns, nt in scene.nodes
        ]
        footprint = np.full(len(positions), _ALBEDO_FOOTPRINT)
        albedo = scene.albedo(owner, np.concatenate(places).astype(np.float32), footprint).astype(np.float64)
        # Lamps and panes count as direct light only; the last row stands for darkness.
        albedo[lamps[owner]] = 0.0
        indirect = np.zeros_like(direct)
        for _ in range(_BOUNCES):
            radiance = np.concatenate([albedo * (direct + indirect), np.zeros((1, 3))]).astype(np.float32)
            arriving = chunked(lambda c: radiance[seen[c]].mean(axis=1), len(coarse))  # noqa: B023
            doubled = np.zeros((len(all_positions), 3))
            doubled[coarse] = arriving
            indirect = _fold(doubled, sheets, len(positions))
            _spread(scene, indirect)
            _mend(scene, indirect, buried, lambda count: 8 if count > 8 else 2)
    return (direct + indirect).astype(np.float32)


def _fold(values: np.ndarray, sheets: np.ndarray, count: int) -> np.ndarray:
    """Averages the two sides of the sheets: [count + sheets, 3] -> [count, 3]."""
    folded = values[:count].copy()
    folded[sheets] = (folded[sheets] + values[count:]) / 2
    return folded
