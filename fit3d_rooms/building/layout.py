"""Where things stand: placement against walls, in the open, on furniture and on the walls, without collisions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fit3d_rooms.building.furniture import Piece, Top
from fit3d_rooms.building.objects import Bulb
from fit3d_rooms.building.primitives import Patch, moved
from fit3d_rooms.building.shell import Opening, Room, Wall
from fit3d_rooms.surfaces.materials import Materials

Rectangle = tuple[float, float, float, float]
"""x0, y0, x1, y1 on the floor plan, metres."""


def overlap(a: Rectangle, b: Rectangle, margin: float = 0.0) -> bool:
    """Returns whether two rectangles come closer than ``margin``.

    Args:
        a: On the floor plan.
        b: On the floor plan.
        margin: Metres.
    """
    return a[0] < b[2] + margin and b[0] < a[2] + margin and a[1] < b[3] + margin and b[1] < a[3] + margin


@dataclass
class Placement:
    """A piece in the room: its frame is turned by ``angle`` about z and moved to ``position``."""

    piece: Piece
    """In its own frame."""
    position: tuple[float, float, float]
    """x, y, z of its frame's origin, metres."""
    angle: float
    """Radians, counter-clockwise about z."""
    rectangle: Rectangle
    """What it covers of the floor."""

    def world(self, x: float, y: float) -> tuple[float, float]:
        """Returns the floor plan position of a point of the piece's frame.

        Args:
            x: Metres.
            y: Metres.
        """
        c, s = np.cos(self.angle), np.sin(self.angle)
        return self.position[0] + c * x - s * y, self.position[1] + s * x + c * y


