"""The same scenes come out wherever they wait, and the budget holds."""

import pytest
import torch

from distill import scenes as scene_bank
from distill.scenes import SceneBank, open_scenes
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import World

CPU = torch.device("cpu")


@pytest.fixture
def scenes(make_scene):
    return open_scenes([make_scene(name, views=4, seed=seed) for seed, name in enumerate("abcde")], None)


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
def test_every_placement_gives_the_scenes(scenes, placement):
    gigabytes = 10.0 if placement == "device" else 2.5 * scenes[0].bundle.num_bytes() / 1e9
    bank = SceneBank(scenes, World(0, 1, CPU), placement, gigabytes)
    bank.prefetch([3, 1])
    for index in (1, 3, 0, 4, 2, 1):
        stored = scenes[index].bundle.read_scene()
        for name, tensor in bank.get(index).tensors().items():
            assert torch.equal(tensor, stored.tensors()[name])
    bank.close()


def test_the_budget_holds(scenes):
    size = scenes[0].bundle.num_bytes()
    bank = SceneBank(scenes, World(0, 1, CPU), "disk", 2.5 * size / 1e9)
    assert bank.block_bytes is not None and bank.block_bytes >= size
    for index in (0, 1, 2, 3, 4, 0):
        bank.prefetch([(index + 1) % 5])
        bank.get(index)
        assert len(bank._resident) + len(bank._uploads) <= 2
    bank.close()


def test_uploads_that_nobody_fetches_do_not_pile_up(scenes):
    bank = SceneBank(scenes, World(0, 1, CPU), "disk", 2.5 * scenes[0].bundle.num_bytes() / 1e9)
    for index in (0, 1, 2, 3, 4, 0, 1):
        bank.prefetch([index])
        assert index in bank._uploads
        bank._uploads[index].result()
        assert len(bank._resident) + len(bank._uploads) <= 2
    bank.prefetch([2, 3], in_use=[0, 1])
    assert {*bank._resident, *bank._uploads} == {0, 1}  # no room beside those in use
    bank.close()


def test_placement_is_chosen_by_size_and_printed(scenes):
    roomy = SceneBank(scenes, World(0, 1, CPU), "auto", 1.0)
    assert (roomy.placement, roomy.block_bytes) == ("device", None)
    assert "5, 0.00 GB, all resident" in roomy.describe()
    tight = SceneBank(scenes, World(0, 1, CPU), "auto", 3 * scenes[0].bundle.num_bytes() / 1e9)
    assert tight.placement == "disk"
    assert "memory-mapped" in tight.describe() and "--scene-memory" in tight.describe()
    for bank in (roomy, tight):
        bank.close()


def test_what_cannot_fit_is_said(scenes, monkeypatch):
    with pytest.raises(UserError, match="--scene-placement device.*raise --scene-memory"):
        SceneBank(scenes, World(0, 1, CPU), "device", 1e-6)
    with pytest.raises(UserError, match="One scene takes.*raise --scene-memory"):
        SceneBank(scenes, World(0, 1, CPU), "disk", 1e-6)
    monkeypatch.setattr(scene_bank, "_host_bytes", scenes[0].bundle.num_bytes)
    with pytest.raises(UserError, match="--scene-placement host: .*use --scene-placement disk"):
        SceneBank(scenes, World(0, 1, CPU), "host", 1.0)


def test_page_locked_memory_is_counted_in_powers_of_two(scenes):
    tensors = scenes[0].bundle.read_scene().tensors()
    assert tensors["means"].nbytes == 3600 and tensors["quats"].nbytes == 4800  # 4096 and 8192
    found = scene_bank._pinned_bytes(scenes[0])
    assert found == 4096 + 8192 + 4096 + 2048 + 8192 + 32768


def test_memory_of_a_container_is_not_that_of_its_machine(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(scene_bank, "_MEMORY_LIMITS", (tmp_path / "absent", limit))
    limit.write_text("max\n")
    machine = scene_bank._host_bytes()
    limit.write_text(f"{machine // 4}\n")
    assert scene_bank._host_bytes() == machine // 4
