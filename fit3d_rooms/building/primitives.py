"""Surfaces that rooms are built of: smooth grids with a place for texture and light.

Every solid is a list of `Patch`: a grid of vertices whose parameters (s, t) in [0, 1] address both its texture
and its light map. Units are metres, z is up, and the outside of a patch is where ``dP/ds x dP/dt`` points.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fit3d_rooms.classes import CLASS_IDS
from fit3d_rooms.surfaces.materials import Surface

Vector = Sequence[float] | np.ndarray
"""Three numbers."""


@dataclass(frozen=True)
class Patch:
    """A grid of A x B vertices.

    Attributes:
        vertices: positions, metres, [A, B, 3].
        normals: unit normals, [A, B, 3].
        s: parameter of each row, ascending from 0 to 1, [A].
        t: parameter of each column, ascending from 0 to 1, [B].
        lengths: extent along s and along t, metres.
        surface: what it is made of.
        origin: where the texture starts, metres along s and t (pieces of one wall share one pattern).
        label: class id.
        two_sided: a sheet seen and lit from both sides (leaves, curtains, lamp shades).
    """

    vertices: np.ndarray
    normals: np.ndarray
    s: np.ndarray
    t: np.ndarray
    lengths: tuple[float, float]
    surface: Surface
    origin: tuple[float, float] = (0.0, 0.0)
    label: int = CLASS_IDS["wall"]
    two_sided: bool = False


def labelled(patches: Sequence[Patch], name: str) -> list[Patch]:
    """Returns the patches with the class ``name``.

    Args:
        patches: Surfaces of a thing.
        name: Of a class in `fit3d_rooms.classes`.
    """
    return [replace(patch, label=CLASS_IDS[name]) for patch in patches]


def moved(patches: Sequence[Patch], offset: Vector, angle: float = 0.0) -> list[Patch]:
    """Returns the patches turned about z, counter-clockwise, and then shifted.

    Args:
        patches: Surfaces of a thing.
        offset: [3], metres.
        angle: Radians.
    """
    c, s = np.cos(angle), np.sin(angle)
    return transformed(patches, np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]), offset)


def transformed(patches: Sequence[Patch], rotation: np.ndarray, offset: Vector) -> list[Patch]:
    """Returns the patches rotated and then shifted.

    Args:
        patches: Surfaces of a thing.
        rotation: [3, 3].
        offset: [3], metres.
    """

    def turn(vectors: np.ndarray) -> np.ndarray:
        # Spelled out: a threaded BLAS may round differently from run to run, and rooms must be bit-identical.
        return sum(vectors[..., i, None] * rotation[:, i] for i in range(3))  # type: ignore[return-value]

    shift = np.asarray(offset, dtype=float)
    return [replace(p, vertices=turn(p.vertices) + shift, normals=turn(p.normals)) for p in patches]


def tilted(patches: Sequence[Patch], pivot: Vector, angle: float, axis: str = "x") -> list[Patch]:
    """Returns the patches turned about a level axis.

    Args:
        patches: Surfaces of a thing.
        pivot: [3], a point of the axis.
        angle: Radians.
        axis: ``x`` or ``y``.
    """
    c, s = np.cos(angle), np.sin(angle)
    rotation = {
        "x": np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]]),
        "y": np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]]),
    }[axis]
    centre = np.asarray(pivot, dtype=float)
    return transformed(transformed(patches, np.eye(3), -centre), rotation, centre)


def quad(
    origin: Vector,
    edge_s: Vector,
    edge_t: Vector,
    surface: Surface,
    texture_origin: tuple[float, float] = (0.0, 0.0),
) -> Patch:
    """Returns a flat parallelogram seen from the side of ``edge_s x edge_t``.

    Args:
        origin: [3], a corner, metres.
        edge_s: [3], from there along s, metres.
        edge_t: [3], from there along t, metres.
        surface: What it is made of.
        texture_origin: Place of the corner in the texture, metres.
    """
    o, es, et = (np.asarray(v, dtype=float) for v in (origin, edge_s, edge_t))
    vertices = np.stack([np.stack([o, o + et]), np.stack([o + es, o + es + et])])
    normal = np.cross(es, et)
    normals = np.broadcast_to(normal / np.linalg.norm(normal), vertices.shape)
    knots = np.array([0.0, 1.0])
    lengths = (float(np.linalg.norm(es)), float(np.linalg.norm(et)))
    return Patch(vertices, normals, knots, knots, lengths, surface, texture_origin)


# (normal axis, sign, s axis, s sign, t axis, t sign) of a box's faces; t points up on the four sides.
_FACES = (
    (2, 1, 0, 1, 1, 1),
    (2, -1, 0, 1, 1, -1),
    (0, 1, 1, 1, 2, 1),
    (0, -1, 1, -1, 2, 1),
    (1, 1, 0, -1, 2, 1),
    (1, -1, 0, 1, 2, 1),
)


def box(low: Vector, high: Vector, surface: Surface) -> list[Patch]:
    """Returns a box with sharp edges between two corners.

    Args:
        low: [3], the least x, y, z, metres.
        high: [3], the largest x, y, z, metres.
        surface: What it is made of.
    """
    lo, hi = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
    patches = []
    for axis, sign, s_axis, s_sign, t_axis, t_sign in _FACES:
        origin = np.where(
            np.array([s_sign if i == s_axis else t_sign if i == t_axis else 1 for i in range(3)]) > 0, lo, hi
        )
        origin[axis] = hi[axis] if sign > 0 else lo[axis]
        edge_s, edge_t = np.zeros(3), np.zeros(3)
        edge_s[s_axis] = s_sign * (hi - lo)[s_axis]
        edge_t[t_axis] = t_sign * (hi - lo)[t_axis]
        patches.append(quad(origin, edge_s, edge_t, surface))
    return patches


def grid_normals(vertices: np.ndarray) -> np.ndarray:
    """Returns unit normals [A, B, 3] of a regular grid, from central differences.

    Args:
        vertices: [A, B, 3].
    """
    normal = np.cross(np.gradient(vertices, axis=0), np.gradient(vertices, axis=1))
    return normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)


def rounded_box(
    low: Vector, high: Vector, radius: float, surface: Surface, bulge: float = 0.0, inner: int = 1
) -> list[Patch]:
    """Returns a box with round edges, and with ``bulge`` > 0 swollen like a cushion.

    Args:
        low: lower corner.
        high: upper corner.
        radius: of the edges; cut to half the smallest side.
        surface: what it is made of.
        bulge: how far the middle of the top and the bottom stands out, metres.
        inner: grid cells across the flat part (more for a smoother bulge).
    """
    lo, hi = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
    centre, half = (lo + hi) / 2, (hi - lo) / 2
    radius = float(min(radius, half.min() * 0.999))
    core = half - radius
    arc = radius * np.tan(np.linspace(0.0, np.pi / 4, 4))
    patches = []
    for axis, sign, s_axis, s_sign, t_axis, t_sign in _FACES:
        knots = []
        for along in (s_axis, t_axis):
            flat = np.linspace(-core[along], core[along], inner + 1)
            knots.append(np.concatenate([-core[along] - arc[:0:-1], flat, core[along] + arc[1:]]))
        q = np.empty((len(knots[0]), len(knots[1]), 3))
        q[..., axis] = sign * half[axis]
        q[..., s_axis] = s_sign * knots[0][:, None]
        q[..., t_axis] = t_sign * knots[1][None, :]
        nearest = np.clip(q, -core, core)
        normals = q - nearest
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        vertices = nearest + radius * normals
        if bulge > 0:
            x, y, z = (vertices[..., i] / half[i] for i in range(3))
            vertices[..., 2] += bulge * z * (1 - x**2) * (1 - y**2)
            normals = grid_normals(vertices)
        s, t = ((k - k[0]) / (k[-1] - k[0]) for k in knots)
        lengths = (float(2 * half[s_axis]), float(2 * half[t_axis]))
        patches.append(Patch(vertices + centre, normals, s, t, lengths, surface))
    return patches


def lathe(
    profile: Sequence[tuple[float, float]], surface: Surface, segments: int = 24, two_sided: bool = False
) -> Patch:
    """Returns a smooth surface of revolution about z.

    Args:
        profile: (radius, z) pairs; going up shows the outside, going down the inside, radius growing the underside.
        surface: what it is made of.
        segments: facets around.
        two_sided: see `Patch`.
    """
    curve = np.asarray(profile, dtype=float)
    slope = np.gradient(curve, axis=0)
    normal = np.stack([slope[:, 1], -slope[:, 0]], axis=1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    angle = np.linspace(0.0, 2 * np.pi, segments + 1)[:, None]
    cos, sin = np.cos(angle), np.sin(angle)
    vertices = np.stack(
        [curve[:, 0] * cos, curve[:, 0] * sin, np.broadcast_to(curve[:, 1], (segments + 1, len(curve)))], -1
    )
    normals = np.stack([normal[:, 0] * cos, normal[:, 0] * sin, np.broadcast_to(normal[:, 1], vertices.shape[:2])], -1)
    arc = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))])
    lengths = (float(2 * np.pi * curve[:, 0].max()), float(arc[-1]))
    return Patch(
        vertices, normals, np.linspace(0, 1, segments + 1), arc / arc[-1], lengths, surface, two_sided=two_sided
    )


def cylinder(
    radius: float, z0: float, z1: float, surface: Surface, segments: int = 20, top_radius: float | None = None
) -> list[Patch]:
    """Returns a closed upright cylinder or cone about z.

    Args:
        radius: Metres.
        z0: Of the bottom, metres.
        z1: Of the top, metres.
        surface: What it is made of.
        segments: Facets around.
        top_radius: Metres; ``radius`` if None.
    """
    top = radius if top_radius is None else top_radius
    patches = [lathe([(radius, z0), (top, z1)], surface, segments)]
    patches += [lathe(c, surface, segments) for c in ([(0, z0), (radius, z0)], [(top, z1), (0, z1)])]
    return patches


def sphere(centre: Vector, radius: float, surface: Surface, segments: int = 16) -> list[Patch]:
    """Returns a sphere.

    Args:
        centre: [3], metres.
        radius: Metres.
        surface: What it is made of.
        segments: Facets around.
    """
    angle = np.linspace(-np.pi / 2, np.pi / 2, segments // 2 + 1)
    profile = list(zip(radius * np.cos(angle), radius * np.sin(angle)))
    return moved([lathe(profile, surface, segments)], centre)


def rod(start: Vector, end: Vector, radius: float, surface: Surface, end_radius: float | None = None):
    """A closed round bar between two points, thinner or thicker at its end if asked.

    Args:
        start: [3], metres.
        end: [3], metres.
        radius: Metres.
        surface: What it is made of.
        end_radius: Metres; ``radius`` if None.
    """
    a, b = np.asarray(start, dtype=float), np.asarray(end, dtype=float)
    length = float(np.linalg.norm(b - a))
    up = (b - a) / length
    side = np.cross(up, [1.0, 0.0, 0.0] if abs(up[0]) < 0.9 else [0.0, 1.0, 0.0])
    side /= np.linalg.norm(side)
    rotation = np.stack([side, np.cross(up, side), up], axis=1)
    return transformed(cylinder(radius, 0.0, length, surface, 10, end_radius), rotation, a)


def sheet(vertices: np.ndarray, surface: Surface, lengths: tuple[float, float]) -> Patch:
    """Returns a two-sided sheet through a grid of vertices [A, B, 3].

    Args:
        vertices: [A, B, 3], metres.
        surface: What it is made of.
        lengths: Along s and t, metres.
    """
    knots = [np.linspace(0.0, 1.0, n) for n in vertices.shape[:2]]
    return Patch(vertices, grid_normals(vertices), knots[0], knots[1], lengths, surface, two_sided=True)
