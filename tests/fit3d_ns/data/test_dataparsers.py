"""nerfstudio's dataparsers heed all that a scene says of its cameras, or the scene is refused."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE, CameraType
from scene_formats import FORMATS, as_colmap, edit, parser_config, read, transforms, write_format

from benchmarks.faults.kinds import NotApplicable
from benchmarks.faults.mutations import apply, mutations_of
from fit3d_ns.data.photos.lenses import lenses_of
from fit3d_ns.support.errors import UserError

FIELDS = ("fx", "fy", "cx", "cy", "width", "height", "distortion_params", "camera_type")
ODD = 5
"""Index of the frame that says something itself."""


def assert_same(ours: Any, theirs: Any):
    assert ours.image_filenames == theirs.image_filenames
    assert ours.dataparser_scale == theirs.dataparser_scale
    assert torch.equal(ours.dataparser_transform, theirs.dataparser_transform)
    for name in ("camera_to_worlds", *FIELDS):
        left, right = getattr(ours.cameras, name), getattr(theirs.cameras, name)
        assert torch.equal(left, right), name
    for name in ("points3D_xyz", "points3D_rgb"):
        assert (name in ours.metadata) == (name in theirs.metadata)
        if name in ours.metadata:
            assert torch.equal(ours.metadata[name], theirs.metadata[name]), name


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", ["nerfstudio", "instant_ngp", "scannetpp", "colmap"])
def test_an_ordinary_scene_is_read_to_the_last_bit_as_nerfstudio_reads_it(scene, tmp_path, kind, split):
    data = tmp_path / "data"
    as_colmap(scene, data) if kind == "colmap" else write_format(scene, kind, data)
    fields: dict[str, Any] = {"train_split_fraction": 0.7} if kind == "instant_ngp" else {}
    theirs = parser_config(kind, data, **fields).setup().get_dataparser_outputs(split)
    if split == "val":  # points are of use for training only
        theirs.metadata = {}
    assert_same(read(kind, data, split, **fields), theirs)


def test_a_synthetic_scene_is_read_as_nerfstudio_reads_it(scene, tmp_path):
    write_format(scene, "blender", tmp_path / "data")
    ours = read("blender", tmp_path / "data")
    theirs = parser_config("blender", tmp_path / "data").setup().get_dataparser_outputs("train")
    theirs.cameras.distortion_params = torch.zeros(12, 6)  # nerfstudio leaves them out, and has float64 below
    theirs.cameras.fx, theirs.cameras.fy = theirs.cameras.fx.float(), theirs.cameras.fy.float()
    assert_same(ours, theirs)


FISHEYE = CAMERA_MODEL_TO_TYPE["OPENCV_FISHEYE"].value
OWN = {
    "fl_x": (50.0, "fx", 50.0),
    "fl_y": (51.0, "fy", 51.0),
    "x_fov": (90.0, "fx", 48.0),
    "y_fov": (90.0, "fy", 36.0),
    "camera_angle_x": (np.pi / 2, "fx", 48.0),
    "camera_angle_y": (np.pi / 2, "fy", 36.0),
    "cx": (40.5, "cx", 40.5),
    "cy": (30.5, "cy", 30.5),
    "w": (90, "width", 90),
    "h": (70, "height", 70),
    "camera_model": ("OPENCV_FISHEYE", "camera_type", FISHEYE),
    "is_fisheye": (True, "camera_type", FISHEYE),
    "distortion_params": ([0.1, 0.2, 0, 0, 0, 0], "distortion_params", [0.1, 0.2, 0, 0, 0, 0]),
    "k1": (0.1, "distortion_params", [0.1, 0, 0, 0, 0, 0]),
    "k2": (0.1, "distortion_params", [0, 0.1, 0, 0, 0, 0]),
    "k3": (0.1, "distortion_params", [0, 0, 0.1, 0, 0, 0]),
    "p1": (0.1, "distortion_params", [0, 0, 0, 0, 0.1, 0]),
    "p2": (0.1, "distortion_params", [0, 0, 0, 0, 0, 0.1]),
}


@pytest.mark.parametrize("key", OWN)
@pytest.mark.parametrize("kind", FORMATS)
def test_each_key_in_one_frame_is_heeded_by_every_reader(scene, tmp_path, kind, key):
    edit(scene / "transforms.json", lambda content: content.pop("camera_model"))
    path = write_format(scene, kind, tmp_path / "data")
    before = read(kind, tmp_path / "data")
    value, field, expected = OWN[key]
    edit(path, lambda content: content["frames"][ODD].update({key: value}))
    name = Path(transforms(path)["frames"][ODD]["file_path"]).stem
    after = read(kind, tmp_path / "data")
    odd = [path.stem for path in after.image_filenames].index(name)
    for other in FIELDS:
        changed = (getattr(before.cameras, other) != getattr(after.cameras, other)).any(dim=1)
        if other == field:
            assert changed.nonzero().tolist() == [[odd]]
            np.testing.assert_allclose(getattr(after.cameras, other)[odd].numpy().squeeze(), expected, rtol=1e-6)
        elif not (kind == "blender" and key in ("fl_x", "x_fov", "camera_angle_x", "w", "h")):
            # (There, one angle and the photo's size give all of them.)
            assert not changed.any(), other


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("key, value", [("k4", 0.1), ("k5", 0.1), ("fl_x", 0), ("camera_model", "EQUIRECTANGULAR")])
def test_what_cannot_be_heeded_is_refused_by_frame_and_key(scene, tmp_path, kind, key, value):
    path = write_format(scene, kind, tmp_path / "data")
    edit(path, lambda content: content["frames"][ODD].update({key: value}))
    name = transforms(path)["frames"][ODD]["file_path"]
    with pytest.raises(UserError, match=f"{key} of {name} in ") as caught:
        read(kind, tmp_path / "data")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model, values",
    [
        ("OPENCV", {"p1": 7}),
        ("OPENCV", {"p2": 7}),
        ("OPENCV", {"p1": -1e12}),
        ("OPENCV", {"k1": 1e12}),
        ("OPENCV_FISHEYE", {"k1": 1e12}),
        ("OPENCV_FISHEYE", {"k1": 1e30, "k2": -1e30}),
    ],
)
def test_coefficients_that_leave_nothing_of_a_photo_are_refused(scene, model, values):
    edit(scene / "transforms.json", lambda content: content.update(values, camera_model=model))
    with pytest.raises(UserError, match=r"camera of \S*frame_0000\d.png .*leave nothing of the photo.*: mend them"):
        read("nerfstudio", scene)


@pytest.mark.parametrize("k1, k2", [(0.3, 0.1), (-0.4, 0.1), (1.2, 0.5)])
def test_strong_lenses_are_not(scene, k1, k2):
    edit(scene / "transforms.json", lambda content: content.update(k1=k1, k2=k2, p1=0.01, p2=-0.01))
    assert lenses_of(read("nerfstudio", scene).cameras)[0] is not None


@pytest.mark.parametrize("model", CAMERA_MODEL_TO_TYPE)
def test_every_camera_type_is_undistorted_by_its_own_model_or_refused(scene, model):
    def change(content):
        for key in ("k1", "k2", "p1", "p2"):
            content.pop(key)
        content["camera_model"] = model
        if model == "FISHEYE624":
            content.update(distortion_params=[0.0] * 12, fisheye_crop_radius=30)

    edit(scene / "transforms.json", change)
    kind = CAMERA_MODEL_TO_TYPE[model]
    if kind not in (CameraType.PERSPECTIVE, CameraType.FISHEYE, CameraType.FISHEYE624):
        with pytest.raises(UserError, match=f'camera_model of .* is "{model}".*undistort the photos first'):
            read("nerfstudio", scene)
        return
    outputs = read("nerfstudio", scene)
    assert (outputs.cameras.camera_type == kind.value).all()
    lens = lenses_of(outputs.cameras)[0]
    if kind == CameraType.PERSPECTIVE:
        assert lens is None
    else:
        assert lens is not None and lens.camera_type == kind.value
        assert lens.fisheye_crop_radius == (30 if model == "FISHEYE624" else None)


def test_models_that_cannot_stand_together_are_refused(scene):
    def change(content):
        for key in ("k1", "k2", "p1", "p2"):
            content.pop(key)
        fisheye = {"camera_model": "FISHEYE624", "distortion_params": [0.0] * 12, "fisheye_crop_radius": 30}
        content["frames"][ODD].update(fisheye)

    edit(scene / "transforms.json", change)
    with pytest.raises(UserError, match="mixes FISHEYE624 cameras with others"):
        read("nerfstudio", scene)


def test_smaller_photos_have_smaller_lenses(scene):
    from PIL import Image

    (scene / "images_2").mkdir()
    for path in (scene / "images").iterdir():
        with Image.open(path) as photo:
            photo.resize((48, 36)).save(scene / "images_2" / path.name)
    edit(
        scene / "transforms.json",
        lambda content: content["frames"][ODD].update(fl_x=50.0, camera_model="OPENCV_FISHEYE"),
    )
    whole, half = read("nerfstudio", scene), read("nerfstudio", scene, downscale_factor=2)
    assert half.image_filenames[0].parent.name == "images_2"
    for name in ("fx", "fy", "cx", "cy", "width", "height"):
        assert torch.equal(getattr(half.cameras, name) * 2, getattr(whole.cameras, name))
    assert half.cameras.fx.unique().numel() == 2 == half.cameras.camera_type.unique().numel()


def test_other_dataparsers_are_judged_by_what_they_give(scene):
    from nerfstudio.data.dataparsers.base_dataparser import DataParser

    from fit3d_ns.data.dataparsers import read_checked

    given = read("nerfstudio", scene)

    class Other(DataParser):
        def _generate_dataparser_outputs(self, split="train", **_):
            return given

    def outputs():
        return read_checked(Other(parser_config("nerfstudio", scene)), True).get_dataparser_outputs("train")

    assert outputs().cameras is given.cameras
    for kind in CameraType:
        given.cameras.camera_type[ODD] = kind.value
        if kind in (CameraType.PERSPECTIVE, CameraType.FISHEYE):
            outputs()
            continue
        said = f"{given.image_filenames[ODD].name}.*type {kind.name}"
        if kind == CameraType.FISHEYE624:
            said = "camera in .* cannot be undistorted .distortion has 6 numbers instead of 12.: mend"
        with pytest.raises(UserError, match=said):
            outputs()
    given.cameras.camera_type[ODD] = CameraType.PERSPECTIVE.value
    for name in ("fx", "fy"):
        for value in (0.0, -90.0, float("nan")):
            before = float(getattr(given.cameras, name)[ODD])
            getattr(given.cameras, name)[ODD] = value
            with pytest.raises(UserError, match=f"{name} of the camera of .*{given.image_filenames[ODD].name}"):
                outputs()
            getattr(given.cameras, name)[ODD] = before


COLMAP = {
    "SIMPLE_PINHOLE": ("96 72 60 48 36", (60, 60), (0,) * 6, 1),
    "PINHOLE": ("96 72 60 61 48 36", (60, 61), (0,) * 6, 1),
    "SIMPLE_RADIAL": ("96 72 60 48 36 .1", (60, 60), (0.1, 0, 0, 0, 0, 0), 1),
    "RADIAL": ("96 72 60 48 36 .1 .2", (60, 60), (0.1, 0.2, 0, 0, 0, 0), 1),
    "OPENCV": ("96 72 60 61 48 36 .1 .2 .3 .4", (60, 61), (0.1, 0.2, 0, 0, 0.3, 0.4), 1),
    "OPENCV_FISHEYE": ("96 72 60 61 48 36 .1 .2 .3 .4", (60, 61), (0.1, 0.2, 0.3, 0.4, 0, 0), 2),
    "SIMPLE_RADIAL_FISHEYE": ("96 72 60 48 36 .1", (60, 60), (0.1, 0, 0, 0, 0, 0), 2),
    "RADIAL_FISHEYE": ("96 72 60 48 36 .1 .2", (60, 60), (0.1, 0.2, 0, 0, 0, 0), 2),
    "FULL_OPENCV": ("96 72 60 61 48 36 .1 .2 .3 .4 0 0 0 0", None, None, 0),
    "FOV": ("96 72 60 61 48 36 .1", None, None, 0),
    "THIN_PRISM_FISHEYE": ("96 72 60 61 48 36 .1 .2 .3 .4 0 0 0 0", None, None, 0),
    "RAD_TAN_THIN_PRISM_FISHEYE": ("96 72 60 61 48 36 0 0 0 0 0 0 0 0 0 0 0 0", None, None, 0),
    "SIMPLE_DIVISION": ("96 72 60 48 36 .1", None, None, 0),
}


def as_binary(model: Path) -> None:
    """Turns the model's cameras and images into COLMAP's binary files."""
    from nerfstudio.data.utils import colmap_parsing_utils as colmap

    colmap.write_cameras_binary(colmap.read_cameras_text(model / "cameras.txt"), model / "cameras.bin")
    colmap.write_images_binary(colmap.read_images_text(model / "images.txt"), model / "images.bin")
    for name in ("cameras.txt", "images.txt"):
        (model / name).unlink()


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("model", COLMAP)
def test_all_models_of_colmap(scene, tmp_path, model, binary):
    from nerfstudio.data.utils.colmap_parsing_utils import CAMERA_MODEL_NAMES

    numbers, focal, distortion, kind = COLMAP[model]
    data = as_colmap(scene, tmp_path / "data", [f"{model} {numbers}"])
    if binary:
        if model not in CAMERA_MODEL_NAMES:
            pytest.skip("nerfstudio cannot write it; the next test does")
        as_binary(data / "sparse/0")
    if focal is None:
        with pytest.raises(UserError, match=f"Camera 1 of .*sparse/0 has the model {model}.*image_undistorter"):
            read("colmap", data)
        return
    cameras = read("colmap", data).cameras
    assert cameras.fx.unique().tolist() == [focal[0]] and cameras.fy.unique().tolist() == [focal[1]]
    assert (cameras.camera_type == kind).all() and (cameras.width == 96).all() and (cameras.height == 72).all()
    np.testing.assert_allclose(cameras.distortion_params.numpy(), np.tile(distortion, (14, 1)), rtol=1e-6)
    assert set(CAMERA_MODEL_NAMES) <= set(COLMAP)


def test_models_of_later_colmaps(scene, tmp_path):
    data = as_colmap(scene, tmp_path / "data")
    as_binary(data / "sparse/0")
    path = data / "sparse/0/cameras.bin"
    content = bytearray(path.read_bytes())
    content[12] = 11  # count (8 bytes), id (4), model
    path.write_bytes(content)
    with pytest.raises(UserError, match="A camera of .*cameras.bin has the model number 11.*image_undistorter"):
        read("colmap", data)


def test_models_of_colmap_beside_each_other(scene, tmp_path):
    lines = [f"{model} {COLMAP[model][0]}" for model in ("OPENCV_FISHEYE", "PINHOLE", "SIMPLE_RADIAL")]
    cameras = read("colmap", as_colmap(scene, tmp_path / "data", lines), eval_mode="all").cameras
    assert cameras.camera_type[:, 0].tolist() == [[2, 1, 1][index % 3] for index in range(16)]
    np.testing.assert_allclose(cameras.distortion_params[:, 3], [[0.4, 0, 0][index % 3] for index in range(16)])
    assert [lens is None for lens in lenses_of(cameras)] == [index % 3 == 1 for index in range(16)]


@pytest.mark.parametrize(
    "line, said",
    [
        ("PINHOLE 96 72 0 60 48 36", "fx of Camera 1 of .* is 0"),
        ("PINHOLE 96 72 60 -1 48 36", "fy of Camera 1 of .* is -1"),
        ("SIMPLE_PINHOLE 96 72 nan 48 36", "f of Camera 1 of .* is nan"),
        ("OPENCV 96 72 60 60 48 36 inf 0 0 0", "k1 of Camera 1 of .* is inf"),
        ("OPENCV 96 72 60 60 48 36", r"Camera 1 of .* has 4 parameters, and OPENCV has 8"),
        ("PINHOLE 0 72 60 60 48 36", "photos are 0x72 pixels"),
    ],
)
def test_damaged_cameras_of_colmap(scene, tmp_path, line, said):
    with pytest.raises(UserError, match=said):
        read("colmap", as_colmap(scene, tmp_path / "data", [line]))


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("table", ["cameras", "images"])
def test_damaged_tables_of_colmap_are_named(scene, tmp_path, monkeypatch, table, binary):
    """Every kind of damage that the harness knows: what cannot be read is said of the file."""
    monkeypatch.setenv("FIT3D_FAULTS_MARKER", str(tmp_path / "marker"))
    data = as_colmap(scene, tmp_path / "data")
    if binary:
        as_binary(data / "sparse/0")
    path = data / "sparse/0" / f"{table}.{'bin' if binary else 'txt'}"
    whole, refused = path.read_bytes(), 0
    for kind in mutations_of(path):
        try:
            apply(kind, path, random.Random(3))
        except NotApplicable:
            continue
        try:
            read("colmap", data)
        except UserError as error:
            refused += 1
            other = "cameras" if table == "images" else "images"
            named = path.name in str(error) or f"{other}{path.suffix}" in str(error) or "sparse/0" in str(error)
            assert named and "Traceback" not in str(error) and "\n" not in str(error), (kind, error)
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        path.write_bytes(whole)
    assert refused >= 9
    assert len(read("colmap", data).cameras) == 14


def test_images_of_a_camera_that_is_not_there(scene, tmp_path):
    data = as_colmap(scene, tmp_path / "data")
    path = data / "sparse/0/cameras.txt"
    path.write_text(path.read_text().replace("1 PINHOLE", "2 PINHOLE"))
    with pytest.raises(UserError, match=r"frame_\d+.png in .*images.txt has the camera 1, which cameras.txt"):
        read("colmap", data)
