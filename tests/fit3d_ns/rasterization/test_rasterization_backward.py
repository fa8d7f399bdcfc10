"""The CPU backend's gradients: against the plain-torch formulation, finite differences, and what training needs."""

from typing import Any

import pytest
import torch
from rasterization_oracle import one_radius, oracle_rasterize, random_scene

from fit3d_ns.rasterization import rasterize

WIDTH, HEIGHT = 45, 35
GEOMETRY = ("means", "quats", "scales", "opacities")


def random(*shape, seed=1, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def differentiable(scene, names=(*GEOMETRY, "viewmats")):
    """A copy of the scene, and those of its tensors that take gradients."""
    copy: dict[str, Any] = {name: value.clone() if torch.is_tensor(value) else value for name, value in scene.items()}
    return copy, {name: copy[name].requires_grad_() for name in names}


def random_loss(render, alpha):
    return (render * random(*render.shape, seed=7, dtype=render.dtype)).sum() + (
        alpha * random(*alpha.shape, seed=8, dtype=alpha.dtype)
    ).sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rasterize_mode": "antialiased"},
        {"render_mode": "RGB+ED", "rasterize_mode": "antialiased"},
        {"render_mode": "ED"},
        {"tile_size": 4, "render_mode": "RGB+ED"},
    ],
)
@pytest.mark.parametrize("channels", [3, 64])
def test_gradients_match_oracle(channels, options):
    gradients = []
    for function in (rasterize, oracle_rasterize):
        scene, leaves = differentiable(random_scene(150, 2, WIDTH, HEIGHT, seed=3))
        leaves["colors"] = random(150, channels).requires_grad_()
        render, alpha, _ = function(**scene, colors=leaves["colors"], **options)
        random_loss(render, alpha).backward()
        gradients.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, wanted in gradients[1].items():
        if wanted is None:  # colours do not enter a depth map
            assert options["render_mode"] == "ED" and gradients[0][name] is None
        else:
            torch.testing.assert_close(gradients[0][name], wanted, rtol=1e-7, atol=1e-8, msg=lambda m: f"{name}: {m}")


