"""Scenes in ScanNet++'s layout: prepared by the script of the documentation, then trained on and bundled."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plyfile import PlyData
from scannetpp_scenes import main, prepare_scene

from fit3d_ns.runs.bundling import bundle_run, choose_runs

FISHEYE = "OPENCV_FISHEYE 96 72 60 60 48 36 0.03 -0.01 0.002 -0.001"


@pytest.fixture
def scene_id(scene, tmp_path) -> Path:
    """The tiny room as ScanNet++ would store it: a COLMAP model as text, a fisheye lens, masks."""
    stored = json.loads((scene / "transforms.json").read_text())
    target = tmp_path / "data" / "0a5c013435"
    dslr = target / "dslr"
    for name in ("colmap", "resized_images", "resized_anon_masks"):
        (dslr / name).mkdir(parents=True)
    lines = []
    for number, frame in enumerate(stored["frames"], start=1):
        name = f"DSC{number:05d}"
        with Image.open(scene / frame["file_path"]) as photo:
            photo.convert("RGB").save(dslr / "resized_images" / f"{name}.JPG", format="JPEG")
        mask = np.full((72, 96), 255, np.uint8)
        mask[:, :32] = 0
        Image.fromarray(mask).save(dslr / "resized_anon_masks" / f"{name}.png")
        pose = np.array(frame["transform_matrix"]) * [1, -1, -1, 1]
        pose = np.linalg.inv(pose)
        w, x, y, z = _quaternion(pose[:3, :3])
        place = " ".join(f"{value:.9f}" for value in pose[:3, 3])
        lines += [f"{number} {w:.9f} {x:.9f} {y:.9f} {z:.9f} {place} 1 {name}.JPG", ""]
    points = PlyData.read(scene / "sparse_pc.ply")["vertex"]
    rows = [
        f"{i} {p['x']} {p['y']} {p['z']} {p['red']} {p['green']} {p['blue']} 0.5 1 0" for i, p in enumerate(points, 1)
    ]
    (dslr / "colmap" / "cameras.txt").write_text(f"# one camera\n1 {FISHEYE}\n")
    (dslr / "colmap" / "images.txt").write_text("\n".join(["# two lines a photo", *lines, ""]))
    (dslr / "colmap" / "points3D.txt").write_text("\n".join(["# points", *rows, ""]))
    return target


def _quaternion(rotation: np.ndarray) -> np.ndarray:
    """Unit quaternion, w first, of a rotation matrix."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_matrix(rotation).as_quat()
    return np.array([w, x, y, z])


def test_prepared_scenes_train_with_lens_masks_and_half_size(scene_id, make_config, make_trainer, tmp_path):
    (tmp_path / "list.txt").write_text(f"{scene_id.name}\n")
    main([str(scene_id.parent), "--scenes", str(tmp_path / "list.txt")])
    config = make_config(scene_id, steps=6)
    config.pipeline.datamanager.camera_res_scale_factor = 0.5
    config.pipeline.datamanager.dataparser.eval_mode = "interval"
    config.save_config()
    trainer = make_trainer(config)
    trainer.train()
    (run,), _ = choose_runs([tmp_path / "outputs"])
    bundle, _ = bundle_run(run, tmp_path / "bundle")
    photo = bundle.info.views[0].photo
    assert photo.lens is not None and photo.scale_factor == 0.5 and photo.height <= 36
    weights = bundle.read_patch_weights()
    assert len(weights) == len(bundle.info.views) and all(0 < float(weight.mean()) < 1 for weight in weights.values())


def test_cameras_see_the_seed_points_where_they_are(scene_id, scene):
    assert prepare_scene(scene_id) == 16
    prepared = json.loads((scene_id / "transforms.json").read_text())
    original = json.loads((scene / "transforms.json").read_text())
    assert (prepared["camera_model"], prepared["k4"]) == ("OPENCV_FISHEYE", -0.001)
    for ours, theirs in zip(prepared["frames"], original["frames"]):
        found = _from_camera(ours, scene_id / prepared["ply_file_path"])
        np.testing.assert_allclose(found, _from_camera(theirs, scene / "sparse_pc.ply"), atol=1e-4)
        assert (scene_id / ours["file_path"]).is_file() and (scene_id / ours["mask_path"]).is_file()


def _from_camera(frame: dict, points: Path) -> np.ndarray:
    """Points in the coordinates of a frame's camera, [N, 3]."""
    vertices = PlyData.read(points)["vertex"]
    homogeneous = np.stack([vertices["x"], vertices["y"], vertices["z"], np.ones(len(vertices))])
    return (np.linalg.inv(np.array(frame["transform_matrix"])) @ homogeneous)[:3].T


def test_what_is_missing_is_said(scene_id, capsys):
    (scene_id / "dslr" / "resized_anon_masks" / "DSC00003.png").unlink()
    (scene_id.parent / "empty").mkdir()
    with pytest.raises(SystemExit):
        main([str(scene_id.parent)])
    said = capsys.readouterr().err
    assert "has masks for 15 of 16 photos" in said and "empty/dslr/colmap holds no COLMAP model" in said
    assert "2 of 2 scenes could not be prepared: 0a5c013435, empty." in said
    assert not (scene_id / "transforms.json").exists()
