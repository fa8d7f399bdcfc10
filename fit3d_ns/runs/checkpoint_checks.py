"""What a checkpoint must hold: checked wherever one is read, before anything is made of it."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fit3d_ns.backbones.identity import check_identity
from fit3d_ns.features.grid import FeatureGrid
from fit3d_ns.runs.names import DECODER_WEIGHT, EXTRA_STATE, FEATURES, GAUSSIANS
from fit3d_ns.support.errors import DamagedFile
from fit3d_ns.support.json_files import build
from fit3d_ns.support.tensor_files import is_finite

_LOGGER = logging.getLogger(__name__)
_SHAPES: dict[str, tuple[int | None, ...]] = {
    "means": (3,),
    "scales": (3,),
    "quats": (4,),
    "features_dc": (3,),
    "features_rest": (None, 3),
    "opacities": (1,),
    FEATURES: (None,),
}
"""Of one Gaussian; None for any length."""


@dataclass(frozen=True)
class _ExtraState:
    """Of ``Fit3DPipeline.get_extra_state``; what older versions did not write has a default."""

    teacher: dict[str, Any]
    feature_grid: FeatureGrid
    strategy: dict[str, Any]
    sampler: dict[str, Any]
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


def check_state(state: Any, checkpoint: Path) -> None:
    """Checks what was read from a checkpoint, of this project's method or of splatfacto.

    Args:
        state: nerfstudio's dictionary.
        checkpoint: Where it came from, for a remark.

    Raises:
        DamagedFile: If an entry is missing, of another kind, type or shape, or a tensor is NaN or infinite throughout.
    """
    if not isinstance(state, dict):
        raise DamagedFile("it holds no dictionary")
    pipeline = state.get("pipeline")
    if not isinstance(pipeline, dict):
        raise DamagedFile("it holds no `pipeline` entry")
    step = state.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise DamagedFile(f"its step is {str(step)[:40]}, no whole number")
    for name in ("optimizers", "schedulers", "scalers"):
        if not isinstance(state.get(name, {}), dict):
            raise DamagedFile(f"its entry {name} is no dictionary")
    for name, value in pipeline.items():
        if not isinstance(name, str) or not (isinstance(value, Tensor) or name.rpartition(".")[2] == EXTRA_STATE):
            raise DamagedFile(f"its entry pipeline.{str(name)[:60]} is no tensor")
    _check_gaussians(pipeline)
    _check_values(state, checkpoint)
    extra = pipeline.get(EXTRA_STATE)
    if extra is not None:
        build(_ExtraState, extra, EXTRA_STATE)


def _check_gaussians(pipeline: Mapping[str, Any]) -> None:
    gaussians = {name.removeprefix(GAUSSIANS): value for name, value in pipeline.items() if name.startswith(GAUSSIANS)}
    counts = set()
    for name, shape in _SHAPES.items():
        tensor = gaussians.get(name)
        if tensor is None:
            continue
        found = tuple(tensor.shape)
        fits = len(found) == len(shape) + 1 and all(b in (a, None) for a, b in zip(found[1:], shape))
        if not fits or tensor.dtype != torch.float32:
            raise DamagedFile(f"{name} is {_shown(tensor)} instead of {_wanted(shape)} float32")
        counts.add(len(tensor))
    if len(counts) > 1 or 0 in counts:
        raise DamagedFile(f"its Gaussians are {' and '.join(map(str, sorted(counts)))} in number")
    kernel, features = pipeline.get(DECODER_WEIGHT), gaussians.get(FEATURES)
    if kernel is not None and features is not None:
        if kernel.dtype != torch.float32 or tuple(kernel.shape[1:]) != (features.shape[1], 3, 3):
            raise DamagedFile(
                f"{DECODER_WEIGHT} is {_shown(kernel)} instead of C x {features.shape[1]} x 3 x 3 float32"
            )


def _check_values(state: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuses tensors without a number in them; some Gaussians that training spoiled are only counted."""
    for name, tensor in _tensors(state):
        if is_finite(tensor):
            continue
        broken = ~torch.isfinite(tensor)
        if not name.startswith(f"pipeline.{GAUSSIANS}") and not name.startswith("optimizers."):
            raise DamagedFile(f"{name} holds NaN or infinite values")
        rows = int(broken.reshape(len(tensor), -1).any(1).sum()) if tensor.dim() else 1
        if rows == (len(tensor) if tensor.dim() else 1):
            raise DamagedFile(f"{name} is NaN or infinite throughout")
        if name.startswith("pipeline."):
            _LOGGER.warning("%d of %d Gaussians in %s have NaN or infinite %s.", rows, len(tensor), checkpoint, name)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))


def _shown(tensor: Tensor) -> str:
    return f"{' x '.join(map(str, tensor.shape)) or 'a number'} {str(tensor.dtype).removeprefix('torch.')}"


def _wanted(shape: tuple[int | None, ...]) -> str:
    return " x ".join(["N", *("K" if length is None else str(length) for length in shape)])
