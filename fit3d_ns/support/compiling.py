"""Whether torch.compile works on this machine."""

import os
import warnings
from functools import lru_cache

import torch
from torch import Tensor

from fit3d_ns.support.errors import first_line


@lru_cache(maxsize=8)
def can_compile(device: torch.device) -> bool:
    """Returns whether torch.compile makes kernels for a device: on CUDA, if it manages to.

    It needs triton, a C compiler with Python's headers, and a GPU that triton knows. Where one is missing, a warning
    says so.

    Args:
        device: On which would be computed.
    """
    if device.type != "cuda" or os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return False
    try:
        torch.compile(_double)(torch.ones(2, device=device))
    except Exception as error:  # each missing part has its own
        reason = first_line(error)
        warnings.warn(f"torch.compile does not work here ({reason}): training takes more time.", stacklevel=2)
        return False
    return True


def _double(values: Tensor) -> Tensor:
    return 2 * values
