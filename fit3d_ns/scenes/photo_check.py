"""Whether a splat shows the scene that its photos show."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.data.photos.reader import PhotoReader
from fit3d_ns.model import Fit3DSplatModel
from fit3d_ns.support.samples import evenly_spaced

_VIEWS = 6
_SIZE = (24, 32)
"""Renders and photos are compared as thumbnails: content counts, sharpness does not."""


@torch.no_grad()
def photo_mismatch(model: Fit3DSplatModel, photos: PhotoReader) -> float:
    """Compares renders of a few views with their own photos and with those of the other views.

    Args:
        model: In evaluation mode.
        photos: Of the training views.

    Returns:
        Squared error to the own photo over squared error to the others': far below 1 where splat, poses and photos
        belong together, about 1 where they do not.
    """
    renders, shown = [], []
    for number in evenly_spaced(range(len(photos)), _VIEWS):
        photo = photos.read(number)
        render = model.get_outputs_for_camera(photo.camera.to(model.device))["rgb"]
        renders.append(_thumbnail(render))
        shown.append(_thumbnail(photo.rgb.to(model.device).float() / 255.0))
    errors = torch.stack([torch.stack([(render - photo).square().mean() for photo in shown]) for render in renders])
    own = errors.diagonal().sum()
    others = (errors.sum() - own) / max(1, len(shown) - 1)
    return float(own / others) if len(shown) > 1 and float(others) > 0 else 0.0


def _thumbnail(image: Float[Tensor, "H W 3"]) -> Float[Tensor, "3 h w"]:
    return F.adaptive_avg_pool2d(image.permute(2, 0, 1)[None], _SIZE)[0]
