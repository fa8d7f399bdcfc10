"""The scene bundle: the one thing that crosses from lifting to distillation.

A folder with ``scene.safetensors`` (geometry in fp32, features in fp16, the decoder, the cameras, weights of masked
patches) and ``scene.json`` (schema, teacher, feature grid, photos with their hashes, dataparser transform, versions).
No pickle, and nothing of optimisers, colours or viewers. Both files carry the bundle's id, and the JSON is written
last, so that a bundle is whole or does not open.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float16
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fit3d_ns.backbones import patch_grid
from fit3d_ns.data.photos import Photo
from fit3d_ns.features.grid import FeatureGrid
from fit3d_ns.features.rendering import Geometry
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_path, atomic_write_json

SCHEMA = 1
"""Raise it when the meaning of a stored value changes."""
TENSORS_NAME = "scene.safetensors"
JSON_NAME = "scene.json"
_PATCH_WEIGHTS = "patch_weights."


@dataclass(frozen=True)
class SceneTensors:
    """What rendering a scene's features takes, in units that any rasterizer understands."""

    geometry: Geometry
    """The Gaussians, fp32."""
    features: Float16[Tensor, "N D"]
    """Lifted features, fp16."""
    decoder: Float[Tensor, "C D 3 3"]
    """Kernel of the scene's decoder, see `fit3d_ns.features.decoder.FeatureDecoder`, fp32."""

    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors by the names that they have in a bundle."""
        return {**vars(self.geometry), "features": self.features, "decoder": self.decoder}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "SceneTensors":
        """Puts together what ``tensors`` took apart.

        Raises:
            KeyError: If a tensor is missing.
        """
        geometry = Geometry(**{item.name: tensors[item.name] for item in fields(Geometry)})
        return cls(geometry, tensors["features"], tensors["decoder"])

    def each(self, change: Callable[[Tensor], Tensor]) -> "SceneTensors":
        """Returns the scene with every tensor changed alike: moved, cloned, put into page-locked memory."""
        return SceneTensors.of({name: change(tensor) for name, tensor in self.tensors().items()})


_SCENE_TENSORS = (*(item.name for item in fields(Geometry)), "features", "decoder")


@dataclass(frozen=True)
class BundleView:
    """One view: its photo and which split it belongs to; its camera is a row of the bundle's ``cameras``."""

    name: str
    """Short name for humans, unique in the scene."""
    split: Literal["train", "eval"]
    """``eval`` views were held out from lifting."""
    photo: Photo
    """The photo."""


@dataclass(frozen=True)
class BundleInfo:
    """Everything about a scene but its tensors; stored as JSON."""

    scene: str
    """Name for humans."""
    teacher: dict[str, Any]
    """The teacher's `fit3d_ns.backbones.backbone_identity`."""
    teacher_max_size: int | None
    """Longest side at which the teacher saw a photo, pixels; None for no limit."""
    teacher_weights: str | None
    """The teacher's local weight file, or None for the hub's."""
    feature_grid: FeatureGrid
    """How features are rendered for a patch grid."""
    dataparser_transform: list[list[float]]
    """3x4, from the photos' original world to the bundle's, before scaling."""
    dataparser_scale: float
    """Factor from the original world to the bundle's."""
    source: dict[str, Any]
    """What the bundle was made from; equal for equal content."""
    views: list[BundleView]
    """All V views, in the order of ``cameras``."""
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in ("fit3d-ns", "torch")})
    """Versions of what made the bundle."""
    teacher_original: dict[str, Any] | None = None
    """Where the teacher is itself a student: the identity of the backbone that it was fine-tuned from."""

    def patch_grid(self, view: int) -> tuple[int, int]:
        """Returns height and width, in patches, of the teacher's map of a view."""
        photo = self.views[view].photo
        return patch_grid(photo.height, photo.width, self.teacher["patch_size"], self.teacher_max_size)

    def indices(self, split: Literal["train", "eval"]) -> list[int]:
        """Returns the positions of a split's views."""
        return [index for index, view in enumerate(self.views) if view.split == split]


@dataclass(frozen=True)
class BundleCameras:
    """Pinhole cameras of V views, at the size of their photos."""

    viewmats: Float[Tensor, "V 4 4"]
    """World to camera, OpenCV axes."""
    Ks: Float[Tensor, "V 3 3"]
    """Intrinsics in pixels of the photo, pixel centres at +0.5."""


