"""Cupboards, shelves and what is kept in them. Frames as in `fit3d_rooms.building.furniture`."""

import numpy as np

from fit3d_rooms.building.furniture import Piece, Top, legs
from fit3d_rooms.building.objects import vase
from fit3d_rooms.building.primitives import Patch, box, labelled, moved, rod, rounded_box, sphere, tilted
from fit3d_rooms.surfaces.materials import Materials

BOOK_COLORS = (
    "#7c2f2a",
    "#2e4a62",
    "#c9a14a",
    "#3f5b43",
    "#d8cdb8",
    "#5b3f5e",
    "#a8563a",
    "#23313b",
    "#8b8f8a",
    "#b8a99a",
)


def wardrobe(materials: Materials, doors: int) -> Piece:
    """Returns a tall wardrobe with hinged doors.

    Args:
        materials: Of the room; its generator draws the details.
        doors: How many, half a metre each.
    """
    rng = materials.rng
    body = materials.white if rng.random() < 0.4 else materials.any_wood()
    width, depth, height = doors * 0.5, 0.6, rng.uniform(1.95, 2.15)
    patches = box((-width / 2 + 0.02, 0.02, 0), (width / 2 - 0.02, depth - 0.06, 0.08), materials.black)
    patches += box((-width / 2, 0, 0.08), (width / 2, depth - 0.022, height), body)
    patches += rounded_box((-width / 2 - 0.02, 0, height), (width / 2 + 0.02, depth + 0.015, height + 0.04), 0.01, body)
    panels = rng.random() < 0.6
    for i in range(doors):
        x0, x1 = -width / 2 + i * 0.5 + 0.004, -width / 2 + (i + 1) * 0.5 - 0.004
        patches += rounded_box((x0, depth - 0.02, 0.1), (x1, depth, height - 0.015), 0.004, body)
        if panels:
            for z0, z1 in ((0.18, height * 0.46), (height * 0.5, height - 0.1)):
                patches += rounded_box((x0 + 0.08, depth - 0.005, z0), (x1 - 0.08, depth + 0.01, z1), 0.008, body)
        x = x1 - 0.04 if i % 2 == 0 else x0 + 0.04
        patches += rod((x, depth + 0.025, 0.95), (x, depth + 0.025, 1.13), 0.008, materials.metal)
    top = Top((-width / 2 + 0.1, width / 2 - 0.1), (0.08, depth - 0.08), height + 0.04, 0.35)
    return Piece(labelled(patches, "wardrobe"), width + 0.04, depth + 0.035, height + 0.04, [top])


def cabinet(materials: Materials, width: float, height: float, depth: float = 0.42) -> Piece:
    """Returns a sideboard, chest or night stand: doors and drawers on legs.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
        height: Metres along z.
        depth: Metres along y.
    """
    rng, wood = materials.rng, materials.any_wood()
    front = materials.white if rng.random() < 0.35 else wood
    knob = materials.brass if rng.random() < 0.5 else materials.metal
    foot = 0.12 if height < 1.0 else 0.06
    patches = rounded_box((-width / 2, 0, height - 0.025), (width / 2, depth, height), 0.006, wood)
    patches += box((-width / 2 + 0.005, 0.005, foot), (width / 2 - 0.005, depth - 0.022, height - 0.025), wood)
    patches += legs(width, depth, foot + 0.005, 0.022, wood, inset=0.03)
    columns = max(1, round(width / 0.45))
    rows = max(1, round((height - foot) / 0.22))
    cell = (width - 0.02) / columns
    for i in range(columns):
        x0, x1 = -width / 2 + 0.01 + i * cell + 0.004, -width / 2 + 0.01 + (i + 1) * cell - 0.004
        drawers = rows if (rng.random() < 0.5 or columns == 1) else 1
        step = (height - 0.03 - foot) / drawers
        for j in range(drawers):
            z0, z1 = foot + j * step + 0.004, foot + (j + 1) * step - 0.004
            patches += rounded_box((x0, depth - 0.024, z0), (x1, depth - 0.004, z1), 0.004, front)
            x, z = (
                ((x0 + x1) / 2, (z0 + z1) / 2)
                if drawers > 1
                else (x1 - 0.05 if i % 2 == 0 else x0 + 0.05, (z0 + z1) / 2)
            )
            patches += sphere((x, depth + 0.008, z), 0.014, knob, 10)
    top = Top((-width / 2 + 0.06, width / 2 - 0.06), (0.06, depth - 0.06), height)
    return Piece(labelled(patches, "cabinet"), width, depth + 0.02, height, [top])


