"""The photos of a scene, read one by one: the same way for training, lifting, bundles and the viewer."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from torch import Tensor

from fit3d_ns.data.photos.lenses import Lens, lenses_of, undistort
from fit3d_ns.data.photos.masks import composite_on_black, patch_weights
from fit3d_ns.data.photos.picture_files import open_mask, open_photo, turned_by
from fit3d_ns.support.errors import UserError, first_line

ImageType = Literal["uint8", "float32"]
_AHEAD = 8
"""Photos opened ahead of the one that is used."""
_AHEAD_BYTES = 2**30
"""What those may take together, decoded."""


def image_size(camera: Cameras) -> tuple[int, int]:
    """Returns a camera's height and width in pixels.

    Whoever reads the photo notes them in the metadata; asking a camera on a GPU would wait for all work queued there.

    Args:
        camera: One camera, of shape [1].
    """
    noted = (camera.metadata or {}).get("image_size")
    return noted or (int(camera.height.item()), int(camera.width.item()))


class PhotoDataset(InputDataset):
    """nerfstudio's data set of a split, whose photos and masks mean what a viewer shows of them.

    Args:
        dataparser_outputs: Files and cameras of the split.
        scale_factor: nerfstudio's ``camera_res_scale_factor``.
        kwargs: What later versions of nerfstudio add.
    """

    def __init__(self, dataparser_outputs: DataparserOutputs, scale_factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(dataparser_outputs, scale_factor, **kwargs)
        if self.cameras.metadata and "fisheye_crop_radius" in self.cameras.metadata:
            self.cameras.metadata["fisheye_crop_radius"] *= scale_factor  # nerfstudio scales all but this
        self.described_cameras: Cameras = deepcopy(self.cameras)
        """As the scene describes them; training overwrites ``cameras`` with those of the undistorted photos."""

    @property
    def mask_filenames(self) -> list[Path] | None:
        """Masks of the photos, in their order; None if the scene has none."""
        return self._dataparser_outputs.mask_filenames

    @mask_filenames.setter
    def mask_filenames(self, paths: list[Path] | None) -> None:
        self._dataparser_outputs.mask_filenames = paths

    @property
    def alpha_color(self) -> tuple[float, float, float] | None:
        """Colour in [0, 1] that the scene wants behind transparent parts; None: they stay transparent."""
        color = self._dataparser_outputs.alpha_color
        if color is None:
            return None
        red, green, blue = (float(value) for value in color)
        return red, green, blue

    @cached_property
    def lenses(self) -> list[Lens | None]:
        """Lens of each photo; None for a pinhole."""
        return lenses_of(self.described_cameras)

    def get_numpy_image(self, image_idx: int) -> np.ndarray:
        """Reads a photo in the colours that a viewer shows.

        Args:
            image_idx: Its position in the split.

        Returns:
            uint8 [H, W, 3 or 4], distorted as it was taken.
        """
        return open_photo(Path(self.image_filenames[image_idx]), scale_factor=self.scale_factor)

    def get_data(self, image_idx: int, image_type: ImageType = "float32") -> dict[str, Any]:
        """Reads a photo and its mask, distorted as they were taken.

        Args:
            image_idx: Position in the split.
            image_type: ``uint8`` in [0, 255] or ``float32`` in [0, 1].

        Returns:
            ``image_idx``; ``image`` [H, W, 3 or 4]; ``mask`` bool [H, W, 1], where the scene has masks.
        """
        image = self.get_image_uint8(image_idx) if image_type == "uint8" else self.get_image_float32(image_idx)
        data: dict[str, Any] = {"image_idx": image_idx, "image": image}
        if self.mask_filenames is not None:
            photo = Path(self.image_filenames[image_idx])
            mask = open_mask(Path(self.mask_filenames[image_idx]), (image.shape[0], image.shape[1]), photo)
            data["mask"] = torch.from_numpy(mask)[..., None]
            if self.mask_color:
                color = torch.tensor(self.mask_color) * (255.0 if image_type == "uint8" else 1.0)
                hidden = color.round().to(image.dtype) if image_type == "uint8" else color
                data["image"] = torch.where(data["mask"], image[..., :3], hidden)
        data.update(self.get_metadata(data))
        return data


@dataclass(frozen=True)
class PreparedPhoto:
    """A photo as a pinhole camera sees it."""

    index: int
    """Its position in the split."""
    image: UInt8[Tensor, "H W c"] | Float[Tensor, "H W c"]
    """Undistorted: RGB or RGBA, in [0, 255] (8 bit) or [0, 1] (float)."""
    mask: Bool[Tensor, "H W 1"] | None
    """What counts; None where the scene has no masks."""
    camera: Cameras
    """One camera without distortion, of the photo's size."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def rgb(self) -> UInt8[Tensor, "H W 3"]:
        """The photo as the teacher sees it: 8-bit RGB, transparent parts black."""
        return composite_on_black(self.image)

    @property
    def batch(self) -> dict[str, Any]:
        """The photo as nerfstudio hands it on: ``image_idx``, ``image`` and perhaps ``mask``."""
        batch: dict[str, Any] = {"image_idx": self.index, "image": self.image}
        return batch if self.mask is None else {**batch, "mask": self.mask}

    def weights(self, grid: tuple[int, int]) -> Float[Tensor, "h w"] | None:
        """Returns the share of each patch that mask and alpha leave valid; None where all is.

        Args:
            grid: Height and width of the teacher's map in patches.
        """
        return patch_weights(self.batch, grid)


