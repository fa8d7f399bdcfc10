"""Samples on disk, and what a data set says of them; reading them, with errors that name the file."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from fit3d_ns.data.photos.picture_files import open_depth, open_labels, open_photo, over_black, picture_size
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.samples import evenly_spaced
from probe.data.choice import Kind

IGNORE = 255
"""Label of pixels that count neither in a loss nor in a metric."""


@dataclass(frozen=True)
class Sample:
    """A photo and its truth."""

    image: Path
    """8-bit colour photo."""
    target: Path
    """Index PNG for segmentation, 16-bit PNG for depth."""
    name: str
    """Short and unique within the split, for reports."""
    intrinsics: tuple[float, float, float, float] | None = None
    """fx, fy, cx, cy in pixels of the photo, where known; needed for normals."""


@dataclass(frozen=True)
class LabelRule:
    """How the values of an index PNG become class ids."""

    num_classes: int
    """Class ids run from 0 to one less."""
    zero_is_ignored: bool = False
    """Whether 0 means "no class" and k means class k - 1 (ADE20K, NYU40)."""
    ids: tuple[int, ...] | None = None
    """Value of each class, where only some values are classes; all other values are ignored."""

    def apply(self, values: np.ndarray, path: Path) -> np.ndarray:
        """Maps PNG values to class ids 0..num_classes-1 and 255.

        Args:
            values: [H, W] as the PNG holds them.
            path: Of the PNG, for the sentence.

        Returns:
            uint8 [H, W].

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
    """For people."""
    kind: Kind
    """Which truth its samples have."""
    train: Sequence[Sample]
    """Samples that heads are fitted to."""
    test: Sequence[Sample]
    """Samples that results are reported on."""
    validation: Sequence[Sample] | None = None
    """Split of its own for choices, where the data set has one besides the split that results are reported on."""
    classes: tuple[str, ...] = ()
    """Names by class id; empty for depth."""
    colors: tuple[tuple[int, int, int], ...] | None = None
    """Colour of each class, 0..255, where the data set has some."""
    labels: LabelRule | None = None
    """Of segmentation; None for depth."""
    depth_scale: float = 1000.0
    """PNG units in a metre."""
    max_depth: float = 10.0
    """Cap in metres: beyond it depth is neither predicted nor evaluated."""
    fit: Literal["equal", "image_to_target", "target_to_image"] = "equal"
    """What to do where photo and truth differ in size: an error, or resize one of them."""
    notes: tuple[str, ...] = field(default=())
    """Sentences that the report must say about the splits."""


