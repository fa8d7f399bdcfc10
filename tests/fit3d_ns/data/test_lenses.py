"""Photos are undistorted by the model of their camera, whatever its coefficients."""

import numpy as np
import pytest
from nerfstudio.cameras.cameras import CameraType
from PIL import Image
from scene_formats import as_colmap, edit, read

from fit3d_ns.data.photos.lenses import Lens, undistort
from fit3d_ns.data.photos.reader import PhotoDataset, PhotoReader

SIZE = (120, 90)
FOCAL, CENTER = (64.0, 66.0), (61.5, 43.0)


def color(directions: np.ndarray) -> np.ndarray:
    """[..., 3] in [0, 255], a smooth function of where a pixel looks to."""
    unit = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    return 127.5 + 120 * np.stack([unit[..., 0], unit[..., 1], np.sin(2 * unit[..., 0] - unit[..., 1])], axis=-1)


def rays(size, focal, center) -> np.ndarray:
    """[H, W, 2] where the pixels of a camera lie on the plane at distance 1 of a pinhole."""
    u, v = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    return np.stack([(u - center[0]) / focal[0], (v - center[1]) / focal[1]], axis=-1)


def radius_of(angle: np.ndarray, k: tuple) -> np.ndarray:
    """OpenCV's fisheye: distance from the middle, in focal lengths, at which a ray of some angle is seen."""
    square = angle**2
    return angle * (1 + square * (k[0] + square * (k[1] + square * (k[2] + square * k[3]))))


def fisheye_photo(k: tuple) -> np.ndarray:
    """[H, W, 3] what a fisheye sees."""
    plane = rays(SIZE, FOCAL, CENTER)
    radius = np.linalg.norm(plane, axis=-1)  # [H, W]
    angles = np.linspace(0, 1.5, 20000)
    angle = np.interp(radius, radius_of(angles, k), angles)
    scale = np.where(radius > 1e-9, np.sin(angle) / np.maximum(radius, 1e-9), 1.0)
    directions = np.concatenate([plane * scale[..., None], np.cos(angle)[..., None]], axis=-1)
    return np.clip(np.round(color(directions)), 0, 255).astype(np.uint8)


def distorted_photo(k1: float, p1: float) -> np.ndarray:
    """[H, W, 3] what a lens of Brown's model sees, found by iteration."""
    target = rays(SIZE, FOCAL, CENTER)
    plane = target.copy()
    for _ in range(100):
        x, y = plane[..., 0], plane[..., 1]
        square = x**2 + y**2
        shift = np.stack([2 * p1 * x * y, p1 * (square + 2 * y**2)], axis=-1)
        plane = (target - shift) / (1 + k1 * square)[..., None]
    directions = np.concatenate([plane, np.ones_like(plane[..., :1])], axis=-1)
    return np.clip(np.round(color(directions)), 0, 255).astype(np.uint8)


NOTHING = (0.0,) * 4
SOME = (0.05, -0.02, 0.01, -0.004)
CAMERAS = {
    "pinhole": ({"camera_model": "OPENCV"}, distorted_photo(0, 0)),
    "k1 and p1": ({"camera_model": "OPENCV", "k1": -0.1, "p1": 0.01}, distorted_photo(-0.1, 0.01)),
    "ideal fisheye": ({"camera_model": "OPENCV_FISHEYE"}, fisheye_photo(NOTHING)),
    "ideal fisheye, zeros": (
        {"camera_model": "OPENCV_FISHEYE", **dict.fromkeys(("k1", "k2", "k3", "k4"), 0.0)},
        fisheye_photo(NOTHING),
    ),
    "instant-ngp's fisheye": ({"is_fisheye": True}, fisheye_photo(NOTHING)),
    "fisheye": ({"camera_model": "OPENCV_FISHEYE", **dict(zip(("k1", "k2", "k3", "k4"), SOME))}, fisheye_photo(SOME)),
    "fisheye624": (
        {"camera_model": "FISHEYE624", "distortion_params": [*SOME, *[0.0] * 8], "fisheye_crop_radius": 38},
        fisheye_photo(SOME),
    ),
}


