"""Whatever a scene's points are, every Gaussian that is made of them is finite and has a size."""

from typing import Any

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement
from scene_formats import as_colmap, edit, read, write_format

from fit3d_ns.data.points.seed_points import FEWEST, read_point_cloud, sift
from fit3d_ns.support.errors import UserError

GENERATOR = np.random.default_rng(0)
GOOD = GENERATOR.uniform(-1, 1, (60, 3)).astype(np.float32)


def with_rows(*rows):
    return np.concatenate([GOOD, np.array(rows, dtype=np.float32).reshape(-1, 3)])


POINTS = {
    "good": (GOOD, 0),
    "one NaN": (with_rows([np.nan, 0, 0]), 1),
    "all kinds of infinite": (with_rows([np.inf, 0, 0], [0, -np.inf, 0], [np.nan] * 3), 3),
    "two at one place": (with_rows(GOOD[3]), 0),
    "four at one place": (with_rows(*[GOOD[3]] * 3), 3),
    "a hundred at one place": (with_rows(*[[0.5, 0.5, 0.5]] * 100), 99),
    "each four times": (np.repeat(GOOD, 4, axis=0), 180),
    "far": (with_rows([1e9, 0, 0], [0, 0, -1e30]), 2),
    "at the edge of float32": (with_rows([3e38, 3e38, 3e38], [-3e38, 0, 0]), 2),
    "distant but there": (with_rows([1e4, 0, 0], [0, 2e4, 0]), 0),
    "smaller than float32 can square": (with_rows(*(1e-30 * GOOD[:20])), None),
    "smallest": (np.arange(30, dtype=np.float32).reshape(10, 3) * 1e-45, None),
    "a few close to each other far from the origin": (1000 + 1e-4 * GOOD[:5], None),
    "in a line": (np.linspace(0, 1, 30, dtype=np.float32)[:, None] * np.ones((1, 3), np.float32), 0),
    "four": (GOOD[:4], 0),
    "three": (GOOD[:3], "3 usable points are too few"),
    "one": (GOOD[:1], "1 usable points are too few"),
    "none": (GOOD[:0], "there are no points"),
    "all NaN": (np.full((50, 3), np.nan, np.float32), "0 usable points are too few (50 not finite)"),
    "all at one place": (np.ones((50, 3), np.float32), "1 usable points are too few (49 at the place of another)"),
    "three places": (np.repeat(GOOD[:3], 20, axis=0), "3 usable points are too few"),
}


@pytest.mark.parametrize("colors", [True, False])
@pytest.mark.parametrize("kind", POINTS)
def test_what_is_left_can_be_initialised(kind, colors):
    positions, expected = POINTS[kind]
    ids = np.arange(len(positions) * 3).reshape(-1, 3).astype(np.uint8) if colors else np.zeros((0, 3), np.uint8)
    result = sift(torch.from_numpy(positions.copy()), torch.from_numpy(ids), 1.0, "a.ply")
    if isinstance(expected, str):
        assert result.positions is None and result.colors is None
        assert result.remark is not None and result.remark.startswith("a.ply: ") and expected in result.remark
        return
    if result.positions is None:
        assert expected is None and result.remark is not None and "too few" in result.remark
        return
    assert result.colors is not None
    left = result.positions.numpy()
    if expected is not None:
        dropped = len(positions) - len(left)
        assert dropped == expected
        assert (result.remark is None) == (dropped == 0)
        if dropped:
            assert result.remark is not None
            assert f"{dropped} of {len(positions)} seed points are left out" in result.remark
    # What remains are points of the file with their colours, in order, and every place is still there.
    found = [np.flatnonzero((positions == row).all(axis=1)) for row in left]
    assert all(len(rows) for rows in found)
    if colors:
        assert all((ids[rows] == color).all(axis=1).any() for rows, color in zip(found, result.colors.numpy()))
    else:
        assert result.colors.shape == (0, 3)
    assert_gaussians_are_sound(result.positions, result.colors)


def assert_gaussians_are_sound(positions: Any, colors: Any):
    """Initialises splatfacto."""
    from nerfstudio.data.scene_box import SceneBox
    from nerfstudio.models.splatfacto import SplatfactoModelConfig

    from fit3d_ns.compat import lazy_lpips, splatfacto_on

    assert len(positions) >= FEWEST
    with lazy_lpips(), splatfacto_on(torch.device("cpu")):
        model = SplatfactoModelConfig().setup(
            scene_box=SceneBox(torch.tensor([[-1.0] * 3, [1.0] * 3])),
            num_train_data=3,
            metadata={},
            device="cpu",
            seed_points=(positions, colors),
        )
    for name, parameter in model.gauss_params.items():
        assert torch.isfinite(parameter).all(), name
    scales = model.gauss_params["scales"].exp()
    assert (scales > 0).all() and torch.isfinite(scales.square()).all()
    assert model.gauss_params["features_dc"].shape == (len(positions), 3)


def test_colours_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="a.ply has 60 points but 7 colours"):
        sift(torch.from_numpy(GOOD), torch.zeros(7, 3, dtype=torch.uint8), 1.0, "a.ply")


