"""Photos as a bundle describes them: found again after a move, checked against their hash, undistorted."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from fit3d_ns.data.photos.lenses import Lens, undistort
from fit3d_ns.data.photos.picture_files import open_photo, over_black
from fit3d_ns.support.errors import UserError

DATA_ROOT_FLAG = "--data-root"
_LARGEST = 2**17
"""Pixels of the side of any photo."""


@dataclass(frozen=True)
class BundledPhoto:
    """A photo as a file, and what turns it into the picture that a pinhole camera describes."""

    path: str
    """Absolute path on the machine where the photo was described."""
    sha256: str
    """Hash of the file's bytes."""
    height: int
    """Height of the picture that `read_photo` returns, pixels."""
    width: int
    """Width of the picture that `read_photo` returns, pixels."""
    lens: Lens | None = None
    """None for a photo without distortion."""
    scale_factor: float = 1.0
    """Factor by which the file's picture is resized first."""
    alpha_color: tuple[float, float, float] | None = None
    """Colour in [0, 1] behind transparent parts where the scene asks for one; they are black otherwise."""

    def __post_init__(self) -> None:
        """Refuses what no photo can be."""
        if not self.path or "\0" in self.path:
            raise ValueError(f"path is {self.path!r}, no path")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 is {self.sha256[:80]!r}, no SHA-256")
        for name in ("height", "width"):
            if not 1 <= getattr(self, name) <= _LARGEST:
                raise ValueError(f"{name} is {getattr(self, name)}, not from 1 to {_LARGEST} pixels")
        if not 0 < self.scale_factor <= _LARGEST:
            raise ValueError(f"scale_factor is {self.scale_factor}, not positive")
        if self.alpha_color is not None and not all(0 <= value <= 1 for value in self.alpha_color):
            raise ValueError(f"alpha_color is {list(self.alpha_color)}, not from 0 to 1")

    def content_key(self) -> str:
        """Returns a hash of everything that decides what `read_photo` returns, the path excepted."""
        facts = (self.sha256, self.height, self.width, self.lens, self.scale_factor, self.alpha_color)
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, hexadecimal.

    Args:
        path: A file of any kind.

    Raises:
        UserError: If it cannot be read.
    """
    return hashlib.sha256(_read_bytes(path)).hexdigest()


def locate(path: Path, data_root: Path | None) -> Path:
    """Finds a file or folder that may have moved.

    Args:
        path: Where it was.
        data_root: Folder below which to look for it: the longest end of ``path`` that exists there is taken, for a
            folder at last ``data_root`` itself. None: it is where it was.

    Returns:
        Where it is.

    Raises:
        UserError: If it is not there.
    """
    if data_root is None:
        if not path.exists():
            raise UserError(f"{path} is missing: restore it, or name the folder it moved to with {DATA_ROOT_FLAG}.")
        return path
    parts = path.parts[1:] if path.is_absolute() else path.parts
    for first in range(len(parts)):
        candidate = data_root.joinpath(*parts[first:])
        if candidate.exists():
            return candidate
    if not path.suffix and data_root.is_dir():
        return data_root  # a scene's folder that was renamed
    raise UserError(f"Nothing below {data_root} looks like {path}: check {DATA_ROOT_FLAG}.")


def read_photo(photo: BundledPhoto, data_root: Path | None = None) -> UInt8[Tensor, "H W 3"]:
    """Reads a photo as its pinhole camera sees it: resized, undistorted, transparent parts filled.

    The same pixels as nerfstudio's data manager gives for an 8-bit image cache.

    Args:
        photo: Which.
        data_root: See `locate`.

    Returns:
        8-bit RGB.

    Raises:
        UserError: If the file is missing, unreadable, or not the one that was described.
    """
    path = locate(Path(photo.path), data_root)
    content = _read_bytes(path)
    if hashlib.sha256(content).hexdigest() != photo.sha256:
        raise UserError(
            f"The photo {path} is not the one that the scene was made with (its hash differs): restore it, or train "
            "and bundle the scene again."
        )
    image = open_photo(path, content, photo.scale_factor)
    if photo.alpha_color is not None and image.shape[2] == 4:
        alpha = image[:, :, 3:].astype(np.float32) / 255.0
        background = 255.0 * np.asarray(photo.alpha_color, dtype=np.float32) * (1.0 - alpha)
        image = np.clip(image[:, :, :3] * alpha + background, 0, 255).astype(np.uint8)
    if photo.lens is not None:
        image = undistort(image, photo.lens).image
    image = over_black(image)
    if image.shape != (photo.height, photo.width, 3):
        raise UserError(
            f"The photo {path} gives a picture of {image.shape[1]}x{image.shape[0]} pixels, but its camera describes "
            f"{photo.width}x{photo.height}: bundle the scene again."
        )
    return torch.from_numpy(np.ascontiguousarray(image))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"The photo {path} cannot be read ({error.strerror or error}): restore it.") from error
