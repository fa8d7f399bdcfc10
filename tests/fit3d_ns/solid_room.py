"""A splat of the tiny room that is the same everywhere: made of its depth images, not trained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


def make_solid(pipeline: Any, scene: Path) -> None:
    """Replaces a model's Gaussians by opaque balls on the surfaces that the scene's depth images show.

    Args:
        pipeline: Of the tiny room, with 8 feature channels.
        scene: The folder of the tiny room, 96 x 72 pixels.
    """
    frames = {
        Path(frame["file_path"]).name: frame for frame in json.loads((scene / "transforms.json").read_text())["frames"]
    }
    scale = pipeline.datamanager.train_dataparser_outputs.dataparser_scale
    y, x = torch.meshgrid(torch.arange(1, 72, 3), torch.arange(1, 96, 3), indexing="ij")
    centres, sizes = [], []
    for dataset in (pipeline.datamanager.train_dataset, pipeline.datamanager.eval_dataset):
        for index, name in enumerate(dataset.image_filenames):
            depth = np.asarray(Image.open(scene / frames[name.name]["depth_file_path"])).astype(np.float32)
            z = (torch.from_numpy(depth * 0.001 * scale))[y, x]
            camera = dataset.cameras[index]
            fx, fy, cx, cy = (float(value) for value in (camera.fx, camera.fy, camera.cx, camera.cy))
            local = torch.stack([(x + 0.5 - cx) / fx * z, -(y + 0.5 - cy) / fy * z, -z], -1).reshape(-1, 3)
            pose, known = camera.camera_to_worlds, z.flatten() > 0
            centres.append((local @ pose[:, :3].T + pose[:, 3])[known])
            sizes.append((z.flatten() / fx * 1.5)[known])
    means, size = torch.cat(centres)[::4], torch.cat(sizes)[::4] * 1.5
    count, generator = len(means), torch.Generator().manual_seed(2)
    parameters = {
        "means": means,
        "scales": size.log()[:, None].repeat(1, 3),
        "quats": torch.tensor([[1.0, 0, 0, 0]]).repeat(count, 1),
        "opacities": torch.full((count, 1), 6.0),
        "features_dc": torch.rand(count, 3, generator=generator) - 0.5,
        "features_rest": torch.zeros(count, 15, 3),
        "fit3d_features": torch.sin(means @ torch.randn(3, 8, generator=generator) * 6),
    }
    for name, values in parameters.items():
        pipeline.model.gauss_params[name].data = values.contiguous()