def ply(path, positions, colors: Any = None, text=False, dtype="f4"):
    columns = [(axis, dtype) for axis in "xyz"]
    if colors is not None:
        columns += [(name, colors.dtype.str) for name in ("red", "green", "blue")]
    rows = np.zeros(len(positions), columns)
    for index, axis in enumerate("xyz"):
        rows[axis] = positions[:, index]
    if colors is not None:
        for index, name in enumerate(("red", "green", "blue")):
            rows[name] = colors[:, index]
    PlyData([PlyElement.describe(rows, "vertex")], text=text).write(path)
    return path


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_point_clouds_are_read_in_double_precision(tmp_path, dtype, text):
    positions = 5e6 + GENERATOR.uniform(0, 1, (20, 3))
    colors = GENERATOR.integers(0, 256, (20, 3)).astype(np.uint8)
    read_positions, read_colors = read_point_cloud(ply(tmp_path / "a.ply", positions, colors, text, dtype))
    np.testing.assert_allclose(read_positions, positions, atol=0.5 if dtype == "f4" else 1e-9)
    assert np.array_equal(read_colors, colors)
    assert read_point_cloud(ply(tmp_path / "a.ply", positions))[1].shape == (0, 3)
    for other in (colors.astype(np.uint16), colors / np.float32(255), colors / 255.0):
        assert np.array_equal(read_point_cloud(ply(tmp_path / "a.ply", positions, other))[1], colors)


DAMAGE = {
    "empty": lambda data: b"",
    "text": lambda data: b"no points at all\n",
    "cut in the header": lambda data: data[:40],
    "cut in the data": lambda data: data[:-7],
    "half": lambda data: data[: len(data) // 2],
    "a flipped bit of the header": lambda data: data.replace(b"vertex", b"vertez"),
    "no x": lambda data: data.replace(b" x\n", b" q\n"),
    "four billion points": lambda data: data.replace(b"vertex 20", b"vertex 4000000000"),
    "more than memory holds": lambda data: data.replace(b"vertex 20", b"vertex 1000000000000000"),
    "noise": lambda data: bytes(GENERATOR.integers(0, 256, 500).astype(np.uint8)),
    "no UTF-8": lambda data: b"\xff\xfe" + data,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_point_cloud_is_named(tmp_path, damage):
    path = ply(tmp_path / "a.ply", GOOD[:20])
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(
        UserError, match=r"seed points .*a.ply cannot be read \(.+\): .*--load-3D-points False"
    ) as caught:
        read_point_cloud(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["nothing", "folder", "damaged"])
@pytest.mark.parametrize("kind", ["nerfstudio", "blender", "colmap"])
def test_named_points_that_cannot_be_read_are_an_error_unless_nobody_wants_them(scene, tmp_path, kind, place):
    data = tmp_path / "data"
    as_colmap(scene, data) if kind == "colmap" else write_format(scene, kind, data)
    path = data / "sparse/0/points3D.txt" if kind == "colmap" else data / "sparse_pc.ply"
    if place == "damaged":
        path.write_bytes(b"1 2 nothing")
    else:
        path.unlink()
        if place == "folder" and kind != "nerfstudio":
            path.mkdir()
    with pytest.raises(
        UserError, match=r"seed points .*(sparse_pc.ply|points3D).* cannot be read.*(--load|--ply-path)"
    ):
        read(kind, data)
    unwanted: dict[str, Any] = {"ply_path": None} if kind == "blender" else {"load_3D_points": False}
    assert "points3D_xyz" not in read(kind, data, **unwanted).metadata
    # Held-out views, and commands that read a trained run, ask for no points.
    assert "points3D_xyz" not in read(kind, data, "val").metadata
    assert "points3D_xyz" not in read(kind, data, seeds=False).metadata


@pytest.mark.parametrize("kind", ["nerfstudio", "blender", "colmap"])
def test_bad_points_of_a_scene_are_left_out_and_counted(scene, tmp_path, kind, caplog):
    rows = PlyData.read(scene / "sparse_pc.ply")["vertex"].data.copy()
    rows["x"][5] = np.nan
    PlyData([PlyElement.describe(rows, "vertex")]).write(scene / "sparse_pc.ply")
    data = tmp_path / "data"
    as_colmap(scene, data) if kind == "colmap" else write_format(scene, kind, data)
    metadata = read(kind, data).metadata
    assert len(metadata["points3D_xyz"]) == len(rows) - 1 == len(metadata["points3D_rgb"])
    assert torch.isfinite(metadata["points3D_xyz"]).all()
    assert f"1 of {len(rows)} seed points are left out (1 not finite)" in caplog.text


def test_too_few_points_start_at_random_with_file_and_reason(scene, make_config, make_trainer, caplog):
    ply(scene / "sparse_pc.ply", GOOD[:2])
    trainer = make_trainer(make_config(scene, num_random=200))
    assert trainer.pipeline.model.num_points == 200
    said = f"No seed points ({scene}/sparse_pc.ply: 2 usable points are too few): 200 Gaussians start at random"
    assert said in caplog.text


def test_points_of_a_scene_that_was_processed_long_ago_are_taken_without_a_question(scene, tmp_path):
    """ns-process-data wrote no PLY file once; nerfstudio asks on the terminal whether it may convert the points."""
    colmap = as_colmap(scene, tmp_path / "colmap")
    applied = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1.0]])

    def change(content):
        content.pop("ply_file_path")
        for frame in content["frames"]:
            frame["transform_matrix"] = (applied @ frame["transform_matrix"]).tolist()

    before = read("nerfstudio", scene)
    edit(scene / "transforms.json", change)
    (scene / "colmap" / "sparse").mkdir(parents=True)
    (colmap / "sparse" / "0").rename(scene / "colmap" / "sparse" / "0")
    stored = (scene / "transforms.json").read_bytes()
    after = read("nerfstudio", scene)
    assert (scene / "transforms.json").read_bytes() == stored

    def distances(outputs):
        positions = outputs.cameras.camera_to_worlds[:, :3, 3]
        return torch.cdist(positions, outputs.metadata["points3D_xyz"]) / outputs.dataparser_scale

    torch.testing.assert_close(distances(after), distances(before), atol=1e-5, rtol=0)
    (scene / "colmap/sparse/0/points3D.txt").unlink()
    assert "points3D_xyz" not in read("nerfstudio", scene).metadata
