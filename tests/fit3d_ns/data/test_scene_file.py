"""What transforms.json says of a camera, at the top or in a frame, is heeded or refused by frame and key."""

import json
import math
import re

import pytest

from fit3d_ns.data.scene_file import (
    CAMERA_MODELS,
    COEFFICIENTS,
    LENS_KEYS,
    SCENE_KEYS,
    FrameLens,
    frame_lens,
    odd_lenses,
    read_scene_file,
)
from fit3d_ns.support.errors import UserError

TOP = {"camera_model": "OPENCV", "fl_x": 100.0, "fl_y": 110.0, "cx": 60.0, "cy": 40.0, "w": 120, "h": 80, "k1": 0.01}
POSE = [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
COUNT = 12 * [0.001]


def written(tmp_path, frame=None, **top):
    """A file of two frames, the second of which says something itself."""
    frames = [{"file_path": f"images/{index}.png", "transform_matrix": POSE} for index in range(2)]
    frames[1].update(frame or {})
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps({**{key: value for key, value in {**TOP, **top}.items()}, "frames": frames}))
    return path


def lenses(path, **options) -> list[FrameLens]:
    content = read_scene_file(path)
    return [frame_lens(content, frame, path, **options) for frame in content["frames"]]


OWN = {
    "fl_x": (90.0, {"fx": 90.0}),
    "fl_y": (90.0, {"fy": 90.0}),
    "x_fov": (90.0, {"fx": 60.0}),
    "y_fov": (90.0, {"fy": 40.0}),
    "camera_angle_x": (math.pi / 2, {"fx": 60.0}),
    "camera_angle_y": (math.pi / 2, {"fy": 40.0}),
    "cx": (50.5, {"cx": 50.5}),
    "cy": (30.5, {"cy": 30.5}),
    "w": (130, {"width": 130}),
    "h": (90, {"height": 90}),
    "camera_model": ("OPENCV_FISHEYE", {"model": "OPENCV_FISHEYE"}),
    "is_fisheye": (True, "camera_model of images/1.png"),
    "fisheye_crop_radius": (30.0, {}),  # of fisheyes only, and this is none
    "distortion_params": (
        [0.1, 0.2, 0.3, 0, 0.01, 0.02],
        {"distortion": (0.1, 0.2, 0.3, 0.0, 0.01, 0.02)},
    ),
    "k1": (0.5, {"distortion": (0.5, 0, 0, 0, 0, 0)}),
    "k2": (0.5, {"distortion": (0.01, 0.5, 0, 0, 0, 0)}),
    "k3": (0.5, {"distortion": (0.01, 0, 0.5, 0, 0, 0)}),
    "k4": (0.5, "k4 of images/1.png"),
    "p1": (0.5, {"distortion": (0.01, 0, 0, 0, 0.5, 0)}),
    "p2": (0.5, {"distortion": (0.01, 0, 0, 0, 0, 0.5)}),
    "k5": (0.5, "k5 of images/1.png"),
    "k6": (0.5, "k6 of images/1.png"),
}


