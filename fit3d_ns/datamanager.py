"""nerfstudio's full-image data manager, handing each view the teacher's map of it."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager, FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataParser
from torch import Tensor

from fit3d_ns.backbones import Backbone, BackboneInfo, BackboneSpec, describe_backbone, load_backbone
from fit3d_ns.compat import refuse_to_render_nothing
from fit3d_ns.data.dataparsers import read_checked
from fit3d_ns.data.feature_cache import FeatureCache, Precision, teacher_precision
from fit3d_ns.data.photos.masks import composite_on_black, patch_weights
from fit3d_ns.data.photos.reader import PhotoDataset, PhotoReader
from fit3d_ns.data.photos.view_files import (
    check_masks_show_something,
    check_photos_exist,
    check_views_read_their_own_files,
    find_masks,
)
from fit3d_ns.data.scene_checks import check_cameras_together, check_split, explain_unreadable_scene
from fit3d_ns.data.splits import nothing_held_out
from fit3d_ns.lifting.memory import ResidentMaps
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import user_cache_directory
from fit3d_ns.support.progress import tracked

Split = Literal["train", "eval"]
SPLITS: tuple[Split, Split] = ("train", "eval")


@dataclass
class Fit3DDataManagerConfig(FullImageDatamanagerConfig):
    """Configuration of the photos and of the teacher that sees them."""

    _target: type = field(default_factory=lambda: Fit3DDataManager)
    """target class to instantiate"""
    backbone: str = "dinov2_small"
    """Teacher: a named backbone (dinov2_small, dinov2_base, dinov2_large, dinov2_giant, dinov2_reg_small,
    dinov2_reg_base, clip_base, mae_base, deit3_base, dinov2_small_focus) or the id of any timm ViT."""
    backbone_weights: Path | None = None
    """Local weights (.safetensors, .pth) of the teacher, in timm, DINOv2 or FiT3D layout. Without it, timm's hub."""
    backbone_layer: int | None = None
    """Block whose output is lifted, counted from 0; negative counts from the end. Without it, the last."""
    backbone_norm: bool = True
    """Whether the backbone's final norm is applied to that layer."""
    backbone_normalization: Literal["own", "imagenet"] = "own"
    """Mean and standard deviation of the input: the backbone's own, or ImageNet's for all (as FiT3D)."""
    backbone_max_size: int = 868
    """Longest side, in pixels, at which the teacher sees a photo; 0 for no limit. Photos are never enlarged by more
    than half a patch."""
    feature_cache_dir: Path | None = None
    """Where the teacher's maps are kept. Without it, .fit3d_cache beside the photos, or the user's cache folder if
    that cannot be written."""
    feature_batch_size: int = 8
    """Photos that the teacher sees at once while the cache is filled."""

    def backbone_spec(self) -> BackboneSpec:
        """Returns the teacher that these flags describe."""
        return BackboneSpec(
            name=self.backbone,
            weights=self.backbone_weights,
            layer=self.backbone_layer,
            norm=self.backbone_norm,
            normalization=self.backbone_normalization,
        )


class EvaluationViews:
    """The held-out views with their teacher maps, loaded one by one when asked for.

    nerfstudio's viewer reads every property of the data manager, this loader among them; a list would load all photos
    and wake the teacher.

    Args:
        datamanager: Of the scene.
    """

    def __init__(self, datamanager: "Fit3DDataManager"):
        self._datamanager = datamanager

    def __len__(self) -> int:
        return len(self._datamanager.eval_dataset)

    def __iter__(self) -> Iterator[tuple[Cameras, dict[str, Any]]]:
        if len(self) == 0:
            raise UserError(nothing_held_out(self._datamanager.get_datapath()))
        for index in range(len(self)):
            yield self._datamanager.evaluation_view(index)


