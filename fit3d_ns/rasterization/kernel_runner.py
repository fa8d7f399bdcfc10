"""Compiles the kernels once per dtype, and runs them over independent parts on several threads.

Threads are plain Python threads over kernels that release the GIL, not one of Numba's threading layers: `workqueue`
aborts the process when two Python threads render at once (nerfstudio's viewer renders while training does), `tbb` is
an extra package, and OpenMP's waiting threads spin against torch's. Plain threads have none of these problems, take
the next part as soon as they are free, and need no parallel compilation.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import filelock
import numba
import torch
from numba import types

from fit3d_ns.rasterization import kernels
from fit3d_ns.support.threads import kernel_threads

_compile_lock = threading.Lock()


def run_parts(kernel: Callable, num_parts: int, *arguments) -> None:
    """Calls ``kernel(part, *arguments)`` for every part, on the threads of `threads.kernel_threads`.

    The parts must write disjoint memory; which thread takes which part is then without effect on the result.

    Args:
        kernel: A compiled kernel that releases the GIL.
        num_parts: The parts are 0 to this number minus one.
        *arguments: What follows the part in the kernel's signature.
    """
    parts = iter(range(num_parts))  # next() of a range iterator is atomic under the GIL

    def work() -> None:
        for part in parts:
            kernel(part, *arguments)

    num_helpers = min(kernel_threads(), num_parts) - 1
    if num_helpers <= 0:
        work()
        return
    with ThreadPoolExecutor(num_helpers) as pool:
        helpers = [pool.submit(work) for _ in range(num_helpers)]
        work()
        for helper in helpers:
            helper.result()


@functools.cache
def compile_kernels(dtype: torch.dtype) -> None:
    """Compiles all kernels for one dtype, or loads them from Numba's disk cache.

    Compiling happens here, under a lock between processes, and nowhere else: Numba writes the index of its cache
    before the code that the index names, so a second process could load what is not there yet.

    Args:
        dtype: torch.float32 or torch.float64.
    """
    with _compile_lock, _lock_between_processes():
        for kernel, signature in _signatures(numba.float32 if dtype == torch.float32 else numba.float64):
            try:
                kernel.compile(signature)
            except OSError:  # raised when saving to the cache (a full disk), after the kernel is ready
                kernel.compile(signature)


def _signatures(real: types.Type) -> list[tuple[Any, tuple[types.Type, ...]]]:
    def array(element, dimensions):
        return types.Array(element, dimensions, "C")

    i64, i64s, i32s, i32_table = types.int64, array(types.int64, 1), array(types.int32, 1), array(types.int32, 2)
    vector, table, image = array(real, 1), array(real, 2), array(real, 3)
    lists = (i64s, i32s, i64s)  # tile_starts, entries, order
    last_entry = array(types.int64, 2)
    return [
        (kernels.pack_gaussians, (i64s, table, table, vector, table)),
        (kernels.tile_bounds, (i64s, table, i32s, i64, i64, i64, i32_table, i64s, i64s)),
        (kernels.fill_tiles, (i32_table, i64, i64s, i32s)),
        (kernels.blend_band, (i64, i64, i64, *lists, table, table, image, table, last_entry)),
        (
            kernels.blend_band_backward,
            (i64, i64, i64, *lists, i32_table, i64s, table, table, table, last_entry, image, table, table, table),
        ),
        (kernels.gather_slots, (i64, i64, i64s, i64s, table, table)),
    ]


@contextlib.contextmanager
def _lock_between_processes() -> Iterator[None]:
    folder = kernels.blend_band.stats.cache_path
    if folder is None:  # compiled without a cache: nothing is shared
        yield
        return
    with contextlib.ExitStack() as stack:
        # A folder that can be read but not locked is no reason to stop.
        with contextlib.suppress(OSError, NotImplementedError):
            os.makedirs(folder, exist_ok=True)
            stack.enter_context(filelock.FileLock(os.path.join(folder, "fit3d_ns_rasterization.lock")))
        yield
