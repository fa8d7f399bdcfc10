"""Loops of a few steps on tiny scenes."""

from pathlib import Path

import pytest
from tiny_scenes import VIEWS, make_scene

from fit3d_loop.config import LoopConfig


@pytest.fixture(scope="session")
def loop_config(teacher_weights):
    """Choices for a short loop on the CPU; keyword arguments set fields."""

    def make(scenes: Path, output_dir: Path, **fields) -> LoopConfig:
        flags = "--pipeline.model.feature-dim 8 --pipeline.model.num-downscales 0 --steps-per-save 4"
        values = {
            "backbone": "test_vit",
            "backbone_weights": teacher_weights,
            "rounds": 1,
            "geometry_steps": 10,
            "geometry_flags": flags,
            "lift_flags": "--feature-dim 8 --no-evaluate",
            "distill_flags": "--steps 6 --save-every 2",
            "engine": "processes",
            "threads": 1,
        }
        return LoopConfig(scenes=scenes, output_dir=output_dir, **{**values, **fields})

    return make


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """No test writes to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIT3D_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory, own_cache) -> Path:
    """Two good scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    make_scene(folder / "a")
    make_scene(folder / "b", VIEWS)
    return folder


@pytest.fixture(scope="module")
def finished(scenes, loop_config, tmp_path_factory) -> Path:
    """A loop that was never disturbed."""
    from fit3d_loop.loop import run_loop

    folder = tmp_path_factory.mktemp("finished") / "out"
    run_loop(loop_config(scenes, folder))
    return folder
