"""What a checkpoint must hold: checked wherever one is read, before anything is made of it."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.runs.names import DECODER_WEIGHT, EXTRA_STATE, FEATURES, GAUSSIANS, GEOMETRY
from fit3d_ns.runs.training_state import check_extra_state, shown, tensors_of
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
class _Geometry:
    """Where the Gaussians of a lift are; see `geometry_reference`."""

    path: str
    bytes: int
    num_gaussians: int


def check_state(state: Any, checkpoint: Path) -> None:
    """Checks what was read from a checkpoint, of this project's method or of splatfacto.

    Args:
        state: nerfstudio's dictionary.
        checkpoint: Where it came from; ``step-N.ckpt`` holds step N.

    Raises:
        DamagedFile: If an entry is missing, of another kind, type or shape, or a tensor is NaN or infinite throughout.
    """
    if not isinstance(state, dict):
        raise DamagedFile("it holds no dictionary")
    pipeline = state.get("pipeline")
    if not isinstance(pipeline, dict) or not pipeline:
        raise DamagedFile("it holds no `pipeline` entry, or an empty one")
    step = state.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise DamagedFile(f"its step is {str(step)[:40]}, no whole number")
    named = re.search(r"step-(\d+)\.ckpt$", checkpoint.name)
    if named is not None and int(named[1]) != step:
        raise DamagedFile(f"its step is {step}, and its name says {int(named[1])}")
    for name in ("optimizers", "schedulers", "scalers"):
        if not isinstance(state.get(name, {}), dict):
            raise DamagedFile(f"its entry {name} is no dictionary")
    for name, value in pipeline.items():
        if not isinstance(name, str) or not (isinstance(value, Tensor) or name.rpartition(".")[2] == EXTRA_STATE):
            raise DamagedFile(f"its entry pipeline.{str(name)[:60]} is no tensor")
    _check_gaussians(pipeline)
    _check_values(state, checkpoint)
    if GEOMETRY in state:
        build(_Geometry, state[GEOMETRY], GEOMETRY)
    elif EXTRA_STATE in pipeline and f"{GAUSSIANS}means" not in pipeline:
        raise DamagedFile("it holds no Gaussians, nor where they are")
    if GEOMETRY in state or any(name == EXTRA_STATE or name.startswith(GAUSSIANS) for name in pipeline):
        check_extra_state(state)


def _check_gaussians(pipeline: Mapping[str, Any]) -> None:
    gaussians = {name.removeprefix(GAUSSIANS): value for name, value in pipeline.items() if name.startswith(GAUSSIANS)}
    if not gaussians:
        return
    counts = set()
    for name, shape in _SHAPES.items():
        tensor = gaussians.get(name)
        if tensor is None:
            if name != FEATURES:
                raise DamagedFile(f"its Gaussians have no {name}")
            continue
        found = tuple(tensor.shape)
        fits = len(found) == len(shape) + 1 and all(b in (a, None) for a, b in zip(found[1:], shape))
        if not fits or tensor.dtype != torch.float32:
            raise DamagedFile(f"{name} is {shown(tensor)} instead of {_wanted(shape)} float32")
        counts.add(len(tensor))
    if len(counts) > 1 or 0 in counts:
        raise DamagedFile(f"its Gaussians are {' and '.join(map(str, sorted(counts)))} in number")
    kernel, features = pipeline.get(DECODER_WEIGHT), gaussians.get(FEATURES)
    if kernel is not None and features is not None:
        if kernel.dtype != torch.float32 or tuple(kernel.shape[1:]) != (features.shape[1], 3, 3):
            raise DamagedFile(f"{DECODER_WEIGHT} is {shown(kernel)} instead of C x {features.shape[1]} x 3 x 3 float32")


def _check_values(state: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuses tensors without a number in them; some Gaussians that training spoiled are only counted."""
    for name, tensor in tensors_of(state):
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


def _wanted(shape: tuple[int | None, ...]) -> str:
    return " x ".join(["N", *("K" if length is None else str(length) for length in shape)])
