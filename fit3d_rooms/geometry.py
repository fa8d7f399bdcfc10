"""All surfaces of a room in flat arrays, ready for ray casting and vectorised look-up."""

from collections.abc import Sequence

import numpy as np

from fit3d_rooms.building.primitives import Patch
from fit3d_rooms.surfaces.materials import TextureBank

TEXEL = 0.04
"""Distance of light map nodes on large surfaces, metres."""


class PackedScene:
    """The room as triangles with texture and light map addresses.

    Attributes:
        vertices: metres, float32 [X, 3].
        triangles: uint32 [F, 3].
        face_patch: patch of each triangle, int32 [F].
        face_st: (s, t) at the corners, float32 [F, 3, 2].
        face_normals: unit normals at the corners, float32 [F, 3, 3].
        label: class id per patch, uint8 [P].
        nodes: light map nodes along s and t per patch, int32 [P, 2].
        node_start: first node of each patch in the flat light map, int64 [P]; node (i, j) is at start + i * nt + j.
        patches: the surfaces themselves.

    Args:
        patches: All surfaces of the room.
        bank: Their textures.
    """

    def __init__(self, patches: Sequence[Patch], bank: TextureBank) -> None:
        self.patches = list(patches)
        self._triangulate()
        self.label = np.array([p.label for p in self.patches], np.uint8)
        self.two_sided = np.array([p.two_sided for p in self.patches])
        self.glow = np.array([p.surface.glow for p in self.patches], np.float32)
        self.gloss = np.array([p.surface.gloss for p in self.patches], np.float32)
        self.tint = np.array([p.surface.tint for p in self.patches], np.float32)
        self.texels, self.texture_offset, sides = bank.packed()
        self.texture = np.array([p.surface.texture for p in self.patches], np.int32)
        self.side = sides[self.texture]
        self._address_textures()
        self.nodes = np.array([[self._node_count(length) for length in p.lengths] for p in self.patches], np.int32)
        sizes = self.nodes.astype(np.int64).prod(axis=1)
        self.node_start = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.node_total = int(sizes.sum())

    @staticmethod
    def _node_count(length: float) -> int:
        return int(np.clip(np.ceil(length / TEXEL) + 1, 2 if length < 0.06 else 4, 320))

    def _triangulate(self) -> None:
        vertices, triangles, face_patch, face_st, face_normals, start = [], [], [], [], [], 0
        for index, patch in enumerate(self.patches):
            a, b = patch.vertices.shape[:2]
            grid = np.arange(a * b).reshape(a, b)
            low, right, up, far = grid[:-1, :-1], grid[1:, :-1], grid[:-1, 1:], grid[1:, 1:]
            faces = np.concatenate([np.stack(f, -1).reshape(-1, 3) for f in ((low, right, far), (low, far, up))])
            st = np.stack(np.meshgrid(patch.s, patch.t, indexing="ij"), -1).reshape(-1, 2)
            vertices.append(patch.vertices.reshape(-1, 3))
            triangles.append(faces + start)
            face_patch.append(np.full(len(faces), index, np.int32))
            face_st.append(st[faces])
            face_normals.append(patch.normals.reshape(-1, 3)[faces])
            start += a * b
        self.vertices = np.concatenate(vertices).astype(np.float32)
        self.triangles = np.concatenate(triangles).astype(np.uint32)
        self.face_patch = np.concatenate(face_patch)
        self.face_st = np.concatenate(face_st).astype(np.float32)
        self.face_normals = np.concatenate(face_normals).astype(np.float32)

    def _address_textures(self) -> None:
        """Texture coordinate = scale * (s, t) + offset, with s and t swapped where ``swapped``."""
        count = len(self.patches)
        self.swapped = np.zeros(count, bool)
        self.stretched = np.zeros(count, bool)
        scale, offset, metres = np.ones((count, 2)), np.zeros((count, 2)), np.empty(count)
        for index, patch in enumerate(self.patches):
            surface, lengths = patch.surface, np.array(patch.lengths)
            if surface.size is None:
                self.stretched[index] = True
                metres[index] = lengths.max()
                continue
            origin = np.array(patch.origin)
            if surface.grain and lengths[1] > lengths[0]:
                self.swapped[index] = True
                lengths, origin = lengths[::-1], origin[::-1]
            size = np.array(surface.size)
            scale[index] = lengths / size
            offset[index] = origin / size
            if surface.scatter:
                # The additive sequence of the plastic number: evenly spread, without another random stream.
                offset[index] += np.mod(index * np.array([0.7548776662, 0.5698402910]), 1.0)
            metres[index] = size.max()
        self.uv_scale, self.uv_offset = scale.astype(np.float32), offset.astype(np.float32)
        self.texel_metres = (metres / self.side).astype(np.float32)

    def node_frames(self, inset: float = 0.002) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns positions [M, 3] and normals [M, 3] of all light map nodes, and the patch of each [M].

        Nodes on the rim are drawn ``inset`` metres inwards, off whatever the surface abuts on.

        Args:
            inset: Metres by which nodes on the rim are drawn inwards.
        """
        positions, normals = np.empty((self.node_total, 3)), np.empty((self.node_total, 3))
        owner = np.repeat(np.arange(len(self.patches)), self.nodes.prod(axis=1))
        for patch, (ns, nt), start in zip(self.patches, self.nodes, self.node_start):
            weights = []
            for knots, count, length in ((patch.s, ns, patch.lengths[0]), (patch.t, nt, patch.lengths[1])):
                rim = min(inset / max(length, 1e-6), 0.25)
                place = np.linspace(0.0, 1.0, count).clip(rim, 1 - rim)
                cell = np.clip(np.searchsorted(knots, place, side="right") - 1, 0, len(knots) - 2)
                weights.append((cell, (place - knots[cell]) / np.maximum(knots[cell + 1] - knots[cell], 1e-12)))
            (i, fs), (j, ft) = weights
            fs, ft = fs[:, None, None], ft[None, :, None]

            def blend(values: np.ndarray) -> np.ndarray:
                low = values[np.ix_(i, j)] * (1 - fs) + values[np.ix_(i + 1, j)] * fs  # noqa: B023
                high = values[np.ix_(i, j + 1)] * (1 - fs) + values[np.ix_(i + 1, j + 1)] * fs  # noqa: B023
                return (low * (1 - ft) + high * ft).reshape(-1, 3)  # noqa: B023

            stop = start + ns * nt
            positions[start:stop], normals[start:stop] = blend(patch.vertices), blend(patch.normals)
        normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
        return positions, normals, owner

    def surface_points(self, faces: np.ndarray, uv: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the patch [N] and (s, t) [N, 2] of hits given as triangle [N] and barycentric (u, v) [N, 2].

        Args:
            faces: [N], triangles.
            uv: [N, 2], barycentric.
        """
        corners = self.face_st[faces]
        u, v = uv[:, :1], uv[:, 1:]
        return self.face_patch[faces], corners[:, 0] * (1 - u - v) + corners[:, 1] * u + corners[:, 2] * v

    def albedo(self, patch: np.ndarray, st: np.ndarray, footprint: np.ndarray) -> np.ndarray:
        """Returns texture colour, linear RGB float32 [N, 3].

        Args:
            patch: [N].
            st: place on the patch, [N, 2].
            footprint: width of the pixel on the surface, metres, [N]; chooses the mip level.
        """
        uv = np.where(self.swapped[patch][:, None], st[:, ::-1], st) * self.uv_scale[patch] + self.uv_offset[patch]
        wanted = np.log2(np.maximum(footprint / self.texel_metres[patch], 1e-3))
        texture, side = self.texture[patch], self.side[patch]
        level = np.clip(np.rint(wanted), 0, np.log2(side)).astype(np.int32)
        width = side >> level
        x = uv * width[:, None] - np.float32(0.5)
        x = np.where(self.stretched[patch][:, None], np.clip(x, 0, width[:, None] - 1), x)
        low = np.floor(x)
        fraction = (x - low).astype(np.float32)
        low = low.astype(np.int32)
        mask = (width - 1)[:, None]
        a, b = low & mask, (low + 1) & mask
        start = self.texture_offset[texture, level]
        row_a, row_b = start + a[:, 1] * width, start + b[:, 1] * width
        fx, fy = fraction[:, :1], fraction[:, 1:]
        bottom = self.texels[row_a + a[:, 0]] * (1 - fx) + self.texels[row_a + b[:, 0]] * fx
        top = self.texels[row_b + a[:, 0]] * (1 - fx) + self.texels[row_b + b[:, 0]] * fx
        return (bottom * (1 - fy) + top * fy) * self.tint[patch]

    def from_nodes(self, values: np.ndarray, patch: np.ndarray, st: np.ndarray) -> np.ndarray:
        """Looks per-node values up at places on patches, bilinearly.

        Args:
            values: [M, 3], one for each node.
            patch: [N].
            st: [N, 2], place on the patch.

        Returns:
            [N, 3].
        """
        count = self.nodes[patch]
        x = st.clip(0, 1) * (count - 1).astype(np.float32)
        low = np.minimum(x.astype(np.int32), count - 2)
        fs, ft = (x - low).astype(np.float32).T[..., None]
        index = self.node_start[patch] + low[:, 0].astype(np.int64) * count[:, 1] + low[:, 1]
        along = index + count[:, 1]
        near = values[index] * (1 - ft) + values[index + 1] * ft
        far = values[along] * (1 - ft) + values[along + 1] * ft
        return near * (1 - fs) + far * fs


