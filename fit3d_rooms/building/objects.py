"""Lamps, plants, vases, pictures, rugs, curtains, screens, boxes: what makes furniture a home.

Things that stand have their foot on z = 0 around x = y = 0. Things that hang have their back at y = 0 and face +y.
"""

from dataclasses import dataclass, replace

import numpy as np

from fit3d_rooms.building.primitives import (
    Patch,
    box,
    cylinder,
    grid_normals,
    labelled,
    lathe,
    quad,
    rod,
    rounded_box,
    sheet,
    sphere,
)
from fit3d_rooms.surfaces import motifs
from fit3d_rooms.surfaces.materials import Materials, Surface


@dataclass
class Bulb:
    """Where a lamp's light comes from: centre [3] and radius in metres, and relative power."""

    centre: tuple[float, float, float]
    """x, y, z, metres."""
    radius: float
    """Metres."""
    power: float
    """Relative to others."""


def _shade(materials: Materials, z0: float, z1: float, low: float, high: float) -> list[Patch]:
    return [lathe([(low, z0), (high, z1)], materials.shade, 28, two_sided=True)]


def floor_lamp(materials: Materials) -> tuple[list[Patch], Bulb]:
    """Returns a standing lamp, 1.6 m high.

    Args:
        materials: Of the room; its generator draws the details.
    """
    metal = materials.brass if materials.rng.random() < 0.5 else materials.black
    height = materials.rng.uniform(1.5, 1.65)
    patches = cylinder(0.14, 0, 0.025, metal, 28) + cylinder(0.012, 0.025, height - 0.15, metal, 12)
    patches += _shade(materials, height - 0.3, height, 0.22, 0.15)
    return labelled(patches, "lamp"), Bulb((0, 0, height - 0.16), 0.09, 0.5)


def table_lamp(materials: Materials) -> tuple[list[Patch], Bulb]:
    """Returns a lamp with a turned ceramic foot, about 0.45 m high.

    Args:
        materials: Of the room; its generator draws the details.
    """
    foot = materials.ceramic.tinted(materials.accent())
    profile = [(0.06, 0.0), (0.075, 0.04), (0.085, 0.09), (0.06, 0.16), (0.025, 0.2), (0.015, 0.26)]
    patches = [lathe(profile, foot)] + _shade(materials, 0.24, 0.43, 0.14, 0.09)
    return labelled(patches, "lamp"), Bulb((0, 0, 0.33), 0.06, 0.2)


def ceiling_lamp(materials: Materials, ceiling: float) -> tuple[list[Patch], Bulb]:
    """Returns a lamp hanging from z = ``ceiling``: a paper globe or a drum.

    Args:
        materials: Of the room; its generator draws the details.
        ceiling: Its height above the floor, metres.
    """
    if materials.rng.random() < 0.5:
        centre = ceiling - 0.42
        patches = sphere((0, 0, centre), 0.2, materials.shade, 24) + cylinder(
            0.006, centre + 0.2, ceiling, materials.black, 8
        )
        bulb = Bulb((0, 0, centre), 0.21, 1.5)
    else:
        patches = _shade(materials, ceiling - 0.42, ceiling - 0.18, 0.27, 0.27)
        patches += [lathe([(0, ceiling - 0.415), (0.265, ceiling - 0.415)], materials.shade, 28, two_sided=True)]
        patches += cylinder(0.006, ceiling - 0.2, ceiling, materials.black, 8)
        bulb = Bulb((0, 0, ceiling - 0.3), 0.22, 1.5)
    patches += cylinder(0.06, ceiling - 0.03, ceiling - 0.001, materials.white)
    return labelled(patches, "lamp"), bulb


def vase(materials: Materials, height: float) -> list[Patch]:
    """Returns a turned vase, open at the top.

    Args:
        materials: Of the room; its generator draws the details.
        height: Metres along z.
    """
    rng = materials.rng
    surface = materials.ceramic.tinted(
        str(rng.choice([materials.accent(), "#d8d2c6", "#7d8f96", "#9a5b45", "#3f5560"]))
    )
    belly, neck = height * rng.uniform(0.22, 0.36), height * rng.uniform(0.08, 0.16)
    z = np.linspace(0, 1, 12)
    peak = rng.uniform(0.25, 0.55)
    radius = neck + (belly - neck) * np.exp(-(((z - peak) / 0.28) ** 2))
    radius[-1] *= 1.15
    outside = list(zip(radius, z * height))
    inside = [(0.9 * r, max(h, 0.012)) for r, h in reversed(outside)]
    return labelled([lathe(outside, surface), lathe([*inside, (0, 0.012)], surface)], "vase")


