"""What features are worth on NYUv2, CamVid and a scene with measured depth: probes that are solved."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from fit3d_ns.backbones import Backbone
from fit3d_ns.data.photos.picture_files import open_depth, open_labels
from fit3d_ns.features.correspondences import SurfaceView
from fit3d_ns.features.metrics import MatchedViews
from probe.data.base import IGNORE, Sample, read_image
from probe.data.own import read_posed_scene
from probe.data.pairing import pair_folders
from probe.solvers import GramSums, choose_ridge, fit_logistic
from probe.tasks.metrics import DepthMetric, SegmentationMetric
from probe.tasks.patch_targets import majority_labels, patch_means
from probe.zero_shot.correspondence import load_photos

NYU_SIZE, CAMVID_SIZE = (336, 448), (280, 378)
"""Height and width at which photos are seen, pixels: multiples of 14."""
DEVELOPMENT_BLOCK, DEVELOPMENT_SHARE = 10, 5
"""Every fifth block of ten training frames is held out for choices: frames of a video belong to one side."""
MAX_DEPTH = 10.0
_SPLITS = ("train", "test")
_BATCH = 32
_TOLERANCE = 1e-4
"""Of the solver, in nats."""
_MILLIMETRES = 1000.0


@dataclass(frozen=True)
class LabelledPhotos:
    """Photos of a data set with their truth, on the device; the training photos come first."""

    images: UInt8[Tensor, "V 3 H W"]
    """uint8 RGB."""
    labels: UInt8[Tensor, "V Y X"]
    """Class ids, 255 for ignored."""
    patch_labels: Int[Tensor, "V h w"]
    """The class that most of a patch's pixels have, 255 for ignored."""
    num_classes: int
    """Class ids run from 0 to one less."""
    num_training: int
    """How many of the photos are for training."""
    depth: Float[Tensor, "V Y X"] | None = None
    """Metres, 0 for none."""
    patch_log_depth: Float[Tensor, "V h w"] | None = None
    """Mean log depth of a patch's pixels, NaN where there are none."""

    def split(self, part: str) -> tuple[list[int], list[int]]:
        """Returns the photos to fit on and to score on: for choices (`development`) or for the final table (`test`).

        Args:
            part: ``development`` or ``test``.
        """
        training = list(range(self.num_training))
        if part == "test":
            return training, list(range(self.num_training, len(self.images)))
        held_out = [index for index in training if index // DEVELOPMENT_BLOCK % DEVELOPMENT_SHARE == 2]
        return sorted(set(training) - set(held_out)), held_out


def read_labelled(folder: Path, size: tuple[int, int], device: torch.device, depth: bool) -> LabelledPhotos:
    """Reads a data set in the folder layout of fit3d-probe into memory.

    Args:
        folder: The data set, with classes.txt; without it, classes are the label values that occur.
        size: Height and width at which photos are seen, pixels.
        device: Where it goes.
        depth: Whether it has depth.

    Returns:
        Photos and truth on the device.
    """
    splits = {
        split: pair_folders(folder / split, folder / f"{split}annot", "DATA/{train,test}annot", Counter())
        for split in _SPLITS
    }
    samples = [sample for split in _SPLITS for sample in splits[split]]
    grid = (size[0] // 14, size[1] // 14)
    with ThreadPoolExecutor() as threads:
        images = list(threads.map(lambda sample: _photo(sample, size), samples))
        labels = list(threads.map(lambda sample: open_labels(sample.target), samples))
    names = folder / "classes.txt"
    if names.is_file():
        num_classes = len(names.read_text().split("\n")) - names.read_text().endswith("\n")
    else:
        num_classes = 1 + max(int(label[label != IGNORE].max()) for label in labels)
    patch_labels = np.stack([majority_labels(label, grid, num_classes, IGNORE) for label in labels])
    depths = means = None
    if depth:
        paths = [
            sample.target.parent.parent / sample.target.parent.name.replace("annot", "depth") for sample in samples
        ]
        with ThreadPoolExecutor() as threads:
            read = threads.map(lambda pair: open_depth(pair[0] / pair[1].target.name), zip(paths, samples))
            metres = [value.astype(np.float32) / np.float32(_MILLIMETRES) for value in read]
        depths = torch.from_numpy(np.stack(metres)).to(device)
        means = torch.from_numpy(np.stack([_log_depth(value, grid) for value in metres])).to(device)
    return LabelledPhotos(
        torch.from_numpy(np.stack(images)).to(device),
        torch.from_numpy(np.stack(labels).astype(np.uint8)).to(device),
        torch.from_numpy(patch_labels).to(device),
        num_classes,
        len(splits["train"]),
        depths,
        means,
    )


def _photo(sample: Sample, size: tuple[int, int]) -> np.ndarray:
    image = read_image(sample.image)
    if image.shape[:2] != size:
        image = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BOX))
    return image.transpose(2, 0, 1)


