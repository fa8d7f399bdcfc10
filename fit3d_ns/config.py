"""The method that nerfstudio registers: ``ns-train fit3d-splat``.

Every ``ns-*`` command imports this module, so it imports neither timm nor open3d nor the CPU kernels.
"""

from dataclasses import dataclass

import torch
from nerfstudio.configs.base_config import MachineConfig, ViewerConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.plugins.types import MethodSpecification

from fit3d_ns.compat import (
    name_callers_without_their_sources,
    read_pictures_by_their_interface,
    register_safe_globals,
)
from fit3d_ns.datamanager import Fit3DDataManagerConfig
from fit3d_ns.model import Fit3DSplatModelConfig
from fit3d_ns.pipeline import Fit3DPipelineConfig
from fit3d_ns.runs.checkpoints import read_checkpoint
from fit3d_ns.runs.config_reader import parse_run_configuration
from fit3d_ns.runs.guarded_commands import guard_nerfstudio, install_error_hook
from fit3d_ns.runs.names import DECODER, FEATURES, METHOD
from fit3d_ns.schedulers import FloatExponentialDecaySchedulerConfig
from fit3d_ns.trainer import Fit3DTrainerConfig

register_safe_globals()
name_callers_without_their_sources()
install_error_hook()
read_pictures_by_their_interface()
guard_nerfstudio(parse_run_configuration, read_checkpoint)


@dataclass
class FusedAdamOptimizerConfig(AdamOptimizerConfig):
    """Adam in one kernel: features are the largest group by far, and other forms pass over them a dozen times."""

    fused: bool = True
    """Whether torch's fused implementation is used."""


def _adam(lr: float) -> AdamOptimizerConfig:
    return AdamOptimizerConfig(lr=lr, eps=1e-15)


# The geometry and colour groups repeat splatfacto's values. They cannot be read from nerfstudio's own table, which
# imports this module while it is being built; tests/fit3d_ns/test_config.py fails if they drift apart.
fit3d_splat = MethodSpecification(
    config=Fit3DTrainerConfig(
        method_name=METHOD,
        steps_per_eval_image=100,
        steps_per_eval_batch=0,
        steps_per_save=2000,
        steps_per_eval_all_images=1000,
        max_num_iterations=30000,
        mixed_precision=False,
        machine=MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu"),
        pipeline=Fit3DPipelineConfig(
            datamanager=Fit3DDataManagerConfig(
                dataparser=NerfstudioDataParserConfig(load_3D_points=True),
                cache_images_type="uint8",
            ),
            model=Fit3DSplatModelConfig(),
        ),
        optimizers={
            "means": {
                "optimizer": _adam(1.6e-4),
                "scheduler": FloatExponentialDecaySchedulerConfig(lr_final=1.6e-6, max_steps=30000),
            },
            "features_dc": {"optimizer": _adam(0.0025), "scheduler": None},
            "features_rest": {"optimizer": _adam(0.0025 / 20), "scheduler": None},
            "opacities": {"optimizer": _adam(0.05), "scheduler": None},
            "scales": {"optimizer": _adam(0.005), "scheduler": None},
            "quats": {"optimizer": _adam(0.001), "scheduler": None},
            "camera_opt": {
                "optimizer": _adam(1e-4),
                "scheduler": FloatExponentialDecaySchedulerConfig(
                    lr_final=5e-7, max_steps=30000, warmup_steps=1000, lr_pre_warmup=0
                ),
            },
            "bilateral_grid": {
                "optimizer": _adam(2e-3),
                "scheduler": FloatExponentialDecaySchedulerConfig(
                    lr_final=1e-4, max_steps=30000, warmup_steps=1000, lr_pre_warmup=0
                ),
            },
            FEATURES: {"optimizer": FusedAdamOptimizerConfig(lr=1e-2, eps=1e-15), "scheduler": None},
            DECODER: {"optimizer": FusedAdamOptimizerConfig(lr=1e-3, eps=1e-15), "scheduler": None},
        },
        viewer=ViewerConfig(num_rays_per_chunk=1 << 15),
        vis="viewer",
    ),
    description="Splatfacto with lifted features of a 2D backbone (FiT3D, stage one).",
)
