"""A scene's views for lifting: cameras, patch weights, and teacher maps that are read when needed.

Photos are opened one by one, undistorted as nerfstudio's data manager would, hashed or shown to the teacher, and let
go; nothing that stays is larger than a patch grid, and of maps only what `fit3d_ns.lifting.memory` allows. So memory
does not grow with the number of photos beyond that.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from fit3d_ns.data.feature_cache import FeatureCache, image_key
from fit3d_ns.data.photos.masks import composite_on_black, patch_weights
from fit3d_ns.data.photos.reader import PhotoReader, PreparedPhoto
from fit3d_ns.datamanager import SPLITS, Fit3DDataManager
from fit3d_ns.lifting.evaluation import EvaluationView
from fit3d_ns.lifting.lift import LiftScene
from fit3d_ns.lifting.memory import ResidentMaps
from fit3d_ns.lifting.operator import PatchCamera
from fit3d_ns.lifting.solver import LiftView
from fit3d_ns.model import Fit3DSplatModel
from fit3d_ns.support.errors import UserError


@dataclass
class _Split:
    """What stays of a split once its photos were gone through."""

    reader: PhotoReader
    grid: Callable[[int, int], tuple[int, int]]
    """Patch grid of a photo's height and width."""
    cameras: dict[int, Cameras] = field(default_factory=dict)
    weights: dict[int, Tensor | None] = field(default_factory=dict)

    def source(self, index: int) -> UInt8[Tensor, "H W 3"]:
        """Opens a photo for the teacher, and notes what the lift needs beside its map."""
        photo = self.reader.read(index)
        self.cameras[index], self.weights[index] = photo.camera, photo.weights(self.grid(*photo.size))
        return photo.rgb


def cached_training_views(datamanager: Fit3DDataManager, model: Fit3DSplatModel, cache: FeatureCache) -> list[LiftView]:
    """Returns the training views from maps that lie in the cache already; the teacher is not run.

    Args:
        datamanager: Of the scene; its own store of photos is not touched.
        model: The geometry.
        cache: Of the teacher's maps.

    Raises:
        UserError: If a photo cannot be used, or the map of one is missing.
    """
    views = []
    for photo in datamanager.photo_reader("train"):
        key = cached_key(cache, photo)

        def load(key: str = key) -> Float[Tensor, "C h w"]:
            return cache.load(key).to(model.device)

        camera = model.corrected(photo.camera.to(model.device))
        views.append(_lift_view(model, camera, load, photo.weights(model.patch_grid(*photo.size))))
    return views


def cached_key(cache: FeatureCache, photo: PreparedPhoto) -> str:
    """Returns the key of a photo's map in the cache.

    Args:
        cache: Of the teacher's maps.
        photo: As the data manager prepares it.

    Raises:
        UserError: If there is none.
    """
    key = image_key(photo.rgb)
    if not cache.has(key):
        raise UserError(
            f"The teacher's maps are not in {cache.folder} (removed, or the photos changed): fit3d-lift "
            "--load-config makes them anew."
        )
    return key


def streamed_scene(datamanager: Fit3DDataManager, model: Fit3DSplatModel) -> LiftScene:
    """Fills the feature cache photo by photo and returns the scene's views; no photo is kept.

    Args:
        datamanager: Of the scene; its own store of photos is not touched.
        model: The geometry.

    Returns:
        Training and held-out views, whose maps are read when needed.

    Raises:
        UserError: If a photo or the teacher cannot be used.
    """
    splits = {name: _Split(datamanager.photo_reader(name), model.patch_grid) for name in SPLITS}
    positions = [(split, index) for split in splits.values() for index in range(len(split.reader))]
    cache = datamanager.open_feature_cache()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        keys = cache.fill(
            [lambda split=split, index=index: split.source(index) for split, index in positions],
            load_teacher=datamanager.load_teacher,
            device=datamanager.device,
            batch_size=datamanager.config.feature_batch_size,
        )
    maps = ResidentMaps(cache.load, model.device)
    views: dict[str, list[EvaluationView]] = {"train": [], "eval": []}
    names = {id(split): name for name, split in splits.items()}
    for (split, index), key in zip(positions, keys):

        def load(key: str = key) -> Float[Tensor, "C h w"]:
            return maps.load(key)

        name = names[id(split)]
        camera = split.cameras[index].to(model.device)
        views[name].append(
            _evaluation_view(
                model,
                camera,
                load,
                split.weights[index],
                training=name == "train",
                photo=lambda split=split, index=index: split.reader.read(index).rgb,
            )
        )
    return _scene(datamanager, views)


