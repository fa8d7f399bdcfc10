"""Pictures of test photos that a probe keeps for its report."""

import logging
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fit3d_ns.support.errors import DamagedFile
from fit3d_ns.support.files import atomic_path, atomic_write_json, discard
from fit3d_ns.support.json_files import build, read_json

_LOGGER = logging.getLogger(__name__)


class Panels:
    """A folder of pictures, one file each.

    Args:
        folder: Where they are.
        fingerprint: Of the question whose answers they show.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        self._index = folder / "index.json"

    def write(self, place: int, name: str, picture: np.ndarray) -> None:
        """Keeps a picture; `seal` comes after the last.

        Args:
            place: Of the photo in the test split.
            name: Of the row; ``photo`` or ``truth``.
            picture: [H, W, 3], 8 bits.
        """
        path = self._folder / f"{place:06d}_{name}.png"
        discard(path)
        with atomic_path(path) as temporary:
            Image.fromarray(picture).save(temporary, format="PNG")

    def seal(self) -> None:
        """Writes down which pictures there are, so that one that is damaged or gone is noticed."""
        sums = {path.name: zlib.crc32(path.read_bytes()) for path in self._files()}
        discard(self._index)
        atomic_write_json(self._index, {"fingerprint": self._fingerprint, "crc32": sums})

    def are_whole(self) -> bool:
        """Returns whether all pictures that were kept are there as they were written."""
        path = self._index
        try:
            content = build(dict[str, Any], read_json(path))
            if content.get("fingerprint") != self._fingerprint:
                return False
            for name, crc32 in build(dict[str, int], content.get("crc32")).items():
                path = self._folder / name
                if not path.is_file() or zlib.crc32(path.read_bytes()) != crc32:
                    raise DamagedFile("it is not as it was written")
        except FileNotFoundError:
            return False
        except (DamagedFile, OSError) as error:
            _LOGGER.warning(f"{path} is damaged and made anew: {error}.")
            return False
        return True

    def read(self) -> dict[int, dict[str, np.ndarray]]:
        """Returns the pictures, by place and name."""
        panels: dict[int, dict[str, np.ndarray]] = {}
        for path in self._files():
            place, _, name = path.stem.partition("_")
            with Image.open(path) as picture:
                panels.setdefault(int(place), {})[name] = np.asarray(picture.convert("RGB"))
        return panels

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*_*.png"))
