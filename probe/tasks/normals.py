"""The linear probe for surface normals, and normals from depth."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from fit3d_ns.backbones import BackboneOutput
from fit3d_ns.support.errors import UserError
from probe.augment import augment_normals, draw_color_change
from probe.data.base import Sample
from probe.heads import resize_maps
from probe.protocols import NormalsRecipe
from probe.tasks.depth import TokenAndClassTask
from probe.tasks.losses import normal_distance
from probe.tasks.metrics import NormalMetric, normal_scores, normal_sums
from probe.tasks.patch_targets import patch_means

_MAX_RELATIVE_STEP = 0.05
"""Largest change of depth between neighbours, as a share of the depth, that is taken for a surface and not an edge."""


def normals_from_depth(depth: np.ndarray, intrinsics: tuple[float, float, float, float]) -> np.ndarray:
    """Computes normals as cross products of central differences of the points that a depth map shows.

    Args:
        depth: [H, W], z-depth in metres, 0 where there is none.
        intrinsics: fx, fy, cx, cy in pixels of the map, pixel centres at +0.5.

    Returns:
        float32 [H, W, 3], unit vectors towards the camera in OpenCV axes (x right, y down, z forward); zero at the
        border, beside missing depth and across edges.
    """
    fx, fy, cx, cy = intrinsics
    rows, columns = np.mgrid[: depth.shape[0], : depth.shape[1]]
    points = np.stack([(columns + 0.5 - cx) / fx * depth, (rows + 0.5 - cy) / fy * depth, depth], -1).astype(np.float64)
    normals = np.zeros((*depth.shape, 3), np.float32)
    if min(depth.shape) < 3:
        return normals
    across = points[1:-1, 2:] - points[1:-1, :-2]
    down = points[2:, 1:-1] - points[:-2, 1:-1]
    normal = np.cross(down, across)
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    around = np.stack([depth[1:-1, 2:], depth[1:-1, :-2], depth[2:, 1:-1], depth[:-2, 1:-1], depth[1:-1, 1:-1]])
    smooth = (around.min(0) > 0) & (np.ptp(around, axis=0) <= _MAX_RELATIVE_STEP * around[-1])
    unit = normal / np.maximum(length, 1e-12)
    normals[1:-1, 1:-1] = np.where(smooth[..., None] & (length > 1e-12), unit, 0.0)
    return normals


class NormalsTask(TokenAndClassTask[NormalsRecipe]):
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
        image, normals = augment_normals(*self.read(sample), rng)
        return {
            "image": np.ascontiguousarray(image.transpose(2, 0, 1)),
            "target": normals,
            "colors": draw_color_change(rng, self.recipe.brightness),
        }

    def loss(self, outputs: Tensor, target: Tensor, step: int) -> Tensor:
        """1 - cosine, at the truth's resolution."""
        normals = resize_maps(outputs, (target.shape[1], target.shape[2]))
        return normal_distance(normals, target.permute(0, 3, 1, 2))

    def sampled_loss(self, outputs: Tensor, values: Tensor, step: int) -> Tensor:
        """1 - cosine at some pixels."""
        return normal_distance(outputs[..., 0], values.permute(0, 2, 1))

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
