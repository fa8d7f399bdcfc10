"""A video of a scene's photographic colours beside the colours of its features."""

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.commands.export.camera_path import CameraPath
from fit3d_ns.commands.export.video import video_writer
from fit3d_ns.data.photos.reader import image_size
from fit3d_ns.features.colors import SceneColors
from fit3d_ns.model import Fit3DSplatModel


def write_turntable(
    file: Path,
    model: Fit3DSplatModel,
    colors: SceneColors,
    path: CameraPath,
    frames_per_second: float,
    max_size: int,
    indices: Iterable[int],
) -> None:
    """Renders a camera path as a video: ``rgb`` on the left, ``feature_pca`` on the right.

    Args:
        file: The MP4 file; what stands there is replaced, in one step.
        model: In evaluation mode.
        colors: Of the scene, on the model's device.
        path: The views; all are shown at the size of the first.
        frames_per_second: Of the video.
        max_size: Longest side of each half in pixels; smaller views are shown at their own size.
        indices: Which views, in order.

    Raises:
        UserError: If videos cannot be written here, or the disk refuses.
    """
    height, width = image_size(path.camera(0, "cpu"))
    scale = min(1.0, max_size / max(height, width))
    size = max(2, int(height * scale)), max(2, int(width * scale))
    with video_writer(file, (size[0], 2 * size[1]), frames_per_second) as append:
        for index in indices:
            append(render_pair(model, colors, path, index, size))


@torch.no_grad()
def render_pair(
    model: Fit3DSplatModel, colors: SceneColors, path: CameraPath, index: int, size: tuple[int, int]
) -> Float[Tensor, "H W2 3"]:
    """Renders one view's colours and, to the right of them, the colours of its features.

    Features are rendered by the scene's own rule for a photo of the view's full size, whatever the size shown.

    Args:
        model: In evaluation mode.
        colors: Of the scene, on the model's device.
        path: The views.
        index: Which of them.
        size: Height and width of each half.

    Returns:
        Values in [0, 1]; twice as wide as ``size``.
    """
    low, _ = model.render_low(path.camera(index, model.device))
    features = _resized(colors.of_render(low), size)
    camera = path.camera(index, model.device)
    own = image_size(camera)
    camera.rescale_output_resolution(max(size[0] / own[0], size[1] / own[1]))
    rgb = _resized(model.get_outputs_for_camera(camera)["rgb"], size)
    return torch.cat([rgb, features], dim=1).clamp(0, 1)


def _resized(picture: Float[Tensor, "h w 3"], size: tuple[int, int]) -> Float[Tensor, "H W 3"]:
    if picture.shape[:2] == size:
        return picture
    channels = picture.permute(2, 0, 1)[None]
    return F.interpolate(channels, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)
