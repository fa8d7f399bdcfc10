"""Poses as training reads them: judged together, in double precision, wherever the origin of a scene lies."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from plyfile import PlyData, PlyElement
from scene_formats import FORMATS, as_colmap, edit, read, transforms, write_format

from fit3d_ns.runs.coordinates import Coordinates, read_coordinates
from fit3d_ns.support.errors import UserError

UTM = np.array([4.5e5, 5.4e6, 120.0])
ODD = 5


def move(scene, place):
    """Moves a scene in nerfstudio's format, its seed points in double precision too."""

    def change(content):
        for frame in content["frames"]:
            for row, value in zip(frame["transform_matrix"], place):
                row[3] += value

    edit(scene / "transforms.json", change)
    rows = PlyData.read(scene / "sparse_pc.ply")["vertex"].data
    moved = np.zeros(len(rows), [(name, "f8" if name in "xyz" else "u1") for name in rows.dtype.names])
    for name in rows.dtype.names:
        moved[name] = rows[name]
    for axis, value in zip("xyz", place):
        moved[axis] += value
    PlyData([PlyElement.describe(moved, "vertex")]).write(scene / "sparse_pc.ply")


@pytest.mark.parametrize("center", ["poses", "focus"])
@pytest.mark.parametrize("kind", ["nerfstudio", "scannetpp", "colmap"])
def test_a_scene_far_from_the_origin_is_trained_like_any_other(scene, tmp_path, kind, center):
    def written(name):
        data = tmp_path / name
        as_colmap(scene, data) if kind == "colmap" else write_format(scene, kind, data)
        return read(kind, data, center_method=center)

    near = written("near")
    original = np.array([frame["transform_matrix"] for frame in transforms(scene / "transforms.json")["frames"]])
    move(scene, UTM)
    far = written("far")
    assert [path.name for path in far.image_filenames] == [path.name for path in near.image_filenames]
    torch.testing.assert_close(far.cameras.camera_to_worlds, near.cameras.camera_to_worlds, atol=2e-6, rtol=0)
    assert abs(far.dataparser_scale / near.dataparser_scale - 1) < 1e-5
    if kind != "scannetpp":
        torch.testing.assert_close(far.metadata["points3D_xyz"], near.metadata["points3D_xyz"], atol=1e-5, rtol=0)
    # The transform leads from the coordinates of the files to those of the training, to a fraction of a millimetre.
    names = [frame["file_path"].split("/")[-1] for frame in transforms(scene / "transforms.json")["frames"]]
    positions = original[[names.index(path.name) for path in far.image_filenames], :3, 3] + UTM
    transform = Coordinates.of(far)
    placed = transform.scale * (positions @ transform.transform[:, :3].T + transform.transform[:, 3])
    np.testing.assert_allclose(placed, far.cameras.camera_to_worlds[:, :3, 3].numpy(), atol=1e-5)
    back = far.transform_poses_to_original_space(far.cameras.camera_to_worlds, "opengl")
    np.testing.assert_allclose(back[:, :3, 3].numpy(), positions, atol=1e-5)
    # As a run notes it.
    far.save_dataparser_transform(tmp_path / "run" / "dataparser_transforms.json")
    stored = read_coordinates(tmp_path / "run")
    assert (
        stored is not None and stored.agrees_with(transform) and np.array_equal(stored.transform, transform.transform)
    )
    assert not stored.agrees_with(Coordinates.of(near))


@pytest.mark.parametrize("kind", ["instant_ngp", "blender", "nerfstudio"])
def test_where_nothing_is_centred_only_the_unusable_is_moved(scene, tmp_path, kind, caplog):
    fields: dict[str, Any] = {} if kind != "nerfstudio" else {"center_method": "none", "orientation_method": "none"}

    def written(name):
        path = write_format(scene, kind, tmp_path / name)
        return read(kind, path.parent, **fields)

    near = written("near")
    assert "far from the origin" not in caplog.text
    scale = near.dataparser_scale
    for distance in (100.0, 1e6):
        move(scene, (distance, 0, 0))
        far = written(f"far-{distance}")
        said = "far from the origin" in caplog.text
        caplog.clear()
        assert said == (distance == 1e6)
        shift = torch.tensor([scale * (distance if not said else 0), 0, 0])
        moved = far.cameras.camera_to_worlds[:, :3, 3] - near.cameras.camera_to_worlds[:, :3, 3]
        if kind != "nerfstudio":  # which scales by the largest coordinate
            assert (moved - moved[0]).abs().max() < 1e-4 * (1 + float(shift[0]))
            assert said or torch.allclose(moved[0], shift, atol=1e-3)
        move(scene, (-distance, 0, 0))
    # Training and held-out views of one scene are moved alike.
    place = np.array(transforms(scene / "transforms.json")["frames"][0]["transform_matrix"])[:3, 3] + [1e6, 0, 0]
    placed = Coordinates.of(far)
    assert np.abs(placed.scale * (placed.transform[:, :3] @ place + placed.transform[:, 3])).max() < 10


