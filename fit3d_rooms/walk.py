"""A walk through a furnished room: a closed, smooth path at eye height that looks at what stands around."""

import numpy as np

from fit3d_rooms.building.layout import Layout, Rectangle
from fit3d_rooms.geometry import RayScene
from fit3d_rooms.rendering import Camera, rotate

CLEARANCE = 0.32
"""Least distance of a camera from walls and furniture on the floor plan, metres."""
_CELL = 0.05
_BINS = 48


def clearance(layout: Layout, points: np.ndarray) -> np.ndarray:
    """Returns the distance on the floor plan to the nearest wall or solid, metres [N]; negative inside.

    Args:
        layout: Of the furnished room.
        points: [N, 2], metres.
    """
    room = layout.room
    distance = np.minimum.reduce([points[:, 0], room.width - points[:, 0], points[:, 1], room.depth - points[:, 1]])
    for rectangle in (*layout.solids, *room.notches):
        distance = np.minimum(distance, _outside(points, rectangle))
    return distance


def _outside(points: np.ndarray, rectangle: Rectangle) -> np.ndarray:
    """Signed distance of points [N, 2] to a rectangle: positive outside."""
    x0, y0, x1, y1 = rectangle
    dx = np.maximum(x0 - points[:, 0], points[:, 0] - x1)
    dy = np.maximum(y0 - points[:, 1], points[:, 1] - y1)
    return np.where((dx <= 0) & (dy <= 0), np.maximum(dx, dy), np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)))


class _Floor:
    """The part of the floor where one can walk, as a grid."""

    def __init__(self, layout: Layout) -> None:
        room = layout.room
        xs, ys = (np.arange(_CELL / 2, size, _CELL) for size in (room.width, room.depth))
        self.points = np.stack(np.meshgrid(xs, ys, indexing="ij"), -1)
        self.room_left = clearance(layout, self.points.reshape(-1, 2)).reshape(len(xs), len(ys))
        self.open = self._largest(self.room_left >= CLEARANCE + 0.02)

    @staticmethod
    def _largest(free: np.ndarray) -> np.ndarray:
        """The largest connected part of a mask [X, Y]."""
        best, left = np.zeros_like(free), free.copy()
        while left.any():
            part = np.zeros_like(free)
            part[tuple(np.argwhere(left)[0])] = True
            while True:
                grown = part.copy()
                for axis in (0, 1):
                    for step in (1, -1):
                        shifted = np.roll(part, step, axis)
                        edge = [slice(None), slice(None)]
                        edge[axis] = slice(0, 1) if step == 1 else slice(-1, None)
                        shifted[tuple(edge)] = False
                        grown |= shifted
                grown &= free
                if (grown == part).all():
                    break
                part = grown
            left &= ~part
            if part.sum() > best.sum():
                best = part
        return best

    def way(self, start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
        """Cells of the shortest way that prefers the middle of open places (Dijkstra)."""
        import heapq

        cost = {start: 0.0}
        came: dict[tuple[int, int], tuple[int, int]] = {}
        queue = [(0.0, start)]
        steps = [(i, j, float(np.hypot(i, j))) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
        while queue:
            so_far, cell = heapq.heappop(queue)
            if cell == end:
                break
            if so_far > cost[cell]:
                continue
            for di, dj, length in steps:
                neighbour = (cell[0] + di, cell[1] + dj)
                if not (0 <= neighbour[0] < self.open.shape[0] and 0 <= neighbour[1] < self.open.shape[1]):
                    continue
                if not self.open[neighbour]:
                    continue
                reached = so_far + length * (1.0 + 0.3 / float(self.room_left[neighbour]))
                if reached < cost.get(neighbour, np.inf):
                    cost[neighbour] = reached
                    came[neighbour] = cell
                    heapq.heappush(queue, (reached, neighbour))
        path = [end]
        while path[-1] != start:
            path.append(came[path[-1]])
        return path[::-1]


def _waypoints(floor: _Floor, count: int) -> list[tuple[int, int]]:
    """Cells far from each other that cover the open floor, ordered around their middle."""
    cells = np.argwhere(floor.open)
    points = floor.points[floor.open]
    chosen = [int(np.argmax(((points - points.mean(0)) ** 2).sum(1)))]
    distance = np.full(len(points), np.inf)
    for _ in range(count - 1):
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(np.argmax(distance)))
    middle = points[chosen].mean(0)
    order = np.argsort(np.arctan2(*(points[chosen] - middle).T[::-1]), kind="stable")
    return [tuple(int(v) for v in cells[chosen[i]]) for i in order]  # type: ignore[misc]


def _smooth_loop(layout: Layout, line: np.ndarray, rounds: int = 220) -> np.ndarray:
    """Rounds the corners of a closed line [K, 2] as far as the furniture allows."""
    for _ in range(rounds):
        target = (np.roll(line, 1, 0) + np.roll(line, -1, 0)) / 2
        moved = line + 0.6 * (target - line)
        allowed = clearance(layout, moved) >= CLEARANCE
        line = np.where(allowed[:, None], moved, line)
    return line


def _resample(line: np.ndarray, count: int) -> np.ndarray:
    """``count`` points [count, 2] at even distances along a closed line."""
    closed = np.concatenate([line, line[:1]])
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    places = np.arange(count) / count * arc[-1]
    return np.stack([np.interp(places, arc, closed[:, i]) for i in (0, 1)], 1)


def look(position: np.ndarray, yaw: float, pitch: float) -> np.ndarray:
    """Returns a camera-to-world matrix [4, 4], OpenGL axes.

    Args:
        position: [3], metres.
        yaw: Radians, counter-clockwise from x.
        pitch: Radians, upwards.
    """
    forward = np.array([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch)])
    right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2], pose[:3, 3] = right, np.cross(right, forward), -forward, position
    return pose