def check(outputs, scale, name):
    reader = PhotoReader(PhotoDataset(outputs, scale), "uint8")
    photo = reader.read([path.name for path in outputs.image_filenames].index(name))
    camera, (height, width) = photo.camera, photo.size
    focal, center = (float(camera.fx), float(camera.fy)), (float(camera.cx), float(camera.cy))
    plane = rays((width, height), focal, center)
    expected = color(np.concatenate([plane, np.ones_like(plane[..., :1])], axis=-1))
    if photo.mask is not None:  # the circle of a fisheye624
        assert 0.6 < float(photo.mask.float().mean()) < 0.9
        assert photo.mask[height // 2, width // 2] and not photo.mask[0, 0]
    inner = (slice(height // 6, -(height // 6)), slice(width // 6, -(width // 6)))
    difference = np.abs(photo.image.numpy()[..., :3].astype(float) - expected)[inner]
    assert min(difference.shape[:2]) > 20
    assert difference.max() < (4 if scale == 1 else 8), (difference.max(), focal, center)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("place", ["top", "frame"])
@pytest.mark.parametrize("kind", CAMERAS)
def test_pixels_look_where_the_pinhole_says(scene, kind, place, scale):
    camera, photo = CAMERAS[kind]
    lens = {"fl_x": FOCAL[0], "fl_y": FOCAL[1], "cx": CENTER[0], "cy": CENTER[1], "w": SIZE[0], "h": SIZE[1]}
    if kind == "fisheye624" and place == "frame":
        pytest.skip("cannot stand beside other models")

    def change(content):
        for key in ("camera_model", "k1", "k2", "p1", "p2"):
            content.pop(key)
        (content if place == "top" else content["frames"][3]).update(lens, **camera)

    edit(scene / "transforms.json", change)
    name = "frame_00004.png"
    for path in (scene / "images").iterdir():
        if place == "top" or path.name == name:
            Image.fromarray(photo).save(path)
    check(read("nerfstudio", scene, eval_mode="all"), scale, name)


@pytest.mark.parametrize("k", [NOTHING, SOME])
def test_fisheyes_of_colmap(scene, tmp_path, k):
    for path in (scene / "images").iterdir():
        Image.fromarray(fisheye_photo(k)).save(path)
    numbers = " ".join(str(value) for value in (*SIZE, *FOCAL, *CENTER, *k))
    check(read("colmap", as_colmap(scene, tmp_path / "data", [f"OPENCV_FISHEYE {numbers}"])), 1.0, "frame_00004.png")


def test_a_mask_and_the_circle_count_together(scene):
    camera, photo = CAMERAS["fisheye624"]
    lens = {"fl_x": FOCAL[0], "fl_y": FOCAL[1], "cx": CENTER[0], "cy": CENTER[1], "w": SIZE[0], "h": SIZE[1]}

    def change(content):
        for key in ("camera_model", "k1", "k2", "p1", "p2"):
            content.pop(key)
        content.update(lens, **camera)
        for frame in content["frames"]:
            frame["mask_path"] = "mask.png"

    edit(scene / "transforms.json", change)
    for path in (scene / "images").iterdir():
        Image.fromarray(photo).save(path)
    counts = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    counts[:, int(CENTER[0]) :] = 255
    Image.fromarray(counts).save(scene / "mask.png")
    prepared = PhotoReader(PhotoDataset(read("nerfstudio", scene), 1.0), "uint8").read(0)
    assert prepared.mask is not None
    shares = prepared.mask[..., 0].float().mean(dim=0)  # of each column
    assert shares[:35].max() == 0 and shares[40:70].min() > 0.5


@pytest.mark.parametrize("camera", ["opencv", "fisheye"])
def test_half_of_a_pixel_of_the_mask_counts_where_photos_are_undistorted(camera):
    """As where they are not: what a little of the mask is blended into does not count."""
    kind, distortion = {
        "opencv": (CameraType.PERSPECTIVE, (0.2, 0.05, 0.0, 0.0, 0.0, 0.0)),
        "fisheye": (CameraType.FISHEYE, (0.05, 0.01, 0.0, 0.0, 0.0, 0.0)),
    }[camera]
    lens = Lens(kind.value, 90.0, 90.0, 48.0, 36.0, 96, 72, distortion)
    mask = np.random.default_rng(0).random((9, 12)).repeat(8, 0).repeat(8, 1)[..., None] < 0.5
    photo = np.repeat(mask.astype(np.uint8) * 255, 3, axis=2)
    undistorted = undistort(photo, lens, mask)
    assert undistorted.mask is not None and undistorted.mask.shape == (*undistorted.image.shape[:2], 1)
    blended = (undistorted.image > 0) & (undistorted.image < 255)
    assert blended.mean() > 0.02
    assert np.array_equal(undistorted.mask[..., 0], undistorted.image[..., 0] >= 128)