def books(materials: Materials, width: float, headroom: float, depth: float) -> list[Patch]:
    """Returns a row of upright books with their backs to +y, from x = 0 to at most ``width``, standing on z = 0.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
        headroom: Metres up to what is above them.
        depth: Metres along y.
    """
    rng, patches, x = materials.rng, [], 0.0
    while True:
        thickness = rng.uniform(0.02, 0.052)
        if x + thickness > width:
            return labelled(patches, "book")
        height = min(headroom - 0.02, rng.uniform(0.19, 0.3))
        back = depth - rng.uniform(0.01, 0.05)
        deep = rng.uniform(0.14, 0.19)
        color = str(rng.choice(BOOK_COLORS))
        cover = materials.books[rng.integers(len(materials.books))].tinted(color)
        volume = box((x + 0.001, back - deep, 0), (x + thickness - 0.001, back, height), cover)
        if rng.random() < 0.08 and x > 0.1:
            volume = tilted(volume, (x, 0, 0), -0.16, "y")
            x += 0.045
        patches += volume
        x += thickness
        if rng.random() < 0.05:
            x += rng.uniform(0.05, 0.15)


def book_pile(materials: Materials, count: int) -> list[Patch]:
    """Returns books lying on each other around the origin.

    Args:
        materials: Of the room; its generator draws the details.
        count: Books.
    """
    rng, patches, z = materials.rng, [], 0.0
    for _ in range(count):
        w, d, h = rng.uniform(0.15, 0.2), rng.uniform(0.21, 0.27), rng.uniform(0.018, 0.04)
        cover = materials.lacquer.tinted(str(rng.choice(BOOK_COLORS)))
        volume = box((-w / 2, -d / 2, z), (w / 2, d / 2, z + h), cover)
        volume += box(
            (-w / 2 + 0.004, -d / 2 + 0.006, z + 0.003), (w / 2 + 0.002, d / 2 - 0.006, z + h - 0.003), materials.paper
        )
        patches += moved(volume, (0, 0, 0), rng.uniform(-0.3, 0.3))
        z += h
    return labelled(patches, "book")


def bookshelf(materials: Materials, width: float, height: float) -> Piece:
    """Returns open shelves, filled with books, piles and vases.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
        height: Metres along z.
    """
    rng = materials.rng
    wood = materials.white if rng.random() < 0.3 else materials.any_wood()
    depth, board = 0.3, 0.022
    patches = box((-width / 2, 0, 0), (width / 2, 0.01, height), wood)
    bays = max(1, round(width / 0.8))
    for x in np.linspace(-width / 2, width / 2 - board, bays + 1):
        patches += box((x, 0.01, 0), (x + board, depth, height), wood)
    shelves = round(height / 0.36)
    step = (height - board - 0.06) / shelves
    bay = (width - board) / bays
    stored: list[Patch] = []
    for j in range(shelves + 1):
        z = 0.06 + j * step
        for i in range(bays):
            x0, x1 = -width / 2 + board + i * bay, -width / 2 + (i + 1) * bay
            patches += box((x0, 0.01, z), (x1, depth - 0.004, z + board), wood)
            if j == shelves:
                continue
            free, floor, room = x1 - x0 - 0.02, z + board, step - board
            choice = rng.random()
            if choice < 0.55:
                stored += moved(books(materials, free * rng.uniform(0.75, 1.0), room, depth), (x0 + 0.01, 0, floor))
            elif choice < 0.8:
                stored += moved(books(materials, free * 0.5, room, depth), (x0 + 0.01, 0, floor))
                if rng.random() < 0.5:
                    stored += moved(book_pile(materials, int(rng.integers(2, 5))), (x1 - 0.15, 0.16, floor))
                else:
                    stored += moved(vase(materials, room * 0.75), (x1 - 0.14, 0.16, floor))
            else:
                stored += moved(book_pile(materials, int(rng.integers(2, 6))), (x0 + 0.16, 0.16, floor))
                stored += moved(vase(materials, room * rng.uniform(0.5, 0.8)), (x0 + free * 0.65, 0.15, floor))
    patches += box((-width / 2 + 0.005, 0.012, 0), (width / 2 - 0.005, depth - 0.02, 0.058), wood)
    top = Top((-width / 2 + 0.1, width / 2 - 0.1), (0.06, depth - 0.06), height - 0.001, 0.4)
    return Piece(labelled(patches, "bookshelf") + stored, width, depth, height, [top])
