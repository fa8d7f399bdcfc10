"""The empty room: floor, ceiling, walls with their openings, windows, doors, skirting boards."""

from dataclasses import dataclass, field

import numpy as np

from fit3d_rooms.building.primitives import Patch, box, labelled, moved, quad, rod, rounded_box
from fit3d_rooms.surfaces import motifs, textures
from fit3d_rooms.surfaces.materials import Materials, Surface

REVEAL = 0.2
"""Depth of the window openings, metres."""


@dataclass
class Opening:
    """A rectangle in a wall: from ``start`` to ``end`` along it, from ``low`` to ``high`` above the floor (metres)."""

    start: float
    """Along the wall, metres."""
    end: float
    """Along the wall, metres."""
    low: float
    """Above the floor, metres."""
    high: float
    """Above the floor, metres."""

    def overlaps(self, other: "Opening", margin: float = 0.0) -> bool:
        """Returns whether two rectangles of one wall come closer than ``margin``.

        Args:
            other: On the same wall.
            margin: Metres.
        """
        return (
            self.start < other.end + margin
            and other.start < self.end + margin
            and self.low < other.high + margin
            and other.low < self.high + margin
        )


@dataclass
class Wall:
    """A straight wall, seen from inside, from its left end on.

    Attributes:
        origin: left end on the floor plan, metres, [2].
        direction: unit vector to the right, [2].
        normal: unit vector into the room, [2].
        length: metres.
        windows: window openings.
        doors: doors (the wall goes on behind them).
        taken: everything that stands against or hangs on it.
    """

    origin: np.ndarray
    direction: np.ndarray
    normal: np.ndarray
    length: float
    windows: list[Opening] = field(default_factory=list)
    doors: list[Opening] = field(default_factory=list)
    taken: list[Opening] = field(default_factory=list)

    @property
    def angle(self) -> float:
        """Turns +y, the front of furniture, into the wall's normal (radians about z)."""
        return float(np.arctan2(self.normal[1], self.normal[0]) - np.pi / 2)

    def point(self, along: float, out: float = 0.0, z: float = 0.0) -> tuple[float, float, float]:
        """Returns a point before the wall.

        Args:
            along: Metres from its start.
            out: Metres into the room.
            z: Above the floor, metres.
        """
        x, y = self.origin + along * self.direction + out * self.normal
        return float(x), float(y), z

    def free(self, rectangle: Opening, margin: float = 0.0) -> bool:
        """Returns whether a rectangle lies on the wall and touches neither openings nor anything standing there.

        Args:
            rectangle: On the wall.
            margin: Metres.
        """
        if rectangle.start < margin or rectangle.end > self.length - margin:
            return False
        return not any(rectangle.overlaps(o, margin) for o in (*self.windows, *self.doors, *self.taken))


@dataclass
class Room:
    """A rectangular room from which corners may be cut: none, one (an L), or two at one end (an alcove).

    Attributes:
        width: along x, metres.
        depth: along y, metres.
        height: metres.
        notches: rectangles (x0, y0, x1, y1) that do not belong to the room.
        walls: counter-clockwise.
    """

    width: float
    depth: float
    height: float
    notches: list[tuple[float, float, float, float]]
    walls: list[Wall]


def make_room(rng: np.random.Generator) -> Room:
    """Draws the floor plan.

    Args:
        rng: Draws what differs from room to room.

    Returns:
        The room, without openings.
    """
    width, depth, height = rng.uniform(4.6, 6.2), rng.uniform(4.2, 5.2), rng.uniform(2.5, 2.8)
    kind = rng.choice(["plain", "plain", "corner", "alcove"])
    notches: dict[int, tuple[float, float]] = {}
    if kind == "corner":
        notches[int(rng.integers(4))] = (rng.uniform(1.0, 1.6), rng.uniform(0.9, 1.4))
    elif kind == "alcove":
        deep = rng.uniform(0.6, 0.9)
        notches = {2: (rng.uniform(0.8, 1.3), deep), 3: (rng.uniform(0.8, 1.3), deep)}
    corners = ((0.0, 0.0), (width, 0.0), (width, depth), (0.0, depth))
    plan, removed = [], []
    for index, (x, y) in enumerate(corners):
        if index not in notches:
            plan.append((x, y))
            continue
        a, b = notches[index]
        inner_x, inner_y = (a if x == 0 else width - a), (b if y == 0 else depth - b)
        steps = [(x, inner_y), (inner_x, inner_y), (inner_x, y)]
        plan += steps if index in (0, 2) else steps[::-1]
        removed.append((min(x, inner_x), min(y, inner_y), max(x, inner_x), max(y, inner_y)))
    walls = []
    for start, end in zip(plan, plan[1:] + plan[:1]):
        p, q = np.array(start), np.array(end)
        length = float(np.linalg.norm(q - p))
        direction = (p - q) / length
        walls.append(Wall(q, direction, np.array([direction[1], -direction[0]]), length))
    return Room(width, depth, height, removed, walls)


