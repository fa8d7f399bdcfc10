"""PLY files as programs write them, and as they arrive damaged."""

import logging
import math

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement

from fit3d_ns.data.points.splat_ply import read_ply
from fit3d_ns.support.errors import UserError

ROWS = 50
BASE = ["x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2"]
SPLAT = [*BASE, "rot_0", "rot_1", "rot_2", "rot_3", *(f"f_rest_{number}" for number in range(9))]


def vertices(names=SPLAT, kind="f4", more=()):
    table = np.zeros(ROWS, [*((name, kind) for name in names), *more])
    generator = np.random.default_rng(0)
    for name in table.dtype.names or ():
        table[name] = (
            generator.integers(0, 200, ROWS) if table[name].dtype.kind in "iu" else generator.normal(size=ROWS)
        )
    return table


def write(path, table, text=False, byte_order="<", before=(), after=()):
    elements = [*before, PlyElement.describe(table, "vertex"), *after]
    PlyData(elements, text=text, byte_order="=" if text else byte_order).write(str(path))
    return path


def faces():
    table = np.array([([0, 1, 2],)], dtype=[("vertex_indices", "i4", (3,))])
    return PlyElement.describe(table, "face")


@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize(("text", "byte_order"), [(True, "="), (False, "<"), (False, ">")])
def test_every_encoding_and_order_of_columns_is_read(tmp_path, kind, text, byte_order):
    table = vertices([*SPLAT[::-1], "feat_0", "nx"], kind, [("state", "u1")])
    camera = PlyElement.describe(np.zeros(2, [("view_px", "f4")]), "camera")
    path = write(tmp_path / "a.ply", table, text, byte_order, before=[camera], after=[faces()])
    read = read_ply(path)
    assert all(tensor.dtype == torch.float32 and len(tensor) == ROWS for tensor in read.values())
    assert np.allclose(read["means"], np.stack([table[name] for name in "xyz"], 1), atol=1e-6)
    assert np.allclose(read["quats"][:, 3], table["rot_3"], atol=1e-6)
    # All red coefficients first, then all green, then all blue.
    assert np.allclose(read["features_rest"][:, 1, 2], table["f_rest_7"], atol=1e-6)


def test_2d_gaussians_become_flat_ones(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    table = vertices([name for name in SPLAT if name != "scale_2"])
    scales = read_ply(write(tmp_path / "a.ply", table))["scales"]
    assert np.allclose(scales[:, :2], np.stack([table["scale_0"], table["scale_1"]], 1))
    assert torch.allclose(scales[:, 2], scales[:, :2].min(1).values + math.log(0.01))
    assert "holds 2D Gaussians (2DGS)" in caplog.text


PACKED = [(f"packed_{name}", "u4") for name in ("position", "rotation", "scale", "color")]
RGB = [(name, "u1") for name in ("red", "green", "blue")]
OTHERS = {
    "supersplat": (vertices([], more=PACKED), {}, "a.ply is a compressed PLY of SuperSplat: .* uncompressed"),
    "rgb": (vertices([name for name in SPLAT if name[0] != "f"], more=RGB), {}, "with --ply-color-mode sh_coeffs"),
    "points": (vertices(["x", "y", "z"], more=RGB), {}, "a.ply is a point cloud, no file of Gaussians: export one"),
    "mesh": (vertices(["x", "y", "z"]), {"after": [faces()]}, "a.ply is a mesh, no file of Gaussians"),
    "no rotation": (vertices(SPLAT[:12]), {}, "lacks the columns rot_2, rot_3: it is no whole file of Gaussians"),
    "neither scale": (
        vertices([n for n in SPLAT if n[:6] != "scale_"]),
        {},
        "lacks the columns scale_0, scale_1, scale_2",
    ),
    "degree": (vertices([*SPLAT[:-1]]), {}, "has 8 f_rest columns, which is no whole degree"),
    "empty": (vertices()[:0], {}, "a.ply holds no Gaussians"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_layouts_are_called_by_their_name(tmp_path, kind):
    table, more, sentence = OTHERS[kind]
    with pytest.raises(UserError, match=sentence) as caught:
        read_ply(write(tmp_path / "a.ply", table, **more))
    assert "\n" not in str(caught.value)


def test_a_file_without_vertices(tmp_path):
    PlyData([faces()]).write(str(tmp_path / "a.ply"))
    with pytest.raises(UserError, match="a.ply is a mesh, no file of Gaussians"):
        read_ply(tmp_path / "a.ply")


def replaced(old, new):
    return lambda data: data.replace(old, new, 1)


DAMAGES = {
    "cut": lambda data: data[:-40],
    "cut header": lambda data: data[:60],
    "only magic": lambda data: data[:4],
    "count": replaced(b"vertex 50", b"vertex 4000000000"),
    "negative": replaced(b"vertex 50", b"vertex -5"),
    "huge": replaced(b"vertex 50", b"vertex 99999999999999999999999999"),
    "no number": replaced(b"vertex 50", b"vertex many"),
    "no words": replaced(b"element vertex 50", b"element"),
    "type": replaced(b"property float x", b"property quad x"),
    "twice": replaced(b"property float y", b"property float x"),
    "format": replaced(b"format ", b"format odd_"),
    "bytes": replaced(b"property float y", b"property float \xff"),
}


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_ends_in_one_sentence(tmp_path, damage, text):
    path = write(tmp_path / "a.ply", vertices(), text)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(
        UserError, match=r"a\.ply (cannot be read \(it(s header)? is damaged: |holds no Gaussians)"
    ) as caught:
        read_ply(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"no", b"\x89PNG\r\n\x1a\n" + bytes(50), b"solid teapot\n"])
def test_what_is_no_ply_file_is_called_so(tmp_path, content):
    (tmp_path / "a.ply").write_bytes(content)
    with pytest.raises(UserError, match=r"a.ply cannot be read \(it is no PLY file\): check --ply"):
        read_ply(tmp_path / "a.ply")


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "b.ply", tmp_path):
        with pytest.raises(UserError, match="cannot be read .*: check --ply"):
            read_ply(path)


def test_rotations_of_no_length_are_counted(tmp_path):
    rows = vertices()
    for name in ("rot_0", "rot_1", "rot_2", "rot_3"):
        rows[name][:7] = 0
    write(tmp_path / "a.ply", rows)
    with pytest.raises(UserError, match=r"7 of \d+ Gaussians in .*a.ply have a rotation of no length"):
        read_ply(tmp_path / "a.ply")


@pytest.mark.parametrize(("lowest", "highest", "said"), [(0.01, 1.0, True), (-3.0, 1.0, False), (0.0, 4.0, False)])
def test_opacities_that_are_no_logits_are_said(tmp_path, caplog, lowest, highest, said):
    rows = np.concatenate([vertices()] * 10)
    rows["opacity"] = np.linspace(lowest, highest, len(rows))
    write(tmp_path / "a.ply", rows)
    read = read_ply(tmp_path / "a.ply")
    assert any("all lie from 0 to 1" in record.getMessage() for record in caplog.records) == said
    assert torch.equal(read["opacities"][:, 0], torch.from_numpy(rows["opacity"]))
