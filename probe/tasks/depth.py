"""The linear probe for depth, and what it shares with that for normals."""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fit3d_ns.backbones import BackboneOutput
from probe.augment import augment_depth, change_colors, depth_window, draw_color_change
from probe.data.base import Sample
from probe.heads import TokenAndClassHead, expected_depth, resize_maps
from probe.protocols import DepthRecipe, NormalsRecipe
from probe.tasks.losses import compiled, log_gradient, scale_invariant
from probe.tasks.metrics import DepthMetric, depth_scores, depth_sums, evaluation_mask
from probe.tasks.patch_targets import patch_means
from probe.tasks.task import Batch, Task, depth_colors

CropRecipe = TypeVar("CropRecipe", DepthRecipe, NormalsRecipe)


class TokenAndClassTask(Task[CropRecipe]):
    """What depth and normals share: the head's kind, colours, mirrored test view."""

    norm = False
    higher_is_better = False
    outputs: int
    """Channels of the head."""

    def make_head(self, width: int, cls_width: int, fuse: bool) -> nn.Module:
        """Makes a `TokenAndClassHead`."""
        return TokenAndClassHead(width, cls_width, self.outputs, fuse)

    def prepare_images(self, batch: Batch, fill: Tensor) -> Tensor:
        """Changes colours."""
        return change_colors(batch["image"].float(), batch["colors"]) / 255

    def test_views(self, image: np.ndarray) -> np.ndarray:
        """Returns the photo and its mirror image."""
        return np.stack([image, image[:, ::-1]])


class DepthTask(TokenAndClassTask[DepthRecipe]):
    """DINOv2's linear depth: 256 bins, scale-invariant loss, mirrored test view."""

    headline = "rmse"
    num_outputs = 1

    @property
    def outputs(self) -> int:  # type: ignore[override]
        """Number of bins."""
        return self.recipe.num_bins

    def test_target(self, image: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cuts KITTI's photos to the part that is evaluated."""
        return depth_window(image, target, self.recipe, training=False)

    def train_sample(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Reads and augments a training sample."""
        image, depth = augment_depth(*self.read(sample), self.recipe, rng)
        return {
            "image": np.ascontiguousarray(image.transpose(2, 0, 1)),
            "target": depth,
            "colors": draw_color_change(rng, self.recipe.brightness),
        }

    def loss(self, outputs: Tensor, target: Tensor, step: int) -> Tensor:
        """Scale-invariant loss of the depth at the truth's resolution, plus the gradient loss if asked for."""
        logits = self._upsample(outputs)
        depth = compiled(expected_depth, logits.device)(logits, self.recipe.min_depth, self.data.max_depth)
        depth = resize_maps(depth, (target.shape[-2], target.shape[-1]))[:, 0]
        scale_invariant_loss = compiled(scale_invariant, logits.device)
        loss = scale_invariant_loss(depth, target, self.recipe.loss_group, step >= self.recipe.sigma_warmup)
        if self.recipe.gradient_loss:
            loss = loss + self.recipe.gradient_loss * log_gradient(depth, target)
        return loss

    def sampled_loss(self, outputs: Tensor, values: Tensor, step: int) -> Tensor:
        """Scale-invariant loss at some pixels."""
        logits = outputs[..., 0]
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
