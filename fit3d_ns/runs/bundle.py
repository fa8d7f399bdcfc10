"""The scene bundle: the one thing that crosses from lifting to distillation.

A folder with ``scene.safetensors`` (geometry in fp32, features in fp16, the decoder, the cameras, weights of masked
patches) and ``scene.json`` (schema, teacher, feature grid, photos with their hashes, dataparser transform, versions).
No pickle, and nothing of optimisers, colours or viewers. The folder is replaced as a whole; both files carry the
bundle's id, a hash of what the JSON says, and the tensors a checksum: a bundle is as it was made, or does not open.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Float16
from torch import Tensor

from fit3d_ns.backbones import patch_grid
from fit3d_ns.backbones.identity import check_identity
from fit3d_ns.data.photos.bundled import BundledPhoto
from fit3d_ns.features.grid import FeatureGrid
from fit3d_ns.features.rendering import Geometry
from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.files import TEMPORARY, atomic_folder, atomic_write_json
from fit3d_ns.support.json_files import build, damaged, read_json
from fit3d_ns.support.tensor_files import TensorFile, TensorSpec, read_tensors, write_tensors

SCHEMA = 2
"""Raise it when the meaning of a stored value changes."""
_WITHOUT_CHECKSUM = 1
"""The schema of version 0.1.0, which is read too."""
TENSORS_NAME = "scene.safetensors"
JSON_NAME = "scene.json"
_PATCH_WEIGHTS = "patch_weights."
_REMEDY = "make the bundle again."


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

        Args:
            tensors: By the names of `Geometry`'s fields, ``features`` and ``decoder``.

        Returns:
            What ``tensors`` took apart.

        Raises:
            KeyError: If a tensor is missing.
        """
        geometry = Geometry(**{item.name: tensors[item.name] for item in fields(Geometry)})
        return cls(geometry, tensors["features"], tensors["decoder"])

    def each(self, change: Callable[[Tensor], Tensor]) -> "SceneTensors":
        """Returns the scene with every tensor changed alike: moved, cloned, put into page-locked memory.

        Args:
            change: Of one tensor of any shape.
        """
        return SceneTensors.of({name: change(tensor) for name, tensor in self.tensors().items()})


@dataclass(frozen=True)
class BundleView:
    """One view: its photo and which split it belongs to; its camera is a row of the bundle's ``cameras``."""

    name: str
    """Short name for humans."""
    split: Literal["train", "eval"]
    """``eval`` views were held out from lifting."""
    photo: BundledPhoto
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
    versions: dict[str, str] = field(default_factory=lambda: _versions("fit3d-ns", "torch", "timm", "gsplat"))
    """Versions of what made the bundle: gsplat 1.4 and 1.5 render different opacities."""
    teacher_precision: Literal["bf16", "fp32"] | None = None
    """In which the teacher computed its maps; None where that is not known."""
    teacher_original: dict[str, Any] | None = None
    """Where the teacher is itself a student: the identity of the backbone that it was fine-tuned from."""

    def __post_init__(self) -> None:
        """Refuses what no scene can be."""
        check_identity(self.teacher, "teacher")
        if self.teacher_original is not None:
            check_identity(self.teacher_original, "teacher_original")
        if self.teacher_max_size is not None and not 1 <= self.teacher_max_size < 2**31:
            raise ValueError(f"teacher_max_size is {self.teacher_max_size}, no number of pixels")
        if [len(row) for row in self.dataparser_transform] != [4, 4, 4]:
            raise ValueError("dataparser_transform is no 3x4 matrix")
        if self.dataparser_scale <= 0:
            raise ValueError(f"dataparser_scale is {self.dataparser_scale}, not positive")
        if not self.views:
            raise ValueError("views is empty")

    def patch_grid(self, view: int) -> tuple[int, int]:
        """Returns height and width, in patches, of the teacher's map of a view.

        Args:
            view: Place in ``views``.
        """
        photo = self.views[view].photo
        return patch_grid(photo.height, photo.width, self.teacher["patch_size"], self.teacher_max_size)

    def indices(self, split: Literal["train", "eval"]) -> list[int]:
        """Returns the positions of a split's views.

        Args:
            split: Of the views.
        """
        return [index for index, view in enumerate(self.views) if view.split == split]


@dataclass(frozen=True)
class BundleCameras:
    """Pinhole cameras of V views, at the size of their photos."""

    viewmats: Float[Tensor, "V 4 4"]
    """World to camera, OpenCV axes."""
    Ks: Float[Tensor, "V 3 3"]
    """Intrinsics in pixels of the photo, pixel centres at +0.5."""


