"""Features are rendered in one place, and as they always were."""

import pytest
import torch
import torch.nn.functional as F
from nerfstudio.models import splatfacto
from rasterization_oracle import random_scene
from solid_room import make_solid

from fit3d_ns.features.decoder import FeatureDecoder
from fit3d_ns.features.grid import FEATURE_GRIDS
from fit3d_ns.features.rendering import Geometry, decode_views, render_depth, render_features, viewmats_of
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.rasterization import rasterize
from fit3d_ns.scenes.lift import lift_scene
from fit3d_ns.scenes.views import resident_scene

SIZE, GRID = (60, 88), (5, 7)


def scene_of(views=2, dtype=torch.float64):
    """Geometry, viewmats and intrinsics of a cloud of 300 Gaussians."""
    scene = random_scene(300, views, SIZE[1], SIZE[0], dtype=dtype)
    geometry = Geometry(scene["means"], scene["quats"], scene["scales"], scene["opacities"])
    return geometry, scene["viewmats"], scene["Ks"]


def values_of(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=dtype)


@pytest.mark.parametrize("name", ["fast", "paper"])
def test_a_render_follows_the_rule_of_its_grid(name):
    geometry, viewmats, Ks = scene_of()
    values, rule = values_of(300, 5), FEATURE_GRIDS[name]
    height, width = rule.render_size(SIZE, GRID)
    maps, alpha = render_features(geometry, values, viewmats, Ks, SIZE, (height, width), rule)
    scaled = torch.diag(torch.tensor([width / SIZE[1], height / SIZE[0], 1.0], dtype=torch.float64)) @ Ks
    options = {"tile_size": rule.tile_size, "rasterize_mode": rule.rasterize_mode}
    wanted, wanted_alpha, _ = rasterize(
        **vars(geometry), colors=values, viewmats=viewmats, Ks=scaled, width=width, height=height, **options
    )
    torch.testing.assert_close(maps, wanted.permute(0, 3, 1, 2))
    torch.testing.assert_close(alpha, wanted_alpha.permute(0, 3, 1, 2))
    depth, depth_alpha = render_depth(geometry, viewmats, Ks, SIZE, (height, width), rule)
    z = (geometry.means @ viewmats[1, :3, :3].T + viewmats[1, :3, 3])[:, 2:]
    summed, _ = render_features(geometry, z, viewmats[1:], Ks[1:], SIZE, (height, width), rule)
    torch.testing.assert_close(depth[1:], summed / alpha[1:].clamp_min(1e-10))
    torch.testing.assert_close(depth_alpha, alpha)


def test_only_values_and_decoder_take_gradients():
    geometry, viewmats, Ks = scene_of(1)
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in vars(geometry).items()}
    cameras = viewmats.clone().requires_grad_(), Ks.clone().requires_grad_()
    values, kernel = values_of(300, 4).requires_grad_(), values_of(6, 4, 3, 3).requires_grad_()
    maps, _ = decode_views(Geometry(**tensors), values, kernel, *cameras, SIZE, GRID, FEATURE_GRIDS["fast"])
    maps.square().sum().backward()
    assert values.grad is not None and values.grad.any() and kernel.grad is not None and kernel.grad.any()
    assert all(tensor.grad is None for tensor in (*tensors.values(), *cameras))


def test_what_is_not_visible_is_not_there():
    geometry, viewmats, Ks = scene_of()
    values, rule = values_of(300, 4), FEATURE_GRIDS["fast"]
    arguments = (viewmats, Ks, SIZE, rule.render_size(SIZE, GRID), rule)
    chosen = torch.arange(300) % 3 == 0
    maps, alpha = render_features(geometry, values, *arguments, visible=chosen)
    faded = Geometry(geometry.means, geometry.quats, geometry.scales, geometry.opacities * chosen)
    wanted, wanted_alpha = render_features(faded, values, *arguments)
    torch.testing.assert_close(maps, wanted)
    torch.testing.assert_close(alpha, wanted_alpha)
    assert not torch.equal(maps, render_features(geometry, values, *arguments)[0])
    nothing, no_alpha = render_features(geometry, values, *arguments, visible=torch.zeros(300, dtype=torch.bool))
    assert nothing.shape == maps.shape and not nothing.any() and no_alpha.shape == alpha.shape and not no_alpha.any()


@pytest.mark.parametrize("name, pooled", [("fast", F.avg_pool2d), ("paper", None)])
def test_views_decoded_together_equal_every_pixel_decoded_one_by_one(name, pooled):
    geometry, viewmats, Ks = scene_of(3)
    features, rule = values_of(300, 5), FEATURE_GRIDS[name]
    decoder = FeatureDecoder(5, 7, torch.Generator().manual_seed(3)).double()
    kernel = decoder.weight.detach()
    together, alpha = decode_views(geometry, features, kernel, viewmats, Ks, SIZE, GRID, rule)
    assert together.shape == (3, 7, *GRID) and alpha.shape == (3, 1, *rule.render_size(SIZE, GRID))
    for view in range(3):
        one = slice(view, view + 1)
        low, _ = render_features(geometry, features, viewmats[one], Ks[one], SIZE, rule.render_size(SIZE, GRID), rule)
        everywhere = decoder(low).detach()
        if pooled is not None:
            wanted = pooled(everywhere, 4)[0]
        else:
            wanted = F.interpolate(everywhere, size=GRID, mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(together[view], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_viewmats_invert_poses_as_splatfacto_does(dtype):
    generator = torch.Generator().manual_seed(0)
    rotations = torch.linalg.qr(torch.randn(9, 3, 3, generator=generator, dtype=dtype))[0]
    poses = torch.cat([rotations, 100 * torch.randn(9, 3, 1, generator=generator, dtype=dtype)], dim=-1)
    viewmats = viewmats_of(poses)
    assert viewmats.dtype == dtype
    eager = getattr(splatfacto.get_viewmat, "_torchdynamo_orig_callable", splatfacto.get_viewmat)
    torch.testing.assert_close(viewmats, eager(poses), rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)
    square = torch.eye(4, dtype=dtype).repeat(9, 1, 1)
    square[:, :3] = poses
    flipped = square @ torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=dtype))
    identity = torch.eye(4, dtype=dtype).expand(9, 4, 4)
    torch.testing.assert_close(viewmats @ flipped, identity, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-12)


