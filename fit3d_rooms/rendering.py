"""Views of a lit room: smooth colour, exact depth and labels at pixel centres."""

from dataclasses import dataclass

import numpy as np

from fit3d_rooms.classes import VOID
from fit3d_rooms.geometry import PackedScene, RayScene

# A rotated grid: no two samples share a row or a column, which smooths near-horizontal and near-vertical edges.
_SAMPLES = ((0.125, 0.625), (0.375, 0.125), (0.625, 0.875), (0.875, 0.375))
_CHUNK = 16384


@dataclass(frozen=True)
class Camera:
    """A pinhole camera with square pixels and its principal point in the middle.

    Attributes:
        width: W, pixels.
        height: H, pixels.
        focal: pixels.
    """

    width: int
    height: int
    focal: float

    def directions(self, shift: tuple[float, float]) -> np.ndarray:
        """Returns ray directions [H * W, 3] in the camera frame (x right, y up, looking along -z), with z = -1.

        Args:
            shift: place in the pixel, (0.5, 0.5) for its centre.
        """
        x = (np.arange(self.width) + shift[0] - self.width / 2) / self.focal
        y = (np.arange(self.height) + shift[1] - self.height / 2) / self.focal
        grid = np.empty((self.height, self.width, 3))
        grid[..., 0], grid[..., 1], grid[..., 2] = x[None], -y[:, None], -1.0
        return grid.reshape(-1, 3)


@dataclass
class RenderedView:
    """What a camera sees.

    Attributes:
        rgb: sRGB, uint8 [H, W, 3].
        depth: distance along the optical axis, metres, float32 [H, W].
        label: class ids, uint8 [H, W].
    """

    rgb: np.ndarray
    depth: np.ndarray
    label: np.ndarray


