"""The teacher's maps on disk: one file per view, named by its content, so that nothing stale is ever found.

A folder per teacher (its identity, its precision, the size limit, the schema), in it a safetensors file per image (its
pixels). Each file is written under a temporary name and renamed, so a kill at any moment leaves whole files only, and
two processes that fill the same folder merely do some work twice. Each carries a checksum: one that was damaged
afterwards is made anew.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float16, UInt8
from torch import Tensor

from fit3d_ns.backbones import Backbone, BackboneSpec, backbone_identity, patch_grid, resize_to_patches
from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.files import atomic_write_json, discard
from fit3d_ns.support.progress import progress
from fit3d_ns.support.samples import batches_of_like
from fit3d_ns.support.tensor_files import TensorSpec, read_tensors, write_tensors

CACHE_SCHEMA = 2
"""Raise it when the same image and teacher come to be stored in another way."""
_LOGGER = logging.getLogger(__name__)
_TENSOR = "patch_tokens"
_DESCRIPTION = "teacher.json"
_STALE_AFTER_SECONDS = 24 * 3600
_KEPT_IMAGES = 2**30
"""Bytes of images that stay in memory between hashing them and showing them to the teacher."""
_CHECKS_AHEAD = 4
"""Photos that may be open while their maps are compared with their checksums."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
ImageSource = Callable[[], UInt8[Tensor, "H W 3"]]
Precision = Literal["bf16", "fp32"]
"""In which a teacher computes: bfloat16 has 8 significant bits, the stored half precision 11."""


@dataclass(frozen=True)
class _Checking:
    """An image whose map is being looked for."""

    key: str
    image: UInt8[Tensor, "H W 3"]
    source: ImageSource
    found: Future[bool]


def teacher_precision(device: str | torch.device) -> Precision:
    """Returns the precision in which a teacher computes on a device unless a run says otherwise.

    Args:
        device: Where.
    """
    return "bf16" if torch.device(device).type == "cuda" else "fp32"


@dataclass(frozen=True)
class _View:
    """An image by content: its key, its height and width in pixels, and how to get it again."""

    key: str
    size: tuple[int, int]
    source: ImageSource