class PhotoReader:
    """Photos of a split, opened ahead on other threads when they are asked for in order; none is kept.

    Args:
        dataset: The split.
        image_type: ``uint8`` or ``float32``, as the data manager opens photos; decides rounding when undistorting.
    """

    def __init__(self, dataset: PhotoDataset, image_type: ImageType) -> None:
        self._dataset = dataset
        self._image_type: ImageType = image_type
        self._pool = ThreadPoolExecutor(max_workers=_AHEAD, thread_name_prefix="photo")
        self._opened: dict[int, Future[PreparedPhoto]] = {}
        self._next = 0
        self._lock = Lock()  # the viewer asks from its own thread

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[PreparedPhoto]:
        return (self.read(index) for index in range(len(self)))

    def read(self, index: int) -> PreparedPhoto:
        """Returns a photo.

        Args:
            index: Its position in the split.

        Raises:
            UserError: If the photo or its mask is missing, damaged, or not of its camera's size; the sentence names
                the file.
        """
        with self._lock:
            ahead = self._ahead if index == self._next else 1  # whoever skips photos does not want those in between
            self._next = index + 1
            for position in range(index, min(index + ahead, len(self._dataset))):
                if position not in self._opened:
                    self._opened[position] = self._pool.submit(self._open, position)
            for position in [position for position in self._opened if not index <= position < index + _AHEAD]:
                self._opened.pop(position).cancel()
            opened = self._opened.pop(index)
        try:
            return opened.result()
        except UserError:
            raise
        except Exception as error:
            path = self._dataset.image_filenames[index]
            raise UserError(f"The photo {path} cannot be prepared: {first_line(error)}.") from error

    @cached_property
    def _ahead(self) -> int:
        cameras = self._dataset.described_cameras
        largest = int((cameras.width * cameras.height).max()) * (4 if self._image_type == "uint8" else 16)
        return max(1, min(_AHEAD, _AHEAD_BYTES // largest))

    def _open(self, index: int) -> PreparedPhoto:
        data = self._dataset.get_data(index, image_type=self._image_type)
        image, mask, lens = data["image"], data.get("mask"), self._dataset.lenses[index]
        camera = deepcopy(self._dataset.described_cameras[index : index + 1])
        self._check_size(index, image.shape[1], image.shape[0], camera)
        if lens is not None:
            photo = undistort(image.numpy(), lens, None if mask is None else mask.numpy())
            image = torch.from_numpy(photo.image)
            mask = None if photo.mask is None else torch.from_numpy(photo.mask)
            _set_intrinsics(camera, photo.K, image.shape[1], image.shape[0])
        camera.distortion_params = None
        size = (image.shape[0], image.shape[1])
        camera.metadata = {**(camera.metadata or {}), "image_size": size, "cam_idx": index}
        return PreparedPhoto(index, image, mask, camera)

    def _check_size(self, index: int, width: int, height: int, camera: Cameras) -> None:
        described = (int(camera.width.item()), int(camera.height.item()))
        if described == (width, height):
            return
        path = Path(self._dataset.image_filenames[index])
        orientation = turned_by(path)
        if described == (height, width) and orientation >= 5:
            raise UserError(
                f"The photo {path} is {width}x{height} pixels once turned as its EXIF orientation {orientation} says, "
                f"but its camera describes {described[0]}x{described[1]}, the picture on its side: take the tag out of "
                "the photos (exiftool -Orientation= ), or find the poses from turned photos."
            )
        raise UserError(
            f"The photo {path} is {width}x{height} pixels, but its camera says {described[0]}x{described[1]}: restore "
            "the photo that the poses were made from, or correct its size in the scene."
        )


def _set_intrinsics(camera: Cameras, K: Float[np.ndarray, "3 3"], width: int, height: int) -> None:
    for name, value in (("fx", K[0, 0]), ("fy", K[1, 1]), ("cx", K[0, 2]), ("cy", K[1, 2])):
        getattr(camera, name)[:] = float(value)
    camera.width[:], camera.height[:] = width, height
