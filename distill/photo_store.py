"""Photos at the student's resolution: decoded once, kept in 8 bits, ready on the device when a step needs them."""

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor

from distill.scenes import Scene
from fit3d_ns.data.photos.bundled import BundledPhoto, read_photo
from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.files import discard, user_cache_directory
from fit3d_ns.support.progress import progress
from fit3d_ns.support.tensor_files import TensorSpec, read_tensors, write_tensors

_LOGGER = logging.getLogger(__name__)

_FILL = "Decoding photos"
_TENSOR = "photo"
_SCHEMA = 4
"""Raise it when the same photo comes to be stored in another way."""
_DECODING_BYTES = 2**31
"""What photos may take together while they are decoded and resized."""
_BYTES_PER_PIXEL = 24
"""Of a photo meanwhile: 8-bit copies, and 3 channels of floats."""

ViewKey = tuple[int, int]
"""Positions of a scene, and of a view in it."""


class PhotoStore:
    """The photos of all views.

    Args:
        scenes: As opened; a scene's number is its place in this list.
        patch_size: The student's; a photo is stored at its patch grid times this.
        device: Where photos are needed.
        directory: Where decoded photos are kept; the user's cache folder if None.
        workers: Threads; as many as processors, at most 16, if 0.
        data_root: See `fit3d_ns.data.photos.bundled.locate`.
        resident_bytes: Device memory for photos: if all fit, each is uploaded once and stays.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        patch_size: int,
        device: torch.device,
        directory: Path | None = None,
        workers: int = 0,
        data_root: Path | None = None,
        resident_bytes: int = 0,
    ):
        self._scenes = scenes
        self._patch_size = patch_size
        self._device = device
        self._folder = (directory or user_cache_directory() / "photos").expanduser()
        self._data_root = data_root
        self._workers = workers or min(os.cpu_count() or 1, 16)
        self._threads = ThreadPoolExecutor(self._workers, thread_name_prefix="photo")
        self._resident: dict[ViewKey, UInt8[Tensor, "3 H W"]] = {}
        self._pending: dict[ViewKey, Future] = {}
        self._keeps = self.num_bytes <= resident_bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def num_bytes(self) -> int:
        """Memory of all photos, decoded."""
        sizes = (self._size(view) for view in self._all_views())
        return sum(3 * height * width for height, width in sizes)

    def fill(self, rank: int = 0, num_processes: int = 1, show: bool = True) -> int:
        """Decodes the photos that are not in the cache, or damaged there.

        Args:
            rank: This process takes its share, counted from here.
            num_processes: Number of shares.
            show: Whether a progress bar is shown.

        Returns:
            How many were decoded.

        Raises:
            UserError: If a photo is missing, unreadable or changed, or the disk is full. Photos decoded until then
                stay in the cache.
        """
        mine = self._all_views()[rank::num_processes]
        share = self._missing(mine)
        if not share:
            return 0
        self._check_space(share)
        largest = max(photo.height * photo.width for photo in map(self._photo, share)) * _BYTES_PER_PIXEL
        workers = max(1, min(self._workers, _DECODING_BYTES // largest))
        with ThreadPoolExecutor(workers) as threads, progress(_FILL, len(share), show=show) as advance:
            futures = [threads.submit(self._decode, view) for view in share]
            try:
                for future in futures:
                    future.result()
                    advance(1)
            finally:
                for future in futures:
                    future.cancel()
        return len(share)

    def prefetch(self, views: Iterable[ViewKey]) -> None:
        """Starts reading photos in the background.

        Args:
            views: Numbers of scene and view.
        """
        for view in views:
            if view not in self._resident and view not in self._pending:
                self._pending[view] = self._threads.submit(self._read, view)

    def get(self, views: Sequence[ViewKey]) -> UInt8[Tensor, "B 3 H W"]:
        """Returns photos of one size, on the device.

        Args:
            views: Which.

        Raises:
            UserError: If one is missing from the cache.
        """
        self.prefetch(views)
        images = []
        for view in views:
            image = self._resident.get(view)
            if image is None:
                image = self._pending[view].result()
                if self._keeps:
                    self._resident[view] = image
                elif self._stream is not None:
                    image.record_stream(torch.cuda.current_stream(self._device))
            images.append(image)
        for view in views:
            self._pending.pop(view, None)
        return torch.stack(images)

    def close(self) -> None:
        """Ends the threads and frees the photos."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._resident.clear()
        self._pending.clear()

    def _all_views(self) -> list[ViewKey]:
        return [(scene, view) for scene, held in enumerate(self._scenes) for view in range(len(held.info.views))]

    def _photo(self, view: ViewKey) -> BundledPhoto:
        return self._scenes[view[0]].info.views[view[1]].photo

    def _size(self, view: ViewKey) -> tuple[int, int]:
        rows, columns = self._scenes[view[0]].info.patch_grid(view[1])
        return rows * self._patch_size, columns * self._patch_size

    def _path(self, view: ViewKey) -> Path:
        height, width = self._size(view)
        key = self._photo(view).content_key()
        return self._folder / f"v{_SCHEMA}-{height}x{width}" / f"{key}.safetensors"

    def _spec(self, view: ViewKey) -> dict[str, TensorSpec]:
        return {_TENSOR: TensorSpec(torch.uint8, (3, *self._size(view)))}

    def _missing(self, views: Iterable[ViewKey]) -> list[ViewKey]:
        """Returns the views without a whole file, and tells of those that were damaged."""
        missing, damaged = [], []
        for view in views:
            path = self._path(view)
            try:
                read_tensors(path, self._spec(view))
            except FileNotFoundError:
                missing.append(view)
            except DamagedFile as error:
                missing.append(view)
                damaged.append(f"{path}: {error}")
                discard(path)
        if damaged:
            _LOGGER.warning(f"{len(damaged)} decoded photos are damaged and made anew, such as {damaged[0]}.")
        return missing

    def _decode(self, view: ViewKey) -> None:
        image = read_photo(self._photo(view), self._data_root).permute(2, 0, 1)
        size = self._size(view)
        if image.shape[1:] != size:
            resized = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False, antialias=True)
            image = resized[0].round().clamp(0, 255).to(torch.uint8)
        try:
            write_tensors(self._path(view), {_TENSOR: image}, sync=False)
        except UserError as error:
            cause = error.__cause__
            full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "free some space" if full else "make it writable"
            raise UserError(f"{error} (decoded photos; {advice}, or choose another folder with --cache-dir)") from cause

    def _read(self, view: ViewKey) -> UInt8[Tensor, "3 H W"]:
        path = self._path(view)
        try:
            image = read_tensors(path, self._spec(view), values=False).tensors[_TENSOR]
        except (FileNotFoundError, DamagedFile) as error:
            raise UserError(f"The decoded photo {path} is missing or damaged: start again with --resume.") from error
        if self._stream is None:
            return image.clone()  # so that nothing is read from disk later
        with torch.cuda.stream(self._stream):
            uploaded = image.pin_memory().to(self._device, non_blocking=True)
        self._stream.synchronize()  # this thread waits, and nobody else
        return uploaded

    def _check_space(self, views: Sequence[ViewKey]) -> None:
        needed = sum(3 * height * width for height, width in map(self._size, views))
        place = self._folder
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if needed > free:
            raise UserError(
                f"The decoded photos need {needed / 1e9:.2f} GB and {self._folder} has {free / 1e9:.2f} GB left: free "
                "some space, or choose another folder with --cache-dir."
            )