class SceneBundle:
    """A bundle on disk. Opening it reads the JSON and the header of the tensors; tensors are read when asked for.

    Args:
        folder: The bundle's folder.

    Raises:
        UserError: If it is no bundle, not whole, or of another version.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / JSON_NAME
        try:
            stored = json.loads(path.read_text())
        except OSError as error:
            raise UserError(f"{folder} is no scene bundle: it holds no readable {JSON_NAME}.") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): make the bundle again.") from error
        if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
            found = stored.get("schema") if isinstance(stored, dict) else None
            raise UserError(f"{path} has the schema {found}, this version reads {SCHEMA}: make the bundle again.")
        try:
            self.id: str = stored["id"]
            self.info = _info_from_dict(stored["info"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} lacks or misnames an entry ({error}): make the bundle again.") from error
        with self._open() as tensors:
            if (tensors.metadata() or {}).get("id") != self.id:
                raise UserError(f"{TENSORS_NAME} and {JSON_NAME} in {folder} do not belong together: make it again.")
            self._names = set(tensors.keys())
        needed = {*_SCENE_TENSORS, "viewmats", "Ks"}
        if not needed <= self._names:
            raise UserError(f"{folder / TENSORS_NAME} lacks {', '.join(sorted(needed - self._names))}: make it again.")

    def read_scene(self) -> SceneTensors:
        """Reads geometry, features and decoder, memory-mapped: pages are read from disk when touched."""
        with self._open() as tensors:
            return SceneTensors.of({name: tensors.get_tensor(name) for name in _SCENE_TENSORS})

    def read_cameras(self) -> BundleCameras:
        """Reads the cameras of all views."""
        with self._open() as tensors:
            return BundleCameras(tensors.get_tensor("viewmats"), tensors.get_tensor("Ks"))

    def read_patch_weights(self) -> dict[int, Float[Tensor, "h w"]]:
        """Reads the share, in [0, 1], that masks leave valid of each patch, for the views that have a mask."""
        with self._open() as tensors:
            names = [name for name in self._names if name.startswith(_PATCH_WEIGHTS)]
            return {int(name.removeprefix(_PATCH_WEIGHTS)): tensors.get_tensor(name).float() for name in names}

    def num_bytes(self) -> int:
        """Size of the tensors on disk, and in memory."""
        return (self.folder / TENSORS_NAME).stat().st_size

    def _open(self) -> Any:
        path = self.folder / TENSORS_NAME
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is missing or damaged: make the bundle again.") from error


def write_bundle(
    folder: Path,
    info: BundleInfo,
    scene: SceneTensors,
    cameras: BundleCameras,
    patch_weights: dict[int, Float[Tensor, "h w"]],
) -> SceneBundle:
    """Writes a bundle; what stood there before stays whole until the new one is.

    Args:
        folder: The bundle's folder; made if needed.
        info: All but the tensors.
        scene: Geometry, features, decoder.
        cameras: One row for each of ``info.views``.
        patch_weights: For views with a mask: what it leaves valid of each patch, in [0, 1].

    Returns:
        The bundle.

    Raises:
        UserError: If the features were never lifted (all zero), if a value is not finite or exceeds half precision,
            or if the disk refuses.
    """
    _check_scene(info.scene, scene)
    content = _info_to_dict(info)
    bundle_id = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
    tensors = {**scene.tensors(), **vars(cameras)}
    tensors.update({f"{_PATCH_WEIGHTS}{index}": weights.half() for index, weights in patch_weights.items()})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(folder / TENSORS_NAME) as temporary:
        try:
            save_file(tensors, temporary, metadata={"id": bundle_id})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    atomic_write_json(folder / JSON_NAME, {"schema": SCHEMA, "id": bundle_id, "info": content})
    return SceneBundle(folder)


def find_bundles(paths: list[Path]) -> list[Path]:
    """Finds bundle folders.

    Args:
        paths: Bundles, or folders that hold some at any depth.

    Returns:
        Folders with a ``scene.json``, each once, sorted within each path.

    Raises:
        UserError: If a path does not exist or holds none.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is no folder: name scene bundles, or folders that hold some.")
        folders = sorted(match.parent for match in path.rglob(JSON_NAME))
        if not folders:
            raise UserError(f"{path} holds no scene bundle ({JSON_NAME}): make them with `fit3d-distill --runs`.")
        found.update(dict.fromkeys(folders))
    return list(found)


def _check_scene(name: str, scene: SceneTensors) -> None:
    if len(scene.geometry) == 0:
        raise UserError(f"The scene {name} has no Gaussians: train it again.")
    broken = [key for key, tensor in scene.tensors().items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise UserError(
            f"The scene {name} holds values that are not finite, or too large for half precision ({broken[0]}): "
            "train or lift it again."
        )
    if not bool(scene.features.any()) or not bool(scene.decoder.any()):
        raise UserError(f"The features of the scene {name} are all zero: it was never lifted; run fit3d-lift on it.")


def _info_to_dict(info: BundleInfo) -> dict[str, Any]:
    return {**asdict(replace(info, views=[])), "views": [asdict(view) for view in info.views]}


def _info_from_dict(values: dict[str, Any]) -> BundleInfo:
    views = [BundleView(**{**view, "photo": Photo.from_dict(view["photo"])}) for view in values["views"]]
    return BundleInfo(**{**values, "feature_grid": FeatureGrid.from_dict(values["feature_grid"]), "views": views})