def add_openings(room: Room, rng: np.random.Generator) -> None:
    """Gives the room one or two windows and a door, each on a wall of its own.

    Args:
        room: Of `make_room`.
        rng: Draws what differs from room to room.
    """
    order = sorted(range(len(room.walls)), key=lambda i: -room.walls[i].length)[:4]
    order = [order[i] for i in rng.permutation(4)]
    windows = 2 if rng.random() < 0.55 else 1
    for wall in (room.walls[i] for i in order[:windows]):
        width = min(rng.uniform(1.3, 2.2), wall.length - 1.2)
        start = np.clip(wall.length / 2 - width / 2 + rng.uniform(-0.6, 0.6), 0.55, wall.length - width - 0.55)
        wall.windows.append(Opening(start, start + width, rng.uniform(0.8, 0.95), min(2.25, room.height - 0.2)))
    wall = room.walls[order[3]]
    width = 0.9
    start = 0.3 if rng.random() < 0.5 else wall.length - width - 0.3
    wall.doors.append(Opening(start, start + width, 0.0, 2.05))


def _floor_pieces(room: Room) -> list[tuple[float, float, float, float]]:
    """Covers the floor plan with rectangles (x0, y0, x1, y1)."""
    cuts = sorted({0.0, room.width, *(x for n in room.notches for x in (n[0], n[2]))})
    pieces = []
    for x0, x1 in zip(cuts, cuts[1:]):
        low, high = 0.0, room.depth
        for n in room.notches:
            if n[0] < (x0 + x1) / 2 < n[2]:
                low, high = (max(low, n[3]), high) if n[1] == 0 else (low, min(high, n[1]))
        pieces.append((x0, low, x1, high))
    return pieces


def _wall_surfaces(materials: Materials) -> tuple[Surface, Surface]:
    """The common wall covering and that of the feature wall."""
    rng, colors, add = materials.rng, materials.palette, materials.bank.add
    if rng.random() < 0.7:
        common = Surface(add(textures.plaster(rng, colors.wall)), (1.7, 1.7))
    else:
        kind = str(rng.choice(["stripes", "flowers", "trellis"]))
        pale = "#{:02x}{:02x}{:02x}".format(*tuple(int(int(colors.wall[i : i + 2], 16) * 0.9) for i in (1, 3, 5)))
        common = Surface(add(textures.wallpaper(rng, colors.wall, pale, kind)), (0.8, 0.8))
    kind = rng.integers(4)
    if kind == 0:
        feature = Surface(add(textures.bricks(rng, "#a2573c" if rng.random() < 0.6 else "#cfc6ba")), (1.0, 0.9))
    elif kind == 1:
        feature = Surface(add(textures.planks(rng, colors.wood, 8)), (2.2, 1.1))
    elif kind == 2:
        pattern = str(rng.choice(["damask", "flowers", "trellis"]))
        feature = Surface(add(textures.wallpaper(rng, colors.feature, colors.wall, pattern)), (0.9, 0.9))
    else:
        feature = Surface(add(textures.plaster(rng, colors.feature, 0.05)), (1.7, 1.7))
    return common, feature


def _floor_surface(materials: Materials) -> Surface:
    rng, colors, add = materials.rng, materials.palette, materials.bank.add
    kind = rng.integers(5)
    if kind <= 1:
        return Surface(add(textures.planks(rng, colors.floor)), (2.4, 1.5), gloss=0.3)
    if kind == 2:
        return Surface(add(textures.parquet(rng, colors.floor)), (2.1, 2.1), gloss=0.3)
    if kind == 3:
        pair = ("#d9d2c4", "#6f7a78") if rng.random() < 0.4 else ("#c9bfae", "#c9bfae")
        return Surface(add(textures.tiles(rng, *pair, checker=True)), (1.6, 1.6), gloss=0.4)
    return Surface(add(textures.carpet(rng, str(rng.choice(["#a79c8b", "#8b8f92", "#b0a186"])))), (0.8, 0.8))


