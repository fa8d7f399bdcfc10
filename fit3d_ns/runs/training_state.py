"""What a checkpoint must hold for a training to go on with: optimizers, schedulers and this project's own state."""

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fit3d_ns.backbones.identity import check_identity
from fit3d_ns.features.grid import FeatureGrid
from fit3d_ns.runs.names import DECODER_WEIGHT, EXTRA_STATE, FEATURES, GAUSSIANS, GEOMETRY, SPLAT
from fit3d_ns.support.errors import DamagedFile
from fit3d_ns.support.json_files import build

_OF_EACH_GAUSSIAN = ("grad2d", "count", "radii")
"""What gsplat's densification keeps, None before it begins."""
_TOGETHER = (SPLAT, (FEATURES, "fit3d_decoder"))
"""Optimizers that a training has or has not, and that step together: geometry may be frozen, features lifted."""
_STEPS_LATER = "features_rest"
"""Has no gradient while splatfacto renders without spherical harmonics."""


@dataclass(frozen=True)
class _Teacher:
    backbone: str
    backbone_layer: int | None
    backbone_norm: bool
    backbone_normalization: Literal["own", "imagenet"]
    backbone_max_size: int


@dataclass(frozen=True)
class _Sampler:
    num_views: int
    unseen: list[int]
    random: list[Any] | None = None
    unsampled: list[float] | None = None

    def __post_init__(self) -> None:
        if any(not 0 <= index < self.num_views for index in self.unseen):
            raise ValueError(f"sampler.unseen is not among the {self.num_views} views")
        if self.random is not None and not _accepts_python(self.random):
            raise ValueError("sampler.random is no state of Python's random generator")


@dataclass(frozen=True)
class _ExtraState:
    """Of ``Fit3DPipeline.get_extra_state``; what older versions did not write has a default."""

    teacher: _Teacher
    feature_grid: FeatureGrid
    strategy: dict[str, Any]
    sampler: _Sampler
    random: dict[str, Any]
    teacher_identity: dict[str, Any] | None = None
    teacher_precision: Literal["bf16", "fp32"] | None = None
    photos: list[str] | None = None

    def __post_init__(self) -> None:
        if self.teacher_identity is not None:
            check_identity(self.teacher_identity, "teacher_identity")
        for name in ("torch", "cuda", "numpy", "python"):
            if name not in self.random:
                raise ValueError(f"random.{name} is missing")
        cuda = self.random["cuda"]
        if not isinstance(cuda, list) or not all(isinstance(one, Tensor) and one.dtype == torch.uint8 for one in cuda):
            raise ValueError("random.cuda is no list of states of CUDA's random generators")
        for name, accepts in (("torch", _accepts_torch), ("numpy", _accepts_numpy), ("python", _accepts_python)):
            if not accepts(self.random[name]):
                raise ValueError(f"random.{name} is no state of that random generator")


def check_extra_state(state: Mapping[str, Any]) -> None:
    """Checks this project's own state and the types of all tensors of the model, Gaussians or not.

    Args:
        state: nerfstudio's dictionary, its Gaussians, or where they are, checked.

    Raises:
        DamagedFile: Naming the entry that is missing, of another type, or of another shape than what it belongs to.
    """
    pipeline = state["pipeline"]
    for name, tensor in tensors_of({**pipeline, EXTRA_STATE: {}}):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise DamagedFile(f"{name} is {shown(tensor)} instead of float32")
    if EXTRA_STATE in pipeline:
        means = pipeline.get(f"{GAUSSIANS}means")
        count = state[GEOMETRY]["num_gaussians"] if means is None else len(means)
        _check_extra_state(build(_ExtraState, pipeline[EXTRA_STATE], EXTRA_STATE), count, pipeline.get(DECODER_WEIGHT))
    elif f"{GAUSSIANS}{FEATURES}" in pipeline or GEOMETRY in state:
        raise DamagedFile(f"its entry {EXTRA_STATE} is missing")


def check_optimizers(state: Mapping[str, Any]) -> None:
    """Checks optimizers and schedulers, for a training that goes on; nothing else has a use for them.

    Args:
        state: nerfstudio's dictionary, of this project's method, and otherwise checked.

    Raises:
        DamagedFile: Naming the entry that is missing, of another type, or of another shape than what it belongs to.
    """
    for name in ("optimizers", "schedulers", "scalers"):
        if not isinstance(state.get(name), dict):
            raise DamagedFile(f"its entry {name} is missing or no dictionary")
    optimizers, schedulers = state["optimizers"], state["schedulers"]
    for name, tensor in tensors_of(optimizers, "optimizers"):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise DamagedFile(f"{name} is {shown(tensor)} instead of float32")
    _check_groups(optimizers, state["pipeline"])
    if "means" in optimizers and "means" not in schedulers:
        raise DamagedFile("its entry schedulers.means is missing")
    for group, scheduler in schedulers.items():
        _check_scheduler(f"schedulers.{group}", scheduler)


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor in nested dictionaries with its name, the keys joined by dots.

    Args:
        value: A tensor, a dictionary, or anything else, which is passed over.
        name: Of the value.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_of(item, f"{name}.{key}" if name else str(key))