def bowl(materials: Materials) -> list[Patch]:
    """Returns a bowl of fruit; fruit and bowl count as a vase.

    Args:
        materials: Of the room; its generator draws the details.
    """
    rng, surface = materials.rng, materials.ceramic.tinted(materials.accent())
    angle = np.linspace(0, 0.42 * np.pi, 8)
    outside = [(0.05 + 0.11 * np.sin(a), 0.1 * (1 - np.cos(a)) / (1 - np.cos(angle[-1]))) for a in angle]
    inside = [(0.94 * r, h + 0.006) for r, h in reversed(outside)]
    patches = [lathe(outside, surface), lathe([*inside, (0, 0.006)], surface)]
    for i in range(6):
        fruit = materials.ceramic.tinted(str(rng.choice(["#c8452e", "#e0a030", "#8fae3c", "#d97a2b"])))
        around = 2 * np.pi * i / 5
        place = (0.075 * np.cos(around), 0.075 * np.sin(around), 0.075) if i < 5 else (0, 0, 0.115)
        patches += sphere(place, 0.038, fruit, 12)
    return labelled(patches, "vase")


def _leaf(root: np.ndarray, azimuth: float, length: float, width: float, rise: float, surface: Surface) -> Patch:
    """A leaf that leaves ``root`` at the angle ``rise`` and bends down under its own weight."""
    along = np.linspace(0, 1, 7)
    bend = rise - 1.5 * along**1.5
    step = length / 6
    out = np.concatenate([[0], np.cumsum(step * np.cos(bend[1:]))])
    up = np.concatenate([[0], np.cumsum(step * np.sin(bend[1:]))])
    half = width / 2 * np.sin(np.pi * (0.08 + 0.9 * along)) ** 0.8
    across = np.linspace(-1, 1, 5)
    direction = np.array([np.cos(azimuth), np.sin(azimuth), 0.0])
    side = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
    spine = root + out[:, None] * direction + up[:, None] * np.array([0.0, 0.0, 1.0])
    grid = spine[None] + (across[:, None] * half[None])[..., None] * side
    grid[..., 2] += 0.25 * np.abs(across)[:, None] * half[None]
    return sheet(grid, surface, (width, length))


def _within(leaf: Patch, reach: float) -> Patch:
    """Draws a leaf towards the stem so far that it stays within ``reach`` of it."""
    extent = float(np.hypot(leaf.vertices[..., 0], leaf.vertices[..., 1]).max())
    if extent <= reach:
        return leaf
    vertices = leaf.vertices * np.array([reach / extent, reach / extent, 1.0])
    return replace(leaf, vertices=vertices, normals=grid_normals(vertices))