def test_both_splits_of_a_far_scene_have_one_origin(scene, tmp_path):
    move(scene, UTM)
    for kind in FORMATS:
        path = write_format(scene, kind, tmp_path / kind)
        data = tmp_path / kind if kind in ("blender", "scannetpp") else path.parent
        train, held_out = read(kind, data), read(kind, data, "val")
        assert len(held_out.image_filenames) > 0
        assert torch.equal(train.dataparser_transform, held_out.dataparser_transform)


CHANGES = {
    "mirrored": (lambda matrix: matrix @ np.diag([-1, 1, 1, 1]), "mirrored"),
    "sheared": (lambda matrix: matrix @ np.diag([1, 1.1, 1, 1]), "no rotation"),
    "infinite": (lambda matrix: matrix + np.inf, "not finite"),
    "transposed": (lambda matrix: matrix.T, "ends with the row"),
    "two rows": (lambda matrix: matrix[:2], "3x4 or 4x4"),
    "scaled": (lambda matrix: matrix @ np.diag([2, 2, 2, 1]), "is scaled by 2"),
    "far": (lambda matrix: matrix + np.pad([[1e5]], ((0, 3), (3, 0))), "as far from the others"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_no_pose_is_refused_by_frame_in_every_format(scene, tmp_path, kind, change):
    path = write_format(scene, kind, tmp_path / "data")
    damage, said = CHANGES[change]

    def apply(content):
        frame = content["frames"][ODD]
        frame["transform_matrix"] = damage(np.array(frame["transform_matrix"])).tolist()

    edit(path, apply)
    name = transforms(path)["frames"][ODD]["file_path"]
    with pytest.raises(UserError, match=said) as caught:
        read(kind, tmp_path / "data")
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_can_be_mended_is_mended_with_a_remark(scene, tmp_path, kind, caplog):
    before = read(kind, write_format(scene, kind, tmp_path / "before") and tmp_path / "before")

    def change(content):
        for frame in content["frames"]:
            matrix = np.array(frame["transform_matrix"]) @ np.diag([2, 2, 2, 1])
            frame["transform_matrix"] = matrix[:3].tolist()

    edit(scene / "transforms.json", change)
    write_format(scene, kind, tmp_path / "after")
    after = read(kind, tmp_path / "after")
    torch.testing.assert_close(before.cameras.camera_to_worlds, after.cameras.camera_to_worlds, atol=1e-6, rtol=0)
    assert caplog.text.count("are scaled by 2, which is divided out") == 1


@pytest.mark.parametrize("kind", [*FORMATS, "colmap"])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 3), (4.5e5, 5.4e6, 120.0)])
def test_views_at_one_place_are_refused_in_every_format(scene, tmp_path, kind, place):
    def change(content):
        for frame in content["frames"]:
            for row, value in zip(frame["transform_matrix"], place):
                row[3] = value

    edit(scene / "transforms.json", change)
    if kind == "colmap":
        as_colmap(scene, tmp_path / "data")
    else:
        write_format(scene, kind, tmp_path / "data")
    with pytest.raises(UserError, match="All 16 views of .* were taken at one place"):
        read(kind, tmp_path / "data")


def test_coordinates_of_a_run_that_are_damaged_or_others(tmp_path, caplog):
    path = tmp_path / "dataparser_transforms.json"
    assert read_coordinates(tmp_path) is None and f"{path} is missing: how the run's coordinates" in caplog.text
    good = {"transform": np.eye(4)[:3].tolist(), "scale": 0.5}
    text = json.dumps(good)
    damaged = [*(text[:length] for length in range(0, len(text), 7)), "null", "[]", "7", "[" * 100000]
    damaged += [json.dumps({**good, key: value}) for key in good for value in (None, [], "a", float("nan"), [[1]])]
    damaged += [json.dumps({**good, "scale": value}) for value in (0, -1)]
    for content in damaged:
        path.write_text(content)
        with pytest.raises(UserError, match=r"dataparser_transforms.json is damaged \(.*\): restore it") as caught:
            read_coordinates(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_text(text)
    stored = read_coordinates(tmp_path)
    assert stored is not None
    for change, same in (
        (lambda matrix, scale: (matrix, scale * 1.00001), True),
        (lambda matrix, scale: (matrix, scale * 1.001), False),
        (lambda matrix, scale: (matrix + 1e-5, scale), True),
        (lambda matrix, scale: (np.roll(matrix, 1, axis=0), scale), False),
        (lambda matrix, scale: (matrix + np.pad([[0.01]], ((0, 2), (3, 0))), scale), False),
    ):
        assert stored.agrees_with(Coordinates(*change(stored.transform, stored.scale))) == same


def test_a_run_with_a_torn_note_of_its_coordinates_is_refused_in_one_sentence(feature_run, make_config, make_trainer):
    trainer = feature_run(steps=2)
    path = trainer.base_dir / "dataparser_transforms.json"
    path.write_text(path.read_text()[:40])
    config = make_config(trainer.config.pipeline.datamanager.data, steps=4)
    config.pipeline.datamanager.dataparser = trainer.config.pipeline.datamanager.dataparser
    config.load_dir = trainer.checkpoint_dir
    with pytest.raises(UserError, match="dataparser_transforms.json is damaged"):
        make_trainer(config)
    config.load_dir, config.pipeline.model.init_from = None, trainer.base_dir
    with pytest.raises(UserError, match="dataparser_transforms.json is damaged"):
        make_trainer(config)
