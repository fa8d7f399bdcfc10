"""What fine-tuning changes on views that were not trained on, over the average with the original's weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from distill.photo_store import PhotoStore
from distill.scenes import Scene
from distill.targets import LiftedTargets, TargetSource
from fit3d_ns.backbones import Backbone
from fit3d_ns.backbones.students.averaging import interpolate
from fit3d_ns.backbones.students.result_folder import MEASURES
from fit3d_ns.features.metrics import MatchedViews, feature_cosine, feature_l1

AMOUNTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the student at which the average with the original is measured."""


@dataclass(frozen=True)
class ViewPictures:
    """A view and its maps, on the CPU."""

    name: str
    """Of the view's file."""
    photo: UInt8[Tensor, "H W 3"]
    """uint8 [H, W, 3]."""
    original: Float[Tensor, "C h w"]
    """Map of the backbone before training, [C, h, w]."""
    target: Float[Tensor, "C h w"]
    """What the student was trained on, [C, h, w]."""
    tuned: Float[Tensor, "C h w"]
    """Map of the result, [C, h, w]."""


@dataclass(frozen=True)
class SceneResult:
    """Measurements on one scene."""

    scene: str
    """Its name."""
    held_out: bool
    """Whether the views were held out from distillation; those of scenes that were trained on, also from lifting."""
    num_views: int
    """Views measured."""
    metrics: dict[str, float]
    """`MEASURES` of the original (``l1_before``, ...) and of the result (``l1_after``, ...), ``view_match_target``, and
    ``view_match_points``; what could not be measured is left out."""
    curve: dict[float, dict[str, float]] = field(default_factory=dict)
    """`MEASURES` for each of `AMOUNTS`."""
    pictures: list[ViewPictures] = field(default_factory=list)
    """Some views to look at."""


class HeldOutViews:
    """Views of a scene with their targets, ready to measure one backbone after the other.

    Args:
        scenes: As opened; a scene's number is its place in this list.
        index: Position of the scene.
        original: The backbone before training, which drift is measured from.
        targets: What the student is trained on.
        geometry: Renders depth, by which points are found again in other views.
        photos: Where photos are.
        num_views: Most held-out views that are taken.
        unseen: Whether the student never sees this scene.
    """

    @torch.no_grad()
    def __init__(
        self,
        scenes: Sequence[Scene],
        index: int,
        original: Backbone,
        targets: TargetSource,
        geometry: LiftedTargets,
        photos: PhotoStore,
        num_views: int,
        unseen: bool = False,
    ):
        self.scene = scenes[index]
        self._index = index
        self._photos = photos
        self.views, self.held_out = self.scene.report_views(num_views, unseen)
        made = [targets.make(index, [view]) for view in self.views]
        # In half precision, as they are trained on: a validation scene's stay while training goes on.
        self.targets = [target.maps[0].half() for target in made]  # each [C, h, w]
        self._weights = [target.weights[0] for target in made]  # each [h, w]
        surfaces = [geometry.surface(index, view) for view in self.views]
        self._matched = MatchedViews(surfaces, [self.scene.info.patch_grid(view) for view in self.views])
        self._original = [map_.half() for map_ in self.maps(original)]

    @torch.no_grad()
    def maps(self, backbone: Backbone) -> list[Float[Tensor, "C h w"]]:
        """Returns what a backbone says about each view.

        Args:
            backbone: On the device of the photos.
        """
        return [
            backbone(self._photos.get([(self._index, view)]).float() / 255.0).patch_tokens[0].float()
            for view in self.views
        ]

    def measure(self, maps: Sequence[Float[Tensor, "C h w"]]) -> dict[str, float]:
        """Returns `MEASURES` of a backbone's maps of all views, as far as they can be measured.

        Args:
            maps: Of `maps`, one for each view.
        """
        values: dict[str, list[float]] = {"l1": [], "cosine": [], "drift": []}
        for found, target, weights, before in zip(maps, self.targets, self._weights, self._original):
            values["drift"].append(float(feature_cosine(found, before.float())))
            if bool(weights.any()):
                values["l1"].append(float(feature_l1(found, target.float(), weights)))
                values["cosine"].append(float(feature_cosine(found, target.float(), weights)))
        measured = {name: sum(numbers) / len(numbers) for name, numbers in values.items() if numbers}
        match = self.match(maps)
        return measured if match is None else {**measured, "view_match": match[0]}

    def match(self, maps: Sequence[Float[Tensor, "C h w"]]) -> tuple[float, int] | None:
        """Returns the share of points found again, and how many there are; None where no two views share enough.

        Args:
            maps: Of `maps`, one for each view.
        """
        match = self._matched.match(maps)
        return None if match is None else (match, self._matched.num_points)

    def photo(self, position: int) -> UInt8[Tensor, "H W 3"]:
        """Returns a view's photo, on the CPU.

        Args:
            position: Among the views that were taken, from 0.
        """
        return self._photos.get([(self._index, self.views[position])])[0].permute(1, 2, 0).cpu()


