"""Samples on disk, and what a data set says of them; reading them, with errors that name the file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import numpy as np
from PIL import Image

from fit3d_ns.errors import UserError

IGNORE = 255
"""Label of pixels that count neither in a loss nor in a metric."""

Kind = Literal["segmentation", "depth", "normals"]


@dataclass(frozen=True)
class Sample:
    """A photo and its truth."""

    image: Path
    """8-bit colour photo."""
    target: Path
    """Index PNG for segmentation, 16-bit PNG for depth."""
    name: str
    """Short and unique within the split, for reports."""
    intrinsics: Optional[tuple[float, float, float, float]] = None
    """fx, fy, cx, cy in pixels of the photo, where known; needed for normals."""


@dataclass(frozen=True)
class LabelRule:
    """How the values of an index PNG become class ids."""

    num_classes: int
    zero_is_ignored: bool = False
    """Whether 0 means "no class" and k means class k - 1 (ADE20K, NYU40)."""
    ids: Optional[tuple[int, ...]] = None
    """Value of each class, where only some values are classes; all other values are ignored."""

    def apply(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Maps PNG values to class ids 0..num_classes-1 and 255.

        Raises:
            UserError: If a value is neither a class nor the ignore value.
        """
        if self.ids is not None:
            table = np.full(max(int(values.max(initial=0)), *self.ids) + 1, IGNORE, np.uint8)
            table[list(self.ids)] = np.arange(len(self.ids))
            return table[values]
        values = values.astype(np.int64)
        ignored = values == IGNORE
        if self.zero_is_ignored:
            ignored |= values == 0
            values = values - 1
        wrong = ~ignored & (values >= self.num_classes)
        if wrong.any():
            value = int(values[wrong][0]) + int(self.zero_is_ignored)
            raise UserError(
                f"{path} holds the label {value}, but the data set has {self.num_classes} classes "
                f"({'1' if self.zero_is_ignored else '0'} to {self.num_classes - (not self.zero_is_ignored)}, and 255 "
                "for ignored pixels): correct the label file, or the class list."
            )
        return np.where(ignored, IGNORE, values).astype(np.uint8)


@dataclass(frozen=True)
class ProbeData:
    """A data set as a probe sees it."""

    name: str
    kind: Kind
    train: Sequence[Sample]
    test: Sequence[Sample]
    validation: Optional[Sequence[Sample]] = None
    """Split of its own for choices, where the data set has one besides the split that results are reported on."""
    classes: tuple[str, ...] = ()
    colors: Optional[tuple[tuple[int, int, int], ...]] = None
    """Colour of each class, 0..255, where the data set has some."""
    labels: Optional[LabelRule] = None
    depth_scale: float = 1000.0
    """PNG units in a metre."""
    max_depth: float = 10.0
    """Cap in metres: beyond it depth is neither predicted nor evaluated."""
    fit: Literal["equal", "image_to_target", "target_to_image"] = "equal"
    """What to do where photo and truth differ in size: an error, or resize one of them."""
    notes: tuple[str, ...] = field(default=())
    """Sentences that the report must say about the splits."""


def read_image(path: Path) -> np.ndarray:
    """Reads a photo as uint8 RGB [H, W, 3].

    Raises:
        UserError: If the file is missing, damaged or no picture.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, error) from None


def read_index(path: Path) -> np.ndarray:
    """Reads an index PNG [H, W] without touching its values: palettes are not resolved to colours.

    Raises:
        UserError: If the file is missing, damaged or a colour picture.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "I", "I;16", "I;16B", "1"):
                raise UserError(
                    f"{path} is a picture of mode {image.mode}, not of class ids: save one value per pixel "
                    "(8-bit grey or palette PNG)."
                )
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(path, error) from None


def read_sample(data: ProbeData, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Reads a sample.

    Args:
        data: The data set, which knows how to read its truth.
        sample: One of its samples.

    Returns:
        Photo uint8 [H, W, 3], and truth of the same size: class ids uint8 [H, W] with 255 = ignored, or depth
        float32 [H, W] in metres with 0 = none.

    Raises:
        UserError: If a file is missing, damaged, of another size or holds other values than it may.
    """
    image = read_image(sample.image)
    values = read_index(sample.target)
    if data.kind == "segmentation":
        assert data.labels is not None
        target = data.labels.apply(values, sample.target)
    else:
        target = values.astype(np.float32) / np.float32(data.depth_scale)
    if image.shape[:2] == target.shape:
        return image, target
    check_sizes(data, sample, image.shape[:2], target.shape)
    height, width = target.shape if data.fit == "image_to_target" else image.shape[:2]
    if data.fit == "image_to_target":
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(resized), target
    # Never interpolated: between two surfaces, or two classes, there is nothing.
    rows = (np.arange(height) * target.shape[0]) // height
    columns = (np.arange(width) * target.shape[1]) // width
    return image, target[rows][:, columns]


def check_sizes(data: ProbeData, sample: Sample, image: tuple[int, ...], target: tuple[int, ...]) -> None:
    """Checks that photo and truth go together.

    Raises:
        UserError: If they differ in size where the data set does not allow it, or in shape.
    """
    if image == target:
        return
    same_view = abs(image[1] * target[0] - target[1] * image[0]) <= 0.02 * image[1] * target[0]
    if data.fit == "equal" or not same_view:
        raise UserError(
            f"{sample.target} has {target[1]}x{target[0]} pixels but its photo {sample.image} has "
            f"{image[1]}x{image[0]}: both must show the same picture at the same size."
        )


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    if isinstance(error, FileNotFoundError):
        return UserError(f"There is no file {path}: check the data folder or the list that names it.")
    return UserError(f"{path} is damaged or no picture that can be read: get it again.")
