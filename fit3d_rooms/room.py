"""One whole room from its seed: furnished, lit, walked through, rendered."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fit3d_ns.support.errors import UserError
from fit3d_rooms.building.furnishing import EXPECTED, ROOM_KINDS, furnish
from fit3d_rooms.building.layout import Layout
from fit3d_rooms.building.shell import add_openings, build_shell, make_room
from fit3d_rooms.geometry import PackedScene, RayScene
from fit3d_rooms.lighting import bake, make_lights
from fit3d_rooms.rendering import Camera, RenderedView, Renderer
from fit3d_rooms.surfaces.materials import PALETTES, Materials
from fit3d_rooms.walk import walk

FIELD_OF_VIEW = 75.0
"""Horizontal, degrees: the wide lens of a phone."""
_ATTEMPTS = 24


@dataclass
class RenderedRoom:
    """Everything that is written about a room.

    Attributes:
        kind: one of :data:`~fit3d_rooms.building.furnishing.ROOM_KINDS`.
        camera: of all views.
        poses: camera-to-world, metres, OpenGL axes, z up, float64 [V, 4, 4].
        views: rendered pictures, V.
    """

    kind: str
    camera: Camera
    poses: np.ndarray
    views: list[RenderedView]


def plan_room(
    seed: int, index: int, camera: Camera, views: int
) -> tuple[Layout, PackedScene, np.ndarray, np.random.Generator]:
    """Furnishes a room and finds a walk through it.

    Args:
        seed: Of all rooms.
        index: Of the room, from 0.
        camera: Of all views.
        views: Camera poses V.

    Returns:
        The layout, its surfaces, camera poses [V, 4, 4], and the generator that goes on with the light.

    Raises:
        UserError: if no attempt leaves a place to walk.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    materials = Materials(rng, PALETTES[rng.integers(len(PALETTES))])
    kind = ROOM_KINDS[index % len(ROOM_KINDS)]
    for attempt in range(_ATTEMPTS):
        room = make_room(rng)
        add_openings(room, rng)
        layout = Layout(room, materials)
        furnish(layout, kind)
        # Better a room that lacks a piece than none: the last attempts take what they get.
        if len(EXPECTED[kind] - set(layout.placements)) > attempt // 4:
            continue
        scene = PackedScene(build_shell(room, materials) + layout.patches, materials.bank)
        poses = walk(layout, RayScene(scene), camera, views, rng)
        if poses is not None:
            return layout, scene, poses, rng
    raise UserError(f"Room {index} of --seed {seed} leaves no place to walk: choose another seed.")


def render_room(
    seed: int,
    index: int,
    views: int,
    width: int,
    height: int,
    workers: int,
    progress: Callable[[str, float], None] = lambda stage, share: None,
) -> RenderedRoom:
    """Makes room ``index`` of a seed; the result depends on nothing else than the first five arguments.

    Args:
        seed: of the whole set.
        index: of the room; rooms do not depend on each other.
        views: V.
        width: W, pixels.
        height: H, pixels.
        workers: threads.
        progress: called with what is being done and the share of the room that is done, 0..1.

    Returns:
        Views, poses and surfaces of the room.
    """
    camera = Camera(width, height, width / 2 / float(np.tan(np.deg2rad(FIELD_OF_VIEW) / 2)))
    progress("furnishing", 0.0)
    layout, scene, poses, rng = plan_room(seed, index, camera, views)
    progress("lighting", 0.12)
    light = bake(scene, make_lights(layout.room, layout.bulbs, rng), rng, workers)
    renderer = Renderer(scene, light, camera)
    renderer.expose(poses)
    rendered: list[RenderedView] = []
    with ThreadPoolExecutor(workers) as pool:
        for view in pool.map(renderer.render, poses):
            rendered.append(view)
            progress("rendering", 0.4 + 0.6 * len(rendered) / views)
    return RenderedRoom(ROOM_KINDS[index % len(ROOM_KINDS)], camera, poses, rendered)