class Averages:
    """A backbone that takes on any average of two sets of weights, where it lies.

    Args:
        backbone: Of that architecture; its weights are overwritten.
        student: Fine-tuned weights, as `plain_state_dict` returns them.
        original: The original's.
    """

    def __init__(self, backbone: Backbone, student: Mapping[str, Tensor], original: Mapping[str, Tensor]):
        self.backbone = backbone
        device = backbone.mean.device
        self._student = {name: tensor.to(device) for name, tensor in student.items()}
        self._original = {name: tensor.to(device) for name, tensor in original.items()}

    def take(self, amount: float) -> Backbone:
        """Returns the backbone with ``amount`` x student + (1 - ``amount``) x original.

        Args:
            amount: Share of the student, in [0, 1].
        """
        self.backbone.model.load_state_dict(interpolate(self._student, self._original, amount), strict=True)
        return self.backbone


def measure_scene(held_out: HeldOutViews, averages: Averages, amount: float, num_pictures: int) -> SceneResult:
    """Measures one scene, over `AMOUNTS` and at the amount of the result.

    Args:
        held_out: The views.
        averages: Of the student and the original.
        amount: Share of the student in the result.
        num_pictures: Most views that are kept as pictures.

    Returns:
        Its measures at each amount, and pictures at the result's.
    """
    curve: dict[float, dict[str, float]] = {}
    kept: dict[float, list[Tensor]] = {}
    for share in sorted({*AMOUNTS, amount}):
        maps = held_out.maps(averages.take(share))
        curve[share] = held_out.measure(maps)
        if share in (0.0, amount):
            kept[share] = [map_.cpu() for map_ in maps[:num_pictures]]
    metrics = {f"{name}_before": value for name, value in curve[0.0].items()}
    metrics |= {f"{name}_after": value for name, value in curve[amount].items()}
    match = held_out.match([target.float() for target in held_out.targets])
    if match is not None:
        metrics |= {"view_match_target": match[0], "view_match_points": match[1]}
    pictures = [
        ViewPictures(
            held_out.scene.info.views[held_out.views[position]].name,
            held_out.photo(position),
            kept[0.0][position],
            held_out.targets[position].float().cpu(),
            kept[amount][position],
        )
        for position in range(min(num_pictures, len(held_out.views)))
    ]
    shown = {share: curve[share] for share in AMOUNTS}
    return SceneResult(held_out.scene.name, held_out.held_out, len(held_out.views), metrics, shown, pictures)


def average(results: Sequence[SceneResult]) -> dict[str, float]:
    """Returns the mean of each metric over the scenes that have it; points of ``view_match`` are summed.

    Args:
        results: One for each scene.
    """
    return mean_of([result.metrics for result in results])


def average_curve(results: Sequence[SceneResult]) -> dict[str, list[float | None]]:
    """Returns the mean over scenes of each measure for each of `AMOUNTS`, and the amounts themselves as ``amount``.

    Args:
        results: Of every scene.

    Returns:
        Lists of one length; None where nothing could be measured.
    """
    means = [mean_of([result.curve[amount] for result in results if amount in result.curve]) for amount in AMOUNTS]
    return {"amount": list(AMOUNTS), **{name: [mean.get(name) for mean in means] for name in MEASURES}}


def mean_of(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of each number over those that have it and where it is no NaN; counts of points are summed.

    Args:
        measured: Numbers by name, of each scene or view.
    """
    means = {}
    for name in dict.fromkeys(name for numbers in measured for name in numbers):
        values = [numbers[name] for numbers in measured if not math.isnan(numbers.get(name, math.nan))]
        if values:
            means[name] = float(sum(values)) if name == "view_match_points" else sum(values) / len(values)
    return means


class Validation:
    """Scenes that nobody trains on, measured every so many steps.

    Args:
        held_out: Views of each of them.
        backbone: Of the student's architecture, to measure with; its weights are overwritten.
        original: The original's weights.
        amount: Share of the student in the average that is measured, which is that of the result.
    """

    def __init__(
        self,
        held_out: Sequence[HeldOutViews],
        backbone: Backbone,
        original: Mapping[str, Tensor],
        amount: float,
    ):
        self._held_out = held_out
        self._backbone = backbone
        self._original = original
        self._amount = amount

    def measure(self, student: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns the means of `MEASURES` over the scenes, of what the result would be with these weights.

        Args:
            student: Weights of the student by timm's keys.
        """
        backbone = Averages(self._backbone, student, self._original).take(self._amount)
        return mean_of([views.measure(views.maps(backbone)) for views in self._held_out])
