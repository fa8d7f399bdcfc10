"""A dataparser of any kind, made to heed what a scene says of poses, seed points and cameras."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nerfstudio.cameras.cameras import CAMERA_MODEL_TO_TYPE, Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs
from torch import Tensor

from fit3d_ns.compat import listing_without
from fit3d_ns.data.folders import is_leftover
from fit3d_ns.data.photos.lenses import Lens, leaves_a_photo, lenses_of
from fit3d_ns.data.points.seed_points import read_point_cloud, sift
from fit3d_ns.data.poses import check_poses
from fit3d_ns.data.scene_file import CAMERA_MODELS, FISHEYE624, FrameLens
from fit3d_ns.support.errors import UserError

_LOGGER = logging.getLogger(__name__)

SEED_REMARK = "seed_points_remark"
"""Key of the outputs' metadata: why there are no seed points although the scene names some."""
LENS = "fit3d_lens"
"""Key of a frame's `FrameLens` among what a dataparser reads of it."""


class FarOutputs(DataparserOutputs):
    """Outputs of a scene whose origin lies far from its views: their transform keeps double precision."""

    def transform_poses_to_original_space(self, poses: Tensor, camera_convention: Any = "opencv") -> Tensor:
        """Returns poses in the coordinates of the scene's files, in double precision.

        Args:
            poses: Camera to world, shape [V, 3, 4].
            camera_convention: ``opencv`` or ``opengl``, of the result.
        """
        return super().transform_poses_to_original_space(poses.double(), camera_convention)


