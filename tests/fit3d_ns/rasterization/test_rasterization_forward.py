"""The CPU backend's images against the plain-torch formulation."""

import importlib.metadata
from typing import Any

import pytest
import torch
from rasterization_oracle import one_radius, oracle_rasterize, random_scene

from fit3d_ns.rasterization import rasterize

GSPLAT_VERSION = tuple(map(int, importlib.metadata.version("gsplat").split(".")[:2]))
WIDTH, HEIGHT = 53, 37  # no multiples of a tile


def colors_of(number, *channels, seed=1, dtype=torch.float64):
    return torch.rand(number, *channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def check(scene, colors, **options):
    render, alpha, info = rasterize(**scene, colors=colors, **options)
    wanted_render, wanted_alpha, wanted_info = oracle_rasterize(**scene, colors=colors, **options)
    torch.testing.assert_close(render, wanted_render, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(alpha, wanted_alpha, rtol=1e-10, atol=1e-10)
    assert torch.equal(one_radius(info), wanted_info["radii"])
    return render, alpha, info


@pytest.mark.parametrize("rasterize_mode", ["classic", "antialiased"])
@pytest.mark.parametrize("channels", [1, 3, 5, 64])
def test_matches_oracle(channels, rasterize_mode):
    scene = random_scene(400, 2, WIDTH, HEIGHT)
    _, alpha, info = check(scene, colors_of(400, channels), rasterize_mode=rasterize_mode)
    assert alpha.max() > 0.9995  # some pixels were closed
    assert 0 < (one_radius(info) > 0).sum() < 2 * 400  # some Gaussians were culled


def test_antialiasing_changes_small_gaussians():
    scene = random_scene(200, 1, WIDTH, HEIGHT, size=0.01)
    classic, _, _ = check(scene, colors_of(200, 3))
    antialiased, _, _ = check(scene, colors_of(200, 3), rasterize_mode="antialiased")
    assert antialiased.mean() < 0.8 * classic.mean()


@pytest.mark.parametrize("render_mode", ["ED", "RGB+ED"])
def test_depth_modes(render_mode):
    scene = random_scene(200, 2, WIDTH, HEIGHT)
    render, _, _ = check(scene, colors_of(200, 3), render_mode=render_mode)
    assert render.shape[-1] == (4 if "RGB" in render_mode else 1)


def test_colors_of_each_view():
    scene = random_scene(200, 3, WIDTH, HEIGHT)
    colors = torch.stack([colors_of(200, 5, seed=s) for s in range(3)])
    check(scene, colors)


@pytest.mark.parametrize("options", [{"tile_size": 4}, {"tile_size": 8}, {"eps2d": 0.0}])
def test_options(options):
    check(random_scene(200, 1, WIDTH, HEIGHT), colors_of(200, 3), **options)


def test_near_and_far_plane():
    scene = random_scene(200, 1, WIDTH, HEIGHT)
    _, _, info = check(scene, colors_of(200, 3), near_plane=4.0, far_plane=6.0)
    seen = scene["means"][one_radius(info)[0] > 0, 2]
    assert len(seen) > 10 and seen.min() >= 4.0 and seen.max() <= 6.0


@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
def test_spherical_harmonics_match_gsplat(degree):
    from gsplat.cuda._torch_impl import _spherical_harmonics

    scene = random_scene(150, 2, WIDTH, HEIGHT)
    coefficients = colors_of(150, 25, 3) - 0.5
    centers = torch.linalg.inv(scene["viewmats"])[:, None, :3, 3]
    used = coefficients[:, : (degree + 1) ** 2]
    used = used if GSPLAT_VERSION >= (1, 6) else used.expand(2, -1, -1, -1)
    colors = (_spherical_harmonics(degree, scene["means"] - centers, used) + 0.5).clamp_min(0)
    wanted, _, _ = oracle_rasterize(**scene, colors=colors)
    render, _, _ = rasterize(**scene, colors=coefficients, sh_degree=degree)
    torch.testing.assert_close(render, wanted, rtol=1e-10, atol=1e-10)
    per_view, _, _ = rasterize(**scene, colors=coefficients.expand(2, -1, -1, -1), sh_degree=degree)
    assert torch.equal(per_view, render)


@pytest.mark.skipif(GSPLAT_VERSION >= (1, 5), reason="gsplat 1.5 bounds Gaussians in another way")
def test_projection_matches_gsplat():
    from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci

    scene = random_scene(500, 2, WIDTH, HEIGHT)
    covariances, _ = _quat_scale_to_covar_preci(scene["quats"], scene["scales"], True, False)
    assert covariances is not None
    radii, means2d, depths, conics, compensations = _fully_fused_projection(
        scene["means"], covariances, scene["viewmats"], scene["Ks"], WIDTH, HEIGHT, calc_compensations=True
    )
    _, _, info = rasterize(**scene, colors=colors_of(500, 1), rasterize_mode="antialiased")
    assert torch.equal(one_radius(info), radii)
    seen = radii > 0
    opacities = scene["opacities"] * compensations
    for ours, theirs in [("means2d", means2d), ("depths", depths), ("conics", conics), ("opacities", opacities)]:
        torch.testing.assert_close(info[ours][seen], theirs[seen], rtol=1e-9, atol=1e-9)


def test_equal_depths_blend_in_index_order():
    scene = random_scene(40, 1, WIDTH, HEIGHT)
    scene["means"][:, 2] = 3.0
    check(scene, colors_of(40, 3))


def test_needles_and_giants():
    scene = random_scene(60, 1, WIDTH, HEIGHT)
    scene["scales"][::3] = torch.tensor([3.0, 0.001, 0.001], dtype=torch.float64)
    scene["scales"][1::3] = 5.0
    check(scene, colors_of(60, 3))


def test_nothing_visible():
    scene = random_scene(30, 2, WIDTH, HEIGHT)
    scene["means"] = -scene["means"].abs() - 20
    render, alpha, info = rasterize(**scene, colors=colors_of(30, 3).requires_grad_())
    assert not render.any() and not alpha.any() and not one_radius(info).any()
    render.sum().backward()


@pytest.mark.parametrize("render_mode", ["RGB", "RGB+ED"])
def test_no_gaussians(render_mode):
    scene = random_scene(0, 2, WIDTH, HEIGHT)
    means = scene.pop("means").requires_grad_()
    render, alpha, info = rasterize(means, **scene, colors=colors_of(0, 3), render_mode=render_mode)
    assert render.shape[:3] == (2, HEIGHT, WIDTH) and not render.any() and not alpha.any()
    assert info["means2d"].shape == (2, 0, 2)
    render.sum().backward()
    assert means.grad is not None and means.grad.shape == (0, 3)


def test_non_finite_gaussians_do_not_spread():
    scene = random_scene(100, 1, WIDTH, HEIGHT)
    colors = colors_of(100, 3)
    keep = torch.ones(100, dtype=torch.bool)
    keep[[3, 40, 77]] = False
    good: dict[str, Any] = dict(scene)
    for name in ("means", "quats", "scales", "opacities"):
        good[name] = scene[name][keep]
    wanted, _, _ = rasterize(**good, colors=colors[keep])
    scene["means"][3], scene["scales"][40], scene["quats"][77] = torch.nan, torch.nan, torch.nan
    render, _, info = rasterize(**scene, colors=colors)
    assert torch.equal(render, wanted)
    assert not one_radius(info)[0, ~keep].any()


def test_float32_stays_close_to_float64():
    scene = random_scene(2000, 1, 96, 80, size=0.04)
    colors = colors_of(2000, 8)
    exact, exact_alpha, _ = rasterize(**scene, colors=colors)
    single: dict[str, Any] = {name: value.float() if torch.is_tensor(value) else value for name, value in scene.items()}
    render, alpha, _ = rasterize(**single, colors=colors.float())
    assert render.dtype == alpha.dtype == torch.float32
    # A Gaussian on the edge of the cut-off at 1/255 may fall to either side, so the median and the norm are judged.
    assert (render - exact).abs().median() < 1e-6
    assert (render - exact).norm() / exact.norm() < 1e-5
    assert (alpha - exact_alpha).norm() / exact_alpha.norm() < 1e-5


def test_tiles_list_gaussians_as_gsplat_does():
    from gsplat.cuda._torch_impl import _isect_offset_encode, _isect_tiles

    from fit3d_ns.rasterization.blending import list_tiles

    scene = random_scene(60, 2, WIDTH, HEIGHT, dtype=torch.float32)
    _, _, info = rasterize(**scene, colors=colors_of(60, 3, dtype=torch.float32))
    assert (info["width"], info["height"], info["n_cameras"], info["tile_size"]) == (WIDTH, HEIGHT, 2, 16)
    tiles = info["tile_width"], info["tile_height"]
    assert tiles == (4, 3)
    _, isect_ids, flatten_ids = _isect_tiles(info["means2d"], info["radii"], info["depths"], 16, *tiles)
    starts = _isect_offset_encode(isect_ids, 2, *tiles)  # [V, rows of tiles, columns of tiles]
    total = 0
    for view in range(2):
        means2d, radii, depths = info["means2d"][view], one_radius(info)[view], info["depths"][view]
        lists = list_tiles(means2d, radii, depths, WIDTH, HEIGHT, 16)
        ids = torch.from_numpy(lists.order[lists.entries]) + 60 * view
        assert torch.equal(ids.int(), flatten_ids[total : total + len(ids)])
        assert torch.equal(torch.from_numpy(lists.tile_starts[:-1]).int() + total, starts[view].flatten())
        total += len(ids)
    assert total == len(flatten_ids)
