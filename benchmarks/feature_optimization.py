r"""Compares initial values and learning rates of the feature field on exactly the same geometry.

Features never influence geometry, so any number of feature fields can be trained beside one splat: each setting has
its own features, decoder and optimizers, and all of them see the same Gaussians, views and steps, from the first step
through densification.

    python benchmarks/feature_optimization.py --data scene --steps 3000 \\
        --settings zeros,6.25e-5,6.25e-5 random,6.25e-5,6.25e-5 zeros,1e-2,1e-3
"""

import json
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from fit3d_ns.config import FusedAdamOptimizerConfig
from fit3d_ns.features.decoder import FeatureDecoder, decode_patches
from fit3d_ns.features.grid import sample_teacher
from fit3d_ns.features.metrics import feature_cosine, feature_l1
from fit3d_ns.model import Fit3DSplatModel
from fit3d_ns.runs.names import METHOD
from fit3d_ns.support.files import atomic_write_json


@dataclass
class Benchmark:
    """Settings of the comparison."""

    data: Path
    """Scene in nerfstudio's format."""
    settings: tuple[str, ...]
    """Each: initial features (zeros, random), learning rate of the features, of the decoder; and optionally the number
    of steps between two trainings of the features."""
    output: Path = Path("outputs/benchmarks/feature_optimization.json")
    """Where the curves are written."""
    steps: int = 3000
    """Training steps."""
    curve_every: int = 500
    """Steps between measurements on the held-out views."""
    feature_grid: str = "fast"
    """`fast` or `paper`."""
    backbone: str = "dinov2_small_focus"
    """Teacher."""
    backbone_weights: Path | None = None
    """Local weights of the teacher."""
    cache: Path = Path("/tmp/fit3d_benchmark_cache")
    """Feature cache."""
    seed: int = 42
    """Seed of the run."""


SETTINGS: list[list[str]] = []


class ManyFieldsModel(Fit3DSplatModel):
    """The model with further feature fields, ``field_0``, ``field_1`` ..., beside its own."""

    def populate_modules(self) -> None:
        """Adds one field and one decoder for each setting."""
        super().populate_modules()
        self.decoders = torch.nn.ModuleList()
        for number, setting in enumerate(SETTINGS):
            generator = torch.Generator().manual_seed(0)
            values = torch.zeros(self.num_points, self.config.feature_dim)
            if setting[0] == "random":
                values.normal_(std=0.1, generator=generator)
            self.gauss_params[f"field_{number}"] = torch.nn.Parameter(values)
            self.decoders.append(FeatureDecoder(self.config.feature_dim, self.fit3d_decoder.width, generator))

    def get_gaussian_param_groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Adds the fields."""
        fields = {f"field_{number}": [self.gauss_params[f"field_{number}"]] for number in range(len(SETTINGS))}
        return {**super().get_gaussian_param_groups(), **fields}

    def get_param_groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Adds the decoders."""
        decoders = {f"decoder_{number}": list(decoder.parameters()) for number, decoder in enumerate(self.decoders)}
        return {**super().get_param_groups(), **decoders}

    def decode_fields(self, camera: Any, offset: tuple[float, float] = (0.0, 0.0)) -> list[torch.Tensor]:
        """Returns decoded maps of a view, one per setting; None where a setting skips this step.

        Args:
            camera: One camera.
            offset: Shift of the sampling points in patches (y, x).
        """
        maps = []
        for number, setting in enumerate(SETTINGS):
            if self.training and len(setting) > 3 and self.step % int(setting[3]):
                maps.append(None)
                continue
            low, _ = self.render_low(camera, self.gauss_params[f"field_{number}"])
            grid = self.patch_grid(*camera.metadata["image_size"])
            decoder = self.decoders[number]
            assert isinstance(decoder, FeatureDecoder)
            maps.append(decode_patches(low, decoder.weight, self.feature_grid, grid, offset))
        return maps

    def _trains_features(self) -> bool:
        return False  # its own field is not part of the comparison

    def get_loss_dict(self, outputs: Any, batch: Any, metrics_dict: Any = None) -> dict[str, torch.Tensor]:
        """Adds one loss per setting."""
        losses = super().get_loss_dict(outputs, batch, metrics_dict)
        if self.training:
            offset = self._sampling_offset()
            teacher = sample_teacher(batch["teacher"].float(), offset)
            for number, decoded in enumerate(self.decode_fields(batch["camera"], offset)):
                if decoded is not None:
                    losses[f"field_{number}"] = feature_l1(decoded, teacher)
        return losses


def main(benchmark: Benchmark) -> None:
    """Trains and prints one row per setting and measurement.

    Args:
        benchmark: The user's choices.
    """
    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
    from nerfstudio.scripts.train import _set_random_seed

    SETTINGS.extend(setting.split(",") for setting in benchmark.settings)
    config = deepcopy(all_methods[METHOD])
    config.vis = "tensorboard"
    config.viewer.quit_on_train_completion = True
    config.logging.local_writer.enable = False
    config.max_num_iterations = benchmark.steps
    config.steps_per_eval_image = config.steps_per_eval_all_images = config.steps_per_save = 10**9
    config.output_dir, config.timestamp = Path("/tmp/fit3d_benchmark_runs"), f"fields-{time.time_ns()}"
    config.pipeline.model._target = ManyFieldsModel
    config.pipeline.model.feature_grid = benchmark.feature_grid
    datamanager = config.pipeline.datamanager
    datamanager.data, datamanager.feature_cache_dir = benchmark.data, benchmark.cache
    datamanager.backbone, datamanager.backbone_weights = benchmark.backbone, benchmark.backbone_weights
    for number, setting in enumerate(SETTINGS):
        for name, rate in ((f"field_{number}", setting[1]), (f"decoder_{number}", setting[2])):
            config.optimizers[name] = {
                "optimizer": FusedAdamOptimizerConfig(lr=float(rate), eps=1e-15),
                "scheduler": None,
            }
    _set_random_seed(benchmark.seed)
    trainer = config.setup()
    trainer.setup()
    rows: list[dict[str, Any]] = []

    @torch.no_grad()
    def measure(step: int) -> None:
        if (step + 1) % benchmark.curve_every:
            return
        pipeline = trainer.pipeline
        pipeline.eval()
        scores: list[list[tuple[float, float]]] = [[] for _ in SETTINGS]
        for camera, batch in pipeline.datamanager.fixed_indices_eval_dataloader:
            teacher = batch["teacher"].float()
            for number, decoded in enumerate(pipeline.model.decode_fields(camera)):
                scores[number].append((float(feature_cosine(decoded, teacher)), float(feature_l1(decoded, teacher))))
        pipeline.train()
        for setting, score in zip(benchmark.settings, scores):
            cosine, l1 = torch.tensor(score).mean(dim=0).tolist()
            rows.append({"setting": setting, "step": step + 1, "feature_cosine": cosine, "feature_l1": l1})
            print(json.dumps(rows[-1]), flush=True)
        atomic_write_json(benchmark.output, rows)

    trainer.callbacks.append(TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], measure))
    trainer.train()


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