def rotate(vectors: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Applies a rotation [3, 3] to vectors [N, 3] without BLAS, whose rounding depends on its threads.

    Args:
        vectors: [N, 3].
        rotation: [3, 3].

    Returns:
        [N, 3].
    """
    return vectors[:, :1] * rotation[:, 0] + vectors[:, 1:2] * rotation[:, 1] + vectors[:, 2:] * rotation[:, 2]


def tone_map(radiance: np.ndarray) -> np.ndarray:
    """Returns display light of scene light: Reinhard's curve with white at 4, and a little contrast.

    Args:
        radiance: In [0, inf).

    Returns:
        In [0, 1].
    """
    return np.minimum(radiance * (1 + radiance / 16) / (1 + radiance), 1.0) ** np.float32(1.2)


def to_srgb(linear: np.ndarray) -> np.ndarray:
    """Returns sRGB bytes of linear display light.

    Args:
        linear: In [0, 1].
    """
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
    return np.rint(encoded * 255).astype(np.uint8)


class Renderer:
    """Renders views of one room.

    Args:
        scene: the room.
        light: on its nodes, from `fit3d_rooms.lighting.bake`, float32 [M, 3].
        camera: of all views.
    """

    def __init__(self, scene: PackedScene, light: np.ndarray, camera: Camera) -> None:
        self.scene, self.light, self.camera = scene, light, camera
        self.rays = RayScene(scene)
        self.exposure = 1.0

    def _outgoing(self, faces: np.ndarray, uv: np.ndarray, footprint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Light leaving hit points without mirror reflection, exposed, [N, 3]; and their patches [N]."""
        scene = self.scene
        patch, st = scene.surface_points(faces, uv)
        albedo = scene.albedo(patch, st, footprint)
        reflected = scene.from_nodes(self.light, patch, st) * np.float32(self.exposure)
        glow = scene.glow[patch][:, None]
        # Lamps and panes show their own light; what they reflect would wash it out.
        return albedo * np.where(glow > 0, glow, reflected), patch

    def _shade(self, origin: np.ndarray, directions: np.ndarray, hits: tuple, spread: float) -> np.ndarray:
        """Display light [N, 3] along rays from one point.

        Args:
            origin: [3].
            directions: [N, 3].
            hits: what they meet, from :meth:`RayScene.first_hit`.
            spread: width of a sample at distance 1.
        """
        scene = self.scene
        faces, uv, distance = hits
        faces = faces.clip(0)
        footprint = distance * np.float32(spread)
        color, patch = self._outgoing(faces, uv, footprint)
        glossy = np.flatnonzero(scene.gloss[patch] > 0)
        if len(glossy):
            u, v = uv[glossy, :1], uv[glossy, 1:]
            corners = scene.face_normals[faces[glossy]]
            normal = corners[:, 0] * (1 - u - v) + corners[:, 1] * u + corners[:, 2] * v
            normal /= np.maximum(np.sqrt((normal**2).sum(1, keepdims=True)), 1e-6)
            incoming = directions[glossy] / np.sqrt((directions[glossy] ** 2).sum(1, keepdims=True))
            cosine = (incoming * normal).sum(1, keepdims=True)
            mirrored = incoming - 2 * cosine * normal
            start = origin + directions[glossy] * distance[glossy, None] + 0.003 * normal
            again, uv_again, further = self.rays.first_hit(start, mirrored)
            blurred = 0.02 + 0.06 * np.minimum(further, 10.0)
            seen, _ = self._outgoing(again.clip(0), uv_again, blurred.astype(np.float32))
            fresnel = 0.04 + 0.96 * np.clip(1 + cosine, 0.0, 1.0) ** 5
            color[glossy] += seen * (fresnel * scene.gloss[patch[glossy]][:, None] * (again >= 0)[:, None])
        return tone_map(color)

    def expose(self, poses: np.ndarray, target: float = 0.62) -> None:
        """Sets one exposure for the whole room, from a coarse look along all camera poses.

        Args:
            poses: [V, 4, 4] camera to world, OpenGL axes.
            target: Brightness that the 60th percentile of all pixels gets.
        """
        self.exposure = 1.0
        coarse = Camera(24, 18, self.camera.focal * 24 / self.camera.width)
        samples = []
        for pose in poses:
            directions = rotate(coarse.directions((0.5, 0.5)), pose[:3, :3]).astype(np.float32)
            faces, uv, distance = self.rays.first_hit(pose[:3, 3].astype(np.float32)[None], directions)
            color, patch = self._outgoing(faces.clip(0), uv, distance * 0.05)
            samples.append(color[self.scene.glow[patch] == 0].mean(axis=1))
        self.exposure = float(target / np.quantile(np.concatenate(samples), 0.6))

    def render(self, pose: np.ndarray) -> RenderedView:
        """Renders a view.

        Args:
            pose: [4, 4] camera to world, OpenGL axes.

        Returns:
            Colour, depth and labels.
        """
        camera, scene = self.camera, self.scene
        origin = pose[:3, 3].astype(np.float32)

        def sample(shift: tuple[float, float], pixels: np.ndarray, spread: float):
            rays = rotate(camera.directions(shift)[pixels], pose[:3, :3]).astype(np.float32)
            hits = self.rays.first_hit(origin[None], rays)
            return self._shade(origin, rays, hits, spread), hits

        total = camera.height * camera.width
        parts = [np.arange(i, min(i + _CHUNK, total)) for i in range(0, total, _CHUNK)]
        sampled = [sample((0.5, 0.5), part, 1 / camera.focal) for part in parts]
        color = np.concatenate([c for c, _ in sampled])
        faces = np.concatenate([hits[0] for _, hits in sampled])
        distance = np.concatenate([hits[2] for _, hits in sampled])
        patch = np.where(faces >= 0, scene.face_patch[faces.clip(0)], -1).reshape(camera.height, camera.width)
        # Textures are filtered by their mip levels; only the borders of surfaces need more samples.
        rim = np.flatnonzero(_borders(patch))
        for begin in range(0, len(rim), _CHUNK):
            part = rim[begin : begin + _CHUNK]
            samples = [sample(shift, part, 0.5 / camera.focal)[0] for shift in _SAMPLES]
            color[part] = sum(samples) / np.float32(len(_SAMPLES))
        label = np.where(faces >= 0, scene.label[scene.face_patch[faces.clip(0)]], VOID).astype(np.uint8)
        shape = (camera.height, camera.width)
        depth = np.where(faces >= 0, distance, 0.0).astype(np.float32)
        return RenderedView(to_srgb(color).reshape(*shape, 3), depth.reshape(shape), label.reshape(shape))


def _borders(patch: np.ndarray) -> np.ndarray:
    """Pixels with another patch among their eight neighbours, bool [H, W]."""
    padded = np.pad(patch, 1, mode="edge")
    height, width = patch.shape
    differs = np.zeros(patch.shape, bool)
    for dy in range(3):
        for dx in range(3):
            differs |= padded[dy : dy + height, dx : dx + width] != patch
    return differs
