"""Functions compiled into few kernels where that pays."""

import os
import warnings
from functools import lru_cache
from typing import Any, Callable, TypeVar, cast

import torch
from torch import Tensor

from fit3d_ns.errors import first_line

Function = TypeVar("Function", bound=Callable)

_KEEP_NOTHING: dict[str, Any] = {"realize_reads_threshold": 1000, "realize_opcount_threshold": 1000}
"""Recompute what has been read or computed cheaply, instead of storing it between kernels."""


@lru_cache(maxsize=8)
def can_fuse(device: torch.device) -> bool:
    """Returns whether torch.compile makes kernels for a device: on CUDA, if it manages to.

    It needs triton, a C compiler with Python's headers, and a GPU that triton knows. Where one is missing, a warning
    says so.
    """
    if device.type != "cuda" or os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return False
    try:
        torch.compile(_double)(torch.ones(2, device=device))
    except Exception as error:  # each missing part has its own
        reason = first_line(error)
        warnings.warn(f"torch.compile does not work here ({reason}): losses take more time and memory.", stacklevel=2)
        return False
    return True


def _double(values: Tensor) -> Tensor:
    return 2 * values


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