def test_no_gradient_through_the_bound_on_alpha():
    gradients = []
    for function in (rasterize, oracle_rasterize):
        scene, leaves = differentiable(random_scene(12, 1, WIDTH, HEIGHT), GEOMETRY)
        with torch.no_grad():
            leaves["scales"][:] = 20.0  # so wide that alpha is at its bound in most pixels
            leaves["opacities"][::2] = 1.0
        render, alpha, _ = function(**scene, colors=random(12, 3))
        random_loss(render, alpha).backward()
        gradients.append(leaves["opacities"].grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


def test_colors_of_each_view_get_their_own_gradient():
    gradients = []
    for function in (rasterize, oracle_rasterize):
        scene, _ = differentiable(random_scene(80, 3, WIDTH, HEIGHT))
        colors = random(3, 80, 5).requires_grad_()
        render, alpha, _ = function(**scene, colors=colors)
        random_loss(render, alpha).backward()
        gradients.append(colors.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rasterize_mode", ["classic", "antialiased"])
def test_finite_differences(rasterize_mode):
    scene, leaves = differentiable(random_scene(7, 2, 9, 8, seed=5, size=0.5))
    fixed = {name: value for name, value in scene.items() if name not in leaves}
    colors = random(7, 2).requires_grad_()

    def render_and_alpha(colors, *tensors):
        named = dict(zip(leaves, tensors))
        return rasterize(
            **fixed,
            **named,
            colors=colors,
            rasterize_mode=rasterize_mode,
            render_mode="RGB+ED",
            tile_size=4,
        )[:2]

    inputs = (colors, *leaves.values())
    assert torch.autograd.gradcheck(render_and_alpha, inputs, eps=1e-6, atol=1e-5, rtol=1e-4)


def test_finite_differences_of_spherical_harmonics():
    scene, leaves = differentiable(random_scene(5, 2, 9, 8, seed=6, size=0.5), ("means", "viewmats"))
    coefficients = (2 * random(5, 16, 3) - 1).requires_grad_()
    fixed = {name: value for name, value in scene.items() if name not in leaves}

    def render(means, viewmats, coefficients):
        return rasterize(means=means, viewmats=viewmats, **fixed, colors=coefficients, sh_degree=3)[0]

    assert torch.autograd.gradcheck(render, (*leaves.values(), coefficients), eps=1e-6, atol=1e-5, rtol=1e-4)


def test_absgrad_sums_absolute_gradients_of_pixels():
    scene, _ = differentiable(random_scene(120, 2, WIDTH, HEIGHT))
    colors = random(120, 3)
    render, alpha, info = rasterize(**scene, colors=colors, absgrad=True)
    info["means2d"].retain_grad()
    random_loss(render, alpha).backward()

    scene, _ = differentiable(random_scene(120, 2, WIDTH, HEIGHT))
    render, alpha, oracle_info = oracle_rasterize(**scene, colors=colors)
    for _, _, pixel_means in oracle_info["pixel_means"]:
        pixel_means.retain_grad()
    random_loss(render, alpha).backward()
    signed, absolute = torch.zeros(2, 120, 2, dtype=torch.float64), torch.zeros(2, 120, 2, dtype=torch.float64)
    for view, ids, pixel_means in oracle_info["pixel_means"]:
        signed[view].index_add_(0, ids, pixel_means.grad.sum(1))
        absolute[view].index_add_(0, ids, pixel_means.grad.abs().sum(1))
    torch.testing.assert_close(info["means2d"].grad, signed, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(info["means2d"].absgrad, absolute, rtol=1e-8, atol=1e-9)


def test_absgrad_is_not_there_unless_asked_for():
    scene, _ = differentiable(random_scene(20, 1, WIDTH, HEIGHT))
    render, _, info = rasterize(**scene, colors=random(20, 3))
    render.sum().backward()
    assert not hasattr(info["means2d"], "absgrad")


@pytest.mark.parametrize("rasterize_mode", ["classic", "antialiased"])
def test_detached_geometry_gives_the_same_feature_gradient(rasterize_mode):
    gradients = []
    for detached in (False, True):
        scene, leaves = differentiable(random_scene(300, 1, WIDTH, HEIGHT, dtype=torch.float32))
        features = random(300, 64, dtype=torch.float32).requires_grad_()
        if detached:
            scene.update({name: leaf.detach() for name, leaf in leaves.items()})
        render, alpha, info = rasterize(**scene, colors=features, rasterize_mode=rasterize_mode)
        assert info["means2d"].requires_grad is not detached and alpha.requires_grad
        (render * random(*render.shape, seed=7, dtype=torch.float32)).sum().backward()
        assert all((leaf.grad is None) is detached for leaf in leaves.values())
        gradients.append(features.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", GEOMETRY)
def test_one_input_alone(name):
    scene, leaves = differentiable(random_scene(60, 1, WIDTH, HEIGHT))
    random_loss(*rasterize(**scene, colors=random(60, 3), rasterize_mode="antialiased")[:2]).backward()
    alone, alone_leaves = differentiable(random_scene(60, 1, WIDTH, HEIGHT), (name,))
    random_loss(*rasterize(**alone, colors=random(60, 3), rasterize_mode="antialiased")[:2]).backward()
    assert torch.equal(alone_leaves[name].grad, leaves[name].grad)


def test_culled_gaussians_get_finite_zero_gradients():
    scene, leaves = differentiable(random_scene(100, 1, WIDTH, HEIGHT), GEOMETRY)
    with torch.no_grad():
        leaves["means"][0] = torch.tensor([0.3, 0.2, 0.0])  # in the plane of the camera
        leaves["scales"][1] = 0.0
    random_loss(*rasterize(**scene, colors=random(100, 3), rasterize_mode="antialiased")[:2]).backward()
    for leaf in leaves.values():
        assert torch.isfinite(leaf.grad).all()
        assert not leaf.grad[0].any()


@pytest.mark.parametrize("absgrad", [False, True])
def test_gsplat_densifies_with_the_returned_info(absgrad):
    from gsplat import DefaultStrategy

    scene = random_scene(200, 1, WIDTH, HEIGHT, dtype=torch.float32)
    parameters = torch.nn.ParameterDict(
        {
            "means": scene["means"],
            "scales": scene["scales"].log(),
            "quats": scene["quats"],
            "opacities": torch.logit(scene["opacities"].clamp(0.01, 0.99)),
            "features": torch.arange(200.0)[:, None].repeat(1, 3),
        }
    )
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: torch.optim.Adam([parameter], lr=0.0) for name, parameter in parameters.items()
    }
    strategy = DefaultStrategy(
        refine_start_iter=0, refine_every=2, refine_scale2d_stop_iter=100, grow_grad2d=1e-6, absgrad=absgrad
    )
    strategy.check_sanity(parameters, optimizers)
    state = strategy.initialize_state(scene_scale=1.0)
    info: dict[str, Any] = {}
    for step in range(1, 3):
        render, _, info = rasterize(
            means=parameters["means"],
            quats=parameters["quats"],
            scales=parameters["scales"].exp(),
            opacities=parameters["opacities"].sigmoid(),
            colors=parameters["features"],
            viewmats=scene["viewmats"],
            Ks=scene["Ks"],
            width=WIDTH,
            height=HEIGHT,
            absgrad=absgrad,
        )
        strategy.step_pre_backward(parameters, optimizers, state, step, info)
        (render * random(*render.shape, dtype=torch.float32)).sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        strategy.step_post_backward(parameters, optimizers, state, step, info)
    tags = parameters["features"][:, 0].long()
    assert len(tags) > 200 and all(len(parameter) == len(tags) for parameter in parameters.values())
    visible = one_radius(info)[0] > 0  # of the same Gaussians in both steps
    grown = torch.bincount(tags, minlength=200) > 1
    assert grown.any() and not grown[~visible].any()
