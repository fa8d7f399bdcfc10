"""Targets are what the scene shows, decoded by the run's own rule; the control has no 3D in it."""

import pytest
import torch
import torch.nn.functional as F

from distill.control_targets import ControlTargets, low_dimensional_basis
from distill.photo_store import PhotoStore
from distill.prefetcher import Prefetcher
from distill.sampler import Sampler
from distill.scenes import SceneCache, open_scenes
from distill.student import load_teacher
from distill.targets import LiftedTargets, accumulation_weights
from fit3d_ns.features.decoder import FeatureDecoder, decode_patches
from fit3d_ns.rasterization import rasterize
from fit3d_ns.support.processes import World

CPU = torch.device("cpu")


def lifted(scenes, accumulation="ignore", min_accumulation=0.5):
    return LiftedTargets(scenes, SceneCache(scenes, World(0, 1, CPU)), CPU, accumulation, min_accumulation)


def single_render(scene, view):
    """Decoded map and opacity of one view, written out plainly."""
    info, tensors = scene.info, scene.bundle.read_scene()
    photo, grid = info.views[view].photo, info.patch_grid(view)
    height, width = info.feature_grid.render_size((photo.height, photo.width), grid)
    intrinsics = scene.cameras.Ks[view].clone()
    intrinsics[0] *= width / photo.width
    intrinsics[1] *= height / photo.height
    low, alpha, _ = rasterize(
        tensors.geometry.means,
        tensors.geometry.quats,
        tensors.geometry.scales,
        tensors.geometry.opacities,
        tensors.features.float(),
        scene.cameras.viewmats[view][None],
        intrinsics[None],
        width,
        height,
        tile_size=info.feature_grid.tile_size,
        rasterize_mode=info.feature_grid.rasterize_mode,
    )
    decoder = FeatureDecoder(8, 64)
    decoder.weight.data = tensors.decoder
    decoded = decode_patches(low[0].permute(2, 0, 1), decoder.weight, info.feature_grid, grid).detach()
    return decoded, F.adaptive_avg_pool2d(alpha[..., 0], grid)[0]


@pytest.mark.parametrize("grid", ["fast", "paper"])
def test_lifted_targets_are_the_runs_own_features(make_scene, grid):
    scenes = open_scenes([make_scene(grid=grid, size=(50, 70))], None)
    made = lifted(scenes).make(0, [0, 3, 2])
    for row, view in enumerate([0, 3, 2]):
        decoded, _ = single_render(scenes[0], view)
        torch.testing.assert_close(made.maps[row], decoded, rtol=1e-4, atol=1e-4)
    assert bool((made.weights == 1).all())


def test_patches_without_a_surface_count_less(make_scene):
    scenes = open_scenes([make_scene(gaussians=20)], None)
    _, opacity = single_render(scenes[0], 1)
    assert 0 < float(opacity.min()) < 0.1 < float(opacity.max()) < 1  # the scene is a cloud with holes
    torch.testing.assert_close(lifted(scenes, "weight").make(0, [1]).weights[0], opacity)
    dropped = lifted(scenes, "drop", 0.1).make(0, [1]).weights[0]
    assert torch.equal(dropped, (opacity >= 0.1).float())
    assert torch.equal(accumulation_weights(opacity, "ignore", 0.1), torch.ones_like(opacity))


def test_masks_leave_patches_out(make_scene):
    scenes = open_scenes([make_scene(masked=(1,))], None)
    weights = lifted(scenes).make(0, [0, 1]).weights
    assert bool((weights[0] == 1).all())
    assert torch.equal(weights[1], scenes[0].patch_weights[1])
    assert 0 < float(weights[1].sum()) < weights[1].numel()


def test_control_is_the_teacher_seen_through_the_basis(make_scene):
    scenes = open_scenes([make_scene(masked=(1,))], None)
    photos = PhotoStore(scenes, 16, CPU)
    photos.fill(show=False)
    teacher = load_teacher(scenes, CPU)
    scene_cache = SceneCache(scenes, World(0, 1, CPU))
    made = ControlTargets("control", scenes, scene_cache, photos, teacher, lifted(scenes), CPU).make(0, [0, 1])
    with torch.no_grad():
        own = teacher(photos.get([(0, 0), (0, 1)]).float() / 255).patch_tokens
    basis = low_dimensional_basis(scenes[0].bundle.read_scene().decoder)
    assert basis.shape == (64, 8)
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-5, rtol=0)
    kept = torch.einsum("cr,bchw->brhw", basis, made.maps)
    torch.testing.assert_close(kept, torch.einsum("cr,bchw->brhw", basis, own), atol=1e-4, rtol=1e-4)
    assert float((made.maps - own).norm() / own.norm()) > 0.1  # eight of 64 directions lose something
    torch.testing.assert_close(torch.einsum("cr,brhw->bchw", basis, kept), made.maps, atol=1e-4, rtol=1e-4)
    assert torch.equal(made.weights[1], scenes[0].patch_weights[1])