def _depth_path(sample: Sample) -> Path:
    labels = sample.target.parent
    return labels.with_name(labels.name.replace("annot", "depth")) / sample.target.name


def _log_depth(metres: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    valid = (metres > 0) & (metres < MAX_DEPTH)
    means, shares = patch_means(np.log(np.where(valid, metres, 1.0)), valid, grid)
    return np.where(shares > 0, means, np.nan).astype(np.float32)


@torch.no_grad()
def features(backbone: Backbone, images: UInt8[Tensor, "V 3 H W"], chosen: Sequence[int]) -> Float[Tensor, "V C h w"]:
    """Returns the patch tokens of chosen photos, fp32.

    Args:
        backbone: In evaluation mode.
        images: uint8 RGB.
        chosen: Places of the photos.
    """
    parts = [images[list(chosen[start : start + _BATCH])] for start in range(0, len(chosen), _BATCH)]
    return torch.cat([backbone(part.float() / 255).patch_tokens for part in parts])


@torch.no_grad()
def score(backbone: Backbone, photos: LabelledPhotos, part: str, decay: float) -> dict[str, float]:
    """Fits both probes on one part of a data set and scores them on another.

    Args:
        backbone: In evaluation mode.
        photos: The data set.
        part: `development` or `test`; see `LabelledPhotos.split`.
        decay: Of the logistic regression.

    Returns:
        ``miou`` and, where there is depth, ``rmse`` (over all pixels) and ``rmse_mean`` (over images), metres.
    """
    fit, scored = photos.split(part)
    tokens = features(backbone, photos.images, [*fit, *scored])
    training, held_out = tokens[: len(fit)], tokens[len(fit) :]
    result = _segmentation(training, held_out, photos, fit, scored, decay)
    if photos.depth is not None:
        result |= _depth(training, held_out, photos, fit, scored)
    return result


def _patches(tokens: Float[Tensor, "V C h w"]) -> Float[Tensor, "P C"]:
    return tokens.permute(0, 2, 3, 1).flatten(0, 2)


def _segmentation(
    training: Tensor, held_out: Tensor, photos: LabelledPhotos, fit: list[int], scored: list[int], decay: float
) -> dict[str, float]:
    labels = photos.patch_labels[fit].flatten()
    known = labels < photos.num_classes
    x, y = _patches(training)[known], labels[known]
    sums = GramSums.zeros(x.shape[1], photos.num_classes, x.device)
    sums.add(x, y)
    with torch.enable_grad():
        solved = fit_logistic(lambda: [(x, y)], sums, decay, tolerance=_TOLERANCE)
    metric = SegmentationMetric(photos.num_classes).to(x.device)
    for start in range(0, len(scored), _BATCH):
        truth = photos.labels[scored[start : start + _BATCH]].long()
        logits = F.interpolate(solved.linear(held_out[start : start + _BATCH]), truth.shape[-2:], mode="bilinear")
        metric.update(logits.argmax(1), truth)
    scores = metric.scores()
    return {"miou": scores["miou"], "accuracy": scores["aacc"], "evaluations": solved.evaluations}


def _depth(
    training: Tensor, held_out: Tensor, photos: LabelledPhotos, fit: list[int], scored: list[int]
) -> dict[str, float]:
    assert photos.depth is not None and photos.patch_log_depth is not None
    width, sums = training.shape[1], []
    # The decay is chosen on blocks all over the frames: one stretch of a video says little of the others.
    block = max(1, min(DEVELOPMENT_BLOCK, len(fit) // (2 * DEVELOPMENT_SHARE)))
    of_choice = [index // block % DEVELOPMENT_SHARE == DEVELOPMENT_SHARE - 1 for index in range(len(fit))]
    for held in (False, True):
        rows = [index for index, chosen in enumerate(of_choice) if chosen == held]
        part, chosen = training[rows], [fit[row] for row in rows]
        targets = photos.patch_log_depth[chosen].flatten()
        known = targets.isfinite()
        sums.append(GramSums.zeros(width, 1, training.device))
        sums[-1].add(_patches(part)[known], targets[known, None])
    choice = choose_ridge(*sums)
    metric, squares, count = DepthMetric().to(training.device), 0.0, 0
    for row, index in enumerate(scored):
        truth = photos.depth[index]
        log_depth = F.interpolate(choice.linear(held_out[row, None]), truth.shape, mode="bilinear")[0, 0]
        predicted = log_depth.exp().clamp(1e-3, MAX_DEPTH)
        valid = (truth > 0) & (truth < MAX_DEPTH)
        metric.update(predicted, truth, valid)
        squares += (torch.where(valid, predicted - truth, 0.0).double().square()).sum()
        count += valid.sum()
    pooled = float((torch.as_tensor(squares) / torch.as_tensor(count)).sqrt())
    return {"rmse": pooled, "rmse_mean": metric.scores()["rmse"], "ridge_decay": choice.decay}


class LastFrames:
    """The last frames of a scene with measured depth, matched in pairs a fixed number of frames apart.

    Args:
        folder: The scene.
        num_frames: So many of its last frames.
        step: From one view of a pair to the other, in frames.
        device: Where they go.
    """

    def __init__(self, folder: Path, num_frames: int, step: int, device: torch.device) -> None:
        photos = sorted(load_photos(read_posed_scene(folder), 1 << 16), key=lambda photo: photo.name)[-num_frames:]
        views, images = [], []
        for photo in photos:
            seen = photo.view
            moved = (seen.viewmat.to(device), seen.K.to(device), seen.width, seen.height, seen.depth.to(device))
            views.append(SurfaceView(*moved))
            image = torch.from_numpy(photo.image.copy()).permute(2, 0, 1)[None].float()  # [1, 3, H, W]
            size = [side // 14 * 14 for side in image.shape[-2:]]
            images.append(F.interpolate(image, size, mode="bilinear", antialias=True).round().to(torch.uint8))
        self._images = torch.cat(images).to(device)
        grid = (self._images.shape[-2] // 14, self._images.shape[-1] // 14)
        pairs = [(index, index + step) for index in range(len(views) - step)]
        self._matched = MatchedViews(views, [grid] * len(views), pairs)

    def match(self, backbone: Backbone) -> float | None:
        """Returns the share of surface points that features find again in the other view of a pair.

        Args:
            backbone: In evaluation mode.
        """
        return self._matched.match(list(features(backbone, self._images, range(len(self._images)))))


@dataclass(frozen=True)
class Labelled:
    """All that students are scored on with labels, loaded once."""

    nyu: LabelledPhotos
    """NYUv2, with depth."""
    camvid: LabelledPhotos
    """CamVid."""
    last_frames: LastFrames
    """Of a scene with measured depth, kept from lifting."""

    def choose_decays(self, backbone: Backbone, decays: Sequence[float]) -> dict[str, dict[float, float]]:
        """Returns the mIoU on development frames by decay of the logistic regression, for each data set.

        Args:
            backbone: In evaluation mode.
            decays: Of the logistic regression.
        """
        sets = {"nyu": self.nyu, "camvid": self.camvid}
        return {
            name: {decay: score(backbone, photos, "development", decay)["miou"] for decay in decays}
            for name, photos in sets.items()
        }

    def score(self, backbone: Backbone, part: str, decays: Mapping[str, float]) -> dict[str, Any]:
        """Returns the scores on `development` or `test` frames, and matches on the frames that were kept out.

        Args:
            backbone: In evaluation mode.
            part: See `LabelledPhotos.split`.
            decays: Of the logistic regression on each data set.
        """
        return {
            "nyu": score(backbone, self.nyu, part, decays["nyu"]),
            "camvid": score(backbone, self.camvid, part, decays["camvid"]),
            "match": self.last_frames.match(backbone),
        }
