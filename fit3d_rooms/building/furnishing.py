"""Which things a living room, a bedroom and a studio hold, and how they go together."""

import numpy as np

from fit3d_rooms.building import objects
from fit3d_rooms.building.cupboards import book_pile, bookshelf, cabinet, wardrobe
from fit3d_rooms.building.furniture import Piece, bed, chair, desk, office_chair, round_table, sofa, table
from fit3d_rooms.building.layout import Layout, Placement, overlap
from fit3d_rooms.building.objects import Bulb
from fit3d_rooms.building.primitives import moved
from fit3d_rooms.building.shell import Opening
from fit3d_rooms.surfaces.materials import Materials

ROOM_KINDS = ("living room", "bedroom", "studio")
"""What room ``i`` is: ``ROOM_KINDS[i % 3]``."""

EXPECTED = {
    "living room": {"sofa", "television stand", "dining table", "bookshelf", "cabinet"},
    "bedroom": {"bed", "wardrobe", "desk", "bookshelf"},
    "studio": {"bed", "sofa", "dining table", "bookshelf", "television stand"},
}
"""What a room of each kind should hold; plans without some of it are drawn again."""


def dining_group(materials: Materials, seats: int) -> Piece:
    """Returns a table with chairs around it, as one piece.

    Args:
        materials: Of the room; its generator draws the details.
        seats: Chairs, 2 to 6.
    """
    rng, style = materials.rng, int(materials.rng.integers(3))
    around = 0.42
    if seats <= 3 and rng.random() < 0.6:
        diameter = rng.uniform(0.9, 1.05)
        piece, centre = round_table(materials, diameter), around + diameter / 2
        patches = moved(piece.patches, (0, around, 0))
        for i in range(seats):
            angle = 2 * np.pi * i / seats + rng.uniform(-0.15, 0.15) + 0.4
            reach = diameter / 2 + 0.36
            x, y = reach * np.cos(angle), centre + reach * np.sin(angle)
            patches += moved(chair(materials, style).patches, (x, y, 0), angle + np.pi / 2)
        size = diameter + 2 * around
        top = piece.tops[0]
        top.y = (top.y[0] + around, top.y[1] + around)
        return Piece(patches, size, size, 0.95, [top])
    per_side = max(1, seats // 2)
    width, depth = 0.3 + 0.6 * per_side, rng.uniform(0.8, 0.9)
    piece = table(materials, width, depth)
    patches = moved(piece.patches, (0, around, 0))
    for i in range(per_side):
        x = (i - (per_side - 1) / 2) * 0.6
        patches += moved(
            chair(materials, style).patches, (x + rng.uniform(-0.03, 0.03), 0.0, 0), rng.uniform(-0.12, 0.12)
        )
        back = (x + rng.uniform(-0.03, 0.03), depth + 2 * around, 0)
        patches += moved(chair(materials, style).patches, back, np.pi + rng.uniform(-0.12, 0.12))
    top = piece.tops[0]
    top.y = (top.y[0] + around, top.y[1] + around)
    return Piece(patches, width, depth + 2 * around, 0.95, [top])


def _dress_windows(layout: Layout) -> None:
    """Curtains beside every window, sometimes a radiator below."""
    room, materials, rng = layout.room, layout.materials, layout.rng
    for wall in room.walls:
        for hole in wall.windows:
            top, middle = min(hole.high + 0.14, room.height - 0.06), (hole.start + hole.end) / 2
            floor_length = rng.random() < 0.6
            bottom = 0.03 if floor_length else hole.low - 0.2
            width = rng.uniform(0.34, 0.46)
            rail = (hole.end - hole.start) / 2 + width * 0.75
            left, right = max(0.04, middle - rail), min(wall.length - 0.04, middle + rail)
            for along in (left + width / 2, right - width / 2):
                drapery = objects.curtain(materials, width, top, bottom)
                layout.patches += moved(drapery, wall.point(along, 0.01), wall.angle)
                wall.taken.append(Opening(along - width / 2 - 0.03, along + width / 2 + 0.03, bottom, top))
                p, q = wall.point(along - width / 2), wall.point(along + width / 2, 0.14)
                layout.solids.append((min(p[0], q[0]), min(p[1], q[1]), max(p[0], q[0]), max(p[1], q[1])))
            bar = objects.rod(
                (-(right - left) / 2, 0.07, top + 0.01), ((right - left) / 2, 0.07, top + 0.01), 0.012, materials.brass
            )
            layout.patches += moved(objects.labelled(bar, "curtain"), wall.point((left + right) / 2, 0.0), wall.angle)
            width = min(1.2, right - left - 2 * 0.5)
            if width > 0.5:
                layout.patches += moved(objects.radiator(materials, width), wall.point(middle, 0.0), wall.angle)
                wall.taken.append(Opening(middle - width / 2, middle + width / 2, 0.0, 0.7))
                p, q = wall.point(middle - width / 2), wall.point(middle + width / 2, 0.14)
                layout.solids.append((min(p[0], q[0]), min(p[1], q[1]), max(p[0], q[0]), max(p[1], q[1])))
        for opening in wall.doors:
            p, q = wall.point(opening.start), wall.point(opening.end, 0.9)
            layout.kept_free.append((min(p[0], q[0]), min(p[1], q[1]), max(p[0], q[0]), max(p[1], q[1])))


def _small_things(layout: Layout, count: int) -> list[tuple[list, float]]:
    materials, rng, things = layout.materials, layout.rng, []
    for _ in range(count):
        kind = rng.integers(5)
        if kind == 0:
            things.append((book_pile(materials, int(rng.integers(2, 5))), 0.15))
        elif kind == 1:
            things.append((objects.bowl(materials), 0.16))
        elif kind == 2:
            things.append((objects.plant(materials, rng.uniform(0.3, 0.42), 0.19), 0.17))
        elif kind == 3:
            things.append((objects.basket_box(materials, 0.24, 0.18, 0.13), 0.16))
        else:
            things.append((objects.vase(materials, rng.uniform(0.2, 0.36)), 0.13))
    return things


def _lamp_on(layout: Layout, placement: Placement, count: int = 1) -> None:
    patches, bulb = objects.table_lamp(layout.materials)
    layout.on_top(placement, [(patches, 0.1), *_small_things(layout, count)], bulb)


def _lay_rug(layout: Layout, anchor: Placement, width: float, depth: float, y: float) -> None:
    """Lays a rug with its middle ``y`` before the back of a piece, if it fits between the walls."""
    for scale in (1.0, 0.85, 0.7):
        w, d = width * scale, depth * scale
        x0, y0 = anchor.world(0.0, y)
        rectangle = layout.footprint((x0, y0), anchor.angle, (-w / 2, -d / 2), (w / 2, d / 2))
        if layout.inside(rectangle, 0.1) and not any(overlap(rectangle, other) for other in layout.rugs):
            layout.rugs.append(rectangle)
            layout.patches += moved(objects.rug(layout.materials, w, d), (x0, y0, 0.0), anchor.angle)
            return


def _sitting(layout: Layout, seats: int) -> None:
    """A sofa, a rug and a low table before it, perhaps an armchair; a television across."""
    materials, rng = layout.materials, layout.rng
    couch = layout.against_wall("sofa", sofa(materials, seats), front=1.1, near=None)
    if couch is None:
        return
    _lay_rug(
        layout, couch, couch.piece.width * rng.uniform(0.95, 1.15), rng.uniform(1.5, 1.9), couch.piece.depth + 0.65
    )
    low = table(materials, rng.uniform(0.85, 1.1), rng.uniform(0.5, 0.6), 0.4)
    spot = layout.before("coffee table", couch, low, rng.uniform(0.38, 0.48))
    if spot is not None:
        layout.on_top(spot, [(objects.bowl(materials), 0.16), *_small_things(layout, 2)])
    across = [w for w in layout.room.walls if float(w.normal @ [-np.sin(couch.angle), np.cos(couch.angle)]) < -0.5]
    _television(layout, across or layout.room.walls, couch)


def _television(layout: Layout, walls: list, facing: Placement | None) -> None:
    materials, rng = layout.materials, layout.rng
    stand = cabinet(materials, rng.uniform(1.2, 1.6), 0.5)
    near = None
    if facing is not None:
        near = float((np.array(facing.world(0, 0)) - walls[0].origin) @ walls[0].direction)
    placed = layout.against_wall("television stand", stand, 0.6, walls, near)
    placed = placed or layout.against_wall("television stand", stand, 0.6)
    if placed is not None:
        screen = objects.television(materials, rng.uniform(0.9, 1.15), stand=True)
        x, y = placed.world(0.0, 0.1)
        layout.patches += moved(screen, (x, y, placed.position[2] + stand.height), placed.angle)
        for wall in layout.room.walls:
            if abs(wall.angle - placed.angle) < 1e-6:
                along = float((np.array([x, y]) - wall.origin) @ wall.direction)
                wall.taken.append(Opening(along - 0.6, along + 0.6, 0.0, 1.4))


def _working(layout: Layout) -> None:
    """A desk with a screen, a lamp and a chair."""
    materials, rng = layout.materials, layout.rng
    place = layout.against_wall("desk", desk(materials, rng.uniform(1.25, 1.45)), front=0.75)
    if place is None:
        return
    seat = office_chair(materials)
    x, y = place.world(rng.uniform(-0.25, 0.0), place.piece.depth + 0.52)
    angle = place.angle + np.pi + rng.uniform(-0.5, 0.5)
    half = 0.34
    solid = (x - half, y - half, x + half, y + half)
    if layout.inside(solid) and not any(overlap(solid, other) for other in layout.solids):
        layout.patches += moved(moved(seat.patches, (0, -0.3, 0)), (x, y, 0.0), angle)
        layout.solids.append(solid)
    screen = objects.television(materials, 0.55, stand=True)
    layout.patches += moved(screen, (*place.world(-0.15, 0.12), 0.74), place.angle)
    patches, bulb = objects.table_lamp(materials)
    spot = (*place.world(place.piece.width / 2 - 0.2, 0.2), 0.74)
    layout.patches += moved(patches, spot, place.angle)
    layout.bulbs.append(Bulb((spot[0], spot[1], spot[2] + bulb.centre[2]), bulb.radius, bulb.power))
    layout.patches += moved(
        book_pile(materials, 3), (*place.world(-place.piece.width / 2 + 0.2, 0.3), 0.74), place.angle
    )


def _sleeping(layout: Layout) -> None:
    """A bed with night stands and a rug."""
    materials, rng = layout.materials, layout.rng
    place = layout.against_wall("bed", bed(materials, float(rng.choice([1.4, 1.6]))), front=0.5)
    if place is None:
        place = layout.against_wall("bed", bed(materials, 1.0), front=0.4)
    if place is None:
        return
    wall = min(layout.room.walls, key=lambda w: abs(float((np.array(place.position[:2]) - w.origin) @ w.normal)))
    middle = float((np.array(place.position[:2]) - wall.origin) @ wall.direction)
    for side in (-1, 1):
        stand = cabinet(materials, 0.45, 0.5, 0.38)
        near = middle + side * (place.piece.width / 2 + 0.28)
        beside = layout.against_wall(f"night stand {side}", stand, 0.2, [wall], near, stray=0.12, tries=16)
        if beside is not None:
            if rng.random() < 0.75:
                _lamp_on(layout, beside, 0)
            else:
                layout.on_top(beside, _small_things(layout, 1))
    _lay_rug(layout, place, place.piece.width + 1.0, 1.5, place.piece.depth - 0.35)


def _storing(layout: Layout, wardrobes: bool) -> None:
    materials, rng = layout.materials, layout.rng
    if wardrobes:
        layout.against_wall("wardrobe", wardrobe(materials, int(rng.integers(2, 4))), front=0.6)
    shelf = layout.against_wall(
        "bookshelf", bookshelf(materials, rng.uniform(0.8, 1.5), rng.uniform(1.7, 2.05)), front=0.5
    )
    if shelf is None:
        layout.against_wall("bookshelf", bookshelf(materials, 0.75, rng.uniform(1.5, 2.0)), front=0.4)
    chest = layout.against_wall("cabinet", cabinet(materials, rng.uniform(0.8, 1.3), rng.uniform(0.75, 0.9)), front=0.5)
    if chest is not None:
        _lamp_on(layout, chest, 2)


def _finishing(layout: Layout) -> None:
    """Lamps, plants, boxes, pictures."""
    materials, rng = layout.materials, layout.rng
    patches, bulb = objects.floor_lamp(materials)
    where = layout.in_a_corner(patches, 0.24)
    if where is not None:
        layout.bulbs.append(Bulb((where[0], where[1], bulb.centre[2]), bulb.radius, bulb.power))
    for height, reach in ((rng.uniform(1.2, 1.7), 0.34), (rng.uniform(0.6, 1.0), 0.27)):
        layout.in_a_corner(objects.plant(materials, height, reach), reach)
    stack = objects.cardboard_box(materials, 0.42, 0.34, 0.3)
    if rng.random() < 0.6:
        upper = objects.cardboard_box(materials, 0.32, 0.28, 0.22)
        stack = stack + moved(upper, (0.02, -0.01, 0.301), rng.uniform(-0.3, 0.3))
    layout.in_a_corner(stack, 0.28)
    if "wardrobe" in layout.placements:
        layout.on_top(layout.placements["wardrobe"], [(objects.basket_box(materials, 0.4, 0.3, 0.22), 0.2)])
    for _ in range(int(rng.integers(4, 7))):
        width, height = rng.uniform(0.35, 0.9), rng.uniform(0.4, 0.75)
        layout.on_wall(objects.picture(materials, width, height), width, height, rng.uniform(1.5, 1.65))
    x, y = layout.room.width * rng.uniform(0.42, 0.58), layout.room.depth * rng.uniform(0.42, 0.52)
    patches, bulb = objects.ceiling_lamp(materials, layout.room.height)
    layout.patches += moved(patches, (x, y, 0.0))
    layout.bulbs.append(Bulb((x, y, bulb.centre[2]), bulb.radius, bulb.power))


def furnish(layout: Layout, kind: str) -> None:
    """Fills an empty room; what finds no place is left out.

    Args:
        layout: Of the empty room.
        kind: One of `ROOM_KINDS`.
    """
    materials, rng = layout.materials, layout.rng
    _dress_windows(layout)
    if kind == "living room":
        _sitting(layout, int(rng.integers(2, 4)))
        _storing(layout, wardrobes=False)
        group = dining_group(materials, int(rng.choice([2, 3, 4])))
        dining = layout.in_the_open("dining table", group, 0.5)
        dining = dining or layout.against_wall("dining table", dining_group(materials, 2), 0.3)
        if dining is not None:
            layout.on_top(dining, _small_things(layout, 2))
        layout.against_wall("armchair", sofa(materials, 1), front=0.3)
    elif kind == "bedroom":
        _sleeping(layout)
        _storing(layout, wardrobes=True)
        _working(layout)
        layout.against_wall("chair", chair(materials, int(rng.integers(3))), front=0.3)
        layout.against_wall("armchair", sofa(materials, 1), front=0.4)
    else:
        _sleeping(layout)
        _sitting(layout, 2)
        _storing(layout, wardrobes=True)
        dining = layout.in_the_open("dining table", dining_group(materials, 2), 0.4)
        dining = dining or layout.against_wall("dining table", dining_group(materials, 2), 0.2)
        if dining is not None:
            layout.on_top(dining, _small_things(layout, 2))
    _finishing(layout)
