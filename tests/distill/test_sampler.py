"""Every view once an epoch, in an order that depends on nothing but seed and step."""

import pytest

from distill.sampler import Sampler, SceneViews

SCENES = [
    SceneViews((0, 1, 2, 5), ((3, 4),) * 4, 100),
    SceneViews((0, 1, 3), ((3, 4), (4, 3), (4, 3)), 60),
    SceneViews((2, 4, 6, 7, 9), ((3, 4),) * 5, 80),
]
ALL = sorted((scene, view) for scene, held in enumerate(SCENES) for view in held.views)


def views_of(batches):
    return [(sample.scene, sample.view) for samples in batches for sample in samples]


@pytest.mark.parametrize("block_bytes", [None, 150, 100])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_each_epoch_shows_every_view_once(batch_size, block_bytes):
    sampler = Sampler(SCENES, batch_size, seed=3, block_bytes=block_bytes)
    for epoch in range(3):
        batches = sampler.epoch(epoch)
        assert sorted(views_of(batches)) == ALL
        assert max(len(samples) for samples in batches) <= batch_size


def test_a_batch_has_one_size():
    grids = {(scene, view): grid for scene, held in enumerate(SCENES) for view, grid in zip(held.views, held.grids)}
    for samples in Sampler(SCENES, 4, seed=1).epoch(0):
        assert len({grids[sample.scene, sample.view] for sample in samples}) == 1


def test_epochs_and_seeds_differ_and_repeat():
    first = Sampler(SCENES, 2, seed=1)
    assert first.epoch(0) == Sampler(SCENES, 2, seed=1).epoch(0)
    assert views_of(first.epoch(0)) != views_of(first.epoch(1))
    assert views_of(first.epoch(0)) != views_of(Sampler(SCENES, 2, seed=2).epoch(0))


def test_steps_can_be_entered_anywhere():
    sampler = Sampler(SCENES, 2, seed=5, block_bytes=150)
    whole = list(sampler.batches(0, 40))
    assert [batch.step for batch in whole] == list(range(40))
    for start in (0, 1, 7, 23):
        assert list(sampler.batches(start, 40)) == whole[start:]


def test_blocks_keep_scenes_together_and_name_the_next():
    sampler = Sampler(SCENES, 1, seed=0, block_bytes=100)
    batches = list(sampler.batches(0, sampler.steps_of(1)))
    order = [batch.samples[0].scene for batch in batches]
    changes = sum(before != after for before, after in zip(order, order[1:]))
    assert changes == len(SCENES) - 1  # one scene to a block here
    for batch, following in zip(batches, batches[1:]):
        if batch.samples[0].scene != following.samples[0].scene:
            assert batch.next_block == (following.samples[0].scene,)
    next_epoch = next(iter(sampler.batches(len(batches), len(batches) + 1)))
    assert batches[-1].next_block == (next_epoch.samples[0].scene,)
    assert all(batch.next_block == () for batch in Sampler(SCENES, 1, seed=0).batches(0, 5))


def test_flips_follow_their_share():
    many = [SceneViews(tuple(range(2000)), ((3, 4),) * 2000, 1)]
    for share in (0.0, 0.5, 1.0):
        flips = [sample.flip for samples in Sampler(many, 4, seed=0, flip=share).epoch(0) for sample in samples]
        assert abs(sum(flips) / len(flips) - share) < 0.05


def test_length_in_epochs():
    sampler = Sampler([SceneViews(tuple(range(10)), ((3, 4),) * 10, 1)], 4, seed=0)
    assert sampler.num_views == 10
    assert [sampler.steps_of(epochs) for epochs in (1, 2, 0.34, 0.01)] == [3, 6, 1, 1]
