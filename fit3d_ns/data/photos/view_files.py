"""Which files the views of a scene read: each its own, photo and mask there, smaller copies told by whole names."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from fit3d_ns.data.folders import spelled_otherwise
from fit3d_ns.data.photos.picture_files import open_mask
from fit3d_ns.support.errors import UserError

_SMALLER_FOLDER = re.compile(r"(.+)_\d+")
"""A folder of smaller copies: images_2, masks_4."""


class ViewFiles(Protocol):
    """Files of a split, in the order of its cameras."""

    @property
    def image_filenames(self) -> list[Path]:
        """One photo for each view."""
        ...

    cameras: Any
    """nerfstudio's ``Cameras``."""


def check_views_read_their_own_files(*splits: ViewFiles) -> None:
    """Checks that no two views read the same file; a view that stands in two splits with one camera counts once.

    Args:
        splits: All splits of a scene, before anything was undistorted.

    Raises:
        UserError: Naming the file.
    """
    seen: dict[str, Any] = {}
    for split in splits:
        in_this_split: set[str] = set()
        for index, path in enumerate(split.image_filenames):
            file, pose = os.path.realpath(path), split.cameras.camera_to_worlds[index]
            # nerfstudio's --eval-mode all evaluates the training views.
            twice = file in in_this_split or (file in seen and not bool((seen[file] == pose).all()))
            if twice:
                copy = "" if _SMALLER_FOLDER.fullmatch(Path(path).parent.name) is None else _COPIES_ADVICE
                raise UserError(
                    f"Two views of the scene read the photo {path}: give each view a photo of its own, or remove one "
                    f"of them.{copy}"
                )
            in_this_split.add(file)
            seen[file] = pose


_COPIES_ADVICE = (
    " In a folder of smaller copies, photos of one name from several folders hide each other: keep the folders below "
    "it, or read the originals (`nerfstudio-data --downscale-factor 1` at the end of the command)."
)


def check_photos_exist(image_filenames: Iterable[Path]) -> None:
    """Looks for every photo of a split, without opening any.

    Args:
        image_filenames: The photos.

    Raises:
        UserError: Naming the first that is missing.
    """
    for path in image_filenames:
        if not Path(path).is_file():
            raise missing_photo(Path(path))


def missing_photo(path: Path, scene: Path | None = None) -> UserError:
    """Returns the error about a photo that a scene names and that is not there; says what is there in its place.

    Args:
        path: As the scene's dataparser names it.
        scene: The scene's folder, to look for photos whose names came from another machine.
    """
    if path.is_symlink():
        return UserError(f"The photo {path} is a link to {os.readlink(path)}, which is missing: get that file too.")
    if (there := spelled_otherwise(path)) is not None:
        return UserError(
            f"The photo {path} is missing, but {there} is there, spelled otherwise: let the scene name that."
        )
    here = None if scene is None else scene / path.parent.name / path.name
    if here is not None and here != path and here.is_file():
        return UserError(
            f"The photo {path} is missing, but {here} is there: name photos relative to the scene's folder, without "
            "the path that they had on another machine."
        )
    return UserError(f"The photo {path} is missing: restore it, or remove it from the scene.")


def check_masks_show_something(mask_filenames: Sequence[Path] | None) -> None:
    """Checks that not all of a scene is masked; the masks are opened up to the first in which something counts.

    Args:
        mask_filenames: All of them; None where there are none.

    Raises:
        UserError: If every mask is black all over; or, naming it, if one that is opened is damaged.
    """
    if mask_filenames and not any(open_mask(path).any() for path in mask_filenames):
        raise UserError(
            f"All {len(mask_filenames)} masks of the scene are black all over ({mask_filenames[0]}), so that nothing "
            "of any photo counts: save white (255) where photos count, or leave out mask_path."
        )


def find_masks(mask_filenames: Sequence[Path] | None, scene: Path) -> list[Path] | None:
    """Looks for every mask of a split; where there is no smaller copy of one, the original stands for it.

    Args:
        mask_filenames: As the dataparser names them, or None.
        scene: The scene's folder.

    Returns:
        The files that are there.

    Raises:
        UserError: Naming the first that is missing.
    """
    if mask_filenames is None:
        return None
    found = []
    for named in map(Path, mask_filenames):
        path = next((candidate for candidate in _with_originals(named, scene) if candidate.is_file()), None)
        if path is None:
            raise UserError(f"The mask {named} is missing: restore it, or take it out of the scene (mask_path).")
        found.append(path)
    return found


def _with_originals(path: Path, scene: Path) -> Iterator[Path]:
    """A file, and what it may be the smaller copy of: masks/a.png of masks_2/a.png."""
    yield path
    for folder in path.parents:
        match = _SMALLER_FOLDER.fullmatch(folder.name)
        if match and scene in folder.parents:
            yield folder.with_name(match[1]) / path.relative_to(folder)


class SmallerCopies:
    """Finds the smaller copies of a scene's files, which belong to them by their whole relative paths.

    nerfstudio looks for them by the last part of the name only, so that ``images/left/1.png`` and
    ``images/right/1.png`` would share ``images_2/1.png``. That place is taken only if no other file of the scene has
    the name.

    Args:
        folder: The scene's folder.
        names: All files of one kind that the scene names, relative to it.
    """

    def __init__(self, folder: Path, names: Iterable[Path]) -> None:
        names = set(names)
        self._folder = folder
        self._count = Counter(name.name for name in names)
        firsts = {name.parts[0] if len(name.parts) > 1 else "" for name in names}
        self._common = firsts.pop() if len(firsts) == 1 else ""
        """First folder of all names ("images"), for which the folder of copies stands; empty if they differ."""

    def find(self, name: Path, copies: str) -> Path:
        """Returns where the smaller copy of a file is, or belongs if there is none.

        Args:
            name: The file, relative to the scene.
            copies: Folder of the copies, such as ``images_2``.

        Raises:
            UserError: If only the place is there which other files of the same name claim too.
        """
        inner = name.relative_to(self._common) if self._common else name
        candidates = [self._folder / copies / inner, self._folder / copies / name]
        flat = self._folder / copies / name.name
        found = next((path for path in candidates if path.is_file()), None)
        if found is not None or not flat.is_file():
            return found or candidates[0]
        if self._count[name.name] > 1 and flat not in candidates:
            raise UserError(
                f"{flat} may be the smaller copy of any of {self._count[name.name]} photos of that name, {name} among "
                f"them: put copies at their whole path ({candidates[0]}), or read the originals (`nerfstudio-data "
                "--downscale-factor 1` at the end of the command)."
            )
        return flat


def whole_path_copies(dataparser: Any, photos: SmallerCopies, masks: SmallerCopies) -> Callable[..., Path]:
    """Returns what stands for nerfstudio's ``Nerfstudio._get_fname``, which goes on choosing the factor.

    Args:
        dataparser: nerfstudio's dataparser of ``transforms.json``.
        photos: Of the scene's photos.
        masks: Smaller copies of the scene's masks.
    """
    original = dataparser._get_fname

    def find(filepath: Path, data_dir: Path, downsample_folder_prefix: str = "images_") -> Path:
        path = original(filepath, data_dir, downsample_folder_prefix)
        if dataparser.downscale_factor == 1 or downsample_folder_prefix not in ("images_", "masks_"):
            return path
        copies = photos if downsample_folder_prefix == "images_" else masks
        return copies.find(filepath, f"{downsample_folder_prefix}{dataparser.downscale_factor}")

    return find
