"""Picture files, read as a viewer shows them: the one place where photos, masks, labels and depths are opened.

The rule for all four: the orientation that the file notes (EXIF or XMP) is applied, and no array is made of stored
numbers before they are brought to their meaning. Photos and masks are what is shown: palettes are looked up, 16 bits
become 8, CMYK, YCbCr and LAB become RGB, a colour profile that is not sRGB is applied, transparency becomes an alpha
channel. Labels and depths are numbers: their
values, and a palette's indices, are kept. What has no such meaning (32 bits or floating point as a photo, colours as
labels) is refused by file and mode.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Integer, UInt8
from PIL import ExifTags, Image, ImageOps

from fit3d_ns.data.folders import spelled_otherwise
from fit3d_ns.data.photos.color_profiles import to_srgb
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.foreign_files import what_it_is

Kind = Literal["photo", "mask", "label file", "depth map"]
"""What a file is for, as errors call it."""

_SHORT = ("I;16", "I;16B", "I;16L", "I;16N")
_LABEL_MODES = ("1", "L", "P", "I", *_SHORT)
_DEPTH_MODES = ("L", "I", *_SHORT)
_DEPTH_ARRAYS = (".npy", ".npz", ".exr", ".pfm")
"""What others store depth in."""
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_GREY_LEVELS = {"L;2": 85, "L;4": 17}
"""What a PNG's grey of 2 or 4 bits is multiplied by when it is decoded to 8."""
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
"""Formats that may make 1 of a 0."""
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
"""TIFF tags."""
_SAME_SHAPE = 0.02
"""Relative difference of the aspect ratios of two pictures that still show the same view, one of them resized."""
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, Image.DecompressionBombError)


def open_photo(
    path: Path, content: bytes | None = None, scale_factor: float = 1.0
) -> UInt8[np.ndarray, "H W 3"] | UInt8[np.ndarray, "H W 4"]:
    """Reads a photo in the colours that a viewer shows.

    Args:
        path: The file: any format and mode that Pillow reads.
        content: Its bytes, if they were read already.
        scale_factor: Factor by which height and width are multiplied (rounded down), bilinear.

    Returns:
        8-bit RGB, or RGBA where the file holds transparency.

    Raises:
        UserError: If the file is missing or damaged, or its mode has no meaning in 8 bits (32 bits, floating point);
            the sentence names the file.
    """
    with _opened(path, content, "photo") as picture:
        shown = _as_shown(picture, path, "photo")
        if scale_factor != 1.0:
            size = (int(shown.width * scale_factor), int(shown.height * scale_factor))
            if min(size) < 1:
                raise UserError(
                    f"The photo {path} of {shown.width}x{shown.height} pixels has none left at the scale "
                    f"{scale_factor:g}: choose a larger one."
                )
            shown = shown.resize(size, resample=Image.Resampling.BILINEAR)
        return np.array(shown)  # writable, as torch wants it