def plant(materials: Materials, height: float, reach: float) -> list[Patch]:
    """Returns a pot plant, ``reach`` wide around its stem: arching leaves, upright blades, or a small tree.

    Args:
        materials: Of the room; its generator draws the details.
        height: Metres along z.
        reach: Width around its stem, metres.
    """
    rng, patches = materials.rng, []
    pot_height = min(0.32, 0.3 * height + 0.03)
    radius = pot_height * 0.52
    pot = materials.ceramic.tinted(str(rng.choice(["#c4714f", "#e4dfd6", "#4a5660", materials.accent()])))
    patches += [
        lathe([(0, 0), (radius * 0.75, 0)], pot),
        lathe([(radius * 0.75, 0), (radius, pot_height)], pot),
        lathe([(radius, pot_height), (radius * 0.9, pot_height)], pot),
        lathe([(radius * 0.9, pot_height), (radius * 0.86, pot_height * 0.88)], pot),
        lathe([(radius * 0.88, pot_height * 0.88), (0, pot_height * 0.9)], materials.earth),
    ]
    green = materials.leaves[rng.integers(3)]
    top, kind = height - pot_height, rng.integers(3) if height > 0.6 else 0
    ground = np.array([0, 0, pot_height * 0.88])
    if kind == 0:
        for _ in range(int(18 + 20 * height)):
            azimuth, length = rng.uniform(0, 2 * np.pi), top * rng.uniform(0.55, 1.05)
            root = ground + np.array([*(radius * 0.3 * rng.uniform(-1, 1, 2)), 0])
            patches.append(
                _leaf(root, azimuth, length, length * rng.uniform(0.16, 0.26), rng.uniform(1.15, 1.5), green)
            )
    elif kind == 1:
        for _ in range(16):
            azimuth, tall = rng.uniform(0, 2 * np.pi), top * rng.uniform(0.6, 1.0)
            lean, root = rng.uniform(0.0, 0.22), ground + np.array([*(radius * 0.5 * rng.uniform(-1, 1, 2)), 0])
            z = np.linspace(0, 1, 6)
            half = 0.035 * np.sin(np.pi * (0.25 + 0.74 * z))
            side = np.array([-np.sin(azimuth), np.cos(azimuth), 0])
            spine = root + np.stack(
                [lean * tall * z**2 * np.cos(azimuth), lean * tall * z**2 * np.sin(azimuth), tall * z], 1
            )
            grid = spine[None] + (np.linspace(-1, 1, 3)[:, None] * half)[..., None] * side
            patches.append(sheet(grid, green, (0.07, tall)))
    else:
        crown = pot_height + top * 0.68
        patches += rod(ground, (0.02, 0.01, crown), 0.018, materials.dark_wood)
        for _ in range(95):
            azimuth, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(-0.9, 1.4)
            spread = top * 0.26 * rng.uniform(0.2, 1.0)
            root = np.array([0.02, 0.01, crown]) + spread * np.array(
                [np.cos(tilt) * np.cos(azimuth), np.cos(tilt) * np.sin(azimuth), np.sin(tilt)]
            )
            patches.append(
                _leaf(root, azimuth + rng.normal(0, 0.5), rng.uniform(0.14, 0.22), 0.08, tilt * 0.6 + 0.5, green)
            )
    return labelled([_within(patch, reach) if patch.two_sided else patch for patch in patches], "plant")


def picture(materials: Materials, width: float, height: float) -> list[Patch]:
    """Returns a framed picture with its middle at x = z = 0.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
        height: Metres along z.
    """
    rng, bar, deep = materials.rng, materials.rng.uniform(0.018, 0.035), 0.025
    frame = (materials.black, materials.white, materials.brass, materials.dark_wood)[rng.integers(4)]
    kind = rng.integers(3)
    if kind == 0:
        image = motifs.landscape(rng)
    elif kind == 1:
        image = motifs.abstract(rng, [*materials.palette.accents, materials.palette.feature, "#2e3338"])
    else:
        image = motifs.botanical(rng)
    w, h = width / 2, height / 2
    patches = box((-w, 0.003, h - bar), (w, deep, h), frame) + box((-w, 0.003, -h), (w, deep, -h + bar), frame)
    for x in (-w, w - bar):
        patches += box((x, 0.003, -h + bar), (x + bar, deep, h - bar), frame)
    mat = 0.0 if kind == 0 else min(width, height) * 0.1
    w, h = w - bar, h - bar
    patches.append(quad((w, 0.008, -h), (-2 * w, 0, 0), (0, 0, 2 * h), materials.white))
    w, h = w - mat, h - mat
    patches.append(quad((w, 0.01, -h), (-2 * w, 0, 0), (0, 0, 2 * h), materials.picture(image, gloss=0.1)))
    return labelled(patches, "picture")


def television(materials: Materials, width: float, stand: bool) -> list[Patch]:
    """Returns a flat screen with its middle at x = 0: on a foot standing at z = 0, or hanging with its middle at z = 0.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
        stand: Whether it stands on a foot; else it hangs with its middle at z = 0.
    """
    height, z0 = width * 0.58, 0.07 if stand else -width * 0.29
    y = 0.06 if stand else 0.01
    patches = rounded_box((-width / 2, y, z0), (width / 2, y + 0.035, z0 + height), 0.008, materials.black)
    face = materials.picture(motifs.screen(materials.rng), gloss=0.3, glow=0.8)
    margin = 0.014
    size = (width - 2 * margin, height - 2 * margin)
    patches.append(quad((size[0] / 2, y + 0.036, z0 + margin), (-size[0], 0, 0), (0, 0, size[1]), face))
    if stand:
        patches += box((-0.04, 0.05, 0.015), (0.04, 0.075, z0 + 0.1), materials.black)
        patches += rounded_box((-width * 0.22, 0.0, 0), (width * 0.22, 0.2, 0.015), 0.005, materials.black)
    return labelled(patches, "television")


