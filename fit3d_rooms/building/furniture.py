"""Seats, tables and beds.

Every piece stands on z = 0 with its back at y = 0, its middle at x = 0 and its front towards +y. Units are metres.
"""

from dataclasses import dataclass, field

import numpy as np

from fit3d_rooms.building.primitives import Patch, box, cylinder, labelled, moved, rod, rounded_box, tilted
from fit3d_rooms.surfaces.materials import Materials, Surface


@dataclass
class Top:
    """A free flat place on a piece of furniture, in its own frame: x and y range, height, headroom."""

    x: tuple[float, float]
    """Least and largest, metres."""
    y: tuple[float, float]
    """Least and largest, metres."""
    z: float
    """Above the floor, metres."""
    headroom: float = 1.0
    """Metres up to what is above it."""


@dataclass
class Piece:
    """A piece of furniture in its own frame.

    Attributes:
        patches: its surfaces, labelled.
        width: extent along x; the piece covers [-width / 2, width / 2].
        depth: extent along y; the piece covers [0, depth].
        height: of its highest point.
        tops: where things may stand on it.
    """

    patches: list[Patch]
    width: float
    depth: float
    height: float
    tops: list[Top] = field(default_factory=list)


def legs(
    width: float, depth: float, height: float, thickness: float, surface: Surface, inset: float = 0.0
) -> list[Patch]:
    """Returns four tapering legs at the corners of [-width / 2, width / 2] x [0, depth].

    Args:
        width: Metres along x.
        depth: Metres along y.
        height: Metres along z.
        thickness: Of a leg at its top, metres.
        surface: What it is made of.
        inset: Metres from the corners.
    """
    patches = []
    margin = inset + thickness
    for x in (-width / 2 + margin, width / 2 - margin):
        for y in (margin, depth - margin):
            patches += rod((x, y, height), (x, y, 0.0), thickness * 0.8, surface, thickness * 0.5)
    return patches


def square_legs(width: float, depth: float, height: float, thickness: float, surface: Surface) -> list[Patch]:
    """Returns four square legs flush with the corners of [-width / 2, width / 2] x [0, depth].

    Args:
        width: Metres along x.
        depth: Metres along y.
        height: Metres along z.
        thickness: Side of a leg, metres.
        surface: What it is made of.
    """
    patches = []
    for x in (-width / 2, width / 2 - thickness):
        for y in (0.0, depth - thickness):
            patches += box((x, y, 0.0), (x + thickness, y + thickness, height), surface)
    return patches


def table(materials: Materials, width: float, depth: float, height: float = 0.74) -> Piece:
    """Returns a rectangular table on four legs, with an apron.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
        depth: Metres along y.
        height: Metres along z.
    """
    rng, wood = materials.rng, materials.any_wood()
    top = 0.035
    patches = rounded_box((-width / 2, 0, height - top), (width / 2, depth, height), 0.012, wood)
    frame = wood if rng.random() < 0.6 else materials.white
    if rng.random() < 0.5:
        patches += moved(square_legs(width - 0.08, depth - 0.08, height - top, 0.06, frame), (0, 0.04, 0))
    else:
        patches += legs(width, depth, height - top, 0.035, frame, inset=0.05)
    apron = min(0.08, height * 0.2)
    x, y = width / 2 - 0.07, 0.07
    patches += box((-x, y, height - top - apron), (x, y + 0.02, height - top - 0.001), frame)
    patches += box((-x, depth - y - 0.02, height - top - apron), (x, depth - y, height - top - 0.001), frame)
    for side in (-x, x - 0.02):
        patches += box(
            (side, y + 0.02, height - top - apron), (side + 0.02, depth - y - 0.02, height - top - 0.001), frame
        )
    margin = 0.08
    spot = Top((-width / 2 + margin, width / 2 - margin), (margin, depth - margin), height)
    return Piece(labelled(patches, "table"), width, depth, height, [spot])


def round_table(materials: Materials, diameter: float, height: float = 0.74) -> Piece:
    """Returns a round table on a pedestal.

    Args:
        materials: Of the room; its generator draws the details.
        diameter: Metres.
        height: Metres along z.
    """
    wood, radius = materials.any_wood(), diameter / 2
    foot = materials.black if materials.rng.random() < 0.5 else wood
    patches = cylinder(radius, height - 0.03, height, wood, 40)
    patches += cylinder(0.045, 0.03, height - 0.03, foot) + cylinder(radius * 0.55, 0.0, 0.03, foot, 32, radius * 0.5)
    half = radius * 0.62
    spot = Top((-half, half), (radius - half, radius + half), height)
    return Piece(labelled(moved(patches, (0, radius, 0)), "table"), diameter, diameter, height, [spot])


