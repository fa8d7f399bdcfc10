"""Which entries of a folder are photos: one rule for every command that lists a folder.

An entry is taken if it is a file with one of `PHOTO_SUFFIXES`, in any spelling (.jpg, .JPG, .Jpeg). Left out, and
counted, are: what operating systems and editors leave behind (`is_leftover`), files of other suffixes, and folders.
"""

import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from fit3d_ns.support.errors import UserError, first_line

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")
"""Pictures that every command reads; compare in lower case."""
_LEFTOVERS = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin"}
_BACKUPS = (".bak", ".swp", ".tmp", ".orig", ".part", ".crdownload")


@dataclass(frozen=True)
class Listing:
    """What a folder holds."""

    folder: Path
    """The folder."""
    photos: tuple[Path, ...]
    """Files that are taken, in the order of their names."""
    left_out: dict[str, int]
    """How many entries were left out, by the reason."""

    def remark(self) -> str | None:
        """Returns one sentence on what was left out; None if nothing was."""
        if not self.left_out:
            return None
        parts = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"Of {self.folder}, {len(self.photos)} photos were taken and left out: {parts}."


def is_photo(path: Path) -> bool:
    """Returns whether a name is that of a photo: a suffix of `PHOTO_SUFFIXES`, and no leftover.

    Args:
        path: A file's name is enough; nothing is opened.
    """
    return path.suffix.lower() in PHOTO_SUFFIXES and not is_leftover(path)


def is_leftover(path: Path) -> bool:
    """Returns whether a name is one that operating systems and editors leave in folders, neither data nor a fault.

    Hidden entries (.DS_Store, ._photo.jpg), Thumbs.db, desktop.ini, __MACOSX, @eaDir, and backups (photo.jpg~,
    #photo.jpg#, .bak, .swp, .tmp, .orig, .part).

    Args:
        path: An entry; only its name is looked at.
    """
    name = path.name.lower()
    return name.startswith((".", "~", "#")) or name.endswith(("~", "#", *_BACKUPS)) or name in _LEFTOVERS


def spelled_otherwise(path: Path) -> Path | None:
    """Returns a file that is meant by a name which is not there: capitals, umlauts, blanks, %20 and suffixes differ.

    Windows and macOS take IMG_1.JPG for img_1.jpg, macOS writes ü as two characters, web tools write blanks as %20,
    NeRF's synthetic scenes leave out the suffix.

    Args:
        path: That a scene names.
    """
    try:
        entries = sorted(path.parent.iterdir())
    except OSError:
        return None
    wanted = _plain(path.name)
    meant = {wanted, _plain(path.stem)}
    alike = [one for one in entries if not is_leftover(one) and _plain(one.name) == wanted and one.is_file()]
    stems = [one for one in entries if is_photo(one) and meant & {_plain(one.stem), _plain(one.name)} and one.is_file()]
    return next(iter([*alike, *stems]), None)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", unquote(name)).casefold().strip()


def list_photos(folder: Path) -> Listing:
    """Lists the photos of a folder, not of folders below it.

    Args:
        folder: That a user or a scene names.

    Returns:
        The photos, and what was left out.

    Raises:
        UserError: If the folder cannot be read.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be read ({error.strerror or first_line(error)}): check it."
        ) from error
    photos, left_out = [], Counter[str]()
    for entry in entries:
        if is_leftover(entry):
            left_out["leftovers of the system or an editor"] += 1
        elif entry.is_dir():
            left_out["folders"] += 1
        elif entry.suffix.lower() in PHOTO_SUFFIXES:
            photos.append(entry)
        else:
            left_out[f"files {entry.suffix or 'without a suffix'}"] += 1
    return Listing(folder, tuple(photos), dict(left_out))
