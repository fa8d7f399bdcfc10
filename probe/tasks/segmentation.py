"""The linear probe for semantic segmentation."""

import numpy as np
import torch
from torch import Tensor, nn

from fit3d_ns.backbones import BackboneOutput
from probe.augment import augment_segmentation, distort, draw_distortion, resize_image, scaled_size
from probe.data.base import IGNORE, ProbeData, Sample
from probe.heads import SegmentationHead, resize_maps
from probe.protocols import SegmentationRecipe
from probe.tasks.losses import cross_entropy, full_resolution_cross_entropy
from probe.tasks.metrics import SegmentationMetric, segmentation_scores, segmentation_sums
from probe.tasks.patch_targets import majority_labels
from probe.tasks.task import Batch, Task, class_colors


class SegmentationTask(Task[SegmentationRecipe]):
    """DINOv2's linear segmentation: crops of 512, cross-entropy at full resolution, sliding window in the test."""

    norm = True
    headline = "miou"
    higher_is_better = True

    def __init__(self, data: ProbeData, recipe: SegmentationRecipe | None = None) -> None:
        """Takes the data set and the recipe, see `Task`.

        Args:
            data: With names of classes.
            recipe: None where nothing is trained.
        """
        super().__init__(data, recipe)
        self.num_outputs = len(data.classes)
        self._colors = np.array(data.colors or class_colors(len(data.classes)), np.uint8)

    def make_head(self, width: int, cls_width: int, fuse: bool) -> nn.Module:
        """Makes a `SegmentationHead`; the class token is not used."""
        return SegmentationHead(width, len(self.data.classes), fuse)

    def train_sample(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Reads and augments a training sample."""
        image, labels, valid = augment_segmentation(*self.read(sample), self.recipe, rng)
        return {
            "image": np.ascontiguousarray(image.transpose(2, 0, 1)),
            "target": labels,
            "valid": np.array(valid),
            "colors": draw_distortion(rng),
        }

    def prepare_images(self, batch: Batch, fill: Tensor) -> Tensor:
        """Distorts colours and fills the padding with the mean colour."""
        images = distort(batch["image"].float(), batch["colors"]) / 255
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device)[None, :, None]
        columns = torch.arange(width, device=images.device)[None, None]
        valid = batch["valid"]
        inside = (rows < valid[:, 0, None, None]) & (columns < valid[:, 1, None, None])
        return torch.where(inside[:, None], images, fill)

    def loss(self, outputs: Tensor, target: Tensor, step: int) -> Tensor:
        """Cross-entropy of the logits at the labels' resolution."""
        return full_resolution_cross_entropy(outputs, target)

    def sampled_loss(self, outputs: Tensor, values: Tensor, step: int) -> Tensor:
        """Cross-entropy of the logits at some pixels."""
        return cross_entropy(outputs[..., 0], values)

    def test_views(self, image: np.ndarray) -> np.ndarray:
        """Cuts the photo, its short side made 512, into overlapping windows."""
        size = scaled_size(image.shape[0], image.shape[1], self.recipe.long_side, self.recipe.short_side)
        image = resize_image(image, size)
        return np.stack([image[window] for window in sliding_windows(size, self.recipe.window, self.recipe.stride)])

    def predict(self, head: nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """Averages logits where windows overlap, resizes them to the truth, takes the largest.

        Returns:
            Class ids [H, W].
        """
        scaled = scaled_size(*size, self.recipe.long_side, self.recipe.short_side)
        windows = sliding_windows(scaled, self.recipe.window, self.recipe.stride)
        rows, columns = windows[0]
        logits = resize_maps(head(features), (rows.stop - rows.start, columns.stop - columns.start))
        total = logits.new_zeros(logits.shape[1], *scaled)
        count = logits.new_zeros(scaled)
        for (rows, columns), window in zip(windows, logits):
            total[:, rows, columns] += window
            count[rows, columns] += 1
        return resize_maps((total / count)[None], size)[0].argmax(0)

    def predict_whole(self, head: nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """Resizes the logits of the whole photo to the truth and takes the largest."""
        return resize_maps(head(features), size)[0].argmax(0)

    def new_metric(self) -> SegmentationMetric:
        """Makes an empty confusion matrix."""
        return SegmentationMetric(len(self.data.classes))

    def update(self, metric: SegmentationMetric, prediction: Tensor, target: Tensor) -> None:
        """Adds a photo's pixels."""
        metric.update(prediction[None], target[None].long())

    def patch_truth(self, target: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """The label of most of a patch's labelled pixels."""
        return majority_labels(target, grid, len(self.data.classes), IGNORE).astype(np.uint8)

    def predict_solved(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Resizes logits to the truth and takes the largest."""
        return resize_maps(maps, size)[0].argmax(0)

    def sums(self, prediction: Tensor, target: Tensor) -> Tensor:
        """See `segmentation_sums`."""
        return segmentation_sums(prediction, target, len(self.data.classes))

    def scores(self, sums: Tensor) -> dict[str, Tensor]:
        """See `segmentation_scores`."""
        return segmentation_scores(sums)

    def picture(self, values: Tensor) -> np.ndarray:
        """Colours class ids; ignored pixels are black."""
        ids = values.cpu().numpy().astype(np.int64)
        return np.concatenate([self._colors, np.zeros((256 - len(self._colors), 3), np.uint8)])[ids]


def sliding_windows(size: tuple[int, int], window: int, stride: int) -> list[tuple[slice, slice]]:
    """Returns windows of one size that cover a photo.

    The last of a row or column is moved back inside, so that it overlaps the one before by more.

    Args:
        size: Height and width of the photo, pixels.
        window: Side of a window, pixels; smaller where the photo is.
        stride: From window to window, pixels.
    """
    starts = []
    for length in size:
        count = max(length - window + stride - 1, 0) // stride + 1
        starts.append([max(min(k * stride + window, length) - window, 0) for k in range(count)])
    height, width = (min(window, length) for length in size)
    return [(slice(top, top + height), slice(left, left + width)) for top in starts[0] for left in starts[1]]