def desk(materials: Materials, width: float) -> Piece:
    """Returns a writing desk with a drawer unit on one side.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
    """
    wood, depth, height = materials.any_wood(), 0.62, 0.74
    patches = rounded_box((-width / 2, 0, height - 0.03), (width / 2, depth, height), 0.008, wood)
    inner = materials.white if materials.rng.random() < 0.5 else wood
    low = width / 2 - 0.42
    patches += box((low, 0.03, 0.03), (width / 2 - 0.02, depth - 0.04, height - 0.031), inner)
    for i in range(3):
        z = 0.06 + i * 0.215
        patches += rounded_box(
            (low + 0.012, depth - 0.042, z), (width / 2 - 0.032, depth - 0.022, z + 0.2), 0.005, inner
        )
        patches += rod(
            (low + 0.13, depth - 0.008, z + 0.13), (width / 2 - 0.15, depth - 0.008, z + 0.13), 0.007, materials.metal
        )
    for y in (0.03, depth - 0.08):
        patches += box((-width / 2 + 0.03, y, 0), (-width / 2 + 0.08, y + 0.05, height - 0.031), inner)
    spot = Top((-width / 2 + 0.08, width / 2 - 0.08), (0.05, depth - 0.25), height)
    return Piece(labelled(patches, "table"), width, depth, height, [spot])


def chair(materials: Materials, style: int) -> Piece:
    """Returns a chair; all chairs of a set share its style.

    Args:
        materials: Of the room; its generator draws the details.
        style: 0: slatted wood, 1: upholstered, 2: shell on thin legs.
    """
    wood = (materials.wood, materials.dark_wood, materials.pale_wood)[style % 3]
    width, depth, seat = 0.45, 0.5, 0.45
    if style == 0:
        patches = rounded_box((-width / 2, 0.03, seat - 0.03), (width / 2, depth, seat), 0.012, wood)
        patches += legs(width, depth, seat - 0.03, 0.024, wood, inset=0.012)
        back = []
        for x in (-width / 2 + 0.03, width / 2 - 0.03):
            back += rod((x, 0.05, seat - 0.01), (x, 0.05, 0.9), 0.017, wood)
        for z in (0.6, 0.71, 0.82):
            back += rounded_box((-width / 2 + 0.03, 0.04, z), (width / 2 - 0.03, 0.058, z + 0.075), 0.007, wood)
        patches += tilted(back, (0, 0.05, seat), 0.1)
    elif style == 1:
        cloth = materials.cushions[0]
        patches = rounded_box((-width / 2, 0.02, seat - 0.075), (width / 2, depth, seat), 0.03, cloth, 0.015, 4)
        patches += legs(width, depth, seat - 0.07, 0.024, wood, inset=0.015)
        back = rounded_box((-width / 2 + 0.01, 0.01, seat + 0.02), (width / 2 - 0.01, 0.075, 0.92), 0.03, cloth)
        patches += tilted(back, (0, 0.05, seat), 0.12)
    else:
        shell = materials.lacquer.tinted(materials.palette.accents[1])
        patches = rounded_box((-width / 2, 0.04, seat - 0.03), (width / 2, depth, seat), 0.02, shell)
        back = rounded_box((-width / 2 + 0.01, 0.03, seat - 0.02), (width / 2 - 0.01, 0.055, 0.82), 0.014, shell)
        patches += tilted(back, (0, 0.05, seat), 0.15)
        for x in (-1, 1):
            for y, foot in ((0.12, 0.03), (depth - 0.1, depth - 0.02)):
                patches += rod(
                    (x * 0.13, y, seat - 0.02), (x * (width / 2 - 0.02), foot, 0), 0.014, materials.pale_wood, 0.01
                )
    # The back leans out behind; the frame starts where it ends.
    return Piece(labelled(moved(patches, (0, 0.05, 0)), "chair"), width, depth + 0.05, 0.92)


def office_chair(materials: Materials) -> Piece:
    """Returns a swivel chair on five feet.

    Args:
        materials: Of the room; its generator draws the details.
    """
    cloth = materials.sofa if materials.rng.random() < 0.5 else materials.black
    patches = rounded_box((-0.25, 0.06, 0.42), (0.25, 0.54, 0.5), 0.035, cloth, 0.015, 4)
    patches += tilted(rounded_box((-0.22, 0.02, 0.56), (0.22, 0.085, 1.02), 0.03, cloth), (0, 0.05, 0.5), 0.12)
    patches += rod((0, 0.1, 0.44), (0, 0.02, 0.64), 0.02, materials.metal) + moved(
        cylinder(0.028, 0.09, 0.43, materials.metal), (0, 0.3, 0)
    )
    for i in range(5):
        angle = 2 * np.pi * i / 5 + 0.3
        tip = (0.27 * np.cos(angle), 0.3 + 0.27 * np.sin(angle), 0.05)
        patches += rod((0, 0.3, 0.1), tip, 0.02, materials.black, 0.014)
        patches += moved(
            tilted(cylinder(0.028, -0.012, 0.012, materials.black, 12), (0, 0, 0), np.pi / 2, "y"), (*tip[:2], 0.028)
        )
    return Piece(labelled(patches, "chair"), 0.6, 0.6, 1.02)


def _throw_cushion(materials: Materials, size: float, index: int) -> list[Patch]:
    cloth = materials.cushions[index % len(materials.cushions)]
    flat = rounded_box((-size / 2, -size / 2, -0.03), (size / 2, size / 2, 0.03), 0.028, cloth, 0.055, 6)
    return labelled(flat, "cushion")


