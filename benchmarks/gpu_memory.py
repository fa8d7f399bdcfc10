"""Most memory that is in use on GPUs meanwhile, as ``nvidia-smi`` says, so that the one who asks uses none."""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SECONDS = 0.5


@contextmanager
def peak_gpu_memory() -> Iterator[list[float]]:
    """Looks twice a second at all that comes into use on the GPUs that this process may use.

    Yields:
        A list with one number, the gigabytes (10^9 bytes) found so far; 0 without a GPU.
    """
    program, peak, over = shutil.which("nvidia-smi"), [0.0], threading.Event()
    if program is None:
        yield peak
        return
    before = _used(program)

    def look() -> None:
        while not over.wait(_SECONDS):
            peak[0] = max(peak[0], _used(program) - before)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield peak
    finally:
        over.set()
        looking.join()


def _used(program: str) -> float:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = ["-i", visible] if visible else []
    command = [program, *chosen, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return sum(map(float, rows)) * 2**20 / 1e9