def over_black(image: UInt8[np.ndarray, "H W c"]) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a photo with its transparent parts black.

    Args:
        image: 8-bit RGB or RGBA.
    """
    if image.shape[2] == 3:
        return image
    values = image.astype(np.float32) / 255.0
    return np.clip(np.round(values[..., :3] * values[..., 3:] * 255.0), 0, 255).astype(np.uint8)


def open_mask(path: Path, size: tuple[int, int] | None = None, photo: Path | None = None) -> Bool[np.ndarray, "H W"]:
    """Reads a mask: what is shown white counts, what is shown black or transparent does not, half is the threshold.

    Args:
        path: The file: any format and mode that `open_photo` reads.
        size: Height and width of the photo, pixels; a mask of another size, but of the same shape, is resized to it.
        photo: The mask's photo, for the sentence about a mask of another shape.

    Returns:
        True where the photo counts.

    Raises:
        UserError: If the file is missing or damaged, has another shape than its photo, or holds 0 and 1 only, which
            is all black to whoever looks at it.
    """
    with _opened(path, None, "mask") as picture:
        exact = picture.format not in _LOSSY
        shown = _as_shown(picture, path, "mask")
    if shown.mode == "RGBA":
        black = Image.new("RGBA", shown.size, (0, 0, 0, 255))
        shown = Image.alpha_composite(black, shown)
    grey = shown.convert("L")
    lowest, highest = grey.getextrema()
    if exact and highest == 1:
        raise UserError(
            f"The mask {path} holds the values {'0 and 1' if lowest == 0 else '1'} of 255, which is black all over: "
            "save white as 255."
        )
    if size is not None and (grey.height, grey.width) != size:
        height, width = size
        if abs(grey.width * height - grey.height * width) > _SAME_SHAPE * grey.width * height:
            raise UserError(
                f"The mask {path} has {grey.width}x{grey.height} pixels and its photo{f' {photo}' if photo else ''} "
                f"{width}x{height}: a mask must show the same picture as its photo, at any size."
            )
        grey = grey.resize((width, height), resample=Image.Resampling.BILINEAR)
    return np.asarray(grey) >= 128


def open_labels(path: Path) -> Integer[np.ndarray, "H W"]:
    """Reads class ids: the values of a grey picture, or the indices of a palette picture.

    Args:
        path: The file, of 1, 8, 16 or 32 bits.

    Returns:
        The ids as they are stored, turned as the file's orientation says.

    Raises:
        UserError: If the file is missing, damaged, or a picture of colours.
    """
    advice = "not of class ids: save one value per pixel (8-bit grey or palette PNG)."
    return _values(path, "label file", _LABEL_MODES, advice)


def open_depth(path: Path) -> Integer[np.ndarray, "H W"]:
    """Reads a depth map in the units in which it is stored.

    Args:
        path: The file: a 16-bit PNG, or another format with one whole number for each pixel.

    Returns:
        The values as they are stored, turned as the file's orientation says.

    Raises:
        UserError: If the file is missing or damaged, or holds colours or floating point.
    """
    return _values(path, "depth map", _DEPTH_MODES, "and depth must be 16-bit PNG: convert it.")


def picture_size(path: Path, kind: Kind = "photo") -> tuple[int, int]:
    """Returns height and width of a picture as it is shown, in pixels, from its header.

    Args:
        path: The file.
        kind: What it is, for errors.

    Raises:
        UserError: If the file is missing or its header is damaged.
    """
    with _opened(path, None, kind) as picture:
        orientation = _orientation(picture)
        if orientation >= 5 and picture.format == "TIFF":
            picture.load()  # Pillow turns TIFF pictures itself; when it says so depends on its version
        elif orientation >= 5:
            return picture.width, picture.height
        return picture.height, picture.width


def turned_by(path: Path) -> int:
    """Returns the EXIF orientation of a picture, 1 (as it is stored) to 8.

    Args:
        path: A photo.
    """
    with _opened(path, None, "photo") as picture:
        return _orientation(picture)


@contextmanager
def _opened(path: Path, content: bytes | None, kind: Kind) -> Iterator[Image.Image]:
    """Opens a picture, and turns whatever is wrong with the file, then or later, into one sentence."""
    if kind == "depth map" and path.suffix.lower() in _DEPTH_ARRAYS and path.is_file():
        raise UserError(f"The depth map {path} is no picture of whole numbers: depth must be 16-bit PNG; convert it.")
    try:
        # Not by its name: Pillow would map an uncompressed TIFF into memory, and garbles one that lies on its side.
        with open(path, "rb") if content is None else io.BytesIO(content) as file, Image.open(file) as picture:
            yield picture
    except UserError:
        raise
    except FileNotFoundError:
        raise _missing(path, kind) from None
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"The {kind} {path} cannot be read ({error.strerror}): make it readable.") from error
    except _DAMAGED as error:
        detail: object = error
        if isinstance(error, Image.UnidentifiedImageError):
            detail = what_it_is(path, content) or "its format is unknown"
        raise UserError(f"The {kind} {path} is truncated or not an image ({detail}): replace it.") from error


def _missing(path: Path, kind: Kind) -> UserError:
    there = spelled_otherwise(path)
    if there is not None:
        return UserError(f"The {kind} {path} is missing, but {there} is there, spelled otherwise: name that.")
    return UserError(f"The {kind} {path} is missing: restore it, or take it out of what names it.")


def _orientation(picture: Image.Image) -> int:
    try:
        orientation = int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF of any kind says nothing, and viewers show such pictures as they are stored
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _turn(picture: Image.Image) -> None:
    """Applies the noted orientation, in place."""
    picture.load()
    if _orientation(picture) != 1:
        ImageOps.exif_transpose(picture, in_place=True)


def _values(path: Path, kind: Kind, modes: tuple[str, ...], advice: str) -> Integer[np.ndarray, "H W"]:
    with _opened(path, None, kind) as picture:
        if picture.mode not in modes:
            raise UserError(f"The {kind} {path} is a picture of mode {picture.mode}, {advice}")
        _turn(picture)
        values = np.asarray(picture)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype.kind == "i" and values.min(initial=0) < 0:
        raise UserError(f"The {kind} {path} holds the negative value {values.min()}: save values from 0 on.")
    return values.astype(values.dtype.newbyteorder("="))


def _as_shown(picture: Image.Image, path: Path, kind: Kind) -> Image.Image:
    """Returns an opened picture in 8-bit RGB, or RGBA where it holds transparency, turned."""
    # Known only before the pixels are decoded.
    tiles = getattr(picture, "tile", None)
    raw_mode = tiles[0][3] if tiles else None
    tags = getattr(picture, "tag_v2", {})
    sample_bits, inverted = tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_PHOTOMETRIC) == 0
    _turn(picture)
    if picture.mode in _SHORT or (picture.mode == "I" and picture.format == "PNG"):
        return _short_as_shown(picture, sample_bits, inverted)
    if picture.mode in ("I", "F"):
        what = "32-bit whole numbers" if picture.mode == "I" else "floating point numbers"
        raise UserError(
            f"The {kind} {path} holds {what} (mode {picture.mode}), and nothing says which of them is white: save it "
            "with 8 or 16 bits."
        )
    if picture.mode in _PREMULTIPLIED:
        picture = picture.convert(_PREMULTIPLIED[picture.mode])
    transparent = picture.info.get("transparency")
    if transparent is not None and raw_mode in _GREY_LEVELS:
        picture.info["transparency"] = transparent * _GREY_LEVELS[raw_mode]
    elif isinstance(transparent, tuple) and raw_mode == "RGB;16B":
        picture.info["transparency"] = tuple(value >> 8 for value in transparent)
    picture = to_srgb(picture)
    wanted = "RGBA" if picture.has_transparency_data else "RGB"
    return picture if picture.mode == wanted else picture.convert(wanted)


def _short_as_shown(picture: Image.Image, sample_bits: int, inverted: bool) -> Image.Image:
    """Scales grey of 9 to 16 bits to 8: the upper 8 bits, as Pillow does with colours of 16 bits."""
    values = np.asarray(picture).astype(np.int32)
    levels = 2 ** (sample_bits if 8 < sample_bits <= 16 else 16)
    transparent = picture.info.get("transparency")
    grey = np.clip(values * 256 // levels, 0, 255).astype(np.uint8)
    if inverted:
        grey = 255 - grey
    if transparent is None:
        shown = Image.fromarray(grey)
        shown.info["icc_profile"] = picture.info.get("icc_profile")
        return to_srgb(shown).convert("RGB")
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("RGBA", [Image.fromarray(band) for band in (grey, grey, grey, alpha)])
