"""How much memory a lift may take beside the Gaussians, and the teacher's maps that stay within it."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

GIBIBYTE = 2**30
_RENDERING = {"cuda": 8 * GIBIBYTE, "cpu": 2 * GIBIBYTE}
_MAPS = {"cuda": 2 * GIBIBYTE, "cpu": 0}
"""On the CPU maps are memory-mapped: the operating system keeps what fits, and gives it back when it is needed."""


def rendering_budget(device: torch.device) -> int:
    """Returns the bytes that one call's renders, their gradients and copies of the values may take.

    At most 8 GiB and half of what is free on CUDA; 2 GiB on the CPU, where many views at once gain nothing.

    Args:
        device: On which is rendered.
    """
    return _share(device, _RENDERING, 2)


def maps_budget(device: torch.device) -> int:
    """Returns the bytes of teacher maps that stay on a device: at most 2 GiB and a quarter of what is free on CUDA.

    Args:
        device: On which maps are used.
    """
    return _share(device, _MAPS, 4)


def _share(device: torch.device, limits: dict[str, int], parts: int) -> int:
    if device.type != "cuda":
        return limits[device.type]
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(limits["cuda"], (torch.cuda.mem_get_info(device)[0] + cached) // parts)


class ResidentMaps:
    """Teacher maps on a device: read once as far as a budget goes, whenever they are asked for beyond it.

    Every pass of a lift reads every map, so a scene within the budget is read from disk once.

    Args:
        read: Returns the map of a key, on any device.
        device: Where maps are wanted.
        budget: Bytes that may stay there; ``maps_budget`` if None.
    """

    def __init__(
        self, read: Callable[[str], Float[Tensor, "C h w"]], device: torch.device, budget: int | None = None
    ) -> None:
        self._read = read
        self._device = device
        self._left = maps_budget(device) if budget is None else budget
        self._maps: dict[str, Tensor] = {}

    def load(self, key: str) -> Float[Tensor, "C h w"]:
        """Returns the map of a key, in the precision in which it is stored.

        Args:
            key: Of `fit3d_ns.data.feature_cache.image_key`.
        """
        if key in self._maps:
            return self._maps[key]
        teacher = self._read(key).to(self._device)
        if teacher.nbytes <= self._left:
            self._maps[key] = teacher
            self._left -= teacher.nbytes
        return teacher
