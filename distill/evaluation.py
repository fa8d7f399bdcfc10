"""What fine-tuning changed, on held-out views: fidelity to the targets, consistency between views, pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from distill.photo_store import PhotoStore
from distill.scenes import Scene
from distill.targets import LiftedTargets, TargetSource
from fit3d_ns.backbones import Backbone
from fit3d_ns.metrics import choose_pairs, feature_cosine, feature_l1, view_match


@dataclass(frozen=True)
class ViewPictures:
    """A view and its maps, on the CPU."""

    name: str
    photo: UInt8[Tensor, "H W 3"]
    original: Float[Tensor, "C h w"]
    target: Float[Tensor, "C h w"]
    tuned: Float[Tensor, "C h w"]


@dataclass(frozen=True)
class SceneResult:
    """Measurements on one scene."""

    scene: str
    """Its name."""
    held_out: bool
    """Whether the views were held out from lifting and from distillation."""
    num_views: int
    """Views measured."""
    metrics: dict[str, float]
    """``l1_before``, ``l1_after``, ``cosine_before``, ``cosine_after`` to the target; ``view_match_before``,
    ``view_match_after``, ``view_match_target`` (left out where no two views share enough surface), and
    ``view_match_points``."""
    pictures: list[ViewPictures] = field(default_factory=list)
    """Some views to look at."""


@torch.no_grad()
def measure_scene(
    scenes: Sequence[Scene],
    index: int,
    original: Backbone,
    tuned: Backbone,
    targets: TargetSource,
    geometry: LiftedTargets,
    photos: PhotoStore,
    num_views: int,
    num_pictures: int,
) -> SceneResult:
    """Measures one scene.

    Args:
        scenes: The scenes.
        index: Which.
        original: The student before training.
        tuned: The student after training.
        targets: What it was trained on.
        geometry: Renders depth, by which points are found again in other views.
        photos: Where photos are.
        num_views: Most held-out views that are measured.
        num_pictures: Most views that are kept as pictures.
    """
    scene = scenes[index]
    views, held_out = scene.report_views(num_views)
    maps: dict[str, list[Tensor]] = {"before": [], "after": [], "target": []}
    sums: dict[str, list[float]] = {}
    pictures: list[ViewPictures] = []
    for view in views:
        photo = photos.get([(index, view)])
        made = targets.make(index, [view])
        target, weights = made.maps[0].float(), made.weights[0]
        maps["target"].append(target)
        for name, backbone in (("before", original), ("after", tuned)):
            features = backbone(photo.float() / 255.0).patch_tokens[0].float()
            maps[name].append(features)
            if bool(weights.any()):
                sums.setdefault(f"l1_{name}", []).append(float(feature_l1(features, target, weights)))
                sums.setdefault(f"cosine_{name}", []).append(float(feature_cosine(features, target, weights)))
        if len(pictures) < num_pictures:
            shown = (maps["before"][-1].cpu(), target.cpu(), maps["after"][-1].cpu())
            pictures.append(ViewPictures(scene.info.views[view].name, photo[0].permute(1, 2, 0).cpu(), *shown))
    metrics = {name: sum(values) / len(values) for name, values in sums.items()}
    surfaces = [geometry.surface(index, view) for view in views]
    pairs = choose_pairs(surfaces, [scene.info.patch_grid(view) for view in views])
    for name, features in maps.items():
        match = view_match(features, surfaces, pairs)
        if match.num_points:
            metrics[f"view_match_{name}"] = match.rate
            metrics["view_match_points"] = match.num_points
    return SceneResult(scene.name, held_out, len(views), metrics, pictures)


def average(results: Sequence[SceneResult]) -> dict[str, float]:
    """Returns the mean of each metric over the scenes that have it; points of ``view_match`` are summed."""
    names = dict.fromkeys(name for result in results for name in result.metrics)
    means = {}
    for name in names:
        values = [result.metrics[name] for result in results if not math.isnan(result.metrics.get(name, math.nan))]
        if values:
            means[name] = float(sum(values)) if name == "view_match_points" else sum(values) / len(values)
    return means
