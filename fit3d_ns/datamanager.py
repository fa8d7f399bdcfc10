"""nerfstudio's full-image data manager, handing each view the teacher's map of it."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager, FullImageDatamanagerConfig
from torch import Tensor

from fit3d_ns.backbones import BackboneInfo, BackboneSpec, describe_backbone, load_backbone
from fit3d_ns.data.feature_cache import FeatureCache, user_cache_directory
from fit3d_ns.data.masks import composite_on_black, patch_weights
from fit3d_ns.data.scene_checks import check_image_files, check_poses, check_split, explain_unreadable_scene
from fit3d_ns.support.errors import UserError

Split = Literal["train", "eval"]


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
    """

    def __init__(self, datamanager: "Fit3DDataManager"):
        self._datamanager = datamanager

    def __len__(self) -> int:
        return len(self._datamanager.eval_dataset)

    def __iter__(self) -> Iterator[tuple[Cameras, dict[str, Any]]]:
        for index in range(len(self)):
            yield self._datamanager.evaluation_view(index)


class Fit3DDataManager(FullImageDatamanager):
    """Full images with the teacher's map of each.

    Batches carry, beside nerfstudio's keys: ``teacher`` (fp16, shape [C, h, w]), ``camera`` (the view's camera) and,
    where a mask or transparency leaves parts out, ``patch_weights`` (shape [h, w], in [0, 1]).

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
        check_split(self.train_dataset, self.eval_dataset)
        check_poses(self.train_dataset, self.eval_dataset)
        if torch.device(device).type != "cuda":
            # "cpu" pins memory, which needs CUDA; "gpu" only means "on the training device".
            self.config.cache_images = "gpu"
        self.train_dataset.metadata["teacher"] = self.teacher_info
        self.train_dataset.metadata["teacher_max_size"] = config.backbone_max_size
        self._feature_cache: FeatureCache | None = None
        self._keys: dict[str, list[str]] = {}
        self._resident: dict[str, Float[Tensor, "C h w"]] = {}

    def next_train(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """Returns the next training view; the first call fills the feature cache."""
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
        """Returns one held-out view.

        Args:
            index: Its position in the evaluation split.
        """
        batch = self.cached_eval[index].copy()
        batch["image"] = batch["image"].to(self.device)
        camera = self.eval_dataset.cameras[index : index + 1].to(self.device)
        return camera, self._with_teacher("eval", camera, batch)

    def teacher_map(self, split: Split, index: int) -> Float[Tensor, "C h w"]:
        """Returns the teacher's map of a view, in half precision, on the data manager's device.

        The first call fills the cache for both splits.

        Args:
            split: ``train`` or ``eval``.
            index: Position of the view in that split.
        """
        if not self._keys:
            self._fill_feature_cache()
        key = self._keys[split][index]
        if key in self._resident:
            return self._resident[key]
        assert self._feature_cache is not None
        teacher = self._feature_cache.load(key).to(self.device)
        if self.config.cache_images == "gpu" and torch.device(self.device).type == "cuda":
            self._resident[key] = teacher
        return teacher

    def teacher_identity(self) -> dict[str, Any] | None:
        """Returns what produced the teacher's maps (name, weights hash, layer ...); None before the cache is read."""
        return None if self._feature_cache is None else self._feature_cache.identity

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
        dataset = self.train_dataset if split == "train" else self.eval_dataset
        try:
            return super()._load_images(split, cache_images_device)
        except Exception as error:
            check_image_files(dataset)
            raise UserError(f"The photos of {self.get_datapath()} could not be prepared: {error}") from error

    def has_teacher_maps(self) -> bool:
        """Tells whether ``teacher_map`` reads maps that are known to be there, as while training."""
        return bool(self._keys)

    def open_feature_cache(self) -> FeatureCache:
        """Returns the store of the teacher's maps, without filling it.

        Raises:
            UserError: If the teacher's weights cannot be used.
        """
        if self._feature_cache is None:
            self._feature_cache = self.feature_cache_of(None)
        return self._feature_cache

    def feature_cache_of(self, identity: dict[str, Any] | None) -> FeatureCache:
        """Returns the store of maps that a teacher made whose weights need not be here.

        Args:
            identity: Its `teacher_identity`, as a checkpoint notes it; None for the teacher that the flags describe.

        Raises:
            UserError: If there is no identity and the teacher's weights cannot be used.
        """
        config = self.config
        data = Path(self.get_datapath())
        scene = data if data.is_dir() else data.parent
        return FeatureCache(
            directory=config.feature_cache_dir or scene / ".fit3d_cache",
            spec=config.backbone_spec(),
            max_size=config.backbone_max_size,
            fallback_directory=None if config.feature_cache_dir else user_cache_directory() / "features",
            identity=identity,
        )

    def _fill_feature_cache(self) -> None:
        """Makes the teacher's maps of all views, or finds them on disk. Draws no random number that training sees."""
        config = self.config
        spec = config.backbone_spec()
        cache = self.open_feature_cache()
        photos = {split: getattr(self, f"cached_{split}") for split in ("train", "eval") if self._has_views(split)}
        sources = [lambda view=view: composite_on_black(view["image"]) for views in photos.values() for view in views]
        python_state = random.getstate()
        with torch.random.fork_rng():
            keys = cache.fill(
                sources,
                load_teacher=lambda: load_backbone(spec, self.device),
                device=self.device,
                batch_size=config.feature_batch_size,
            )
        random.setstate(python_state)
        for split, views in photos.items():
            self._keys[split], keys = keys[: len(views)], keys[len(views) :]

    def _has_views(self, split: str) -> bool:
        return len(self.train_dataset if split == "train" else self.eval_dataset) > 0
