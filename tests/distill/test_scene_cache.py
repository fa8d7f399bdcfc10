"""The same scenes come out wherever they wait, and the budget holds."""

import pytest
import torch

from distill import scenes as scenes_module
from distill.scenes import SceneCache, open_scenes
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import World

CPU = torch.device("cpu")


@pytest.fixture
def scenes(make_scene):
    return open_scenes([make_scene(name, views=4, seed=seed) for seed, name in enumerate("abcde")], None)


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_every_placement_gives_the_scenes(scenes, placement):
    gigabytes = 10.0 if placement == "device" else 2.5 * scenes[0].bundle.num_bytes() / 1e9
    scene_cache = SceneCache(scenes, World(0, 1, CPU), placement, gigabytes)
    scene_cache.prefetch([3, 1])
    for index in (1, 3, 0, 4, 2, 1):
        stored = scenes[index].bundle.read_scene()
        for name, tensor in scene_cache.get(index).tensors().items():
            assert torch.equal(tensor, stored.tensors()[name])
    scene_cache.close()


def test_the_budget_holds(scenes):
    size = scenes[0].bundle.num_bytes()
    scene_cache = SceneCache(scenes, World(0, 1, CPU), "disk", 2.5 * size / 1e9)
    assert scene_cache.block_bytes is not None and scene_cache.block_bytes >= size
    for index in (0, 1, 2, 3, 4, 0):
        scene_cache.prefetch([(index + 1) % 5])
        scene_cache.get(index)
        assert len(scene_cache._resident) + len(scene_cache._uploads) <= 2
    scene_cache.close()


def test_uploads_that_nobody_fetches_do_not_pile_up(scenes):
    scene_cache = SceneCache(scenes, World(0, 1, CPU), "disk", 2.5 * scenes[0].bundle.num_bytes() / 1e9)
    for index in (0, 1, 2, 3, 4, 0, 1):
        scene_cache.prefetch([index])
        assert index in scene_cache._uploads
        scene_cache._uploads[index].result()
        assert len(scene_cache._resident) + len(scene_cache._uploads) <= 2
    scene_cache.prefetch([2, 3], in_use=[0, 1])
    assert {*scene_cache._resident, *scene_cache._uploads} == {0, 1}  # no room beside those in use
    scene_cache.close()


def test_placement_is_chosen_by_size_and_printed(scenes):
    roomy = SceneCache(scenes, World(0, 1, CPU), "auto", 1.0)
    assert (roomy.placement, roomy.block_bytes) == ("device", None)
    assert "5, 0.00 GB, all resident" in roomy.describe()
    tight = SceneCache(scenes, World(0, 1, CPU), "auto", 3 * scenes[0].bundle.num_bytes() / 1e9)
    assert tight.placement == "disk"
    assert "memory-mapped" in tight.describe() and "--scene-memory" in tight.describe()
    for scene_cache in (roomy, tight):
        scene_cache.close()


def test_what_cannot_fit_is_said(scenes, monkeypatch):
    with pytest.raises(UserError, match="--scene-placement device.*raise --scene-memory"):
        SceneCache(scenes, World(0, 1, CPU), "device", 1e-6)
    with pytest.raises(UserError, match="One scene takes.*raise --scene-memory"):
        SceneCache(scenes, World(0, 1, CPU), "disk", 1e-6)
    monkeypatch.setattr(scenes_module, "_host_bytes", scenes[0].bundle.num_bytes)
    with pytest.raises(UserError, match="--scene-placement host: .*use --scene-placement disk"):
        SceneCache(scenes, World(0, 1, CPU), "host", 1.0)


def test_page_locked_memory_is_counted_in_powers_of_two(scenes):
    tensors = scenes[0].bundle.read_scene().tensors()
    assert tensors["means"].nbytes == 3600 and tensors["quats"].nbytes == 4800  # 4096 and 8192
    found = scenes_module._pinned_bytes(scenes[0])
    assert found == 4096 + 8192 + 4096 + 2048 + 8192 + 32768


def test_memory_of_a_container_is_not_that_of_its_machine(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(scenes_module, "_MEMORY_LIMITS", (tmp_path / "absent", limit))
    limit.write_text("max\n")
    machine = scenes_module._host_bytes()
    limit.write_text(f"{machine // 4}\n")
    assert scenes_module._host_bytes() == machine // 4
