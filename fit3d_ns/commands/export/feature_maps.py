"""Decoded feature maps of views, as NumPy archives."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fit3d_ns.commands.export.camera_path import CameraPath
from fit3d_ns.data.photos.reader import image_size
from fit3d_ns.features.decoder import decode_patches
from fit3d_ns.model import Fit3DSplatModel
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_folder


@torch.no_grad()
def write_feature_maps(folder: Path, model: Fit3DSplatModel, path: CameraPath, indices: Iterable[int]) -> None:
    """Writes ``00000.npz``, ``00001.npz``, ... one view at a time; the folder is whole or absent.

    Each holds ``features`` [C, h, w] float16 (decoded, on the patch grid that the teacher has for a photo of that
    size), ``accumulation`` [h, w] float16 in [0, 1], ``viewmat`` [4, 4] float32 (world to camera, OpenCV axes), ``K``
    [3, 3] float32 (pixels of the full-size view, pixel centres at +0.5), ``image_size`` [2] (height, width) and
    ``name``.

    Args:
        folder: Where they go; replaced as a whole.
        model: In evaluation mode.
        path: The views.
        indices: Which of them, in order.

    Raises:
        UserError: If a feature exceeds half precision, or the disk refuses.
    """
    with atomic_folder(folder) as temporary:
        for index in indices:
            np.savez(temporary / f"{index:05d}.npz", **_view(model, path, index))


def _view(model: Fit3DSplatModel, path: CameraPath, index: int) -> dict[str, Any]:
    camera = path.camera(index, model.device)
    size = image_size(camera)
    grid = model.patch_grid(*size)
    low, alpha = model.render_low(camera)
    features = decode_patches(low, model.fit3d_decoder.weight, model.feature_grid, grid).half()
    if not bool(torch.isfinite(features).all()):
        raise UserError(f"The features of the view {path.names[index]} exceed half precision: export without them.")
    viewmat, intrinsics = model.view_matrices(camera)
    return {
        "features": features.cpu().numpy(),
        "accumulation": F.adaptive_avg_pool2d(alpha, grid)[0].half().cpu().numpy(),
        "viewmat": viewmat.cpu().numpy(),
        "K": intrinsics.cpu().numpy(),
        "image_size": np.array(size),
        "name": np.array(path.names[index]),
    }