@dataclass
class Layout:
    """A room that is being furnished.

    Attributes:
        room: the empty room.
        materials: of everything in it; its generator makes every choice.
        patches: surfaces placed so far.
        bulbs: lamps placed so far, in room coordinates.
        solids: footprints that nothing else may enter, cameras included.
        kept_free: footprints that furniture leaves open: before doors, wardrobes, sofas.
        placements: larger pieces by name.
        rugs: footprints of what lies on the floor; they may lie under furniture, but not under each other.
    """

    room: Room
    materials: Materials
    patches: list[Patch] = field(default_factory=list)
    bulbs: list[Bulb] = field(default_factory=list)
    solids: list[Rectangle] = field(default_factory=list)
    kept_free: list[Rectangle] = field(default_factory=list)
    placements: dict[str, Placement] = field(default_factory=dict)
    rugs: list[Rectangle] = field(default_factory=list)

    @property
    def rng(self) -> np.random.Generator:
        """The room's generator."""
        return self.materials.rng

    def inside(self, rectangle: Rectangle, margin: float = 0.0) -> bool:
        """Returns whether a rectangle lies in the room.

        Args:
            rectangle: On the floor plan.
            margin: Metres to the walls.
        """
        x0, y0, x1, y1 = rectangle
        if x0 < margin or y0 < margin or x1 > self.room.width - margin or y1 > self.room.depth - margin:
            return False
        return not any(overlap(rectangle, notch, margin) for notch in self.room.notches)

    def vacant(self, rectangle: Rectangle, margin: float = 0.0) -> bool:
        """Returns whether a rectangle is free for something solid.

        Args:
            rectangle: On the floor plan.
            margin: Metres to other solid things.
        """
        return (
            self.inside(rectangle)
            and not any(overlap(rectangle, other, margin) for other in self.solids)
            and not any(overlap(rectangle, other) for other in self.kept_free)
        )

    def footprint(
        self, position: Sequence[float], angle: float, low: Sequence[float], high: Sequence[float]
    ) -> Rectangle:
        """Returns the bounding rectangle of a piece after placement.

        Args:
            position: x, y of its frame's origin, metres.
            angle: Radians, counter-clockwise.
            low: Least x and y in its frame, metres.
            high: Largest x and y in its frame, metres.
        """
        c, s = np.cos(angle), np.sin(angle)
        corners = [(c * x - s * y, s * x + c * y) for x in (low[0], high[0]) for y in (low[1], high[1])]
        xs, ys = [position[0] + p[0] for p in corners], [position[1] + p[1] for p in corners]
        return min(xs), min(ys), max(xs), max(ys)

    def _put(
        self, name: str, piece: Piece, position: tuple[float, float, float], angle: float, solid: Rectangle
    ) -> Placement:
        placement = Placement(piece, position, angle, solid)
        self.patches += moved(piece.patches, position, angle)
        self.solids.append(solid)
        self.placements[name] = placement
        return placement

    def against_wall(
        self,
        name: str,
        piece: Piece,
        front: float = 0.5,
        walls: Sequence[Wall] | None = None,
        near: float | None = None,
        stray: float = 10.0,
        tries: int = 240,
    ) -> Placement | None:
        """Puts a piece with its back to a wall.

        Args:
            name: key in ``placements``.
            piece: what to place.
            front: depth to keep free before it, metres; half of it where there is no room for more.
            walls: candidates; all of the room's by default.
            near: wanted position along the wall, metres; anywhere by default.
            stray: how far from ``near`` it may end up, metres.
            tries: random positions to try.

        Returns:
            The placement, or None where it does not fit.
        """
        candidates = list(walls if walls is not None else self.room.walls)
        gap = 0.018
        for attempt in range(tries):
            wall = candidates[self.rng.integers(len(candidates))]
            half = piece.width / 2
            low, high = half + 0.03, wall.length - half - 0.03
            draw, corner = self.rng.uniform(low, max(low, high)), self.rng.random()
            if low > high:
                continue
            along = draw
            if near is not None:
                step = float(np.clip(draw - near, -stray, stray)) * attempt / tries
                along = float(np.clip(near + step, low, high))
                if abs(along - near) > stray:
                    continue
            elif corner < 0.35:
                along = low if corner < 0.175 else high
            spot = Opening(along - half, along + half, 0.0, piece.height)
            position, angle = wall.point(along, gap), wall.angle
            solid = self.footprint(position, angle, (-half, -gap), (half, piece.depth))
            reach = piece.depth + (front if attempt < tries / 2 else front / 2)
            ahead = self.footprint(position, angle, (-half, piece.depth), (half, reach))
            blocked = any(overlap(ahead, other) for other in self.solids)
            if not wall.free(spot) or not self.vacant(solid, 0.04) or blocked or not self.inside(ahead):
                continue
            wall.taken.append(spot)
            self.kept_free.append(ahead)
            return self._put(name, piece, position, angle, solid)
        return None

    def in_the_open(self, name: str, piece: Piece, margin: float = 0.6, tries: int = 200) -> Placement | None:
        """Puts a piece away from the walls.

        Args:
            name: Of the piece.
            piece: In its own frame.
            margin: Metres that stay free around it.
            tries: Places that are drawn.

        Returns:
            Where it stands; None where it does not fit.
        """
        for _ in range(tries):
            angle = self.rng.integers(4) * np.pi / 2
            position = (self.rng.uniform(0, self.room.width), self.rng.uniform(0, self.room.depth), 0.0)
            half = piece.width / 2
            solid = self.footprint(position, angle, (-half, 0), (half, piece.depth))
            wide = (solid[0] - margin, solid[1] - margin, solid[2] + margin, solid[3] + margin)
            if self.inside(wide) and not any(overlap(wide, other) for other in self.solids) and self.vacant(solid):
                return self._put(name, piece, position, angle, solid)
        return None

    def before(
        self, name: str, anchor: Placement, piece: Piece, distance: float, facing: bool = False
    ) -> Placement | None:
        """Puts a piece before another.

        Args:
            name: Of the piece.
            anchor: The other.
            piece: In its own frame.
            distance: Metres between the two.
            facing: Whether it is turned towards the other, instead of like it.

        Returns:
            Where it stands; None if that is blocked.
        """
        y = anchor.piece.depth + distance
        angle = anchor.angle + (np.pi if facing else 0.0)
        x, y = anchor.world(0.0, y + (piece.depth if facing else 0.0))
        half = piece.width / 2
        solid = self.footprint((x, y), angle, (-half, 0), (half, piece.depth))
        if not self.inside(solid, 0.3) or any(overlap(solid, other, 0.02) for other in self.solids):
            return None
        return self._put(name, piece, (x, y, 0.0), angle, solid)

    def in_a_corner(self, patches: Sequence[Patch], radius: float, tries: int = 120) -> tuple[float, float] | None:
        """Stands something round near a wall.

        Args:
            patches: Around the origin.
            radius: Metres.
            tries: Places that are drawn.

        Returns:
            Its place x, y; None where there is no room.
        """
        for _ in range(tries):
            wall = self.room.walls[self.rng.integers(len(self.room.walls))]
            ends = (radius + 0.06, wall.length - radius - 0.06)
            draw = self.rng.uniform(*ends) if ends[1] > ends[0] else ends[0]
            along = ends[self.rng.integers(2)] if self.rng.random() < 0.6 else draw
            x, y, _ = wall.point(along, radius + 0.05)
            solid = (x - radius, y - radius, x + radius, y + radius)
            if self.vacant(solid, 0.02) and not any(o.start - radius < along < o.end + radius for o in wall.doors):
                self.patches += moved(patches, (x, y, 0.0), self.rng.uniform(0, 2 * np.pi))
                self.solids.append(solid)
                return x, y
        return None

    def on_top(
        self, placement: Placement, things: Sequence[tuple[list[Patch], float]], bulb: Bulb | None = None
    ) -> None:
        """Stands things on a piece, apart from each other.

        Args:
            placement: the piece.
            things: (patches, radius of the foot in metres); those that find no room are left out.
            bulb: light of the first thing, if it is a lamp.
        """
        for top in placement.piece.tops:
            self._fill(placement, top, things, bulb)
            return

    def _fill(
        self, placement: Placement, top: Top, things: Sequence[tuple[list[Patch], float]], bulb: Bulb | None
    ) -> None:
        placed: list[tuple[float, float, float]] = []
        for index, (patches, radius) in enumerate(things):
            low, high = (top.x[0] + radius, top.y[0] + radius), (top.x[1] - radius, top.y[1] - radius)
            for _ in range(40):
                x = self.rng.uniform(low[0], high[0]) if high[0] > low[0] else (low[0] + high[0]) / 2
                y = self.rng.uniform(low[1], high[1]) if high[1] > low[1] else (low[1] + high[1]) / 2
                if any(np.hypot(x - px, y - py) < radius + pr + 0.01 for px, py, pr in placed):
                    continue
                placed.append((x, y, radius))
                world = (*placement.world(x, y), placement.position[2] + top.z)
                self.patches += moved(patches, world, placement.angle)
                if bulb is not None and index == 0:
                    centre = tuple(float(a + b) for a, b in zip(world, bulb.centre))
                    self.bulbs.append(Bulb(centre, bulb.radius, bulb.power))  # type: ignore[arg-type]
                break

    def on_wall(self, patches: Sequence[Patch], width: float, height: float, z: float, tries: int = 60) -> bool:
        """Hangs something on a wall.

        Args:
            patches: With their middle at x = z = 0, back at y = 0.
            width: Metres along the wall.
            height: Metres.
            z: Of the middle, above the floor, metres.
            tries: Places that are drawn.

        Returns:
            Whether a place was found.
        """
        for _ in range(tries):
            wall = self.room.walls[self.rng.integers(len(self.room.walls))]
            if wall.length < width + 0.4:
                continue
            along = self.rng.uniform(width / 2 + 0.2, wall.length - width / 2 - 0.2)
            spot = Opening(along - width / 2, along + width / 2, z - height / 2, z + height / 2)
            if wall.free(spot, 0.12):
                wall.taken.append(spot)
                self.patches += moved(patches, wall.point(along, 0.0, z), wall.angle)
                return True
        return False
