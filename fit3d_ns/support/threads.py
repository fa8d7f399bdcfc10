"""How the CPU's threads are used where other programs, or other scenes, share its cores.

A thread of OpenMP that has nothing to do spins, and takes the core from the one that it waits for. Where two programs
share two cores, a training step on small photos takes eight times as long with two threads as with one.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

SMALL_PIXELS = 100_000
"""Photos below this many pixels are small: what torch does with them and their Gaussians gains nothing by threads."""
_CHOSEN_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_kernel_threads: int | None = None


def wait_without_spinning() -> None:
    """Lets threads of OpenMP sleep while they wait, unless the user has said how; for a command, before it uses torch.

    Too late once torch is imported, which reads this when it is loaded; without effect then.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


@contextlib.contextmanager
def one_thread_for_small(num_pixels: int) -> Iterator[None]:
    """Runs torch's own operations on one thread where photos are small, in nerfstudio's commands on a CPU.

    Those have imported torch before they ask a plugin, so that its threads spin while they wait. The kernels keep as
    many threads as before: they are plain ones, which do not spin, and their results do not depend on the number.
    The choice follows from the photos alone, so that a run that goes on makes it again.

    Whoever sets threads in the environment is obeyed, and so is ``torch.set_num_threads``, which only a program can
    have called that is none of nerfstudio's commands.

    Args:
        num_pixels: Of a photo.
    """
    import torch

    global _kernel_threads  # noqa: PLW0603
    command = Path(sys.argv[0]).name.startswith("ns-")
    if not command or num_pixels >= SMALL_PIXELS or any(name in os.environ for name in _CHOSEN_BY_USER):
        yield
        return
    threads = torch.get_num_threads()
    _kernel_threads = threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _kernel_threads = None
        torch.set_num_threads(threads)


def kernel_threads() -> int:
    """Returns on how many threads the kernels run: as many as torch uses, or used before it was given one."""
    import torch

    return _kernel_threads or torch.get_num_threads()
