"""One tiny real-format scene, one tiny teacher, and a trainer on them, shared by the tests of stage one."""

import random
import shutil
import socket
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from paths import TINY_ROOM

TINY_TEACHER = "test_vit"
"""A timm ViT of 64 channels with patches of 16 pixels, made for tests."""


@pytest.fixture
def scene(tmp_path) -> Path:
    """A copy of the tiny room: 16 views of 96 x 72 pixels with seed points."""
    return Path(shutil.copytree(TINY_ROOM, tmp_path / "scene"))


@pytest.fixture
def make_config(tmp_path, teacher_weights):
    """Builds the configuration of a short CPU run; keyword arguments set fields of the model's configuration."""

    def make(scene: Path, method: str = "fit3d-splat", steps: int = 20, **model_fields):
        from nerfstudio.configs.method_configs import all_methods

        config = deepcopy(all_methods[method])
        config.vis = "tensorboard"
        config.viewer.quit_on_train_completion = True
        config.logging.local_writer.enable = False
        config.machine.device_type = "cpu"
        config.max_num_iterations = steps
        config.steps_per_eval_image = config.steps_per_eval_all_images = 10**6
        config.output_dir = tmp_path / "outputs"
        config.timestamp = f"run-{random.SystemRandom().randrange(10**9)}"
        config.pipeline.datamanager.data = scene
        config.pipeline.datamanager.cache_images = "gpu"
        if method == "fit3d-splat":
            config.pipeline.datamanager.backbone = TINY_TEACHER
            config.pipeline.datamanager.backbone_weights = teacher_weights
        fields = {"num_downscales": 0, "warmup_length": 5, "refine_every": 5, "reset_alpha_every": 8, "feature_dim": 8}
        if method != "fit3d-splat":
            del fields["feature_dim"]
        for name, value in {**fields, **model_fields}.items():
            setattr(config.pipeline.model, name, value)
        return config

    return make


@pytest.fixture
def make_trainer():
    """Sets up a trainer as ns-train would, with fixed seeds."""

    def make(config, seed: int = 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        trainer = config.setup()
        trainer.setup()
        return trainer

    return make


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Empty caches of the user and of the model hub."""
    import huggingface_hub.constants

    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path / "user-cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def no_network(monkeypatch) -> list:
    """Refuses every connection, and counts the attempts."""
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


@pytest.fixture
def fill_hub_cache(tmp_path):
    """Puts files where the model hub's client would have put them."""

    def fill(repository: str, files: dict[str, Path], commit: str = "abc") -> None:
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        for name, path in files.items():
            shutil.copy(path, snapshot / name)

    return fill


@pytest.fixture
def parser():
    """Every fourth view held out."""
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    return NerfstudioDataParserConfig(load_3D_points=True, eval_mode="interval", eval_interval=4)


@pytest.fixture
def splatfacto_run(scene, make_config, make_trainer, parser):
    """Trains a run of upstream's splatfacto; returns its config.yml."""
    from lifted_runs import STEPS
    from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig
    from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
    from plain_splatfacto import PlainSplatfacto

    def make(name="plain", steps=STEPS):
        config = make_config(scene, method="splatfacto", steps=steps)
        config.timestamp = name
        config.pipeline = VanillaPipelineConfig(
            datamanager=FullImageDatamanagerConfig(
                data=scene, cache_images="gpu", cache_images_type="uint8", dataparser=parser
            ),
            model=config.pipeline.model,
        )
        stored = deepcopy(config)
        config.pipeline.model._target = PlainSplatfacto
        trainer = make_trainer(config)
        trainer.train()
        stored.experiment_name = config.experiment_name
        stored.save_config()
        return config.get_base_dir() / "config.yml"

    return make


@pytest.fixture
def feature_run(scene, make_config, make_trainer, parser):
    """Trains a run of fit3d-splat; keyword arguments set fields of the model."""
    from lifted_runs import STEPS

    def make(name="joint", steps=STEPS, **fields):
        config = make_config(scene, steps=steps, **fields)
        config.timestamp, config.pipeline.datamanager.dataparser = name, parser
        config.save_config()
        trainer = make_trainer(config)
        trainer.train()
        return trainer

    return make


@pytest.fixture
def lift_command(teacher_weights):
    """Builds a command of fit3d-lift with the tiny teacher."""
    from fit3d_ns.commands.lift.cli import LiftCommand
    from fit3d_ns.lifting.settings import LiftSettings

    def make(lift=None, **fields):
        teacher = {"backbone": "test_vit", "backbone_weights": teacher_weights, "feature_dim": 8}
        return LiftCommand(**{**teacher, **fields}, lift=lift or LiftSettings())

    return make


@pytest.fixture
def viewed_run(scene, make_config, make_trainer):
    """A run of a few steps, with features from the first one on, and surfaces that nothing shines through."""
    trainer = make_trainer(make_config(scene, steps=12, feature_interval=1))
    trainer.train()
    trainer.pipeline.eval()
    trainer.pipeline.model.gauss_params["opacities"].data.fill_(6.0)
    trainer.save_checkpoint(11)
    trainer.config.save_config()
    return trainer


@pytest.fixture
def untrained(scene, make_config, make_trainer):
    """A run before its first step: all features are zero."""
    pipeline = make_trainer(make_config(scene)).pipeline
    pipeline.eval()
    return pipeline
