"""A click into the scene: what is seen there, and its feature."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from fit3d_ns.data.points.splat_ply import standard_gaussians, write_splat_ply
from fit3d_ns.support.errors import UserError
from fit3d_ns.viewer.feature_view import FeatureView
from fit3d_ns.viewer.outputs import LazyOutputs

_SOLID = 0.3
"""Accumulation below which a click went past everything."""


@dataclass(frozen=True)
class ClickedPoint:
    """A point of a surface.

    Attributes:
        position: In the scene's coordinates.
        feature: Decoded, as on an even surface.
    """

    position: Float[Tensor, "3"]
    feature: Float[Tensor, "C"]


@torch.no_grad()
def look_at_pixel(view: FeatureView, camera: Cameras, place: tuple[float, float], crop: Any = None) -> ClickedPoint:
    """Finds what a picture shows at a place.

    The whole picture is rendered: what a rasterizer shows along a ray depends on the camera around it.

    Args:
        view: What is looked at.
        camera: Of the picture.
        place: Shares (x, y) of its width and height, from the upper left corner, in [0, 1].
        crop: Crop box or selection; None for the whole scene.

    Returns:
        The point, and the feature there.

    Raises:
        UserError: If there is nothing, or nothing with a feature.
    """
    model, was_training = view.model, view.model.training
    model.eval()
    try:
        frame: LazyOutputs = model.get_outputs_for_camera(camera, crop)
        (height, width), (x, y) = frame.size, place
        row, column = min(int(y * height), height - 1), min(int(x * width), width - 1)
        if float(frame["accumulation"][row, column]) < _SOLID:
            raise UserError("There is nothing where you clicked: click on a surface.")
        maps, _ = frame.render(view.features, frame.feature_size())
    finally:
        model.train(was_training)
    at = maps.new_tensor([[[[2 * x - 1, 2 * y - 1]]]])
    low = F.grid_sample(maps[None], at, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0, 0]
    space = view.space()
    feature = space.decode(space.coordinates(low))
    if not bool(torch.isfinite(feature).all()) or not bool(feature.any()):
        raise UserError("What you clicked on has no feature yet: let it train, or lift features.")
    viewmat, intrinsics = model.view_matrices(camera)
    pixel = intrinsics.new_tensor([x * width, y * height, 1.0])
    point = torch.linalg.inv(intrinsics) @ pixel * frame["depth"][row, column]
    return ClickedPoint(viewmat[:3, :3].T @ (point - viewmat[:3, 3]), feature)


def export_segment(view: FeatureView, path: Path) -> int:
    """Writes the Gaussians that are similar to the query, with their features, as ``ns-export`` writes splats.

    Args:
        view: With a query.
        path: The file; it must not exist.

    Returns:
        The number of Gaussians written.

    Raises:
        UserError: If nothing was clicked, nothing is similar, the file exists, or it cannot be written.
    """
    if path.suffix != ".ply":
        raise UserError(f"{path} is no name of a PLY file: let it end in .ply.")
    if path.exists():
        raise UserError(f"{path} exists: choose another name.")
    chosen = view.similar()
    model = view.model
    gaussians = standard_gaussians(dict(model.gauss_params.items()), model.config.sh_degree)
    picked = {name: values[chosen] for name, values in gaussians.items()}
    return write_splat_ply(path, picked, view.features[chosen])
