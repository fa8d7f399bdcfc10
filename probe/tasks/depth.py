"""The linear probes for depth, and for surface normals made of it."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fit3d_ns.backbones import BackboneOutput
from fit3d_ns.support.errors import UserError
from probe.augment import augment_depth, augment_normals, change_colors, depth_window, draw_color_change
from probe.data.base import Sample
from probe.heads import TokenAndClassHead, expected_depth, resize_maps
from probe.protocols import DepthRecipe
from probe.tasks.losses import fused, log_gradient, normal_distance, scale_invariant
from probe.tasks.metrics import (
    DepthMetric,
    NormalMetric,
    depth_scores,
    depth_sums,
    evaluation_mask,
    normal_scores,
    normal_sums,
)
from probe.tasks.normals import normals_from_depth
from probe.tasks.patch_targets import patch_means
from probe.tasks.task import Batch, Task, depth_colors


class _TokenAndClassTask(Task[DepthRecipe]):
    """What depth and normals share: the head's kind, colours, mirrored test view."""

    norm = False
    higher_is_better = False
    outputs: int

    def make_head(self, width: int, cls_width: int, fuse: bool) -> nn.Module:
        """Makes a `TokenAndClassHead`."""
        return TokenAndClassHead(width, cls_width, self.outputs, fuse)

    def prepare_images(self, batch: Batch, fill: Tensor) -> Tensor:
        """Changes colours."""
        return change_colors(batch["image"].float(), batch["colors"]) / 255

    def test_views(self, image: np.ndarray) -> np.ndarray:
        """Returns the photo and its mirror image."""
        return np.stack([image, image[:, ::-1]])

    def test_target(self, image: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cuts KITTI's photos to the part that is evaluated."""
        return depth_window(image, target, self.recipe, training=False)


class DepthTask(_TokenAndClassTask):
    """DINOv2's linear depth: 256 bins, scale-invariant loss, mirrored test view."""

    headline = "rmse"
    num_outputs = 1

    @property
    def outputs(self) -> int:  # type: ignore[override]
        """Number of bins."""
        return self.recipe.num_bins

    def train_sample(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Reads and augments a training sample."""
        image, depth = augment_depth(*self.read(sample), self.recipe, rng)
        return {
            "image": np.ascontiguousarray(image.transpose(2, 0, 1)),
            "target": depth,
            "colors": draw_color_change(rng, self.recipe),
        }

    def loss(self, head: nn.Module, features: BackboneOutput, target: Tensor, step: int) -> Tensor:
        """Scale-invariant loss of the depth at the truth's resolution, plus the gradient loss if asked for."""
        logits = self._upsample(head(features))
        depth = fused(expected_depth, logits.device)(logits, self.recipe.min_depth, self.data.max_depth)
        depth = resize_maps(depth, (target.shape[-2], target.shape[-1]))[:, 0]
        scale_invariant_loss = fused(scale_invariant, logits.device)
        loss = scale_invariant_loss(depth, target, self.recipe.loss_group, step >= self.recipe.sigma_warmup)
        if self.recipe.gradient_loss:
            loss = loss + self.recipe.gradient_loss * log_gradient(depth, target)
        return loss

    def sampled_loss(self, head: nn.Module, features: BackboneOutput, values: Tensor, step: int) -> Tensor:
        """Scale-invariant loss at some pixels."""
        logits = head(features)[..., 0]
        depth = expected_depth(logits, self.recipe.min_depth, self.data.max_depth)[:, 0]
        return scale_invariant(depth, values, self.recipe.loss_group, step >= self.recipe.sigma_warmup)

    def predict(self, head: nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """Averages the depth of the photo and of its mirror image.

        Returns:
            Metres [H, W].
        """
        depth = self._test_depth(head, features, size)
        return (depth[0] + depth[1].flip(-1)) / 2

    def predict_whole(self, head: nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """Predicts metres [H, W] from one view."""
        return self._test_depth(head, features, size)[0]

    def new_metric(self) -> DepthMetric:
        """Makes an empty metric."""
        return DepthMetric()

    def update(self, metric: DepthMetric, prediction: Tensor, target: Tensor) -> None:
        """Adds a photo."""
        metric.update(prediction, target, self._valid(target))

    def patch_truth(self, target: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """The mean log depth of a patch's pixels that the metric counts."""
        valid = self._valid(torch.from_numpy(target)).numpy()
        log_depth = np.log(np.where(valid, target, 1))
        means, shares = patch_means(log_depth[..., None], valid, grid)
        return np.where(shares[..., None] > 0, means, np.nan).astype(np.float32)

    def predict_solved(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Resizes depth, limited to its range, to the truth: metres [H, W]."""
        depth = maps.exp().clamp(self.recipe.min_depth, self.data.max_depth)
        return resize_maps(depth, size)[0, 0]

    def sums(self, prediction: Tensor, target: Tensor) -> Tensor:
        """See `depth_sums`."""
        return depth_sums(prediction, target, self._valid(target))

    def scores(self, sums: Tensor) -> dict[str, Tensor]:
        """See `depth_scores`."""
        return depth_scores(sums)

    def picture(self, values: Tensor) -> np.ndarray:
        """Colours depth by its logarithm, near bright; black where there is none."""
        return depth_colors(values.cpu().numpy(), self.data.max_depth)

    def _valid(self, target: Tensor) -> Tensor:
        return evaluation_mask(target, self.recipe.min_depth, self.data.max_depth, self.recipe.evaluation_crop)

    def _upsample(self, logits: Tensor) -> Tensor:
        # The linear map commutes with the upsampling of its input, which has 1.5 to 6 times as many channels.
        return resize_maps(logits, tuple(side * self.recipe.upsample for side in logits.shape[-2:]))

    def _test_depth(self, head: nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        depth = expected_depth(self._upsample(head(features)), self.recipe.min_depth, self.data.max_depth)
        depth = depth.clamp(self.recipe.min_depth, self.data.max_depth)
        return resize_maps(depth, size)[:, 0]


class NormalsTask(_TokenAndClassTask):
    """Surface normals, made of depth, from one linear map."""

    headline = "mean_angle"
    outputs = 3
    num_outputs = 3

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Reads photo and normals float32 [H, W, 3], zero where there are none."""
        image, depth = super().read(sample)
        if sample.intrinsics is None:
            raise UserError(f"{sample.image} has no intrinsics, which normals need.")
        return image, normals_from_depth(depth, sample.intrinsics)

    def mirror_values(self, values: np.ndarray) -> np.ndarray:
        """Changes the sign of x."""
        return values * np.array([-1, 1, 1], np.float32)

    def train_sample(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Reads and augments a training sample."""
        image, normals = augment_normals(*self.read(sample), self.recipe, rng)
        return {
            "image": np.ascontiguousarray(image.transpose(2, 0, 1)),
            "target": normals,
            "colors": draw_color_change(rng, self.recipe),
        }

    def loss(self, head: nn.Module, features: BackboneOutput, target: Tensor, step: int) -> Tensor:
        """1 - cosine, at the truth's resolution."""
        normals = resize_maps(head(features), (target.shape[1], target.shape[2]))
        return normal_distance(normals, target.permute(0, 3, 1, 2))

    def sampled_loss(self, head: nn.Module, features: BackboneOutput, values: Tensor, step: int) -> Tensor:
        """1 - cosine at some pixels."""
        return normal_distance(head(features)[..., 0], values.permute(0, 2, 1))

    def predict(self, head: nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """Averages the normals of the photo and of its mirror image.

        Returns:
            Unit vectors [H, W, 3].
        """
        both = F.normalize(resize_maps(head(features), size), dim=1)
        mirrored = both[1].flip(-1) * both.new_tensor([-1.0, 1.0, 1.0])[:, None, None]
        return F.normalize(both[0] + mirrored, dim=0).permute(1, 2, 0)

    def predict_whole(self, head: nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """Predicts unit vectors [H, W, 3] from one view."""
        return F.normalize(resize_maps(head(features), size)[0], dim=0).permute(1, 2, 0)

    def new_metric(self) -> NormalMetric:
        """Makes an empty metric."""
        return NormalMetric()

    def update(self, metric: NormalMetric, prediction: Tensor, target: Tensor) -> None:
        """Adds a photo."""
        metric.update(prediction.permute(2, 0, 1), target.permute(2, 0, 1), target.square().sum(-1) > 0.25)

    def patch_truth(self, target: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """The mean of a patch's normals, shorter than one where they turn."""
        means, shares = patch_means(target, np.square(target).sum(-1) > 0.25, grid)
        return np.where(shares[..., None] > 0, means, np.nan).astype(np.float32)

    def predict_solved(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Resizes normals to the truth: unit vectors [H, W, 3]."""
        return F.normalize(resize_maps(maps, size)[0], dim=0).permute(1, 2, 0)

    def sums(self, prediction: Tensor, target: Tensor) -> Tensor:
        """See `normal_sums`."""
        return normal_sums(prediction.permute(2, 0, 1), target.permute(2, 0, 1), target.square().sum(-1) > 0.25)

    def scores(self, sums: Tensor) -> dict[str, Tensor]:
        """See `normal_scores`."""
        return normal_scores(sums)

    def picture(self, values: Tensor) -> np.ndarray:
        """Colours normals the usual way: x, y, z from -1..1 to red, green, blue; black where there are none."""
        array = values.cpu().numpy()
        known = np.square(array).sum(-1, keepdims=True) > 0.25
        # Towards the camera is -z, which is shown light as in most papers.
        shown = (array * np.array([1, -1, -1], np.float32) + 1) / 2
        return np.where(known, np.round(shown * 255), 0).astype(np.uint8)
