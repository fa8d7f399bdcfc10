"""A picture file means what a viewer shows of it, whatever its format, mode and orientation."""

import numpy as np
import pytest
from picture_files import FORMATS, ORIENTATIONS, Case, colored, every_mode, png, save_turned
from PIL import Image

from fit3d_ns.data.photos.picture_files import open_depth, open_labels, open_mask, open_photo, picture_size, turned_by
from fit3d_ns.support.errors import UserError

LEVELS = (0, 51, 85, 102, 170, 204, 255)
"""Levels of which some survive 2 and 4 bits."""


@pytest.fixture(scope="module")
def grey() -> np.ndarray:
    """[24, 40] a few wide steps: flat areas keep their colours in lossy formats."""
    columns = np.repeat(np.array(LEVELS[:5]), 8)
    return np.tile(columns, (24, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def cases(tmp_path_factory, grey) -> list[Case]:
    return every_mode(tmp_path_factory.mktemp("modes"), grey)


def over_black(image: np.ndarray) -> np.ndarray:
    if image.shape[-1] == 3:
        return image
    return (image[..., :3].astype(int) * image[..., 3:] / 255).round().astype(np.uint8)


def inner(image: np.ndarray) -> np.ndarray:
    """Without the columns beside a step, which lossy formats blur."""
    return image[:, [column for column in range(40) if column % 8 in (2, 3, 4, 5)]]


def test_the_cases_cover_every_mode_that_pillow_reads(cases):
    modes = {}
    for case in cases:
        with Image.open(case.path) as picture:
            modes.setdefault(picture.format, set()).add(picture.mode)
    assert modes["PNG"] >= {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}
    assert modes["JPEG"] >= {"L", "RGB", "CMYK"}
    assert modes["TIFF"] >= {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16"}
    assert modes["WEBP"] >= {"RGB", "RGBA"}


def test_photos_of_every_mode(cases):
    for case in cases:
        if not case.readable:
            with pytest.raises(UserError, match=rf"{case.path.name} holds .*\(mode [IF]\).*8 or 16 bits"):
                open_photo(case.path)
            continue
        image = open_photo(case.path)
        assert image.dtype == np.uint8 and image.shape in ((24, 40, 3), (24, 40, 4)), case.name
        difference = np.abs(inner(over_black(image)).astype(int) - inner(case.shown)).max()
        assert difference <= case.tolerance, (case.name, difference)


def test_masks_of_every_mode(cases):
    weights = np.array([299, 587, 114]) / 1000  # ITU-R 601-2
    for case in cases:
        if not case.readable:
            with pytest.raises(UserError, match=f"mask .*{case.path.name} holds .*mode [IF]"):
                open_mask(case.path)
            continue
        luma = inner(case.shown) @ weights
        clear = np.abs(luma - 128) > case.tolerance + 2
        assert clear.mean() > 0.5
        assert ((inner(open_mask(case.path)) == (luma >= 128)) | ~clear).all(), case.name


@pytest.mark.parametrize("suffix", FORMATS.values())
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientation(tmp_path, grey, suffix, orientation):
    shown = colored(grey)
    shown[:12, :20] //= 2  # no symmetry
    path = tmp_path / f"photo{suffix}"
    save_turned(shown, path, orientation)
    image = open_photo(path)
    assert image.shape == (24, 40, 3) and picture_size(path) == (24, 40)
    error = np.abs(image.astype(int) - shown)
    assert error.mean() < (6 if suffix in (".jpg", ".webp") else 0.1)
    if suffix != ".tif":
        assert turned_by(path) == orientation
    mask = tmp_path / f"mask{suffix}"
    white = np.where(np.arange(24)[:, None] + np.arange(40) < 30, 255, 0).astype(np.uint8)
    save_turned(white, mask, orientation)
    assert ((open_mask(mask) == (white == 255)).mean()) > 0.98
    if suffix in (".png", ".tif"):
        numbers = tmp_path / f"numbers{suffix}"
        save_turned(grey, numbers, orientation)
        assert (open_labels(numbers) == grey).all() and (open_depth(numbers) == grey).all()


def test_orientation_in_xmp_and_damaged_exif(tmp_path, grey):
    shown = colored(grey)
    stored = Image.fromarray(np.ascontiguousarray(shown[::-1, ::-1]))
    stored.save(tmp_path / "xmp.jpg", quality=95, xmp=b'<x:xmpmeta><rdf tiff:Orientation="3"/></x:xmpmeta>')
    assert np.abs(open_photo(tmp_path / "xmp.jpg").astype(int) - shown).mean() < 6
    damaged = {"short": b"II*\0", "text": b"no exif at all", "wild": b"MM\0*\xff\xff\xff\xff"}
    for name, exif in damaged.items():
        Image.fromarray(shown).save(tmp_path / f"{name}.jpg", quality=95, exif=b"Exif\0\0" + exif)
        assert np.abs(open_photo(tmp_path / f"{name}.jpg").astype(int) - shown).mean() < 6


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_orientation_that_does_not_exist(tmp_path, grey, orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(grey).save(tmp_path / "photo.png", exif=tags)
    assert (open_photo(tmp_path / "photo.png")[..., 0] == grey).all()


def test_scaled_photo_of_a_palette_mixes_colours_and_not_indices(tmp_path):
    stripes = Image.fromarray(np.tile(np.array([0, 2], np.uint8), (8, 8)))
    stripes.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    stripes.save(tmp_path / "stripes.png")
    half = open_photo(tmp_path / "stripes.png", scale_factor=0.5)
    assert half.shape == (4, 8, 3) and np.abs(half[:, 2:-2].astype(int) - [127, 0, 127]).max() <= 1
    with pytest.raises(UserError, match="stripes.png of 16x8 pixels has none left"):
        open_photo(tmp_path / "stripes.png", scale_factor=0.01)


def test_twelve_bits_are_scaled_by_their_own_range(tmp_path):
    values = np.array([[0, 2048, 4095, 1024]])
    packed = np.unpackbits(values[0].astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:]
    content = bytearray(__import__("picture_files").tiff(np.packbits(packed), 1, (1, 4), 12))
    (tmp_path / "twelve.tif").write_bytes(bytes(content))
    assert open_photo(tmp_path / "twelve.tif")[0, :, 0].tolist() == [0, 128, 255, 64]


def test_masks_of_another_size(tmp_path):
    large = np.zeros((40, 60), np.uint8)
    large[:, 30:] = 255
    for height, width in ((20, 30), (40, 60), (80, 120), (27, 40)):
        Image.fromarray(large).resize((width, height)).save(tmp_path / "mask.png")
        mask = open_mask(tmp_path / "mask.png", (40, 60))
        assert mask.shape == (40, 60) and mask[:, 32:].all() and not mask[:, :28].any()
    Image.fromarray(large[:, :40]).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask.png has 40x40 pixels and its photo .*a.jpg 60x40"):
        open_mask(tmp_path / "mask.png", (40, 60), tmp_path / "a.jpg")


def test_mask_of_zeros_and_ones_is_black_to_everyone_who_looks(tmp_path):
    ones = np.zeros((8, 8), np.uint8)
    ones[2:] = 1
    Image.fromarray(ones).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match=r"mask .*mask.png holds the values 0 and 1.*white as 255"):
        open_mask(tmp_path / "mask.png")
    Image.fromarray(ones * 0).save(tmp_path / "mask.png")
    assert not open_mask(tmp_path / "mask.png").any()
    Image.fromarray(ones.astype(bool)).save(tmp_path / "mask.png")
    assert (open_mask(tmp_path / "mask.png") == ones.astype(bool)).all()


@pytest.mark.parametrize("read", [open_photo, open_mask, open_labels, open_depth, picture_size])
def test_missing_and_damaged_files_are_named(tmp_path, read):
    whole = png(np.arange(2000, dtype=np.uint16).reshape(40, 50), 16, 0)
    broken = {"empty": b"", "text": b"no image", "half": whole[: len(whole) // 2], "noise": whole[:60] + b"\xff" * 500}
    for name, content in broken.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        if read is picture_size and name in ("half", "noise"):
            continue  # the header is whole
        with pytest.raises(UserError, match=rf"{name}.png is truncated or not an image") as caught:
            read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="nowhere.png is missing"):
        read(tmp_path / "nowhere.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="folder.png cannot be read"):
        read(tmp_path / "folder.png")


def test_labels_keep_their_values(tmp_path):
    ids = np.array([[0, 1, 2], [3, 200, 255]], np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette(bytes(range(256)) * 3)
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "transparent.png", transparency=0)
    Image.fromarray(ids).save(tmp_path / "grey.tif")
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "short.png")
    big = Image.frombytes("I;16B", (3, 2), ids.astype(">u2").tobytes())
    big.save(tmp_path / "big.tif")
    Image.fromarray(ids.astype(np.int32)).save(tmp_path / "long.tif")
    for name in ("palette.png", "transparent.png", "grey.tif", "short.png", "big.tif", "long.tif"):
        values = open_labels(tmp_path / name)
        assert (values == ids).all() and values.dtype.isnative, name
    Image.fromarray(ids > 1).save(tmp_path / "bits.png")
    assert open_labels(tmp_path / "bits.png").tolist() == [[0, 0, 1], [1, 1, 1]]
    Image.fromarray(-ids.astype(np.int32)).save(tmp_path / "negative.tif")
    with pytest.raises(UserError, match="negative.tif holds the negative value -255"):
        open_labels(tmp_path / "negative.tif")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK", "F", "YCbCr", "LAB"])
def test_colours_are_no_labels_and_no_depths(tmp_path, mode):
    image = Image.new(mode, (4, 4))
    image.save(tmp_path / "values.tif")
    with pytest.raises(UserError, match=rf"values.tif is a picture of mode {mode}, not of class ids"):
        open_labels(tmp_path / "values.tif")
    with pytest.raises(UserError, match=rf"values.tif is a picture of mode {mode}, and depth must be 16-bit PNG"):
        open_depth(tmp_path / "values.tif")


def test_depth_as_numpy_file_is_told_the_format(tmp_path):
    np.save(tmp_path / "depth.npy", np.ones((4, 4)))
    with pytest.raises(UserError, match="depth.npy .*depth must be 16-bit PNG"):
        open_depth(tmp_path / "depth.npy")
    with pytest.raises(UserError, match="gone.npy is missing"):
        open_depth(tmp_path / "gone.npy")