def rug(materials: Materials, width: float, depth: float) -> list[Patch]:
    """Returns a rug with its middle at the origin.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
        depth: Metres along y.
    """
    kind = str(materials.rng.choice(["medallion", "bands", "diamonds", "shag"]))
    colors = [materials.palette.accents[i] for i in materials.rng.permutation(3)]
    face = materials.picture(motifs.rug(materials.rng, colors, kind))
    patches = rounded_box((-width / 2, -depth / 2, 0), (width / 2, depth / 2, 0.014), 0.006, face)
    return labelled(patches, "rug")


def curtain(materials: Materials, width: float, top: float, bottom: float) -> list[Patch]:
    """Returns one gathered curtain with its middle at x = 0, hanging from z = ``top`` to ``bottom``.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
        top: Above the floor, metres.
        bottom: Above the floor, metres.
    """
    rng, folds = materials.rng, max(3, round(width / 0.085))
    s = np.linspace(0, 1, folds * 8 + 1)
    t = np.linspace(0, 1, 9)
    phase = rng.uniform(0, 2 * np.pi)
    amplitude = 0.035 * (1 + 0.35 * np.sin(2 * np.pi * 1.7 * s + phase))
    wave = np.sin(2 * np.pi * folds * s + 0.9 * np.sin(2 * np.pi * 2 * s + phase))
    grid = np.empty((len(s), len(t), 3))
    # Facing +y, s has to run towards -x for the outside to be the front.
    grid[..., 0] = width * (0.5 - s)[:, None] * (1 + 0.05 * (1 - t))[None] + 0.008 * wave[:, None]
    grid[..., 1] = 0.06 + (amplitude * wave)[:, None] * (1.0 - 0.35 * t)[None]
    grid[..., 2] = (bottom + (top - bottom) * t)[None]
    return labelled([sheet(grid, materials.curtain, (width * 1.6, top - bottom))], "curtain")


def cardboard_box(materials: Materials, width: float, depth: float, height: float) -> list[Patch]:
    """Returns a closed carton with a strip of tape.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
        depth: Metres along y.
        height: Metres along z.
    """
    patches = box((-width / 2, -depth / 2, 0), (width / 2, depth / 2, height), materials.cardboard)
    tape = materials.lacquer.tinted("#cdb58a")
    patches += box((-width / 2 - 0.001, -0.03, height * 0.7), (width / 2 + 0.001, 0.03, height + 0.001), tape)
    return labelled(patches, "box")


def basket_box(materials: Materials, width: float, depth: float, height: float) -> list[Patch]:
    """Returns a painted storage box with a lid.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
        depth: Metres along y.
        height: Metres along z.
    """
    color = materials.lacquer.tinted(materials.accent())
    patches = box((-width / 2, -depth / 2, 0), (width / 2, depth / 2, height * 0.8), color)
    lid = (width / 2 + 0.008, depth / 2 + 0.008)
    patches += rounded_box((-lid[0], -lid[1], height * 0.78), (lid[0], lid[1], height), 0.006, color)
    return labelled(patches, "box")


def radiator(materials: Materials, width: float) -> list[Patch]:
    """Returns a ribbed radiator below a window, back at y = 0, standing off the floor.

    Args:
        materials: Of the room; its generator draws the details.
        width: Metres along x.
    """
    patches, ribs = [], round(width / 0.06)
    step = width / ribs
    for i in range(ribs):
        x = -width / 2 + i * step
        patches += rounded_box((x + 0.006, 0.03, 0.12), (x + step - 0.006, 0.12, 0.66), 0.02, materials.white)
    for z in (0.18, 0.58):
        patches += rod((-width / 2, 0.075, z), (width / 2, 0.075, z), 0.014, materials.white)
    return labelled(patches, "radiator")
