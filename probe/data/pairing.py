"""Lists of samples from folders and list files."""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fit3d_ns.data.folders import PHOTO_SUFFIXES, list_photos
from fit3d_ns.support.errors import UserError
from probe.data.base import Sample


def pair_folders(
    images: Path,
    targets: Path,
    layout: str,
    left_out: Counter[str],
    image_prefix: str = "",
    target_prefix: str = "",
) -> list[Sample]:
    """Pairs the photos of a folder with the PNGs of another by their names.

    Args:
        images: Folder of photos, not searched below.
        targets: Folder of PNGs with the same names.
        layout: The layout expected, for errors.
        left_out: Here is counted which entries of both folders were left out, by the reason.
        image_prefix: Cut from a photo's name before its truth is looked for.
        target_prefix: Put before the rest.

    Returns:
        Samples in the order of their names.

    Raises:
        UserError: If a folder is missing or empty, a photo has no truth, or two photos have the same.
    """
    for folder in (images, targets):
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}; the layout expected is: {layout}.")
    photos, truths = list_photos(images), list_photos(targets)
    left_out.update(photos.left_out)
    left_out.update(truths.left_out)
    if not photos.photos:
        raise UserError(f"{images} holds no photo ({', '.join(PHOTO_SUFFIXES)}); the layout expected is: {layout}.")
    known = {path.stem: path for path in truths.photos if path.suffix.lower() == ".png"}
    samples, taken = [], {}
    for photo in photos.photos:
        stem = target_prefix + photo.stem.removeprefix(image_prefix)
        if stem not in known:
            other = next((path for path in targets.glob(f"{glob.escape(stem)}.*") if path.stem == stem), None)
            if other is not None:
                raise UserError(
                    f"{other}, the truth of {photo.name}, is no PNG: depth must be 16-bit PNG, and class ids 8-bit "
                    "PNG; convert it."
                )
            raise UserError(f"{photo} has no truth {targets / stem}.png; the layout expected is: {layout}.")
        if stem in taken:
            raise UserError(f"{taken[stem]} and {photo} have one truth, {known[stem]}: rename or remove one of them.")
        taken[stem] = photo
        samples.append(Sample(photo, known[stem], photo.stem))
    if len(truths.photos) > len(samples):
        left_out["truths without a photo"] += len(truths.photos) - len(samples)
    return samples


def left_out_note(left_out: Counter[str]) -> tuple[str, ...]:
    """Returns what the report says of entries that were left out: one sentence, or none.

    Args:
        left_out: Counted by `pair_folders`.
    """
    if not left_out:
        return ()
    return (f"Left out of the folders: {', '.join(f'{count} {reason}' for reason, count in left_out.items())}.",)


def read_lines(path: Path, flag: str) -> list[str]:
    """Reads the lines of a list file that are not empty.

    Args:
        path: The list, a text file.
        flag: By which the user names it, for the sentence.

    Returns:
        The lines, stripped.

    Raises:
        UserError: If it cannot be read as text or holds nothing.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"The list {path} cannot be read ({error.strerror}): check {flag}.") from None
    except UnicodeDecodeError:
        raise UserError(f"The list {path} is no text file: check {flag}.") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"The list {path} is empty: check {flag}.")
    return lines


def samples_from_pairs(
    lines: Sequence[str],
    root: Path,
    image_folders: Sequence[str],
    target_folders: Sequence[str],
    source: str,
    layout: str,
) -> list[Sample]:
    """Reads lines of ``image truth [focal]``, with paths below a data folder.

    Lines whose truth is ``None`` are left out (45 of KITTI's Eigen test list). Samples are put in the order of their
    photos' names, as the references do.

    Args:
        lines: The list.
        root: The data folder.
        image_folders: Folders below it that photos may lie in, tried in turn for each line.
        target_folders: The same for the truth.
        source: Where the list came from, for errors.
        layout: The layout expected, for errors.

    Returns:
        Samples.

    Raises:
        UserError: If a line is malformed or a file is missing.
    """
    samples = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if len(words) < 2:
            raise UserError(f"Line {number} of {source} is {line!r}: expected 'image truth'.")
        image_name, target_name = (word.lstrip("/") for word in words[:2])
        if target_name == "None":
            continue
        image = _find(root, image_folders, image_name)
        target = _find(root, target_folders, target_name)
        for found, name in ((image, image_name), (target, target_name)):
            if found is None:
                raise UserError(f"{name}, which {source} lists, is not below {root}; the layout expected is: {layout}.")
        assert image is not None and target is not None
        samples.append(Sample(image, target, image_name.rpartition(".")[0].replace("/", "_")))
    return sorted(samples, key=lambda sample: str(sample.image))


def _find(root: Path, folders: Sequence[str], name: str) -> Path | None:
    for folder in folders:
        for spelling in (name, name.replace("\\", "/")):
            path = root / folder / spelling
            if path.is_file():
                return path
    return None
