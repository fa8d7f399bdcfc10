"""Functions compiled into few kernels where that pays."""

import os
import shutil
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Callable, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable)

_KEEP_NOTHING: dict[str, Any] = {"realize_reads_threshold": 1000, "realize_opcount_threshold": 1000}
"""Recompute what has been read or computed cheaply, instead of storing it between kernels."""


@lru_cache(maxsize=8)
def can_fuse(device: torch.device) -> bool:
    """Returns whether torch.compile makes kernels for a device: on CUDA, with triton and the C compiler it calls."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return device.type == "cuda" and find_spec("triton") is not None and compiler is not None


@lru_cache(maxsize=32)
def fused(function: Function, device: torch.device) -> Function:
    """Returns a function's compiled version where there can be one, else the function itself.

    Args:
        function: Of tensors on the device and of plain values. It is compiled anew for each shape of its arguments (a
            few seconds), hence only meant for training, where shapes stay.
        device: Where its tensors are.
    """
    if not can_fuse(device):
        return function
    return cast(Function, torch.compile(function, dynamic=False, options=_KEEP_NOTHING))