@pytest.mark.parametrize("key", LENS_KEYS)
def test_each_key_in_one_frame(tmp_path, key):
    value, expected = OWN[key]
    path = written(tmp_path, {key: value})
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected) as caught:
            lenses(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        return
    first, second = lenses(path)
    assert first == FrameLens("OPENCV", 100.0, 110.0, 60.0, 40.0, 120, 80, (0.01, 0, 0, 0, 0, 0))
    different = {name: getattr(second, name) for name in vars(first) if getattr(first, name) != getattr(second, name)}
    assert {name: pytest.approx(value) if name != "model" else value for name, value in expected.items()} == different
    # The same, said at the top for all.
    top = {name: None for name in TOP if name in ("fl_x", "fl_y") and key not in ("fl_x", "fl_y")}
    if key in ("x_fov", "y_fov", "camera_angle_x", "camera_angle_y"):
        axis = "fx" if "x" in key else "fy"
        lens = lenses(written(tmp_path, **{**top, "fl_x" if axis == "fy" else "fl_y": 99.0, key: value}))[0]
        assert getattr(lens, axis) == pytest.approx(expected[axis])
    elif key != "distortion_params":
        assert lenses(written(tmp_path, **{key: value})) == [second, second]


def test_all_keys_are_tested():
    assert set(OWN) == set(LENS_KEYS)


@pytest.mark.parametrize("key", SCENE_KEYS)
def test_what_holds_for_a_scene_is_refused_in_a_frame(tmp_path, key):
    path = written(tmp_path, {key: "a"})
    with pytest.raises(UserError, match=f"{key} stands in the frame images/1.png of .*transforms.json.*top"):
        read_scene_file(path)
    read_scene_file(written(tmp_path, {key: "a"}, **{key: "a"}))  # says the same


def nerfstudio_models():
    from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE

    return list(CAMERA_MODEL_TO_TYPE)


@pytest.mark.parametrize("place", ["top", "frame"])
@pytest.mark.parametrize(
    "model", [*nerfstudio_models(), "FULL_OPENCV", "FOV", "THIN_PRISM_FISHEYE", "opencv", "", 7, None, ["OPENCV"]]
)
def test_all_camera_models(tmp_path, model, place):
    extra = {"distortion_params": COUNT, "fisheye_crop_radius": 30} if model == "FISHEYE624" else {}
    path = (
        written(tmp_path, k1=None, camera_model=model, **extra)
        if place == "top"
        else written(tmp_path, {"camera_model": model, **extra}, k1=None)
    )
    if model is not None and (not isinstance(model, str) or model not in CAMERA_MODELS):
        with pytest.raises(UserError, match="camera_model of images/[01].png.*undistort the photos first") as caught:
            lenses(path)
        assert json.dumps(model) in str(caught.value)
        return
    lens = lenses(path)[1]
    fisheye = model in ("OPENCV_FISHEYE", "FISHEYE624")
    assert lens.distorts == fisheye, "a fisheye distorts whatever its coefficients"
    assert lens.model == (model or "OPENCV")
    assert lens.fisheye_crop_radius == (30 if model == "FISHEYE624" else None)
    assert set(CAMERA_MODELS) <= set(nerfstudio_models())


@pytest.mark.parametrize("model", ["SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "OPENCV_FISHEYE"])
@pytest.mark.parametrize("key", [*COEFFICIENTS, "k5", "k6"])
def test_each_coefficient_is_used_or_refused(tmp_path, model, key):
    path = written(tmp_path, {key: 0.25}, k1=None, camera_model=model)
    unused = {"k5", "k6"} | ({"p1", "p2"} if "FISHEYE" in model else {"k4"})
    if key in unused:
        with pytest.raises(UserError, match=f"{key} of images/1.png.*is 0.25.*{model}"):
            lenses(path)
        return
    lens = lenses(path)[1]
    assert lens.distorts and dict(zip(COEFFICIENTS, lens.distortion))[key] == 0.25 and sum(lens.distortion) == 0.25


@pytest.mark.parametrize("key", ["fl_x", "fl_y", "cx", "cy", "w", "h", "k1", "k4", "p2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "wide", [1], {}, 10**400])
def test_numbers_that_are_none_are_refused(tmp_path, key, value):
    with pytest.raises(UserError, match=f"{key} of images/1.png in .*transforms.json is .*not a finite number"):
        lenses(written(tmp_path, {key: value}))


@pytest.mark.parametrize(
    "key, value, said",
    [
        *((key, value, "a focal length is positive") for key in ("fl_x", "fl_y") for value in (0, -90)),
        *((key, value, "not a number of pixels") for key in ("w", "h") for value in (0, -3, 2.5)),
        *((key, value, "angle of view") for key in ("x_fov", "y_fov") for value in (0, 180, -20)),
        *((key, value, "angle of view") for key in ("camera_angle_x", "camera_angle_y") for value in (0, 4)),
        *(("distortion_params", value, "list of 6 numbers") for value in (3, [0.1], COUNT, {})),
        ("distortion_params", [0, 0, 0, 0, 0, "a"], "not a finite number"),
        ("is_fisheye", "yes", "true or false"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, key, value, said):
    with pytest.raises(UserError, match=f"{key} of images/1.png in .*{said}"):
        lenses(written(tmp_path, {key: value}))


@pytest.mark.parametrize("radius", [None, 0, -1, "a"])
def test_a_fisheye624_needs_its_circle(tmp_path, radius):
    frame = {"camera_model": "FISHEYE624", "distortion_params": COUNT, "fisheye_crop_radius": radius}
    with pytest.raises(UserError, match="fisheye_crop_radius of images/1.png"):
        lenses(written(tmp_path, frame, k1=None))


def test_a_circle_that_cannot_be_heeded_is_refused(tmp_path):
    with pytest.raises(UserError, match="fisheye_crop_radius of images/1.png.*OPENCV_FISHEYE.*mask"):
        lenses(written(tmp_path, {"camera_model": "OPENCV_FISHEYE", "fisheye_crop_radius": 30}))


def test_coefficients_said_twice_must_agree(tmp_path):
    listed = [0.1, 0, 0, 0, 0, 0]
    assert lenses(written(tmp_path, {"distortion_params": listed, "k1": 0.1}))[1].distortion[0] == 0.1
    with pytest.raises(UserError, match="k1 of images/1.png.*beside distortion_params"):
        lenses(written(tmp_path, {"distortion_params": listed, "k1": 0.2}))
    # The frame's own coefficient wins over a list at the top.
    assert lenses(written(tmp_path, {"k2": 0.3}, k1=None, distortion_params=listed))[1].distortion[:2] == (0.1, 0.3)


def test_what_is_not_said_comes_from_the_photo_or_is_missed(tmp_path):
    path = written(tmp_path, w=None, h=None, cx=None, cy=None, fl_y=None)
    with pytest.raises(UserError, match="w of images/0.png in .* is missing"):
        lenses(path)
    lens = lenses(path, size=lambda: (200, 100))[0]
    assert (lens.width, lens.height, lens.cx, lens.cy, lens.fx, lens.fy) == (200, 100, 100, 50, 100, 100)
    with pytest.raises(UserError, match="fl_x of images/0.png in .* is missing"):
        lenses(written(tmp_path, fl_x=None, fl_y=None))


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        ("null", "no JSON object"),
        ("[]", "no JSON object"),
        ("7", "no JSON object"),
        ("{}", "holds no poses"),
        ('{"frames": null}', "holds no poses"),
        ('{"frames": {}}', "holds no poses"),
        ('{"frames": [null]}', "Frame 0 of .* has no file_path"),
        ('{"frames": [{"file_path": 7}]}', "Frame 0 of .* has no file_path"),
        ('{"frames": [{"file_path": "a.png"}]}', "a.png in .* has no pose"),
        ('{"frames": [{"file_path": "a.png", "transform_matrix": 1, "mask_path": 3}]}', "mask_path of a.png"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path, text, said):
    path = tmp_path / "transforms.json"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_scene_file(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid JSON"):
        read_scene_file(path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read_scene_file(path)


def test_a_mark_at_the_beginning_and_backslashes_are_taken(tmp_path):
    path = written(
        tmp_path, {"file_path": "images\\1.png", "mask_path": "masks\\1.png"}, val_filenames=["images\\1.png"]
    )
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    content = read_scene_file(path)
    assert content["frames"][1]["file_path"] == "images/1.png" == content["val_filenames"][0]
    assert content["frames"][1]["mask_path"] == "masks/1.png"


ODD = {
    "focal length in millimetres": ({"fl_x": 4.2, "fl_y": 4.2}, "4.2 pixels makes an angle of view of 172 degrees"),
    "principal point of the full photo": (
        {"cx": 600.0},
        r"principal point \(600, 40\) lies outside the photo of 120x80",
    ),
    "negative principal point": ({"cy": -1.0}, r"principal point \(60, -1\) lies outside"),
    "coefficients in pixels": ({"k1": 950.0}, r"moves corners of the photo to \d+ times their distance"),
    "coefficients that fold": ({"k1": -3.0}, r"moves corners of the photo to -[\d.]+ times"),
    "fisheye": ({"camera_model": "OPENCV_FISHEYE", "k4": 900.0}, "moves corners of the photo"),
}


@pytest.mark.parametrize("kind", ODD)
def test_cameras_that_are_rarely_meant_are_said_once(tmp_path, kind):
    own, said = ODD[kind]
    path = written(tmp_path, own)
    (remark,) = odd_lenses(lenses(path), ["images/0.png", "images/1.png"], str(path))
    assert re.search(said, remark) and "images/1.png" in remark and str(path) in remark
    both = written(tmp_path, own, **own)
    (remark,) = odd_lenses(lenses(both), ["images/0.png", "images/1.png"], str(both))
    assert "images/0.png" in remark and "(2 of 2 views" in remark


@pytest.mark.parametrize(
    "top",
    [
        {},
        {"fl_x": 17.0, "fl_y": 17.0, "k1": 0.0},  # 148 degrees
        {"cx": 0.0, "cy": 80.0},
        {"fl_x": 80.0, "fl_y": 80.0, "k1": -0.25, "k2": 0.07, "k3": -0.01},  # a sports camera
        {"camera_model": "OPENCV_FISHEYE", "fl_x": 30.0, "fl_y": 30.0, "k1": -0.05, "k2": 0.01},
    ],
)
def test_ordinary_cameras_are_no_news(tmp_path, top):
    path = written(tmp_path, **top)
    assert odd_lenses(lenses(path), ["0", "1"], str(path)) == []


def test_frames_that_are_no_list(tmp_path):
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps({"frames": {"0": {}}}))
    with pytest.raises(UserError, match="holds no poses .`frames` is no list"):
        read_scene_file(path)
