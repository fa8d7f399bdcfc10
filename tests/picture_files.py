"""One picture in every mode that PNG, JPEG, TIFF and WebP take, and what a viewer shows of it."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tif", "WEBP": ".webp"}
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "I", "F")
SHORT = ("I;16", "I;16B", "I;16L")
ORIENTATIONS = range(1, 9)
UNTURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[::-1],
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image.swapaxes(0, 1)[:, ::-1],
}
"""What is stored of a picture whose orientation says how to turn it (EXIF 2.32, tag 274), from what is shown."""


@dataclass(frozen=True)
class Case:
    """A file, and what a viewer shows of it over black."""

    name: str
    path: Path
    shown: np.ndarray
    """[H, W, 3] 8-bit RGB."""
    readable: bool
    """Whether the mode has a meaning in 8 bits."""
    tolerance: int
    """Largest difference that the format's loss explains."""


def colored(image: np.ndarray) -> np.ndarray:
    """Makes a smooth picture of few colours, so that palettes and lossy formats keep it: [H, W, 3] from its grey."""
    return np.stack([image, image // 2 + image // 4, 255 - image], axis=-1).astype(np.uint8)


def every_mode(folder: Path, grey: np.ndarray) -> list[Case]:
    """Writes a picture in every mode that a format takes.

    Args:
        folder: Where to.
        grey: [H, W] uint8, smooth, of at most 16 levels; transparent modes hide its right half.
    """
    cases = []
    for mode in MODES:
        for format_name, suffix in FORMATS.items():
            image, shown = _in_mode(mode, grey)
            path = folder / f"{mode}{suffix}"
            try:
                image.save(path, format_name, **({"quality": 95} if format_name in ("JPEG", "WEBP") else {}))
            except (OSError, ValueError):
                path.unlink(missing_ok=True)
                continue  # the format has no such mode
            lossy = {"JPEG": 12, "WEBP": 24}.get(format_name, 0) + 6 * (mode in ("YCbCr", "LAB"))
            if mode == "1" and format_name in ("JPEG", "WEBP"):
                lossy = 60
            cases.append(Case(f"{mode}{suffix}", path, shown, mode not in "IF" or format_name == "WEBP", lossy))
    short = grey.astype(np.uint16) * 257
    for mode in SHORT:
        for format_name in ("PNG", "TIFF"):
            path = folder / f"{mode.replace(';', '_')}{FORMATS[format_name]}"
            order = ">u2" if mode.endswith("B") else "<u2"
            image = Image.frombytes(mode, grey.shape[::-1], short.astype(order).tobytes())
            try:
                image.save(path, format_name)
            except (OSError, ValueError):
                path.unlink(missing_ok=True)
                continue
            cases.append(Case(path.name, path, _grey(grey), True, 0))
    return cases + _crafted(folder, grey)


def _grey(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def _in_mode(mode: str, grey: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """The picture in a mode, and what is shown of it over black."""
    alpha = np.full(grey.shape, 255, np.uint8)
    alpha[:, grey.shape[1] // 2 :] = 0
    seen = (alpha == 255)[..., None]
    color = colored(grey)
    rgb, opacity, plain = Image.fromarray(color), Image.fromarray(alpha), Image.fromarray(grey)
    if mode == "1":
        bits = np.where(grey >= 128, 255, 0).astype(np.uint8)
        return Image.fromarray(bits).convert("1"), _grey(bits)
    if mode in ("L", "I", "F"):
        return plain.convert(mode), _grey(grey)
    if mode in ("LA", "La"):
        return Image.merge("LA", [plain, opacity]).convert(mode), _grey(grey) * seen
    if mode in ("P", "PA"):
        indices = np.unique(grey, return_inverse=True)[1].reshape(grey.shape).astype(np.uint8)
        palette = Image.fromarray(indices)
        palette.putpalette(colored(np.unique(grey)[:, None]).reshape(-1).tobytes())
        if mode == "P":
            return palette, color
        with_alpha = palette.convert("PA")
        with_alpha.putalpha(opacity)
        return with_alpha, color * seen
    if mode in ("RGBA", "RGBa"):
        image = rgb.convert("RGBA")
        image.putalpha(opacity)
        return image.convert(mode), color * seen
    if mode == "LAB":
        # Neutral colours, of which L* alone decides (CIE 1976; sRGB's D50 white is that of Pillow's profile).
        linear = np.where(grey / 255 <= 0.04045, grey / 255 / 12.92, ((grey / 255 + 0.055) / 1.055) ** 2.4)
        lightness = np.where(linear > 216 / 24389, 116 * np.cbrt(linear) - 16, linear * 24389 / 27)
        bands = [Image.fromarray((lightness * 2.55).round().astype(np.uint8))]
        return Image.merge("LAB", bands + [Image.new("L", rgb.size, 128)] * 2), _grey(grey)
    if mode == "CMYK":
        inverse = [Image.fromarray(255 - color[..., band]) for band in range(3)]
        return Image.merge("CMYK", [*inverse, Image.new("L", rgb.size, 0)]), color
    return rgb.convert(mode), color


def _crafted(folder: Path, grey: np.ndarray) -> list[Case]:
    """What Pillow reads but does not write, or writes in one way of several."""
    color, bits = colored(grey), np.where(grey >= 128, 1, 0)
    seen = np.ones(grey.shape, bool)
    hidden = grey == grey.max()
    levels = grey.astype(np.uint16) * 257
    cases = []

    def add(name: str, shown: np.ndarray, content: bytes | None = None) -> None:
        if content is not None:
            (folder / name).write_bytes(content)
        cases.append(Case(name, folder / name, shown, True, 0))

    for depth in (1, 2, 4):  # grey of few bits, with a transparent level
        top = 2**depth - 1
        few = grey.astype(np.uint16) * top // 255
        seen = few != top
        shown = _grey((few * 255 // top).astype(np.uint8))
        add(f"grey{depth}.png", shown, png(few, depth, 0))
        add(f"grey{depth}_transparent.png", shown * seen[..., None], png(few, depth, 0, struct.pack(">H", top)))
    short_grey = png(levels, 16, 0, struct.pack(">H", int(levels.max())))
    add("grey16_transparent.png", _grey(grey) * ~hidden[..., None], short_grey)
    add("rgb16.png", color, png(color.astype(np.uint16) * 257, 16, 2))
    alpha = np.where(hidden, 0, 65535).astype(np.uint16)
    add("grey16_alpha.png", _grey(grey) * ~hidden[..., None], png(np.stack([levels, alpha], -1), 16, 4))
    rgba = np.concatenate([color.astype(np.uint16) * 257, alpha[..., None]], -1)
    add("rgba16.png", color * ~hidden[..., None], png(rgba, 16, 6))
    key = color[hidden][0]
    with_key = np.where((color == key).all(-1, keepdims=True), 0, color)
    add("rgb8_key.png", with_key, png(color.astype(np.uint16), 8, 2, struct.pack(">HHH", *(int(v) for v in key))))
    wide_key = struct.pack(">HHH", *(int(value) * 257 for value in key))
    add("rgb16_key.png", with_key, png(color.astype(np.uint16) * 257, 16, 2, wide_key))

    values = np.unique(grey)
    indices = np.searchsorted(values, grey).astype(np.uint8)
    palette = Image.fromarray(indices)
    palette.putpalette(colored(values[:, None]).reshape(-1).tobytes())
    palette.save(folder / "palette_index.png", transparency=len(values) - 1)
    add("palette_index.png", color * ~hidden[..., None])
    palette.save(folder / "palette_alphas.png", transparency=bytes([255] * (len(values) - 1) + [0]))
    add("palette_alphas.png", color * ~hidden[..., None])
    palette.save(folder / "palette_lossless.webp", lossless=True)
    add("palette_lossless.webp", color)

    add("white_is_zero16.tif", _grey(grey), tiff((65535 - levels).astype("<u2"), photometric=0))
    add("white_is_zero8.tif", _grey(grey), tiff(255 - grey, photometric=0))
    add(
        "white_is_zero1.tif",
        _grey((bits * 255).astype(np.uint8)),
        tiff(np.packbits(1 - bits, axis=1), 0, grey.shape, 1),
    )
    return cases


def png(values: np.ndarray, depth: int, color_type: int, transparency: bytes = b"") -> bytes:
    """Returns a PNG of any depth and colour type (ISO 15948)."""
    rows = []
    for row in values.reshape(values.shape[0], -1):
        if depth == 16:
            packed = row.astype(">u2").tobytes()
        elif depth == 8:
            packed = row.astype(np.uint8).tobytes()
        else:
            bits = (row[:, None] >> np.arange(depth)[::-1]) & 1
            packed = np.packbits(bits.reshape(-1).astype(np.uint8)).tobytes()
        rows.append(b"\0" + packed)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], depth, color_type, 0, 0, 0)
    chunks = [(b"IHDR", header), *([(b"tRNS", transparency)] if transparency else [])]
    chunks += [(b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    crc = [struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks]
    body = (struct.pack(">I", len(data)) + name + data + end for (name, data), end in zip(chunks, crc))
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def tiff(values: np.ndarray, photometric: int, shape: tuple[int, int] | None = None, bits: int | None = None) -> bytes:
    """Returns an uncompressed little-endian TIFF of one channel."""
    height, width = shape or (values.shape[0], values.shape[1])
    data = values.tobytes()
    tags = {256: width, 257: height, 258: bits or values.itemsize * 8, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags.update({278: height, 279: len(data)})
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


def save_turned(shown: np.ndarray, path: Path, orientation: int) -> None:
    """Saves a picture so that a viewer which heeds its orientation shows ``shown``."""
    stored = Image.fromarray(np.ascontiguousarray(UNTURNED[orientation](shown)))
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    options: dict[str, Any] = {"quality": 95} if path.suffix in (".jpg", ".webp") else {}
    stored.save(path, exif=tags, **options)
