"""A click into the scene: what is seen there, and its feature."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from fit3d_ns.errors import UserError
from fit3d_ns.model import Fit3DSplatModel
from fit3d_ns.viewer.outputs import Frame

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
def look_at_pixel(
    model: Fit3DSplatModel, camera: Cameras, place: tuple[float, float], visible: Any = None
) -> ClickedPoint:
    """Finds what a picture shows at a place.

    The whole picture is rendered: what a rasterizer shows along a ray depends on the camera around it.

    Args:
        model: The scene.
        camera: Of the picture.
        place: Shares (x, y) of its width and height, from the upper left corner, in [0, 1].
        visible: Crop box or selection; None for the whole scene.

    Raises:
        UserError: If there is nothing, or nothing with a feature.
    """
    was_training = model.training
    model.eval()
    try:
        outputs = model.get_outputs_for_camera(camera, visible)
        shared = (outputs["rgb"], outputs["background"], outputs["accumulation"], visible)
        frame = Frame(model.feature_view, model, camera, *shared)
        (height, width), (x, y) = frame.size, place
        row, column = min(int(y * height), height - 1), min(int(x * width), width - 1)
        if float(outputs["accumulation"][row, column]) < _SOLID:
            raise UserError("There is nothing where you clicked: click on a surface.")
        maps, _ = frame.render(frame.view.features, frame.feature_size())
    finally:
        model.train(was_training)
    at = maps.new_tensor([[[[2 * x - 1, 2 * y - 1]]]])
    low = F.grid_sample(maps[None], at, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0, 0]
    space = frame.view.space()
    feature = space.decode(space.coordinates(low))
    if not bool(torch.isfinite(feature).all()) or not bool(feature.any()):
        raise UserError("What you clicked on has no feature yet: let it train, or lift features.")
    viewmat, intrinsics = model.view_matrices(camera)
    pixel = intrinsics.new_tensor([x * width, y * height, 1.0])
    point = torch.linalg.inv(intrinsics) @ pixel * outputs["depth"][row, column]
    return ClickedPoint(viewmat[:3, :3].T @ (point - viewmat[:3, 3]), feature)