def _survey(positions: np.ndarray, pitch: np.ndarray, rays: RayScene, probe: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Looks around at every place.

    Returns:
        How open each direction is, [V, _BINS] (walls right before the camera are bad), and which part of the room
        each ray of ``probe`` meets, as ids of half-metre cells from 0 on, [V, _BINS, R].
    """
    worth, cells = np.empty((len(positions), _BINS)), []
    for index, position in enumerate(positions):
        directions = np.concatenate(
            [
                rotate(probe.directions((0.5, 0.5)), look(position, yaw, float(pitch[index]))[:3, :3])
                for yaw in 2 * np.pi * np.arange(_BINS) / _BINS
            ]
        )
        _, _, distance = rays.first_hit(position[None], directions)
        cells.append(np.floor((position + directions * distance[:, None]) / 0.5).reshape(_BINS, -1, 3))
        distance = distance.reshape(_BINS, -1)
        worth[index] = 0.4 * np.minimum(distance, 4.0).mean(1) - 4.0 * (distance < 0.7).mean(1)
    flat = np.stack(cells).clip(-4, 40).astype(np.int64) + 4
    ids = (flat[..., 0] * 64 + flat[..., 1]) * 64 + flat[..., 2]
    return worth, np.unique(ids, return_inverse=True)[1].reshape(ids.shape)


def _choose_yaws(worth: np.ndarray) -> np.ndarray:
    """The bins [V] of the smooth sequence of directions that is worth most (Viterbi), for ``worth`` [V, _BINS]."""
    angles = 2 * np.pi * np.arange(_BINS) / _BINS
    turn = np.abs(np.angle(np.exp(1j * (angles[:, None] - angles[None]))))
    penalty = 0.5 * turn + 6.0 * np.maximum(turn - 0.45, 0.0)
    total, back = worth[0], []
    for row in worth[1:]:
        options = total[:, None] - penalty
        back.append(options.argmax(0))
        total = options.max(0) + row
    bins = [int(total.argmax())]
    for pointers in reversed(back):
        bins.append(int(pointers[bins[-1]]))
    return np.array(bins[::-1])


def _cover(worth: np.ndarray, seen: np.ndarray, rounds: int = 8) -> np.ndarray:
    """Yaw of every view, radians [V]: open directions, and every part of the room seen by some views.

    Args:
        worth: of each direction by itself, [V, _BINS].
        seen: cells met by each direction's rays, [V, _BINS, R].
        rounds: each prefers what the paths before it saw least.
    """
    count = np.zeros(int(seen.max()) + 1)
    best, best_score = None, -np.inf
    everywhere = len(np.unique(seen))
    for _ in range(rounds):
        rarity = 1.0 / (1.0 + count)
        bins = _choose_yaws(worth + 4.0 * rarity[seen].mean(2))
        met, times = np.unique(seen[np.arange(len(bins)), bins], return_counts=True)
        score = (times >= 3).sum() / everywhere * 10 + worth[np.arange(len(bins)), bins].mean()
        if score > best_score:
            best, best_score = bins, score
        count[met] += times / len(bins) * 4
    return np.unwrap(2 * np.pi * np.asarray(best) / _BINS)


def walk(layout: Layout, rays: RayScene, camera: Camera, views: int, rng: np.random.Generator) -> np.ndarray | None:
    """Plans the camera poses of a room.

    Args:
        layout: the furnished room.
        rays: its surfaces.
        camera: whose field of view is used to judge directions.
        views: V, how many poses.
        rng: for the sway of height and gaze.

    Returns:
        Camera-to-world matrices [V, 4, 4], metres, OpenGL axes; None where furniture leaves no place to walk.
    """
    floor = _Floor(layout)
    if floor.open.sum() * _CELL**2 < 1.2:
        return None
    stops = _waypoints(floor, 7)
    cells = [cell for a, b in zip(stops, stops[1:] + stops[:1]) for cell in floor.way(a, b)[:-1]]
    line = _smooth_loop(layout, floor.points[tuple(np.array(cells).T)])
    places = _resample(line, views)
    if clearance(layout, places).min() < CLEARANCE - 0.05:
        return None
    phase = np.arange(views) / views
    sway = rng.uniform(0, 1, 3)
    height = 1.45 + 0.12 * np.sin(2 * np.pi * (2 * phase + sway[0]))
    pitch = -0.27 + 0.11 * np.sin(2 * np.pi * (3 * phase + sway[1]))
    positions = np.concatenate([places, height[:, None]], 1)
    worth, seen = _survey(positions, pitch, rays, Camera(12, 9, camera.focal * 12 / camera.width))
    centre = places.mean(0)
    inward = np.arctan2(*(centre - places).T[::-1])
    worth += 0.4 * np.cos(2 * np.pi * np.arange(_BINS) / _BINS - inward[:, None])
    yaw = _cover(worth, seen)
    kernel = np.array([0.25, 0.5, 0.25])
    yaw = np.convolve(np.pad(yaw, 1, mode="edge"), kernel, mode="valid")
    return np.stack([look(p, float(y), float(t)) for p, y, t in zip(positions, yaw, pitch)])
