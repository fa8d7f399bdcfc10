"""How the training step is run: as it is written, as a CUDA graph, or with fused kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fit3d_ns.support.errors import UserError

Acceleration = Literal["none", "graph", "compile"]
_SAVED = 9e-11
"""Seconds that fused kernels save for each number of a block's output in a view: .83 ms of 9.5 million in a ViT-S/14 of
12 blocks at 518x784, .42 of 4.5 million in one of 9 blocks at 504x504, on an H200 (docs/benchmarks.md)."""
_START = 2.5
"""Seconds that compiling takes for each block of the student and size of photo: 30 for 12, the longest seen."""
_MOST_SIZES = 8
"""torch compiles a function for no more different shapes."""


@dataclass(frozen=True)
class Work:
    """What a training has to do."""

    views: int
    """Views of all steps together."""
    grids: Sequence[tuple[int, int]]
    """Patch grid (h, w) of every view of an epoch."""
    width: int
    """Channels of the student."""
    depth: int
    """Its blocks."""


def choose_acceleration(
    asked: Literal["auto", "none", "compile", "graph"],
    cuda: bool,
    processes: int,
    work: Work,
    compiles: Callable[[], bool],
) -> tuple[Acceleration, str]:
    """Chooses how the step is run.

    Args:
        asked: ``--acceleration``.
        cuda: Whether it runs on a GPU.
        processes: That share it.
        work: Of the whole training, so that a resumed one goes on as it began.
        compiles: Whether torch.compile works here; only asked where it would be used.

    Returns:
        The choice, and a sentence with its reason.

    Raises:
        UserError: If what was asked for cannot be had.
    """
    graphs = cuda and processes == 1
    if asked == "graph" and not graphs:
        raise UserError("--acceleration graph needs CUDA and a single process: use compile or none.")
    if asked != "auto":
        return asked, f"The step is run with --acceleration {asked}."
    otherwise: Acceleration = "graph" if graphs else "none"
    if not cuda:
        return otherwise, "The step is run as it is written: on a CPU compiling it does not pay."
    if processes > 1:
        return otherwise, "The step is run as it is written: what compiling saves several processes was not measured."
    sizes = len(set(work.grids))
    if sizes > _MOST_SIZES:
        return otherwise, f"The step is a CUDA graph: photos of {sizes} sizes are too many to compile it for each."
    tokens = sum(height * width for height, width in work.grids) / len(work.grids)
    saved, start = work.views * tokens * work.width * work.depth * _SAVED, sizes * work.depth * _START
    costs = f"compiling it would save {saved:.0f} s of {work.views:,} views and take {start:.0f}"
    if saved <= start:
        return otherwise, f"The step is a CUDA graph: {costs}."
    if not compiles():
        return otherwise, f"The step is a CUDA graph: {costs}, but torch.compile does not work here."
    return "compile", f"The step is compiled, in a CUDA graph: that saves about {saved:.0f} s and takes {start:.0f}."