def _window(materials: Materials, opening: Opening, wall_surface: Surface) -> list[Patch]:
    """Reveal, frame, sill and the view, in the frame of furniture whose middle is the wall's left end."""
    a0, a1, low, high = opening.start, opening.end, opening.low, opening.high
    wide, tall, white = a1 - a0, high - low, materials.white
    reveal = [
        quad((-a0, 0, low), (-wide, 0, 0), (0, -REVEAL, 0), white),
        quad((-a0, -REVEAL, high), (-wide, 0, 0), (0, REVEAL, 0), wall_surface),
        quad((-a0, 0, low), (0, -REVEAL, 0), (0, 0, tall), wall_surface),
        quad((-a1, -REVEAL, low), (0, REVEAL, 0), (0, 0, tall), wall_surface),
    ]
    view = materials.picture(motifs.outdoors(materials.rng), glow=2.0)
    pane = [quad((-a0, -REVEAL + 0.03, low), (-wide, 0, 0), (0, 0, tall), view)]
    y0, y1, bar = -REVEAL + 0.05, -REVEAL + 0.1, 0.06
    frame = box((-a1, y0, low), (-a0, y1, low + bar), white) + box((-a1, y0, high - bar), (-a0, y1, high), white)
    casements = 2 if wide < 1.7 else 3
    for x in np.linspace(a0, a1 - bar, casements + 1):
        frame += box((-x - bar, y0, low + bar), (-x, y1, high - bar), white)
    if materials.rng.random() < 0.5:
        z = high - tall * 0.28
        frame += box((-a1 + bar, y0 + 0.005, z), (-a0 - bar, y1 - 0.005, z + 0.045), white)
    sill = rounded_box((-a1 - 0.06, 0.0, low - 0.035), (-a0 + 0.06, 0.05, low - 0.002), 0.01, white)
    return labelled(reveal, "wall") + labelled(pane + frame + sill, "window")


def _door(materials: Materials, opening: Opening) -> list[Patch]:
    """A panelled door in its frame, in the frame of furniture whose middle is the wall's left end."""
    leaf = materials.white if materials.rng.random() < 0.5 else materials.any_wood()
    x0, x1, high, bar = -opening.end, -opening.start, opening.high, 0.08
    patches = []
    for x in (x0, x1 - bar):
        patches += box((x, 0, 0), (x + bar, 0.035, high), leaf)
    patches += box((x0, 0, high), (x1, 0.035, high + bar), leaf)
    patches += box((x0 + bar, 0, 0.006), (x1 - bar, 0.02, high), leaf)
    for z0, z1 in ((0.15, 0.92), (1.08, high - 0.15)):
        patches += rounded_box((x0 + 0.2, 0.01, z0), (x1 - 0.2, 0.03, z1), 0.008, leaf)
        patches += rounded_box((x0 + 0.24, 0.02, z0 + 0.04), (x1 - 0.24, 0.036, z1 - 0.04), 0.008, leaf)
    handle = x1 - bar - 0.07
    patches += rod((handle, 0.02, 1.02), (handle, 0.07, 1.02), 0.012, materials.metal)
    patches += rod((handle, 0.065, 1.02), (handle - 0.12, 0.065, 1.02), 0.01, materials.metal)
    return labelled(patches, "door")


def _wall(materials: Materials, wall: Wall, height: float, surface: Surface) -> list[Patch]:
    def piece(a0: float, a1: float, z0: float, z1: float) -> Patch:
        return quad((-a0, 0, z0), (a0 - a1, 0, 0), (0, 0, z1 - z0), surface, (a0, z0))

    patches, cursor = [], 0.0
    for hole in sorted(wall.windows, key=lambda o: o.start):
        patches += [piece(cursor, hole.start, 0, height)]
        patches += [piece(hole.start, hole.end, 0, hole.low), piece(hole.start, hole.end, hole.high, height)]
        cursor = hole.end
    patches.append(piece(cursor, wall.length, 0, height))
    patches = labelled(patches, "wall")
    # Boards start one thickness in, so that two of them never share a surface in a corner.
    cursor, thickness = 0.014, 0.014
    for gap in [*sorted(wall.doors, key=lambda o: o.start), Opening(wall.length, wall.length, 0, 0)]:
        if gap.start > cursor:
            patches += labelled(box((-gap.start, 0, 0), (-cursor, thickness, 0.08), materials.white), "wall")
        cursor = gap.end
    return patches


def build_shell(room: Room, materials: Materials) -> list[Patch]:
    """Returns the surfaces of the empty room.

    Args:
        room: With its openings.
        materials: Of the room; its generator draws the details.
    """
    rng = materials.rng
    common, feature = _wall_surfaces(materials)
    floor = _floor_surface(materials)
    ceiling = Surface(materials.bank.add(textures.plaster(rng, "#f1eee8", 0.02)), (1.5, 1.5))
    patches = []
    for x0, y0, x1, y1 in _floor_pieces(room):
        patches += labelled([quad((x0, y0, 0), (x1 - x0, 0, 0), (0, y1 - y0, 0), floor, (x0, y0))], "floor")
        over = quad((x0, y1, room.height), (x1 - x0, 0, 0), (0, y0 - y1, 0), ceiling, (x0, -y1))
        patches += labelled([over], "ceiling")
    without_window = [i for i, w in enumerate(room.walls) if not w.windows and w.length > 2.0]
    chosen = int(rng.choice(without_window)) if without_window and rng.random() < 0.85 else -1
    for index, wall in enumerate(room.walls):
        surface = feature if index == chosen else common
        parts = _wall(materials, wall, room.height, surface)
        for opening in wall.windows:
            parts += _window(materials, opening, surface)
        for opening in wall.doors:
            parts += _door(materials, opening)
        patches += moved(parts, wall.point(0.0), wall.angle)
    return patches