class RayScene:
    """Open3D's ray caster over all or some of the triangles of a room.

    Args:
        scene: the room.
        keep: which patches take part, bool [P]; all by default.
    """

    def __init__(self, scene: PackedScene, keep: np.ndarray | None = None) -> None:
        from open3d import core
        from open3d.t.geometry import RaycastingScene  # pyright: ignore[reportMissingImports]

        faces = np.arange(len(scene.triangles)) if keep is None else np.flatnonzero(keep[scene.face_patch])
        self._faces = faces.astype(np.int32)
        self._tensor = core.Tensor
        # One thread builds the tree, so that ties between touching triangles fall the same way every time.
        self._scene = RaycastingScene(nthreads=1)
        self._scene.add_triangles(core.Tensor(scene.vertices), core.Tensor(scene.triangles[faces]))
        self.first_hit(np.zeros((1, 3), np.float32), np.array([[0.0, 0.0, 1.0]], np.float32))

    def _rays(self, origins: np.ndarray, directions: np.ndarray):
        rays = np.empty((len(directions), 6), np.float32)
        rays[:, :3], rays[:, 3:] = origins, directions
        return self._tensor(rays)

    def first_hit(self, origins: np.ndarray, directions: np.ndarray):
        """Casts rays; returns triangle [N] (-1: nothing hit), barycentric uv [N, 2], distance in ray lengths [N].

        Args:
            origins: [N, 3] or [1, 3], metres.
            directions: [N, 3], of any length.
        """
        hits = self._scene.cast_rays(self._rays(origins, directions), nthreads=0)
        faces = hits["primitive_ids"].numpy().astype(np.int64)
        missed = faces >= len(self._faces)
        faces = np.where(missed, -1, self._faces[np.where(missed, 0, faces)])
        return faces, hits["primitive_uvs"].numpy(), hits["t_hit"].numpy()

    def blocked(self, origins: np.ndarray, directions: np.ndarray, reach: float) -> np.ndarray:
        """Returns whether something lies between each origin and ``reach``, bool [N].

        Args:
            origins: [N, 3] or [1, 3], metres.
            directions: [N, 3], of any length.
            reach: In lengths of a ray's direction.
        """
        return self._scene.test_occlusions(self._rays(origins, directions), 0.0, reach, nthreads=0).numpy()