class SceneReader:
    """Reads through a dataparser of any kind.

    Args:
        parser: nerfstudio's dataparser, set up; its ``get_dataparser_outputs`` is called through this.
        seeds: Whether points are wanted that Gaussians start from.
    """

    def __init__(self, parser: DataParser, seeds: bool) -> None:
        self._parser: Any = parser
        self._generate = parser.get_dataparser_outputs
        self._seeds = seeds
        self._seed_source = f"The scene {self._data}"
        self._said: set[str] = set()
        self._origin = np.zeros(3)
        """What is subtracted from positions before they are rounded, in the coordinates of the dataparser."""

    @property
    def _data(self) -> Path:
        return Path(self._parser.config.data)

    def outputs(self, split: str = "train", **kwargs: Any) -> DataparserOutputs:
        """Stands for the dataparser's ``get_dataparser_outputs``.

        Args:
            split: ``train``, ``val`` or ``test``.
            **kwargs: Of the dataparser, handed on.

        Returns:
            What the dataparser gives, with cameras, poses and points checked.
        """
        self._wants_points = self._seeds and split == "train"
        outputs = self._read(split, **kwargs)
        check_cameras(outputs, str(self._data))
        if "points3D_xyz" in outputs.metadata:
            outputs.metadata = self._sifted(outputs)
        return self._moved_back(outputs)

    def _read(self, split: str, **kwargs: Any) -> DataparserOutputs:
        with listing_without(is_leftover):
            return self._generate(split, **kwargs)

    def _say(self, remarks: Sequence[str]) -> None:
        for remark in remarks:
            if remark not in self._said:
                self._said.add(remark)
                _LOGGER.warning(remark)

    def _applied(self) -> np.ndarray:
        """[3, 4] what leads from the files' coordinates to those in which the dataparser got the poses."""
        return np.eye(4)[:3]

    def _load_points(self, path: Path, transform: Tensor | None = None, scale: float | None = None) -> dict[str, Any]:
        """Stands for a dataparser's ``_load_3D_points``: the same numbers, from points in double precision."""
        if not self._wants_points:
            return {}
        self._seed_source = str(path)
        positions, colors = self._read_points(Path(path))
        with np.errstate(over="ignore", invalid="ignore"):
            points = torch.from_numpy((positions - self._point_origin()).astype(np.float32))
        if transform is not None:
            points = torch.cat((points, torch.ones_like(points[..., :1])), -1) @ transform.T
        points = points * (self._parser.config.scale_factor if scale is None else scale)
        return {"points3D_xyz": points, "points3D_rgb": torch.from_numpy(colors)}

    def _read_points(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        return read_point_cloud(path)

    def _point_origin(self) -> np.ndarray:
        """[3] the subtracted point in the coordinates of the points."""
        return self._origin

    def _sifted(self, outputs: DataparserOutputs) -> dict[str, Any]:
        metadata = dict(outputs.metadata)
        if not self._wants_points:
            return {key: value for key, value in metadata.items() if key not in ("points3D_xyz", "points3D_rgb")}
        positions = outputs.cameras.camera_to_worlds[:, :3, 3].double()  # [V, 3]
        extent = float((positions - positions.median(dim=0).values).norm(dim=1).max()) if len(positions) else 1.0
        points3d, colors = metadata.pop("points3D_xyz").float(), metadata.pop("points3D_rgb", None)
        colors = torch.zeros((0, 3), dtype=torch.uint8) if colors is None else colors
        points = sift(points3d, colors, extent, self._seed_source)
        if points.positions is None:
            metadata[SEED_REMARK] = points.remark
        else:
            metadata.update(points3D_xyz=points.positions, points3D_rgb=points.colors)
            self._say([f"{points.remark}."] if points.remark else [])
        return metadata

    def _moved_back(self, outputs: DataparserOutputs) -> DataparserOutputs:
        """Notes in the outputs' transform what was subtracted."""
        if not self._origin.any():
            return outputs
        origin = np.linalg.solve(self._applied()[:, :3], self._origin)  # in the coordinates of the files
        transform = outputs.dataparser_transform.double().clone()
        transform[:, 3] -= transform[:, :3] @ torch.from_numpy(origin)
        return FarOutputs(**{**vars(outputs), "dataparser_transform": transform})

    def _near(self, matrices: Sequence[Any], names: Sequence[str], source: str) -> np.ndarray:
        """Judges poses, and returns them with the origin among them if it lies far away: [V, 4, 4] float64."""
        if len(names) == 1:
            raise UserError(f"The scene has only one view ({names[0]} in {source}): lifting needs at least two.")
        poses = check_poses(matrices, names, source)
        centred = getattr(self._parser.config, "center_method", "none") != "none"
        self._origin = poses.origin(centred)
        self._say(poses.remarks)
        if self._origin.any() and not centred:
            place = ", ".join(f"{value:.6g}" for value in self._origin)
            self._say([f"The views of {source} lie far from the origin: they are moved by -({place})."])
        near = poses.matrices.copy()
        near[:, :3, 3] -= self._origin
        return near


def make_cameras(
    poses: Tensor,
    lenses: Sequence[FrameLens],
    cameras: Cameras,
    source: str,
    downscale: float = 1.0,
    rounding: str = "floor",
) -> Cameras:
    """Returns nerfstudio's cameras for views whose lenses are known.

    Args:
        poses: Camera to world, shape [V, 3, 4].
        lenses: Of the V views, at the full size of the photos.
        cameras: What a dataparser made of them; gives the metadata.
        source: Where they come from, for sentences.
        downscale: By how much the photos are smaller than what the lenses describe.
        rounding: How nerfstudio rounds sizes then: ``floor``, ``round`` or ``ceil``.

    Raises:
        UserError: If models are mixed that nerfstudio cannot hold together.
    """
    if not lenses:
        return cameras
    radii = {lens.fisheye_crop_radius for lens in lenses}
    if len(radii) > 1:
        raise UserError(
            f"{source} mixes {FISHEYE624} cameras with others, or their fisheye_crop_radius differ: train them apart, "
            "or undistort the photos first."
        )
    metadata = dict(cameras.metadata) if cameras.metadata else {}
    radius = radii.pop()
    if radius is not None:
        metadata["fisheye_crop_radius"] = radius / downscale
    result = Cameras(
        camera_to_worlds=poses,
        fx=torch.tensor([lens.fx for lens in lenses], dtype=torch.float32)[:, None],
        fy=torch.tensor([lens.fy for lens in lenses], dtype=torch.float32)[:, None],
        cx=torch.tensor([lens.cx for lens in lenses], dtype=torch.float32)[:, None],
        cy=torch.tensor([lens.cy for lens in lenses], dtype=torch.float32)[:, None],
        width=torch.tensor([lens.width for lens in lenses])[:, None],
        height=torch.tensor([lens.height for lens in lenses])[:, None],
        distortion_params=torch.tensor([lens.distortion for lens in lenses], dtype=torch.float32),
        camera_type=torch.tensor([CAMERA_MODEL_TO_TYPE[lens.model].value for lens in lenses])[:, None],
        metadata=metadata,
    )
    result.rescale_output_resolution(1.0 / downscale, rounding)
    return result


def check_cameras(outputs: DataparserOutputs, source: str) -> None:
    """Checks that the photos of all cameras can be undistorted, whatever dataparser describes them.

    Args:
        outputs: Of one split.
        source: The scene, for sentences.

    Raises:
        UserError: Naming the first photo whose camera is of another type, has an intrinsic that is out of range, or
            coefficients that no lens has.
    """
    cameras = outputs.cameras
    for index, photo in enumerate(outputs.image_filenames):
        kind = int(cameras.camera_type[index])
        model = next((model for model in CAMERA_MODELS if CAMERA_MODEL_TO_TYPE[model].value == kind), None)
        if model is None:
            raise UserError(
                f"The camera of {photo} in {source} is of the type {CameraType(kind).name}, whose photos cannot be "
                "undistorted here: undistort the photos first."
            )
        values = {name: float(getattr(cameras, name)[index]) for name in ("fx", "fy", "cx", "cy")}
        for name, value in values.items():
            if not math.isfinite(value) or (name in ("fx", "fy") and value <= 0):
                raise UserError(f"{name} of the camera of {photo} in {source} is {value:g}: mend or remove that view.")
    try:
        lenses = lenses_of(cameras)
    except ValueError as error:
        raise UserError(f"A camera in {source} cannot be undistorted ({error}): mend its distortion.") from error
    judged: dict[Lens, bool] = {}
    for photo, lens in zip(outputs.image_filenames, lenses):
        if lens is None:
            continue
        if lens not in judged:
            judged[lens] = leaves_a_photo(lens)
        if not judged[lens]:
            shown = ", ".join(f"{value:g}" for value in lens.distortion)
            raise UserError(
                f"The camera of {photo} in {source} has distortion coefficients that leave nothing of the photo once "
                f"it is undistorted ({shown}): mend them."
            )
