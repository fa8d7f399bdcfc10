"""What the checks of files cost a lift whose teacher's maps are cached: reading with and without them, in turn.

    python -m benchmarks.checks [--views 96] [--threads 1]

Maps of 384 x 76 x 76 in half precision (4.4 MB) beside photos that are opened, decoded and hashed as a lift does, and a
checkpoint with its optimizers' state, which a lift opens twice. All lies in the page cache. Each line of JSON has the
seconds of the clock and of the processor, the best of the repeats, with the checks and without, and the difference.
"""

import json
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tyro
from PIL import Image

from fit3d_ns.backbones import BackboneSpec
from fit3d_ns.data import feature_cache
from fit3d_ns.data.feature_cache import FeatureCache, image_key
from fit3d_ns.data.photos.picture_files import open_photo
from fit3d_ns.support import torch_files
from fit3d_ns.support.tensor_files import read_tensors, write_tensors

_WIDTHS = (3, 3, 4, 1, 3, 45)
"""Of splatfacto's parameters."""


@dataclass
class Checks:
    """Times the checks."""

    views: int = 96
    """Photos, and maps."""
    width: int = 512
    """Width and height of the photos, pixels."""
    gaussians: int = 500_000
    """Of the checkpoint: splatfacto's 59 numbers each, and two more of the optimizers for each of them."""
    threads: int = 1
    """Of torch."""
    repeats: int = 5
    """Of each measurement; the best counts."""


def main(config: Checks) -> None:
    """Measures maps and checkpoint.

    Args:
        config: The user's choices.
    """
    torch.set_num_threads(config.threads)
    identity: dict[str, Any] = {"name": "noise", "width": 384}
    with TemporaryDirectory() as folder:
        cache = FeatureCache(Path(folder), BackboneSpec("test_vit"), None, identity=identity)
        photos = _write(config, Path(folder), cache)
        checkpoint = Path(folder) / "step-000000001.ckpt"
        values = [torch.randn(config.gaussians, width) for width in _WIDTHS]
        torch.save({"pipeline": values, "optimizers": [torch.randn(2, *value.shape) for value in values]}, checkpoint)
        sources = [lambda path=path: torch.from_numpy(open_photo(path)) for path in photos]

        def fill() -> None:
            fresh = FeatureCache(Path(folder), BackboneSpec("test_vit"), None, identity=identity)
            fresh.fill(sources, _no_teacher, "cpu")

        def header_only(*arguments: Any, **named: Any) -> Any:
            return read_tensors(*arguments, **{**named, "values": False})

        _say(
            f"{config.views} maps and photos, {torch.get_num_threads()} threads of torch",
            fill,
            lambda: patch.object(feature_cache, "read_tensors", header_only),
            config.repeats,
        )

        def read_twice() -> None:
            getattr(torch_files, "_whole", set()).clear()  # as in a new process
            for _ in range(2):
                torch_files.read_torch(checkpoint, mmap=True)

        _say(
            f"checkpoint of {checkpoint.stat().st_size / 1e6:.0f} MB, opened twice",
            read_twice,
            lambda: patch.object(zipfile, "is_zipfile", lambda path: False),
            config.repeats,
        )


def _write(config: Checks, folder: Path, cache: FeatureCache) -> list[Path]:
    rng, photos = np.random.default_rng(0), []
    cache.folder.mkdir(parents=True)
    for number in range(config.views):
        noise = rng.integers(0, 256, (config.width // 8, config.width // 8, 3), dtype=np.uint8)
        photos.append(folder / f"{number}.jpg")
        Image.fromarray(noise).resize((config.width, config.width)).save(photos[-1], quality=92)
        key = image_key(torch.from_numpy(open_photo(photos[-1])))
        map_ = torch.randn(384, 76, 76, generator=torch.Generator().manual_seed(number)).half()
        write_tensors(cache.folder / f"{key}.safetensors", {"patch_tokens": map_}, sync=False)
    return photos


def _no_teacher() -> Any:
    raise AssertionError("all maps are there")


def _say(
    what: str, call: Callable[[], object], without: Callable[[], AbstractContextManager[Any]], repeats: int
) -> None:
    taken: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
    for _ in range(repeats + 1):  # in turn, so that both meet the same neighbours; the first is for warming up
        for name, changed in (("with", nullcontext), ("without", without)):
            with changed():
                start, cpu = time.perf_counter(), time.process_time()
                call()
                taken[name].append((time.perf_counter() - start, time.process_time() - cpu))
    best = {name: [min(column) for column in zip(*rows[1:])] for name, rows in taken.items()}
    line: dict[str, Any] = {"what": what}
    for place, clock in enumerate(("seconds", "cpu_seconds")):
        line[clock] = {name: round(values[place], 4) for name, values in best.items()}
        line[clock]["checks"] = round(best["with"][place] - best["without"][place], 4)
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Checks))