def image_key(image: UInt8[Tensor, "H W 3"]) -> str:
    """Returns the content key of an image: a hash of its shape and pixels.

    Args:
        image: 8-bit RGB, ``[H, W, 3]``.

    Raises:
        ValueError: If it is no such image.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"expected 8-bit RGB of shape [H, W, 3], got {image.dtype} of shape {tuple(image.shape)}")
    digest = hashlib.blake2b(str(tuple(image.shape)).encode(), digest_size=16)
    digest.update(image.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Teacher maps in half precision, computed once per image, read memory-mapped.

    Attributes:
        identity: The teacher's `backbone_identity`.
        teacher_id: Short hash of all that decides a map beside the image; names the folder.
    """

    def __init__(
        self,
        directory: Path,
        spec: BackboneSpec,
        max_size: int | None,
        fallback_directory: Path | None = None,
        identity: dict[str, Any] | None = None,
        precision: Precision = "fp32",
    ) -> None:
        """Names the folders; touches nothing on disk beside reading the teacher's weights to hash them.

        Args:
            directory: Where maps are kept.
            spec: The teacher.
            max_size: Limit of the long side at which the teacher sees an image, pixels; None or 0: no limit.
            fallback_directory: Used when ``directory`` cannot be written to; None: that is an error.
            identity: The teacher's `backbone_identity` where it is known, so that its weights are not needed.
            precision: In which the teacher computes, on whatever device.

        Raises:
            UserError: If the teacher's name, layer or weights are not usable; see `backbone_identity`.
        """
        self.identity = backbone_identity(spec) if identity is None else identity
        self._max_size = max_size or None
        self.precision: Precision = precision
        self._description = {
            "schema": CACHE_SCHEMA,
            "max_size": self._max_size,
            "precision": precision,
            "teacher": self.identity,
        }
        content = json.dumps(self._description, sort_keys=True).encode()
        self.teacher_id = f"{self.identity['name']}-{hashlib.blake2b(content, digest_size=8).hexdigest()}"
        directories = [directory] if fallback_directory is None else [directory, fallback_directory]
        self._folders = [Path(place).expanduser().resolve() / self.teacher_id for place in directories]
        self._checked: set[Path] = set()
        self._damaged: dict[Path, str] = {}

    @property
    def folder(self) -> Path:
        """Where maps are looked for first."""
        return self._folders[0]

    def fill(
        self,
        images: Sequence[ImageSource],
        load_teacher: Callable[[], Backbone],
        device: str | torch.device,
        batch_size: int = 8,
    ) -> list[str]:
        """Makes the maps that are missing or damaged; the teacher is loaded only if any is.

        Images without a map stay in memory up to 1 GiB, so that the photos of most scenes are opened once. Images of
        equal size share a batch. Prints how many maps are missing, their grid, size and place, says which were
        damaged, and shows a progress bar.

        Args:
            images: One function per view that returns its image, 8-bit RGB ``[H, W, 3]``. Called once to hash it,
                and once more if its map is missing and the image could not be kept.
            load_teacher: Returns the backbone that the spec describes; its result is freed afterwards.
            device: Where the teacher runs.
            batch_size: Images at once.

        Returns:
            One key per image, in order, for `load`.

        Raises:
            UserError: If an image is smaller than a patch, the disk is full or no folder can be written to, or the
                teacher's output is not finite in half precision.
        """
        keys: list[str] = []
        views: dict[str, _View] = {}
        missing: list[_View] = []
        room = _KEPT_IMAGES
        seen: set[str] = set()
        checking: deque[_Checking] = deque()

        def sort_in(one: _Checking) -> None:
            nonlocal room
            absent = not one.found.result()
            kept = absent and one.image.nbytes <= room
            room -= one.image.nbytes * kept
            size = (one.image.shape[0], one.image.shape[1])
            views[one.key] = _View(one.key, size, (lambda image=one.image: image) if kept else one.source)
            if absent:
                missing.append(views[one.key])

        # Maps are checked while the next photos are opened; more threads than one were slower on two cores.
        with progress("Reading photos", len(images)) as advance, ThreadPoolExecutor(1) as pool:
            for source in images:
                image = source()
                advance(1)
                keys.append(key := image_key(image))
                if key in seen:
                    continue
                seen.add(key)
                checking.append(_Checking(key, image, source, pool.submit(self.has, key)))
                if len(checking) > _CHECKS_AHEAD:
                    sort_in(checking.popleft())
            while checking:
                sort_in(checking.popleft())
        if missing:
            self._say_damaged()
            folder = self._writable_folder()
            self._announce(folder, missing, len(views))
            batches = batches_of_like(missing, kind=lambda view: view.size, size=lambda view: batch_size)
            self._compute(folder, batches, load_teacher, torch.device(device))
        paths = {key: path for key in views if (path := self._find(key)) is not None}
        places = sorted({str(path.parent) for path in paths.values()})
        megabytes = sum(path.stat().st_size for path in paths.values()) / 1e6
        _LOGGER.info(f"Teacher features of {len(keys)} views: {megabytes:.1f} MB in {', '.join(places)}")
        return keys

    def has(self, key: str) -> bool:
        """Returns whether the map of this key lies on disk, undamaged; its data are read once.

        Args:
            key: Of `image_key`.
        """
        return self._find(key) is not None

    def load(self, key: str) -> Float16[Tensor, "C h w"]:
        """Returns the map of a key, memory-mapped: pages are read when touched, writing to it changes no file.

        Args:
            key: From `fill` or `image_key`.

        Returns:
            Half precision on the CPU, ``[C, h, w]``.

        Raises:
            UserError: If there is none, or its file is damaged.
        """
        path = self._find(key)
        if path is None:
            raise UserError(
                f"The teacher features {key} are missing from {self._folders[0]} or damaged: start again to make them "
                "anew."
            )
        return read_tensors(path, values=False).tensors[_TENSOR]

    def _find(self, key: str) -> Path | None:
        spec = {_TENSOR: TensorSpec(torch.float16, (self.identity["width"], "h", "w"))}
        for folder in self._folders:
            path = self._path(folder, key)
            try:
                read_tensors(path, spec, values=path not in self._checked)
            except FileNotFoundError:
                continue
            except DamagedFile as error:
                self._checked.discard(path)
                self._damaged[path] = str(error)
                continue
            self._checked.add(path)
            return path
        return None

    def _say_damaged(self) -> None:
        """Tells of files that will be made anew, and clears their places."""
        if not self._damaged:
            return
        path, reason = next(iter(self._damaged.items()))
        _LOGGER.warning(
            f"{len(self._damaged)} files of teacher features are damaged and made anew, such as {path}: {reason}."
        )
        for damaged in self._damaged:
            discard(damaged)
        self._damaged.clear()

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / f"{key}.safetensors"

    def _writable_folder(self) -> Path:
        """Returns the first folder that takes the file which describes the teacher."""
        reason: BaseException | None = None
        for folder in self._folders:
            if (folder / _DESCRIPTION).is_dir():
                discard(folder / _DESCRIPTION)
            try:
                atomic_write_json(folder / _DESCRIPTION, self._description)
            except UserError as error:
                reason = error.__cause__
                if isinstance(reason, OSError) and reason.errno in _DISK_FULL:
                    raise self._unwritable(folder, reason) from None
                continue
            _remove_stale_temporaries(folder)
            return folder
        raise self._unwritable(self._folders[-1], reason) from None

    def _announce(self, folder: Path, missing: Sequence[_View], num_images: int) -> None:
        """Prints what will be made, and checks beforehand that the disk takes it."""
        patch, width = self.identity["patch_size"], self.identity["width"]
        grids = [patch_grid(*view.size, patch, self._max_size) for view in missing]
        needed = sum(rows * columns for rows, columns in grids) * width * 2
        different = sorted(set(grids))
        shown = ", ".join(f"{rows}x{columns}" for rows, columns in different[:3])
        shown += f" and {len(different) - 3} more" if len(different) > 3 else ""
        _LOGGER.info(
            f"Making teacher features ({self.identity['name']}) of {len(missing)} of {num_images} views: patch grid "
            f"{shown}, {width} channels, {needed / 1e6:.1f} MB in {folder}"
        )
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"The teacher features need {needed / 1e6:.0f} MB and {folder} has {free / 1e6:.0f} MB left: free "
                f"some space, or choose another folder with {{feature_cache_dir}}."
            )

    def _compute(
        self,
        folder: Path,
        batches: Sequence[list[_View]],
        load_teacher: Callable[[], Backbone],
        device: torch.device,
    ) -> None:
        teacher = load_teacher()
        with progress("Teacher features", sum(len(batch) for batch in batches)) as advance:
            for batch in batches:
                # Another process may have made some meanwhile.
                views = [view for view in batch if not self.has(view.key)]
                if views:
                    for view, patch_tokens in zip(views, self._run(teacher, views, device)):
                        self._write(folder, view.key, patch_tokens)
                advance(len(batch))
        del teacher
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, teacher: Backbone, views: Sequence[_View], device: torch.device) -> Float16[Tensor, "B C h w"]:
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        with torch.inference_mode(), autocast:
            # Resized one by one: photos as floats are large, what the teacher sees is not.
            resized = [self._resized(view.source(), teacher.info.patch_size, device) for view in views]
            batch = torch.cat(resized).contiguous(memory_format=torch.channels_last)
            patch_tokens = teacher(batch).patch_tokens.to(torch.float16)
        if not bool(torch.isfinite(patch_tokens).all()):
            raise UserError(
                f"The backbone {teacher.info.name} gives features that are not finite in half precision: its weights "
                "are damaged, or its layer needs the final norm ({backbone_norm} True)."
            )
        return patch_tokens.cpu()

    def _resized(
        self, image: UInt8[Tensor, "H W 3"], patch_size: int, device: torch.device
    ) -> Float[Tensor, "1 3 h w"]:
        values = image.to(device).permute(2, 0, 1)[None].float() / 255.0  # [1, 3, H, W]
        return resize_to_patches(values, patch_size, self._max_size)

    def _write(self, folder: Path, key: str, patch_tokens: Float16[Tensor, "C h w"]) -> None:
        try:
            write_tensors(self._path(folder, key), {_TENSOR: patch_tokens}, sync=False)
        except UserError as error:
            raise self._unwritable(folder, error.__cause__) from None

    @staticmethod
    def _unwritable(folder: Path, reason: BaseException | None) -> UserError:
        cause = getattr(reason, "strerror", None) or reason
        return UserError(
            f"The teacher features cannot be written to {folder} ({cause}): free some space there, or choose another "
            f"folder with {{feature_cache_dir}}."
        )


def _remove_stale_temporaries(folder: Path) -> None:
    """Removes what killed processes left: temporary files older than any process that fills a cache."""
    for path in folder.glob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_AFTER_SECONDS:
                os.unlink(path)
        except OSError:
            continue  # Another process was quicker: nothing depends on the cleaning.