class Fit3DDataManager(FullImageDatamanager[PhotoDataset]):
    """Full images with the teacher's map of each.

    Batches carry, beside nerfstudio's keys: ``teacher`` (fp16, shape [C, h, w]), ``camera`` (the view's camera) and,
    where a mask or transparency leaves parts out, ``patch_weights`` (shape [h, w], in [0, 1]).

    Args:
        config: The user's choices.
        device: Of the model.
        **kwargs: nerfstudio's: ``test_mode``, ``world_size``, ``local_rank``.

    Raises:
        UserError: If the scene, its poses, its photos or a flag cannot be used; the sentence names the file or flag.
    """

    config: Fit3DDataManagerConfig
    absent: str | None = None
    """Why there are no photos, where there are none (`fit3d_ns.scenes.absent`)."""

    def __init__(self, config: Fit3DDataManagerConfig, device: torch.device | str = "cpu", **kwargs: Any):
        if config.feature_batch_size < 1:
            raise UserError(
                f"--pipeline.datamanager.feature-batch-size is {config.feature_batch_size}: the teacher sees photos "
                "in batches of at least 1, so name a larger number."
            )
        self.teacher_info: BackboneInfo = describe_backbone(config.backbone_spec())
        with explain_unreadable_scene(config.data or config.dataparser.data):
            super().__init__(config, device=device, **kwargs)
        self._check_files()
        check_split(self.train_dataset, self.eval_dataset)
        check_cameras_together(self.train_dataset, self.eval_dataset)
        if len(self.eval_dataset) == 0:
            refuse_to_render_nothing(nothing_held_out(self.get_datapath()))
        if torch.device(device).type != "cuda":
            # "cpu" pins memory, which needs CUDA; "gpu" only means "on the training device".
            self.config.cache_images = "gpu"
        self.train_dataset.metadata["teacher"] = self.teacher_info
        self.train_dataset.metadata["teacher_max_size"] = config.backbone_max_size
        self._feature_cache: FeatureCache | None = None
        self._trained_with: tuple[dict[str, Any] | None, Precision | None] = (None, None)
        self._keys: dict[str, list[str]] = {}
        self._readers: dict[str, PhotoReader] = {}
        self._maps: ResidentMaps | None = None

    @property
    def dataparser(self) -> DataParser:  # type: ignore[override]
        """Nerfstudio's reader of the scene, by this package's rules."""
        return self._dataparser

    @dataparser.setter
    def dataparser(self, parser: DataParser) -> None:
        self._dataparser = read_checked(parser, seeds=self.test_mode == "val")

    def next_train(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """Returns the next training view; the first call fills the feature cache."""
        self.prepare_teacher_maps()
        camera, batch = super().next_train(step)
        return camera, self._with_teacher("train", camera, batch)

    def next_eval_image(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """Returns a random held-out view."""
        camera, batch = super().next_eval_image(step)
        return camera, self._with_teacher("eval", camera, batch)

    @property
    def fixed_indices_eval_dataloader(self) -> EvaluationViews:  # type: ignore[override]
        """All held-out views, loaded while iterating."""
        return EvaluationViews(self)

    def evaluation_view(self, index: int) -> tuple[Cameras, dict[str, Any]]:
        """Returns one held-out view; its photo is opened now, unless training holds it in memory.

        Args:
            index: Its position in the evaluation split.
        """
        if self._holds("eval"):
            batch = self.cached_eval[index].copy()
            camera = self.eval_dataset.cameras[index : index + 1].to(self.device)
        else:
            photo = self.photo_reader("eval").read(index)
            batch, camera = photo.batch, photo.camera.to(self.device)
        batch["image"] = batch["image"].to(self.device)
        return camera, self._with_teacher("eval", camera, batch)

    def photo_reader(self, split: Split) -> PhotoReader:
        """Returns the reader of a split's photos, which keeps none of them.

        Args:
            split: ``train`` or ``eval``.
        """
        if split not in self._readers:
            self._readers[split] = PhotoReader(self._dataset(split), self.config.cache_images_type)
        return self._readers[split]

    def prepare_teacher_maps(self) -> None:
        """Makes the teacher's maps of all views, or finds them on disk; nothing where that was done before."""
        if not self._keys:
            self._fill_feature_cache("train", "eval")

    def teacher_map(self, split: Split, index: int) -> Float[Tensor, "C h w"]:
        """Returns the teacher's map of a view, in half precision, on the data manager's device.

        The first call for a split fills the cache.

        Args:
            split: ``train`` or ``eval``.
            index: Position of the view in that split.
        """
        if split not in self._keys:
            self._fill_feature_cache(split)
        if self._maps is None:
            self._maps = ResidentMaps(self.open_feature_cache().load, torch.device(self.device))
        return self._maps.load(self._keys[split][index])

    def teacher_identity(self) -> dict[str, Any] | None:
        """Returns what produced the teacher's maps (name, weights hash, layer ...); None before the cache is read."""
        return None if self._feature_cache is None else self._feature_cache.identity

    def teacher_precision(self) -> Precision | None:
        """Returns in which precision the teacher's maps were computed; None before the cache is read."""
        return None if self._feature_cache is None else self._feature_cache.precision

    def sampler_state(self) -> dict[str, Any]:
        """Returns where the sampling of training views stands, as plain values."""
        unseen = [int(index) for index in self.train_unseen_cameras]
        state: dict[str, Any] = {"num_views": len(self.train_dataset), "unseen": unseen}
        if hasattr(self, "random_generator"):
            kind, values, gauss = self.random_generator.getstate()
            state["random"] = [kind, list(values), gauss]
        if hasattr(self, "train_unsampled_epoch_count"):
            state["unsampled"] = [float(count) for count in self.train_unsampled_epoch_count]
        return state

    def load_sampler_state(self, state: dict[str, Any]) -> None:
        """Continues the sampling of training views where ``sampler_state`` was taken.

        A state of another scene (a different number of views) is left aside.

        Args:
            state: Of ``sampler_state``.
        """
        num_views = len(self.train_dataset)
        # Older checkpoints do not tell the number.
        if state.get("num_views", num_views) != num_views or any(index >= num_views for index in state["unseen"]):
            return
        self.train_unseen_cameras = list(state["unseen"])
        if "random" in state and hasattr(self, "random_generator"):
            kind, values, gauss = state["random"]
            self.random_generator.setstate((kind, tuple(values), gauss))
        if "unsampled" in state and hasattr(self, "train_unsampled_epoch_count"):
            self.train_unsampled_epoch_count[:] = state["unsampled"]

    def _with_teacher(self, split: Split, camera: Cameras, batch: dict[str, Any]) -> dict[str, Any]:
        teacher = self.teacher_map(split, batch["image_idx"])
        camera.metadata = {**(camera.metadata or {}), "image_size": tuple(batch["image"].shape[:2])}
        batch["camera"] = camera
        batch["teacher"] = teacher
        weights = patch_weights(batch, (teacher.shape[1], teacher.shape[2]))
        if weights is not None:
            batch["patch_weights"] = weights.to(teacher.device)
        return batch

    def _load_images(self, split: Split, cache_images_device: Literal["cpu", "gpu"]) -> list[dict[str, Tensor]]:
        """Reads all photos of a split into memory, for training; its cameras become those of undistorted photos."""
        dataset, batches = self._dataset(split), []
        reader = PhotoReader(dataset, self.config.cache_images_type)
        for photo in tracked(reader, f"Reading the photos ({split})", len(reader)):
            for name in ("fx", "fy", "cx", "cy", "width", "height"):
                getattr(dataset.cameras, name)[photo.index] = getattr(photo.camera, name)[0]
            batch = photo.batch
            for name in ("image", "mask"):
                if name in batch and cache_images_device == "gpu":
                    batch[name] = batch[name].to(self.device)
                elif name in batch:
                    batch[name] = batch[name].pin_memory()
            batches.append(batch)
        cameras = self.train_dataset.cameras
        self.train_cameras = cameras.to(self.device) if cache_images_device == "gpu" else cameras
        return batches

    def _dataset(self, split: str) -> PhotoDataset:
        return self.train_dataset if split == "train" else self.eval_dataset

    def _holds(self, split: str) -> bool:
        """Whether the photos of a split are in memory, as while training."""
        return f"cached_{split}" in self.__dict__

    def _check_files(self) -> None:
        """Looks for every file that the scene names, before anything is trained."""
        scene = self._scene_folder()
        for dataset in (self.train_dataset, self.eval_dataset):
            check_photos_exist(dataset.image_filenames)
            dataset.mask_filenames = find_masks(dataset.mask_filenames, scene)
        check_masks_show_something(self.train_dataset.mask_filenames)
        check_views_read_their_own_files(self.train_dataset, self.eval_dataset)

    def _scene_folder(self) -> Path:
        data = Path(self.get_datapath())
        return data if data.is_dir() else data.parent

    def has_teacher_maps(self) -> bool:
        """Returns whether photos and the teacher's maps of the training views are at hand, as while training."""
        return "train" in self._keys and self._holds("train")

    def open_feature_cache(self) -> FeatureCache:
        """Returns the store of the teacher's maps, without filling it.

        Raises:
            UserError: If the teacher's weights cannot be used.
        """
        if self._feature_cache is None:
            self._feature_cache = self.feature_cache_of(*self._trained_with)
        return self._feature_cache

    def measure_against(self, identity: dict[str, Any] | None, precision: Precision | None) -> None:
        """Takes the teacher's maps from now on to be those of the teacher that a run was trained with.

        Args:
            identity: Its `teacher_identity`, as a checkpoint notes it; None if it does not.
            precision: In which it computed, likewise.
        """
        self._trained_with, self._feature_cache = (identity, precision), None

    def load_teacher(self) -> Backbone:
        """Loads the teacher, for maps that are not there.

        Returns:
            On the device of the data manager.

        Raises:
            UserError: If its weights cannot be used, or are others than those of the run that is measured.
        """
        backbone = load_backbone(self.config.backbone_spec(), self.device)
        identity, found = self._trained_with[0], backbone.identity["weights_sha256"]
        if identity is not None and found != identity["weights_sha256"]:
            raise UserError(
                f"The run was trained with other weights of {identity['name']} (SHA-256 "
                f"{identity['weights_sha256'][:12]}, now {found[:12]}), and their maps are "
                f"not in {self.open_feature_cache().folder}: restore those weights, or lift the run again."
            )
        return backbone

    def feature_cache_of(self, identity: dict[str, Any] | None, precision: Precision | None = None) -> FeatureCache:
        """Returns the store of maps that a teacher made whose weights need not be here.

        Args:
            identity: Its `teacher_identity`, as a checkpoint notes it; None for the teacher that the flags describe.
            precision: In which it computed; None for what is usual on this device.

        Raises:
            UserError: If there is no identity and the teacher's weights cannot be used.
        """
        config = self.config
        return FeatureCache(
            directory=config.feature_cache_dir or self._scene_folder() / ".fit3d_cache",
            spec=config.backbone_spec(),
            max_size=config.backbone_max_size,
            fallback_directory=None if config.feature_cache_dir else user_cache_directory() / "features",
            identity=identity,
            precision=precision or teacher_precision(self.device),
        )

    def _fill_feature_cache(self, *splits: Split) -> None:
        """Makes the teacher's maps of splits, or finds them on disk. Draws no random number that training sees.

        Training keeps its photos in memory anyway; everything else reads them one by one.
        """
        cache = self.open_feature_cache()
        sources: list[Callable[[], UInt8[Tensor, "H W 3"]]] = []
        for split in splits:
            for index in range(len(self._dataset(split))):
                sources.append(partial(self._photo, split, index, len(splits) > 1))
        python_state = random.getstate()
        device = torch.device(self.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            keys = cache.fill(
                sources,
                load_teacher=self.load_teacher,
                device=self.device,
                batch_size=self.config.feature_batch_size,
            )
        random.setstate(python_state)
        for split in splits:
            count = len(self._dataset(split))
            self._keys[split], keys = keys[:count], keys[count:]

    def _photo(self, split: Split, index: int, keep: bool) -> UInt8[Tensor, "H W 3"]:
        if keep or self._holds(split):
            views = self.cached_train if split == "train" else self.cached_eval
            return composite_on_black(views[index]["image"])
        return self.photo_reader(split).read(index).rgb