def sofa(materials: Materials, seats: int) -> Piece:
    """Returns a sofa with ``seats`` seats (1: an armchair), back cushions and throw cushions.

    Args:
        materials: Of the room; its generator draws the details.
        seats: 1 for an armchair.
    """
    rng, cloth = materials.rng, materials.sofa
    seat_width, arm = 0.66 if seats > 1 else 0.6, rng.uniform(0.13, 0.2)
    width, depth, seat, back = seats * seat_width + 2 * arm, 0.88, 0.43, rng.uniform(0.76, 0.84)
    foot, arm_height = 0.1, rng.uniform(0.54, 0.62)
    patches = rounded_box((-width / 2, 0, foot), (width / 2, depth - 0.04, 0.28), 0.03, cloth)
    patches += rounded_box((-width / 2 + arm, 0, 0.27), (width / 2 - arm, 0.2, back - 0.06), 0.05, cloth)
    for x in (-width / 2, width / 2 - arm):
        patches += rounded_box((x, 0, foot + 0.03), (x + arm, depth - 0.03, arm_height), 0.06, cloth)
    for i in range(seats):
        x = -width / 2 + arm + i * seat_width
        patches += rounded_box((x + 0.006, 0.2, 0.28), (x + seat_width - 0.006, depth, seat), 0.045, cloth, 0.02, 5)
        cushion = rounded_box((x + 0.012, 0.2, seat + 0.012), (x + seat_width - 0.012, 0.36, back + 0.03), 0.07, cloth)
        patches += tilted(cushion, (0, 0.22, seat), 0.1)
    patches += legs(width, depth - 0.04, foot + 0.02, 0.025, materials.dark_wood, inset=0.05)
    parts = labelled(patches, "sofa")
    spots = [-1, 1] if seats > 1 else [0]
    for index, side in enumerate(spots):
        size = rng.uniform(0.38, 0.45)
        cushion = moved(
            _throw_cushion(materials, size, index + int(rng.integers(2))), (0, 0, 0), rng.uniform(-0.15, 0.15)
        )
        cushion = tilted(cushion, (0, 0, 0), np.pi / 2 + 0.3)
        x = side * (width / 2 - arm - size / 2 - rng.uniform(0.02, 0.1))
        parts += moved(cushion, (x, 0.5, seat + size / 2 - 0.01))
    return Piece(parts, width, depth, back + 0.05)


def bed(materials: Materials, width: float) -> Piece:
    """Returns a bed with headboard, mattress, duvet, blanket and pillows.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
    """
    rng, wood = materials.rng, materials.any_wood()
    length, frame, top = 2.08, 0.3, 0.52
    patches = rounded_box((-width / 2, 0.04, 0.1), (width / 2, length, frame), 0.02, wood)
    patches += square_legs(width - 0.06, length, 0.11, 0.07, wood)
    padded = rng.random() < 0.5
    if padded:
        count = 4
        for i in range(count):
            x = -width / 2 + i * width / count
            patches += rounded_box((x, 0, 0.15), (x + width / count, 0.09, 1.08), 0.035, materials.sofa)
    else:
        patches += rounded_box((-width / 2, 0, 0.05), (width / 2, 0.05, 0.98), 0.02, wood)
        patches += rounded_box((-width / 2 + 0.08, 0.045, 0.5), (width / 2 - 0.08, 0.062, 0.9), 0.008, wood)
    patches += rounded_box(
        (-width / 2 + 0.03, 0.1, frame - 0.02), (width / 2 - 0.03, length - 0.03, top), 0.06, materials.linen
    )
    duvet = materials.cushions[int(rng.integers(3))]
    patches += rounded_box(
        (-width / 2 - 0.01, 0.72, 0.3), (width / 2 + 0.01, length + 0.005, top + 0.055), 0.06, duvet, 0.03, 8
    )
    patches += rounded_box(
        (-width / 2 - 0.02, 0.7, 0.36), (width / 2 + 0.02, 0.98, top + 0.085), 0.05, materials.linen, 0.01, 6
    )
    throw = materials.sofa
    patches += rounded_box(
        (-width / 2 - 0.025, 1.5, 0.28), (width / 2 + 0.025, 1.86, top + 0.095), 0.05, throw, 0.012, 6
    )
    parts = labelled(patches, "bed")
    pillows = 2 if width > 1.3 else 1
    for i in range(pillows):
        x = (i - (pillows - 1) / 2) * width / 2
        pillow = rounded_box((-0.32, -0.21, -0.045), (0.32, 0.21, 0.045), 0.04, materials.linen, 0.06, 6)
        pillow = tilted(labelled(pillow, "cushion"), (0, 0, 0), -0.45)
        parts += moved(pillow, (x, 0.34, top + 0.16))
        throw_cushion = tilted(_throw_cushion(materials, 0.4, i + 1), (0, 0, 0), -1.0 - 0.1 * i)
        parts += moved(throw_cushion, (x * 0.9, 0.55, top + 0.2))
    return Piece(parts, width + 0.05, length + 0.03, 1.08)
