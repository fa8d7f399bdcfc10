"""What the three trained probes have in common, and what each must say."""

import colorsys
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fit3d_ns.backbones import BackboneOutput
from fit3d_ns.support.samples import evenly_spaced
from probe.augment import resize_image
from probe.data.base import ProbeData, Sample, read_sample

RecipeType = TypeVar("RecipeType")
Batch = dict[str, Tensor]
_PANELS = 4


class Task(ABC, Generic[RecipeType]):
    """A probe: its samples, heads, loss and metric.

    A training sample holds ``image`` uint8 [3, H, W], ``target``, and what `prepare_images` needs; a test sample holds
    ``views`` uint8 [n, 3, h, w] and ``target``.
    """

    norm: bool
    """Whether features are taken after the backbone's final norm."""
    num_outputs: int
    """Numbers K that a solved map predicts for a patch."""
    headline: str
    """Metric that choices are made by."""
    higher_is_better: bool
    """Whether a larger value of it is a better one."""

    def __init__(self, data: ProbeData, recipe: RecipeType | None = None) -> None:
        """Takes the data set and the full protocol's recipe.

        Args:
            data: The data set.
            recipe: None where nothing is trained, and only metrics and pictures are asked for.
        """
        self.data = data
        self._recipe = recipe

    @property
    def recipe(self) -> RecipeType:
        """The full protocol's recipe.

        Raises:
            ValueError: If there is none.
        """
        if self._recipe is None:
            raise ValueError(f"{type(self).__name__} was made without a recipe")
        return self._recipe

    @abstractmethod
    def make_head(self, width: int, cls_width: int, fuse: bool) -> nn.Module:
        """Makes a head with random weights from the global generator.

        Args:
            width: Channels of the row's patch tokens.
            cls_width: Channels of the class token; 0 for none.
            fuse: Whether a learned layer fuses two backbones first.

        Returns:
            A module from `BackboneOutput` to logits on the patch grid.
        """

    @abstractmethod
    def train_sample(self, sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Reads and augments a training sample.

        Args:
            sample: On disk.
            rng: This sample's own.

        Returns:
            ``image``, ``target`` and what `prepare_images` needs, by name.
        """

    @abstractmethod
    def prepare_images(self, batch: Batch, fill: Tensor) -> Tensor:
        """Turns a batch on the device into what backbones see.

        Args:
            batch: Training samples by name, stacked.
            fill: [1, 3, 1, 1] mean colour, in [0, 1].

        Returns:
            Images [B, 3, H, W] in [0, 1].
        """

    @abstractmethod
    def loss(self, outputs: Tensor, target: Tensor, step: int) -> Tensor:
        """Computes the loss of a head's outputs on dense targets.

        Args:
            outputs: [B, K, h, w] on the patch grid.
            target: Dense truth [B, H, W] or [B, H, W, 3].
            step: From 0.

        Returns:
            A single number.
        """

    @abstractmethod
    def sampled_loss(self, outputs: Tensor, values: Tensor, step: int) -> Tensor:
        """Computes the loss of a head's outputs at some pixels.

        Args:
            outputs: [B, K, P, 1].
            values: Truth there, [B, P] or [B, P, 3].
            step: From 0.

        Returns:
            A single number.
        """

    @abstractmethod
    def test_views(self, image: np.ndarray) -> np.ndarray:
        """Returns the views uint8 [n, h, w, 3] that the full protocol predicts from.

        Args:
            image: uint8 [H, W, 3].
        """

    @abstractmethod
    def predict(self, head: nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """Combines the outputs on all views into the prediction at the truth's size (H, W).

        Args:
            head: In evaluation mode.
            features: Of all views of `test_views`.
            size: Height and width of the truth, pixels.

        Returns:
            Class ids or metres [H, W], or unit vectors [H, W, 3].
        """

    @abstractmethod
    def predict_whole(self, head: nn.Module, features: BackboneOutput, size: tuple[int, int]) -> Tensor:
        """Predicts from a single view of the whole photo, as the fast protocol does.

        Args:
            head: In evaluation mode.
            features: Of the whole photo.
            size: Height and width of the truth, pixels.

        Returns:
            Class ids or metres [H, W], or unit vectors [H, W, 3].
        """

    @abstractmethod
    def new_metric(self) -> Any:
        """Makes an empty metric with ``scores()``.

        Returns:
            Of no photo yet.
        """

    @abstractmethod
    def update(self, metric: Any, prediction: Tensor, target: Tensor) -> None:
        """Adds a prediction to a metric.

        Args:
            metric: Of `new_metric`.
            prediction: Of `predict` or `predict_whole`.
            target: Truth of the same photo.
        """

    @abstractmethod
    def patch_truth(self, target: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        """Reads a truth for each patch of a grid (h, w), as the exact protocol fits it.

        Args:
            target: Truth [H, W] or [H, W, 3].
            grid: Height h and width w, patches.

        Returns:
            Class ids uint8 [h, w], 255 where there is none; or numbers float32 [h, w, T], NaN where there are none.
        """

    @abstractmethod
    def predict_solved(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Turns a solved map's outputs into the prediction.

        Args:
            maps: [1, K, h, w] on the patch grid.
            size: Height and width of the truth, pixels.

        Returns:
            Class ids or metres [H, W], or unit vectors [H, W, 3].
        """

    @abstractmethod
    def sums(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Returns a photo's sums [S], float64, from which `scores` follow.

        Args:
            prediction: Of a photo.
            target: Its truth.
        """

    @abstractmethod
    def scores(self, sums: Tensor) -> dict[str, Tensor]:
        """Computes scores from sums [..., S] over photos.

        Args:
            sums: [..., S], added over photos.

        Returns:
            Scores by name, of the leading shape.
        """

    @abstractmethod
    def picture(self, values: Tensor) -> np.ndarray:
        """Shows a prediction or a truth as uint8 RGB [H, W, 3].

        Args:
            values: Prediction or truth, [H, W] or [H, W, 3].

        Returns:
            uint8 RGB [H, W, 3].
        """

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Reads photo uint8 [H, W, 3] and truth [H, W] or [H, W, 3].

        Args:
            sample: On disk.

        Returns:
            Photo uint8 [H, W, 3] and truth [H, W] or [H, W, 3].
        """
        return read_sample(self.data, sample)

    def test_target(self, image: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cuts photo and truth to what the protocol evaluates.

        Args:
            image: uint8 [H, W, 3].
            target: [H, W] or [H, W, 3].

        Returns:
            Both, cut alike.
        """
        return image, target

    def test_sample(self, sample: Sample, whole_size: tuple[int, int] | None = None) -> dict[str, Any]:
        """Reads a test sample.

        Args:
            sample: On disk.
            whole_size: Height and width, pixels, at which the whole photo is seen; None for the full protocol's views.

        Returns:
            ``views`` uint8 [n, 3, h, w] and ``target``.
        """
        image, target = self.test_target(*self.read(sample))
        views = self.test_views(image) if whole_size is None else resize_image(image, whole_size)[None]
        return {
            "views": torch.from_numpy(np.ascontiguousarray(views.transpose(0, 3, 1, 2))),
            "target": torch.from_numpy(np.ascontiguousarray(target)),
        }

    def panel_places(self) -> list[int]:
        """Returns the places of some test samples, evenly spaced, that reports show."""
        return evenly_spaced(range(len(self.data.test)), _PANELS)

    def mirror_values(self, values: np.ndarray) -> np.ndarray:
        """Turns truth at some pixels into that of the mirrored photo.

        Args:
            values: Truth at P pixels, [P] or [P, 3].

        Returns:
            Of the same shape.
        """
        return values

    def is_better(self, score: float, other: float) -> bool:
        """Returns whether a value of the headline metric beats another; NaN beats nothing.

        Args:
            score: Of the headline metric.
            other: Likewise.
        """
        if np.isnan(other):
            return not np.isnan(score)
        return score > other if self.higher_is_better else score < other


def class_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """Returns colours that neighbours in the list of classes can be told apart by: hues a golden angle apart.

    Args:
        count: Classes.
    """
    colors = []
    for index in range(count):
        hue = (index * 0.618034) % 1.0
        saturation, value = (0.75, 0.55, 0.9)[index % 3], (0.95, 0.75, 0.6)[(index // 3) % 3]
        colors.append(tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value)))
    return tuple(colors)


def depth_colors(depth: np.ndarray, max_depth: float) -> np.ndarray:
    """Colours depth [H, W] in metres by its logarithm, near bright; black where there is none.

    Args:
        depth: float32 [H, W], metres; 0 where there is none.
        max_depth: Metres that are shown darkest.

    Returns:
        uint8 [H, W, 3].
    """
    import matplotlib as mpl

    nearest = max_depth / 40
    share = np.log(np.clip(depth, nearest, max_depth) / nearest) / np.log(max_depth / nearest)
    colors = mpl.colormaps["magma"](1 - share)[..., :3]
    return np.where((depth > 0)[..., None], np.round(colors * 255), 0).astype(np.uint8)
