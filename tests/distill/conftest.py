"""Small scenes as bundles, made without training, and a tiny teacher."""

import logging
import math
import random
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import TINY_ROOM
from PIL import Image

from distill.config import DistillConfig
from fit3d_ns.backbones import BackboneSpec, backbone_identity
from fit3d_ns.backbones.students.result_folder import original_of
from fit3d_ns.data.photos.bundled import BundledPhoto, hash_file
from fit3d_ns.features.grid import FEATURE_GRIDS
from fit3d_ns.features.rendering import Geometry
from fit3d_ns.runs.bundle import BundleCameras, BundleInfo, BundleView, SceneTensors, write_bundle

TINY_TEACHER = "test_vit"
"""A timm ViT of 64 channels with patches of 16 pixels, made for tests."""
WIDTH = 64


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, caplog):
    """No test reads or writes the user's cache; what commands say is caught."""
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make_scene(tmp_path, teacher_weights):
    """Writes photos and a bundle of random Gaussians seen from a ring of cameras."""

    def make(
        name: str = "scene",
        views: int = 6,
        size: tuple[int, int] = (48, 64),
        seed: int = 0,
        grid: str = "fast",
        held_out: int = 2,
        masked: tuple[int, ...] = (),
        gaussians: int = 300,
        wall: bool = False,
        spec: BackboneSpec | None = None,
    ) -> Path:
        generator = torch.Generator().manual_seed(seed)
        random = np.random.default_rng(seed)
        spec = spec or BackboneSpec(TINY_TEACHER, teacher_weights)
        photos = tmp_path / "photos" / name
        photos.mkdir(parents=True)
        height, width = size
        bundle_views, viewmats = [], []
        for view in range(views):
            blobs = random.integers(0, 255, (6, 8, 3), dtype=np.uint8)
            path = photos / f"{view:03d}.png"
            Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC).save(path)
            split = "eval" if view >= views - held_out else "train"
            photo = BundledPhoto(str(path), hash_file(path), height, width)
            bundle_views.append(BundleView(f"{view:03d}.png", split, photo))
            angle = 0.25 * (view - views / 2)
            viewmat = torch.eye(4)
            viewmat[:3, :3] = torch.tensor(
                [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]]
            )
            viewmat[0, 3], viewmat[2, 3] = 0.3 * (view - views / 2), 3.0
            viewmats.append(viewmat)
        focal = float(width)
        intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        scene = SceneTensors(
            geometry=Geometry(
                means=torch.randn(gaussians, 3, generator=generator) * 0.8,
                quats=torch.randn(gaussians, 4, generator=generator),
                scales=torch.rand(gaussians, 3, generator=generator) * 0.2 + 0.05,
                opacities=torch.rand(gaussians, generator=generator),
            ),
            features=torch.randn(gaussians, 8, generator=generator).half(),
            decoder=torch.randn(WIDTH, 8, 3, 3, generator=generator) * 0.1,
        )
        if wall:  # an opaque plane instead of a cloud
            flat = torch.tensor([2.0, 2.0, 0.0])
            geometry = Geometry(
                means=(torch.rand(gaussians, 3, generator=generator) * 2 - 1) * flat,
                quats=torch.tensor([1.0, 0, 0, 0]).repeat(gaussians, 1),
                scales=torch.full((gaussians, 3), 0.1) * torch.tensor([1.0, 1.0, 0.01]),
                opacities=torch.full((gaussians,), 0.95),
            )
            scene = replace(scene, geometry=geometry)
        info = BundleInfo(
            scene=name,
            teacher=backbone_identity(spec),
            teacher_max_size=868,
            teacher_weights=str(spec.weights),
            feature_grid=FEATURE_GRIDS[grid],
            dataparser_transform=torch.eye(4)[:3].tolist(),
            dataparser_scale=1.0,
            source={"seed": seed},
            views=bundle_views,
            teacher_original=original_of(spec.weights, backbone_identity(spec)["weights_sha256"]),
        )
        weights = {view: torch.rand(info.patch_grid(view), generator=generator).round() for view in masked}
        cameras = BundleCameras(torch.stack(viewmats), intrinsics.expand(views, 3, 3))
        return write_bundle(tmp_path / "bundles" / name, info, scene, cameras, weights).folder

    return make


@pytest.fixture
def make_config(tmp_path):
    """Choices for a short training on the CPU; keyword arguments set fields.

    Of the paper's recipe, so that every step and every weight can be followed.
    """

    def make(*bundles: Path, **fields) -> DistillConfig:
        values = {
            "bundles": tuple(bundles),
            "output_dir": tmp_path / "out",
            "device": "cpu",
            "recipe": "paper",
            "lr": 1e-3,
            "steps": 8,
            "workers": 2,
            "render_ahead": 6,
            "report_scenes": 1,
            "clip": 1.0,
        }
        return DistillConfig(**{**values, **fields})

    return make


@pytest.fixture
def run(tmp_path, teacher_weights) -> Path:
    """A finished run of a few steps on the tiny room; returns the folder that holds it."""
    from nerfstudio.configs.method_configs import all_methods

    scene = Path(shutil.copytree(TINY_ROOM, tmp_path / "room"))
    config = deepcopy(all_methods["fit3d-splat"])
    config.vis = "tensorboard"
    config.viewer.quit_on_train_completion = True
    config.logging.local_writer.enable = False
    config.machine.device_type = "cpu"
    config.max_num_iterations = 3
    config.steps_per_eval_image = config.steps_per_eval_all_images = 10**6
    config.output_dir = tmp_path / "outputs"
    config.timestamp = "run"
    config.pipeline.datamanager.data = scene
    config.pipeline.datamanager.backbone = "test_vit"
    config.pipeline.datamanager.backbone_weights = teacher_weights
    config.pipeline.model.feature_init = "random"
    config.pipeline.model.feature_dim = 8
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    trainer = config.setup()
    trainer.setup()
    config.save_config()
    trainer.train()
    return config.output_dir