class SceneBundle:
    """A bundle on disk. Opening it checks the JSON and the header of the tensors; tensors are read when asked for.

    Args:
        folder: The bundle's folder.

    Raises:
        UserError: If it is no bundle, damaged, or of another version.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / JSON_NAME
        try:
            stored = read_json(path)
        except FileNotFoundError as error:
            raise UserError(f"{folder} is no scene bundle: it holds no {JSON_NAME}.") from error
        except DamagedFile as error:
            raise damaged(path, error, _REMEDY) from error
        schema = stored.get("schema") if isinstance(stored, dict) else None
        if schema not in (SCHEMA, _WITHOUT_CHECKSUM) or isinstance(schema, bool):
            raise UserError(f"{path} has the schema {schema}, this version reads 1 and {SCHEMA}: {_REMEDY}")
        self._has_checksum = schema != _WITHOUT_CHECKSUM
        try:
            self.id = build(str, stored.get("id"), "id")
            content = stored.get("info")
            if self._has_checksum and isinstance(content, dict) and self.id != _hash(content):
                raise DamagedFile("it is not as it was written: its hash differs from its id")
            self.info = build(BundleInfo, content, "info")
        except DamagedFile as error:
            raise damaged(path, error, _REMEDY) from error
        if self._read(values=False).metadata.get("id") != self.id:
            raise UserError(f"{TENSORS_NAME} and {JSON_NAME} in {folder} do not belong together: {_REMEDY}")

    def check(self) -> None:
        """Reads all tensors once and checks them.

        Raises:
            UserError: If they are not as they were written, or a value is out of range.
        """
        tensors = self._read(values=True).tensors
        for name, fits in (
            ("scales", lambda: bool((tensors["scales"] > 0).all())),
            ("opacities", lambda: bool(((tensors["opacities"] >= 0) & (tensors["opacities"] <= 1)).all())),
            ("Ks", lambda: bool((tensors["Ks"][:, [0, 1], [0, 1]] > 0).all())),
        ):
            if not fits():
                raise damaged(self._path, DamagedFile(f"{name} holds values out of range"), _REMEDY)

    def read_scene(self) -> SceneTensors:
        """Reads geometry, features and decoder, memory-mapped: pages are read from disk when touched.

        Returns:
            Tensors on the CPU.
        """
        return SceneTensors.of(self._read(values=False).tensors)

    def read_cameras(self) -> BundleCameras:
        """Reads the cameras of all views.

        Returns:
            World-to-camera matrices [V, 4, 4] and intrinsics [V, 3, 3], in the order of ``views``.
        """
        tensors = self._read(values=False).tensors
        return BundleCameras(tensors["viewmats"], tensors["Ks"])

    def read_patch_weights(self) -> dict[int, Float[Tensor, "h w"]]:
        """Reads the share, in [0, 1], that masks leave valid of each patch, for the views that have a mask.

        Returns:
            Weights [h, w] by the view's place.
        """
        tensors = self._read(values=False).tensors
        names = [name for name in tensors if name.startswith(_PATCH_WEIGHTS)]
        return {int(name.removeprefix(_PATCH_WEIGHTS)): tensors[name].float() for name in names}

    def num_bytes(self) -> int:
        """Returns the bytes of the tensors, on disk as in memory."""
        return self._path.stat().st_size

    @property
    def _path(self) -> Path:
        return self.folder / TENSORS_NAME

    def _read(self, values: bool) -> TensorFile:
        """Reads the tensors, checked against what the JSON says of them."""
        num_views, width = len(self.info.views), self.info.teacher["width"]
        specs = {
            "means": TensorSpec(torch.float32, ("N", 3)),
            "quats": TensorSpec(torch.float32, ("N", 4)),
            "scales": TensorSpec(torch.float32, ("N", 3)),
            "opacities": TensorSpec(torch.float32, ("N",)),
            "features": TensorSpec(torch.float16, ("N", "D")),
            "decoder": TensorSpec(torch.float32, (width, "D", 3, 3)),
            "viewmats": TensorSpec(torch.float32, (num_views, 4, 4)),
            "Ks": TensorSpec(torch.float32, (num_views, 3, 3)),
        }
        weights = {
            f"{_PATCH_WEIGHTS}{view}": TensorSpec(torch.float16, self.info.patch_grid(view))
            for view in range(num_views)
        }
        try:
            return read_tensors(self._path, specs, weights, checksum=self._has_checksum, values=values)
        except FileNotFoundError as error:
            raise UserError(f"{self._path} is missing: {_REMEDY}") from error
        except DamagedFile as error:
            raise damaged(self._path, error, _REMEDY) from error


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
    bundle_id = _hash(content)
    tensors = {**scene.tensors(), **vars(cameras)}
    tensors.update({f"{_PATCH_WEIGHTS}{index}": weights.half() for index, weights in patch_weights.items()})
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / TENSORS_NAME, tensors, {"id": bundle_id})
        atomic_write_json(temporary / JSON_NAME, {"schema": SCHEMA, "id": bundle_id, "info": content})
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
        found_here = (match.parent for match in path.rglob(JSON_NAME))
        # A process that was killed may have left half a bundle under a temporary name.
        folders = sorted(found for found in found_here if not any(TEMPORARY.fullmatch(part) for part in found.parts))
        if not folders:
            raise UserError(f"{path} holds no scene bundle ({JSON_NAME}): make them with `fit3d-distill --runs`.")
        found.update(dict.fromkeys(folders))
    return list(found)


def check_bundles(folders: Iterable[Path]) -> None:
    """Reads the tensors of bundles once: what others made is taken as it was made, or not at all.

    Args:
        folders: The bundles.

    Raises:
        UserError: Naming the file that is damaged.
    """
    for folder in folders:
        SceneBundle(folder).check()


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
    return json.loads(json.dumps(asdict(info)))  # tuples are lists there


def _hash(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _versions(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