def shown(tensor: Tensor) -> str:
    """Returns a tensor's shape and type for a sentence.

    Args:
        tensor: Any.
    """
    return f"{' x '.join(map(str, tensor.shape)) or 'a number'} {str(tensor.dtype).removeprefix('torch.')}"


def _check_groups(optimizers: Mapping[str, Any], pipeline: Mapping[str, Any]) -> None:
    """Refuses groups that are torn; all may be gone, and start anew then (`drop_optimizer_state`)."""
    for group, optimizer in optimizers.items():
        name = f"optimizers.{group}"
        if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
            raise DamagedFile(f"its entry {name} is no optimizer's state")
        settings = optimizer.get("param_groups")
        if not isinstance(settings, list) or not settings or not all(map(_is_group, settings)):
            raise DamagedFile(f"its entry {name}.param_groups holds no learning rate and betas")
        for moments in optimizer["state"].values():
            if not isinstance(moments, dict) or (moments and not {"step", "exp_avg", "exp_avg_sq"} <= moments.keys()):
                raise DamagedFile(f"its entry {name}.state lacks step, exp_avg or exp_avg_sq")
            if not all(isinstance(value, Tensor) for value in moments.values()):
                raise DamagedFile(f"its entry {name}.state holds what is no tensor")
        trained = pipeline.get(f"{GAUSSIANS}{group}", pipeline.get(f"_model.{group}.weight"))
        for place, tensor in tensors_of(optimizer, name):
            shape = () if place.endswith(".step") else None if trained is None else tuple(trained.shape)
            if shape is not None and tuple(tensor.shape) != shape:
                wanted = " x ".join(map(str, shape)) or "a number"
                raise DamagedFile(f"{place} is {shown(tensor)} instead of {wanted}")
    for together in _TOGETHER:
        stepped = [group for group in together if any(optimizers.get(group, {}).get("state", {}).values())]
        missing = [group for group in together if group not in optimizers]
        behind = [group for group in together if group not in stepped and group != _STEPS_LATER]
        if 0 < len(missing) < len(together) or (stepped and behind):
            raise DamagedFile(f"its entry optimizers.{(missing or behind)[0]} is missing or empty")


def _check_scheduler(name: str, scheduler: Any) -> None:
    """Refuses what torch's ``LRScheduler.load_state_dict`` would take as it comes."""
    if not isinstance(scheduler, dict):
        raise DamagedFile(f"its entry {name} is no scheduler's state")
    for field in ("last_epoch", "_step_count"):
        count = scheduler.get(field)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise DamagedFile(f"{name}.{field} is {str(count)[:40]}, no whole number")
    for field in ("base_lrs", "_last_lr"):
        rates = scheduler.get(field)
        if not isinstance(rates, list) or not rates or not all(map(_is_rate, rates)):
            raise DamagedFile(f"{name}.{field} is {str(rates)[:40]}, no list of learning rates")


def _check_extra_state(extra: _ExtraState, num_gaussians: int, kernel: Tensor | None) -> None:
    strategy = extra.strategy
    if "binoms" not in strategy:  # MCMC's, which has nothing else
        for name in ("grad2d", "count", "scene_scale"):
            if name not in strategy:
                raise DamagedFile(f"strategy.{name} is missing")
        scale = strategy["scene_scale"]
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not (math.isfinite(scale) and scale > 0):
            raise DamagedFile(f"strategy.scene_scale is {str(scale)[:40]}, no number above 0")
    for name in _OF_EACH_GAUSSIAN:
        values = strategy.get(name)
        fits = isinstance(values, Tensor) and values.dtype == torch.float32 and values.shape == (num_gaussians,)
        if values is not None and not fits:
            told = shown(values) if isinstance(values, Tensor) else str(values)[:40]
            raise DamagedFile(f"strategy.{name} is {told} instead of a float32 for each Gaussian")
    width = (extra.teacher_identity or {}).get("width")
    if kernel is not None and width is not None and len(kernel) != width:
        raise DamagedFile(f"{DECODER_WEIGHT} has {len(kernel)} rows, and the teacher {width} channels")


def _is_group(settings: Any) -> bool:
    """Whether these are an Adam's settings."""
    if not isinstance(settings, dict):
        return False
    betas = settings.get("betas")
    numbers = [settings.get("lr"), settings.get("eps"), *(betas if isinstance(betas, (list, tuple)) else [None])]
    return isinstance(settings.get("params"), list) and all(map(_is_rate, numbers))


def _is_rate(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number) and number >= 0


def _accepts_torch(state: Any) -> bool:
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError):
        return False
    return True


def _accepts_numpy(state: Any) -> bool:
    try:
        kind, keys, *rest = state
        np.random.RandomState().set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _accepts_python(state: Any) -> bool:
    try:
        kind, values, gauss = state
        random.Random().setstate((kind, tuple(values), gauss))
    except (TypeError, ValueError, OverflowError):
        return False
    return True
