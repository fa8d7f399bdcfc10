"""What this machine has, and how many scenes it can work on at once."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from fit3d_loop.scenes.scene_list import SceneSource, count_photos, scenes_in_words
from fit3d_ns.support.errors import UserError

_MOST_AT_ONCE = 16
"""Scenes on one GPU; more were not measured."""
_CORES_A_SCENE = 1
"""Beside a GPU, where Python's one thread is what bounds a scene."""
_GPU_BASE, _GPU_A_MEGAPIXEL, _GPU_A_PHOTO_MEGAPIXEL = 2.5, 0.6, 0.004
"""Gigabytes: CUDA and a million Gaussians with their optimizers; a render and its gradients; a photo as bytes and
its features."""
_USABLE = 0.9
"""Share of a GPU's free memory."""
_MOST_CPU_THREADS = 8
_DEFAULT_MEGAPIXELS = 1.0
_SAMPLED_SCENES = 32


@dataclass(frozen=True)
class PhotoCounts:
    """How many photos the scenes have, about, and how large they are."""

    counts: tuple[int, ...]
    """For each scene; 0 where it is not known before it is opened."""
    megapixels: float
    """Of the largest photo that was looked at."""

    @property
    def total(self) -> int:
        """All photos, where scenes that are not known have as many as the others have on average."""
        known = [count for count in self.counts if count]
        mean = sum(known) / len(known) if known else 100
        return round(sum(count or mean for count in self.counts))


@dataclass(frozen=True)
class Packing:
    """How scenes share the machine."""

    at_once: int
    """Scenes at a time on this machine, on all its GPUs together."""
    threads: int
    """Processor threads of each."""
    cores: int
    """Of the machine."""
    gpus: int
    """Of the machine."""
    sentence: str
    """The choice and its reason."""

    @property
    def gpu_share(self) -> float:
        """Share of a GPU that a scene takes; 0 without one."""
        return min(1.0, self.gpus / self.at_once) if self.gpus else 0.0


def look_at_photos(scenes: Sequence[SceneSource]) -> PhotoCounts:
    """Counts the photos of all scenes and looks at the size of some.

    Args:
        scenes: Of `read_scenes`.

    Returns:
        Counts, and the size of the largest photo that was looked at.
    """
    counts, megapixels = [], []
    for scene in scenes:
        count, example = count_photos(scene)
        counts.append(count)
        if example is not None and len(megapixels) < _SAMPLED_SCENES:
            try:
                with Image.open(example) as photo:
                    megapixels.append(photo.width * photo.height / 1e6)
            except (OSError, ValueError):
                continue  # said when the scene is opened
    return PhotoCounts(tuple(counts), max(megapixels, default=_DEFAULT_MEGAPIXELS))


def num_cores() -> int:
    """Returns the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(num_scenes: int, cuda: bool) -> int:
    """Returns processor threads for each scene.

    Args:
        num_scenes: Scenes that are worked on at once.
        cuda: Whether there is a GPU.
    """
    if cuda:
        return _CORES_A_SCENE
    return max(1, min(num_cores() // max(num_scenes, 1), _MOST_CPU_THREADS))


def choose_packing(photos: PhotoCounts, threads: int, at_once: int | None) -> Packing:
    """Chooses how many scenes are worked on at once.

    Args:
        photos: Of the scenes.
        threads: Processor threads of each scene.
        at_once: The user's choice, if any.

    Returns:
        The choice and its reason.

    Raises:
        UserError: If there is a GPU and it cannot be used.
    """
    cores, gpus = num_cores(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    by_cores = max(1, cores // threads)
    if not gpus:
        chosen = at_once or by_cores
        why = "--scenes-at-once" if at_once else f"{cores} cores, {threads} threads each (--threads)"
        return Packing(chosen, threads, cores, 0, f"{scenes_in_words(chosen)} at once on the CPU: {why}.")
    largest = max(photos.counts, default=0) or 100
    needed = _GPU_BASE + photos.megapixels * (_GPU_A_MEGAPIXEL + largest * _GPU_A_PHOTO_MEGAPIXEL)
    memory = min(_free_gpu_memory()) / 1e9
    by_memory = max(1, int(_USABLE * memory / needed))
    each = max(1, min(by_memory, _MOST_AT_ONCE, max(1, by_cores // gpus)))
    chosen = at_once or each * gpus
    why = (
        f"a GPU has {memory:.0f} GB free and a scene takes about {needed:.1f} ({by_memory} fit), {cores} cores at "
        f"{threads} a scene"
    )
    why = "--scenes-at-once" if at_once else why
    on = "the GPU" if gpus == 1 else f"{gpus} GPUs"
    return Packing(chosen, threads, cores, gpus, f"{scenes_in_words(chosen)} at once on {on}: {why}.")


@functools.cache
def _free_gpu_memory() -> tuple[int, ...]:
    """Bytes that are free on each GPU, as a short process finds them, since one that asks holds some of it."""
    ask = "import torch; print(*(torch.cuda.mem_get_info(gpu)[0] for gpu in range(torch.cuda.device_count())))"
    answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise UserError(f"The GPU does not answer ({answer.stderr.strip().rpartition(chr(10))[2]}): see nvidia-smi.")
    return tuple(map(int, answer.stdout.split()))


def free_disk(folder: Path) -> float:
    """Returns the gigabytes that are free where a folder is, or will be.

    Args:
        folder: It need not exist.
    """
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9
