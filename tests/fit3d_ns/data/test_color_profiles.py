"""Pictures that carry a colour profile are what a viewer shows of them: the profile applied."""

import struct
from io import BytesIO
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image, ImageCms

from fit3d_ns.data.photos.picture_files import open_mask, open_photo

SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
"""Columns: the primaries in XYZ under D50, as the sRGB profile has them; of Display P3 and Adobe RGB likewise."""
P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
ADOBE = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])
WHITE = np.array([0.9642, 1.0, 0.8249])


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(gamma: float, primaries: np.ndarray | None = None) -> bytes:
    """An ICC profile, version 2: of a display with these primaries, or of grey."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(79),
        b"cprt": b"text" + bytes(4) + b"none\0" + bytes(3),
        b"wtpt": b"XYZ " + bytes(4) + fixed(*WHITE),
    }
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for index, color in enumerate(b"rgb"):
            tags[bytes([color]) + b"XYZ"] = b"XYZ " + bytes(4) + fixed(*primaries[:, index])
            tags[bytes([color]) + b"TRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    space = b"GRAY" if primaries is None else b"RGB "
    header = bytes(4) + struct.pack(">I", 0x02100000) + b"mntr" + space + b"XYZ " + bytes(12) + b"acsp" + bytes(28)
    header = bytes(4) + header + fixed(*WHITE) + bytes(48)
    whole = header + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def shown(values: np.ndarray, gamma: float, primaries: np.ndarray = SRGB) -> np.ndarray:
    """What sRGB values stand for these ones, by the definitions of both."""
    linear = np.linalg.solve(SRGB, primaries @ (values.reshape(-1, 3).T / 255.0) ** gamma).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (encoded.T * 255.0).round().reshape(values.shape)


@pytest.fixture
def colors() -> np.ndarray:
    """[16, 16, 3]: moderate colours, which sRGB and the other spaces all have."""
    return np.random.default_rng(0).integers(70, 190, (4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("name", ["p3", "adobe"])
def test_profiles_are_applied(tmp_path, colors, suffix, name):
    gamma, primaries = {"p3": (2.2, P3), "adobe": (2.19921875, ADOBE)}[name]
    path = tmp_path / f"photo{suffix}"
    options = {".jpg": {"quality": 98, "subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    Image.fromarray(colors).save(path, icc_profile=profile(gamma, primaries), **options)
    with Image.open(path) as picture:
        stored = np.asarray(picture.convert("RGB"))  # as the format's loss left it
    wanted = shown(stored, gamma, primaries)
    assert np.abs(wanted - stored).max() > 8, "the profile matters"
    assert np.abs(open_photo(path) - wanted).max() <= 2


def test_profiles_of_palettes_transparency_and_grey(tmp_path, colors):
    p3, linear = profile(2.2, P3), profile(1.0)
    alpha = np.full((16, 16, 1), 200, np.uint8)
    wanted = shown(colors, 2.2, P3)
    Image.fromarray(np.concatenate([colors, alpha], axis=-1)).save(tmp_path / "alpha.png", icc_profile=p3)
    read = open_photo(tmp_path / "alpha.png")
    assert np.abs(read[..., :3] - wanted).max() <= 2 and (read[..., 3] == 200).all()
    Image.fromarray(colors).quantize(16).save(tmp_path / "palette.png", icc_profile=p3)
    stored = np.asarray(Image.open(tmp_path / "palette.png").convert("RGB"))
    assert np.abs(open_photo(tmp_path / "palette.png") - shown(stored, 2.2, P3)).max() <= 2

    grey = colors[..., 0]
    wanted = shown(np.stack([grey] * 3, axis=-1), 1.0)
    Image.fromarray(grey).save(tmp_path / "grey.png", icc_profile=linear)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "short.png", icc_profile=linear)
    for name in ("grey.png", "short.png"):
        assert np.abs(open_photo(tmp_path / name) - wanted).max() <= 2, name
    Image.fromarray(np.full((4, 4), 60, np.uint8)).save(tmp_path / "mask.png", icc_profile=linear)
    assert open_mask(tmp_path / "mask.png").all(), "60 of linear light is shown brighter than half"


def test_what_is_srgb_or_says_nothing_changes_nothing(tmp_path, colors):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for number, data in enumerate((srgb, b"no profile", profile(2.2, P3)[:150], profile(1.0))):  # the last: of grey
        path = tmp_path / f"{number}.png"
        Image.fromarray(colors).save(path, icc_profile=data)
        assert Image.open(path).info["icc_profile"] == data
        assert np.array_equal(open_photo(path), colors)


def test_a_written_profile_is_a_profile():
    for data, space in ((profile(2.2, P3), "RGB "), (profile(1.0), "GRAY")):
        assert cast(Any, ImageCms.ImageCmsProfile(BytesIO(data)).profile).xcolor_space == space