def scene_to_lift(datamanager: Fit3DDataManager, model: Fit3DSplatModel) -> LiftScene:
    """Returns the views of a scene from what training holds in memory; where nothing trains, photo by photo.

    Args:
        datamanager: Of the scene.
        model: The geometry.

    Raises:
        UserError: If a photo or the teacher cannot be used.
    """
    read = resident_scene if datamanager.has_teacher_maps() else streamed_scene
    return read(datamanager, model)


def resident_scene(datamanager: Fit3DDataManager, model: Fit3DSplatModel) -> LiftScene:
    """Returns the views of a scene whose photos the data manager holds already, as while training.

    Args:
        datamanager: Of the scene.
        model: The geometry.
    """
    views: dict[str, list[EvaluationView]] = {"train": [], "eval": []}
    for split, dataset in (("train", datamanager.train_dataset), ("eval", datamanager.eval_dataset)):
        photos = datamanager.cached_train if split == "train" else datamanager.cached_eval
        for index, photo in enumerate(photos):
            size = (photo["image"].shape[0], photo["image"].shape[1])
            camera = dataset.cameras[index : index + 1].to(model.device)
            camera.metadata = {**(camera.metadata or {}), "image_size": size, "cam_idx": index}
            weights = patch_weights(photo, model.patch_grid(*size))

            def load(split: Any = split, index: int = index) -> Float[Tensor, "C h w"]:
                return datamanager.teacher_map(split, index)

            views[split].append(
                _evaluation_view(
                    model,
                    camera,
                    load,
                    weights,
                    training=split == "train",
                    photo=lambda photo=photo: composite_on_black(photo["image"]),
                )
            )
    return _scene(datamanager, views)


def held_out_flags(datamanager: Fit3DDataManager) -> list[bool]:
    """Returns of each evaluation view whether it is no training view too (nerfstudio's ``--eval-mode all``).

    Args:
        datamanager: Of the scene.
    """
    trained = {Path(name) for name in datamanager.train_dataset.image_filenames}
    return [Path(name) not in trained for name in datamanager.eval_dataset.image_filenames]


def _evaluation_view(
    model: Fit3DSplatModel,
    camera: Cameras,
    load: Callable[[], Float[Tensor, "C h w"]],
    weights: Tensor | None,
    training: bool,
    photo: Callable[[], UInt8[Tensor, "H W 3"]],
) -> EvaluationView:
    camera = model.corrected(camera) if training else camera  # map and surface must be of one pose
    view = _lift_view(model, camera, load, weights)
    return EvaluationView(view, lambda: model.surface_view(camera), photo)


def _lift_view(
    model: Fit3DSplatModel,
    camera: Cameras,
    load: Callable[[], Float[Tensor, "C h w"]],
    weights: Tensor | None,
) -> LiftView:
    size: tuple[int, int] = camera.metadata["image_size"]  # type: ignore[index]
    viewmat, intrinsics = model.view_matrices(camera)
    patch_camera = PatchCamera(viewmat, intrinsics, size, model.patch_grid(*size))
    return LiftView(patch_camera, load, None if weights is None else weights.to(model.device))


def _scene(datamanager: Fit3DDataManager, views: dict[str, list[EvaluationView]]) -> LiftScene:
    held_out = [view for view, kept in zip(views["eval"], held_out_flags(datamanager)) if kept]
    return LiftScene([item.view for item in views["train"]], held_out, views["train"])