BEFORE = {
    "fast": {
        "low": [-0.0045086, 0.5446595, 0.2731103],
        "alpha": [0.9737092, 0.0417871, 0.9901043],
        "decoded": [0.0035141, 0.1875345, -0.0162385],
        "training": [0.0035141, 0.1875345, -0.0162385],
        "values": [0.2611874, 2.4094803, 6.4462752],
        "variance": [10.6082649, 10.4360554, 11.8487053],
        "evaluation": {
            "psnr": 15.357931,
            "ssim": 0.4137017,
            "feature_l1": 0.8187599,
            "feature_l1_std": 0.0117432,
            "feature_cosine": -0.0034169,
            "feature_cosine_std": 0.0330434,
            "view_match_teacher": 26 / 41,
            "view_match_lifted": 32 / 41,
            "view_match_points": 41,
        },
        "lift": {"feature_cosine": 0.8250590, "feature_l1": 0.3708383, "view_match_lifted": 33 / 41},
    },
    "paper": {
        "low": [-0.0052528, 0.5957197, -0.1453011],
        "alpha": [0.9746302, 0.0660794, 0.9998172],
        "decoded": [0.0055263, 0.3175413, -0.0396851],
        "training": [0.0013615, 0.3146349, -0.1955529],
        "values": [0.2635909, 2.3228784, 6.0628233],
        "variance": [3.8789550, 4.1965756, 2.1113510],
        "evaluation": {
            "psnr": 15.357931,
            "ssim": 0.4137017,
            "feature_l1": 0.8443286,
            "feature_l1_std": 0.0114752,
            "feature_cosine": -0.0128039,
            "feature_cosine_std": 0.0251555,
            "view_match_teacher": 26 / 41,
            "view_match_lifted": 22 / 41,
            "view_match_points": 41,
        },
        "lift": {"feature_cosine": 0.8316354, "feature_l1": 0.3638660, "view_match_lifted": 34 / 41},
    },
}
"""What version 0.1.0 rendered, measured and lifted of the solid tiny room, by feature grid. Of tensors: mean, standard
deviation, and the value at a third of their length."""
SURFACE = {
    "depth": [1.7841729, 0.4028298, 1.7206314],
    "accumulation": [0.9746302, 0.0660794, 0.9998172],
    "viewmat": [0.0747102, 0.5446622, -0.3668763],
    "K": [23.3455149, 28.552786, 0.0],
}


def summary(tensor):
    flat = tensor.detach().double().flatten()
    return [float(flat.mean()), float(flat.std()), float(flat[len(flat) // 3])]


@pytest.mark.parametrize("grid", ["fast", "paper"])
def test_numbers_are_those_of_version_0_1_0(scene, make_config, make_trainer, grid):
    config = make_config(scene, feature_grid=grid)
    config.pipeline.datamanager.dataparser.eval_mode = "interval"
    config.pipeline.datamanager.dataparser.eval_interval = 2
    pipeline, before = make_trainer(config).pipeline, BEFORE[grid]
    pipeline.eval()
    make_solid(pipeline, scene)
    model = pipeline.model
    camera, _ = pipeline.datamanager.evaluation_view(1)
    low, alpha = model.render_low(camera)
    measured = {"low": low, "alpha": alpha, "decoded": model.decode_view(camera)}
    model.train()
    model.step = 7
    measured["training"] = model.decode_view(camera, model._sampling_offset())
    model.eval()
    surface = model.surface_view(camera)
    for name, wanted in SURFACE.items():
        assert summary(getattr(surface, name)) == pytest.approx(wanted, rel=1e-4, abs=1e-5), name
    metrics = pipeline.get_average_eval_image_metrics(get_std=True)
    assert {name: metrics[name] for name in before["evaluation"]} == pytest.approx(before["evaluation"], rel=1e-4)
    pipeline.eval()
    settings = LiftSettings(select="consistency", refinements=2, report_dims=(4,))
    lift = lift_scene(model, resident_scene(pipeline.datamanager, model), settings)
    measured |= {"values": lift.values, "variance": lift.variance}
    for name, tensor in measured.items():
        assert summary(tensor) == pytest.approx(before[name], rel=1e-4, abs=1e-5), name
    assert {name: lift.metrics[name] for name in before["lift"]} == pytest.approx(before["lift"], rel=1e-4)
    assert lift.metrics["view_match_teacher"] == pytest.approx(26 / 41)