def file_stamp(path: Path) -> tuple[int, int]:
    """Returns what tells a changed file: its size and the time of its last change.

    Args:
        path: A file.

    Raises:
        UserError: If there is no such file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the data folder.") from None
    return status.st_size, status.st_mtime_ns


def data_identity(data: ProbeData) -> dict[str, Any]:
    """Describes a data set by its files and rules.

    Args:
        data: The data set.

    Returns:
        JSON-able, equal for equal data.

    Raises:
        UserError: If a file is missing.
    """
    digest = hashlib.blake2b(digest_size=12)
    for samples in (data.train, data.validation or (), data.test):
        for sample in samples:
            stamps = [(path.name, *file_stamp(path)) for path in (sample.image, sample.target)]
            digest.update(f"{sample.name}|{stamps}|{sample.intrinsics}\n".encode())
        digest.update(b"--\n")
    return {
        "name": data.name,
        "files": digest.hexdigest(),
        "train": len(data.train),
        "test": len(data.test),
        "classes": list(data.classes),
        "labels": asdict(data.labels) if data.labels else None,
        "depth_scale": data.depth_scale,
        "max_depth": data.max_depth,
    }


def read_image(path: Path) -> np.ndarray:
    """Reads a photo as uint8 RGB [H, W, 3], as it is shown over black.

    Args:
        path: The file.

    Returns:
        uint8 [H, W, 3].

    Raises:
        UserError: If the file is missing, damaged or of a mode that has no meaning in 8 bits.
    """
    return over_black(open_photo(path))


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
    if data.kind == "segmentation":
        assert data.labels is not None
        target = data.labels.apply(open_labels(sample.target), sample.target)
    else:
        target = open_depth(sample.target).astype(np.float32) / np.float32(data.depth_scale)
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

    Args:
        data: Says which sizes may differ.
        sample: For the sentence.
        image: Height and width of the photo, pixels.
        target: Height and width of the truth, pixels.

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


HEADERS_CHECKED = 4000
"""Files of which the size is checked beforehand, per split; evenly spread where there are more."""
CONTENTS_CHECKED = 100
"""Samples that are read beforehand, per split; the others are checked as they are read."""
_CLOSEST_SCENE = 0.3
"""Metres; depths that all lie below are remarked on."""


@dataclass(frozen=True)
class DataSummary:
    """What the check saw."""

    labels_seen: int
    """Classes that occur in the samples that were read (segmentation)."""
    valid_share: float
    """Share of pixels with a class, or with a depth up to the cap."""
    remarks: tuple[str, ...] = ()
    """Sentences on what looks wrong but may be right."""


def check_data(data: ProbeData) -> DataSummary:
    """Checks a data set before training.

    Args:
        data: The data set.

    Returns:
        What the samples that were read hold.

    Raises:
        UserError: If a split is empty, a file is damaged or holds what it must not, photo and truth differ in size,
            no pixel has a truth, or the number of classes is not one that 8-bit labels hold.
    """
    if data.kind == "segmentation" and not 2 <= len(data.classes) <= IGNORE:
        raise UserError(
            f"{data.name} has {len(data.classes)} class{'es' * (len(data.classes) != 1)}, and segmentation needs 2 to "
            f"{IGNORE} ({IGNORE} marks ignored pixels): check the label files and the class list."
        )
    seen: set[int] = set()
    valid, total = 0, 0
    nearest, farthest = float("inf"), 0.0
    for split, samples in (("training", data.train), ("validation", data.validation), ("test", data.test)):
        if samples is None:
            continue
        if not samples:
            raise UserError(f"The {split} split of {data.name} has no sample: check --data and --split-file.")
        for sample in evenly_spaced(samples, HEADERS_CHECKED):
            _check_header(data, sample)
        split_valid = 0
        chosen = evenly_spaced(samples, CONTENTS_CHECKED)
        for sample in chosen:
            _, target = read_sample(data, sample)
            if data.kind == "segmentation":
                present = np.unique(target)
                seen.update(int(value) for value in present if value != 255)
                known = int((target != 255).sum())
            else:
                within = (target > 0) & (target <= data.max_depth)
                known = int(within.sum())
                nearest = float(np.min(target, where=within, initial=nearest))
                farthest = float(np.max(target, where=within, initial=farthest))
            split_valid += known
            total += target.size
        if not split_valid:
            raise UserError(_nothing_valid(data, chosen[0], split))
        valid += split_valid
    return DataSummary(len(seen), valid / max(1, total), _range_remark(data, nearest, farthest))


def check_crops(data: ProbeData, crop_of: Callable[[int, int], tuple[int, int]]) -> None:
    """Checks that the training crops of all photos have one size, as those of a step must.

    Args:
        data: The data set.
        crop_of: Returns the size of a crop, given height and width of a photo.

    Raises:
        UserError: If not.
    """
    first: tuple[Path, tuple[int, int]] | None = None
    for sample in evenly_spaced(data.train, HEADERS_CHECKED):
        path = sample.target if data.fit == "image_to_target" else sample.image
        crop = crop_of(*picture_size(path))
        if first is None:
            first = path, crop
        elif crop != first[1]:
            raise UserError(
                f"{first[0]} gives training crops of {first[1][1]}x{first[1][0]} pixels and {path} of "
                f"{crop[1]}x{crop[0]}, but those of a step must be equal: resize the photos to one size, or take "
                "--protocol exact."
            )


def _nothing_valid(data: ProbeData, sample: Sample, split: str) -> str:
    if data.kind == "segmentation":
        return (
            f"All pixels of the {split} labels are ignored, for example in {sample.target}: check that they hold class "
            "ids."
        )
    return (
        f"No pixel of the {split} depths is valid, for example in {sample.target}: they must lie above 0 and not above "
        f"{data.max_depth:g} m at {data.depth_scale:g} units a metre (--depth-scale, --max-depth)."
    )


def _check_header(data: ProbeData, sample: Sample) -> None:
    kind = "label file" if data.kind == "segmentation" else "depth map"
    check_sizes(data, sample, picture_size(sample.image), picture_size(sample.target, kind))


def _range_remark(data: ProbeData, nearest: float, farthest: float) -> tuple[str, ...]:
    """A remark on depths that are all closer than anything in a photo is, as those in whole metres seem."""
    if data.kind == "segmentation" or farthest >= _CLOSEST_SCENE:
        return ()
    return (
        f"The depths of {data.name} reach from {nearest:g} m to {farthest:g} m at {data.depth_scale:g} units a metre, "
        "which is closer than photos are taken: if the files hold whole metres, give --depth-scale 1.",
    )
