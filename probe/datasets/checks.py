"""What can be known of a data set before training: files, sizes, labels, depths."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

from fit3d_ns.errors import UserError
from probe.datasets.samples import IGNORE, ProbeData, Sample, check_sizes, read_sample

HEADERS_CHECKED = 4000
"""Files of which the size is checked beforehand, per split; evenly spread where there are more."""
CONTENTS_CHECKED = 100
"""Samples that are read beforehand, per split; the others are checked as they are read."""


@dataclass(frozen=True)
class DataSummary:
    """What the check saw."""

    labels_seen: int
    """Classes that occur in the samples that were read (segmentation)."""
    valid_share: float
    """Share of pixels with a class, or with a depth up to the cap."""


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
    for split, samples in (("training", data.train), ("validation", data.validation), ("test", data.test)):
        if samples is None:
            continue
        if not samples:
            raise UserError(f"The {split} split of {data.name} has no sample: check --data and --split-file.")
        for sample in spread(samples, HEADERS_CHECKED):
            _check_header(data, sample)
        split_valid = 0
        chosen = spread(samples, CONTENTS_CHECKED)
        for sample in chosen:
            _, target = read_sample(data, sample)
            if data.kind == "segmentation":
                present = np.unique(target)
                seen.update(int(value) for value in present if value != 255)
                known = int((target != 255).sum())
            else:
                known = int(((target > 0) & (target <= data.max_depth)).sum())
            split_valid += known
            total += target.size
        if not split_valid:
            raise UserError(_nothing_valid(data, chosen[0], split))
        valid += split_valid
    return DataSummary(len(seen), valid / max(1, total))


def check_crops(data: ProbeData, crop_of: Callable[[int, int], tuple[int, int]]) -> None:
    """Checks that the training crops of all photos have one size, as those of a step must.

    Args:
        data: The data set.
        crop_of: Returns the size of a crop, given height and width of a photo.

    Raises:
        UserError: If not.
    """
    first: Optional[tuple[Path, tuple[int, int]]] = None
    for sample in spread(data.train, HEADERS_CHECKED):
        path = sample.target if data.fit == "image_to_target" else sample.image
        with Image.open(path) as image:
            crop = crop_of(image.height, image.width)
        if first is None:
            first = path, crop
        elif crop != first[1]:
            raise UserError(
                f"{first[0]} gives training crops of {first[1][1]}x{first[1][0]} pixels and {path} of "
                f"{crop[1]}x{crop[0]}, but those of a step must be equal: resize the photos to one size, or use --fast."
            )


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Returns at most ``count`` samples, evenly spread."""
    if len(samples) <= count:
        return list(samples)
    return [samples[(2 * k + 1) * len(samples) // (2 * count)] for k in range(count)]


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
    sizes = []
    for path in (sample.image, sample.target):
        try:
            with Image.open(path) as image:
                sizes.append((image.height, image.width))
        except FileNotFoundError:
            raise UserError(f"There is no file {path}: check the data folder or the list that names it.") from None
        except (OSError, SyntaxError, ValueError):
            raise UserError(f"{path} is damaged or no picture that can be read: get it again.") from None
    check_sizes(data, sample, *sizes)
