"""The teacher's maps of training views, for looking at them; the teacher itself is never run."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from fit3d_ns.backbones import weights_available
from fit3d_ns.data.feature_cache import FeatureCache, Precision
from fit3d_ns.datamanager import Fit3DDataManager
from fit3d_ns.lifting.solver import LiftView
from fit3d_ns.model import Fit3DSplatModel
from fit3d_ns.scenes.views import cached_key, cached_training_views, resident_scene
from fit3d_ns.support.errors import UserError

NEAR = 0.005
"""Largest distance from a training view at which a camera counts as standing there; nerfstudio scales poses to 1."""


@dataclass(frozen=True)
class TeacherView:
    """A training view.

    Attributes:
        patch_tokens: [C, h, w] float32, the teacher's map of the photo.
        camera: The photo's camera, without distortion.
        image_size: (H, W) of the photo.
    """

    patch_tokens: Float[Tensor, "C h w"]
    camera: Cameras
    image_size: tuple[int, int]


class TeacherViews:
    """Training views with their teacher maps, read one at a time.

    Args:
        datamanager: Of the scene.
        model: The geometry.
    """

    def __init__(self, datamanager: Fit3DDataManager, model: Fit3DSplatModel) -> None:
        self._datamanager = datamanager
        self._model = model
        self._cache: FeatureCache | None = None
        self._last: tuple[int, TeacherView | None] = (-1, None)
        self.identity: dict[str, Any] | None = None
        """The teacher's, as the checkpoint notes it: with it, weights are not needed to find its maps."""
        self.precision: Precision | None = None
        """In which the teacher computed, likewise."""

    def standing_at(self, camera: Cameras) -> int | None:
        """Returns the training view that a camera stands at, whichever way it looks; None elsewhere.

        Args:
            camera: One camera.

        Raises:
            UserError: If the scene is gone.
        """
        self._check()
        positions = self._datamanager.train_dataset.cameras.camera_to_worlds[..., 3].to(camera.camera_to_worlds)
        distances = (positions - camera.camera_to_worlds.reshape(-1, 3, 4)[0, :, 3]).norm(dim=-1)
        index = int(distances.argmin())
        return index if float(distances[index]) < NEAR else None

    def view(self, index: int) -> TeacherView:
        """Returns a training view.

        Args:
            index: Its position in the training split.

        Raises:
            UserError: If the photo or its map cannot be had.
        """
        self._check()
        known, view = self._last
        if known != index or view is None:
            view = self._resident(index) if self._datamanager.has_teacher_maps() else self._stored(index)
            self._last = (index, view)
        return view

    def lift_views(self) -> list[LiftView]:
        """Returns all training views, as the lifting solver wants them.

        Raises:
            UserError: If a photo or a map cannot be had.
        """
        self._check()
        if self._datamanager.has_teacher_maps():
            return list(resident_scene(self._datamanager, self._model).training)
        return cached_training_views(self._datamanager, self._model, self._open_cache())

    def _resident(self, index: int) -> TeacherView:
        photo = self._datamanager.cached_train[index]["image"]
        camera = self._datamanager.train_dataset.cameras[index : index + 1].to(self._model.device)
        teacher = self._datamanager.teacher_map("train", index).float()
        return TeacherView(teacher, camera, (photo.shape[0], photo.shape[1]))

    def _stored(self, index: int) -> TeacherView:
        cache = self._open_cache()
        photo = self._datamanager.photo_reader("train").read(index)
        patch_tokens = cache.load(cached_key(cache, photo)).to(self._model.device).float()
        return TeacherView(patch_tokens, photo.camera.to(self._model.device), photo.size)

    def _open_cache(self) -> FeatureCache:
        if self._cache is None:
            spec = self._datamanager.config.backbone_spec()
            if self.identity is None and not weights_available(spec):
                raise UserError(
                    f"The weights of {spec.name} are not here, and the run does not say which maps are theirs."
                )
            self._cache = self._datamanager.feature_cache_of(self.identity, self.precision)
        return self._cache

    def _check(self) -> None:
        if self._datamanager.absent is not None:
            raise UserError(self._datamanager.absent)
        if len(self._datamanager.train_dataset) == 0:
            raise UserError("The scene has no training views.")


def seen_from(
    image_size: tuple[int, int],
    photo: tuple[Float[Tensor, "4 4"], Float[Tensor, "3 3"]],
    size: tuple[int, int],
    camera: tuple[Float[Tensor, "4 4"], Float[Tensor, "3 3"]],
) -> Float[Tensor, "H W 2"]:
    """Returns where the pixels of a camera lie in a photo that was taken at the same place, whichever way both look.

    Args:
        image_size: Height and width of the photo.
        photo: World to camera (OpenCV axes) and intrinsics of the photo, in its pixels.
        size: Height and width of the camera's picture.
        camera: The same two of the camera, in its pixels.

    Returns:
        In `grid_sample`'s coordinates (x, y): the photo is -1 to 1; 2 behind the photo's camera.
    """
    (photo_viewmat, photo_K), (viewmat, K) = photo, camera
    y, x = torch.meshgrid(
        torch.arange(size[0], device=K.device) + 0.5, torch.arange(size[1], device=K.device) + 0.5, indexing="ij"
    )
    rays = torch.stack([x, y, torch.ones_like(x)], dim=-1).to(K) @ torch.linalg.inv(K).T
    points = rays @ (photo_K @ photo_viewmat[:3, :3] @ viewmat[:3, :3].T).T
    pixels = points[..., :2] / points[..., 2:].clamp_min(1e-6)
    scale = pixels.new_tensor([2.0 / image_size[1], 2.0 / image_size[0]])
    return torch.where(points[..., 2:] > 1e-6, pixels * scale - 1, 2.0)