def test_photo_and_target_are_mirrored_together(make_scene, make_config):
    scenes = open_scenes([make_scene(masked=(1,))], None)
    scene_cache, photos = SceneCache(scenes, World(0, 1, CPU)), PhotoStore(scenes, 16, CPU)
    photos.fill(show=False)
    source = LiftedTargets(scenes, scene_cache, CPU, "ignore", 0.5)
    config = make_config(batch_size=4)
    seen = {}
    for flip in (0.0, 1.0):
        sampler = Sampler([scene.sampled_views() for scene in scenes], 4, seed=0, flip=flip)
        prefetcher = Prefetcher(scenes, sampler, source, scene_cache, photos, config, World(0, 1, CPU))
        (_, inputs), *_ = prefetcher.steps(0, 1)
        seen[flip] = inputs
    for name in ("images", "targets", "weights"):
        plain, mirrored = getattr(seen[0.0], name), getattr(seen[1.0], name)
        assert torch.equal(plain.flip(-1), mirrored)
        assert not torch.equal(plain, mirrored)


@pytest.mark.parametrize("kept_bytes", [0, 10**9])
def test_two_shares_are_one_batch(make_scene, make_config, kept_bytes, monkeypatch):
    folders = [make_scene("a"), make_scene("b", views=5, seed=1)]
    scenes = open_scenes(folders, None)
    scene_cache, photos = SceneCache(scenes, World(0, 1, CPU)), PhotoStore(scenes, 16, CPU)
    photos.fill(show=False)
    source = LiftedTargets(scenes, scene_cache, CPU, "weight", 0.5)
    config = make_config(batch_size=4)
    sampler = Sampler([scene.sampled_views() for scene in scenes], 4, seed=0)
    monkeypatch.setattr("distill.prefetcher.sum_over_processes", lambda values: values)

    def steps(rank, size, start=0):
        prefetcher = Prefetcher(
            scenes, sampler, source, scene_cache, photos, config, World(rank, size, CPU), kept_bytes
        )
        return [inputs for _, inputs in prefetcher.steps(start, 5)]

    whole, shares = steps(0, 1), (steps(0, 2), steps(1, 2))
    for step, inputs in enumerate(whole):
        for rank, part in enumerate(share[step] for share in shares):
            assert len(part.images) == 2
            for name in ("targets", "weights"):
                torch.testing.assert_close(getattr(part, name), getattr(inputs, name)[rank::2], atol=1e-3, rtol=1e-3)
            shown = part.weights.flatten(1).any(1)
            assert torch.equal(part.images[shown], inputs.images[rank::2][shown])
    assert any(bool((inputs.weights == 0).all((1, 2)).any()) for inputs in whole)  # a batch that is not full
    entered = steps(0, 1, start=2)
    for inputs, same in zip(entered, whole[2:]):
        assert all(torch.equal(getattr(inputs, name), getattr(same, name)) for name in vars(inputs))


@pytest.mark.parametrize("control, kept_bytes", [(True, 0), (False, 10**9), (False, 0)])
def test_scenes_are_fetched_only_while_targets_need_them(make_scene, make_config, monkeypatch, control, kept_bytes):
    scenes = open_scenes([make_scene(name, views=3, held_out=1, seed=seed) for seed, name in enumerate("abcde")], None)
    scene_cache = SceneCache(scenes, World(0, 1, CPU), "disk", 2.5 * scenes[0].bundle.num_bytes() / 1e9)
    photos = PhotoStore(scenes, 16, CPU)
    photos.fill(show=False)
    source = LiftedTargets(scenes, scene_cache, CPU, "weight", 0.5)
    if control:
        source = ControlTargets("control", scenes, scene_cache, photos, load_teacher(scenes, CPU), source, CPU)
    sampler = Sampler([scene.sampled_views() for scene in scenes], 2, seed=0, block_bytes=scene_cache.block_bytes)
    prefetcher = Prefetcher(
        scenes,
        sampler,
        source,
        scene_cache,
        photos,
        make_config(render_ahead=2),
        World(0, 1, CPU),
        kept_bytes=kept_bytes,
    )
    prefetch, fetched = scene_cache.prefetch, []

    def record(indices, in_use=()):
        fetched.extend(indices)
        prefetch(indices, in_use)

    monkeypatch.setattr(scene_cache, "prefetch", record)
    counts = []
    for batch, _ in prefetcher.steps(0, 15):  # three epochs of a step for each scene
        assert len(scene_cache._resident) + len(scene_cache._uploads) <= 2
        counts.append(len(fetched))
        assert len(batch.samples) == 2
    assert counts[4] >= 4
    assert (counts[14] - counts[5] == 0) == (control or kept_bytes > 0)
    scene_cache.close()
