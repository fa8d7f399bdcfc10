"""What this project asks of gsplat, on a machine without a GPU; `make test-gsplat` runs it against every version.

gsplat 1.6 has kernels for fewer tiles and channels than 1.4 and 1.5. A stand-in that refuses all others, and renders
with the CPU backend, takes its place here.
"""

import inspect
from importlib import metadata

import pytest
import torch
from gsplat.strategy import DefaultStrategy
from rasterization_oracle import random_scene

from fit3d_ns import compat
from fit3d_ns.features.grid import FEATURE_GRIDS
from fit3d_ns.rasterization import cuda, rasterize

TILES_OF_1_6 = (4, 16)  # cuda/csrc/RasterizeToPixels3DGSSerialBatchFwd.cu
CHANNELS_OF_1_6 = (1, 2, 3, 4, 5, 6, 8, 9, 16, 17, 21, 23, 24, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513)  # Config.h
RESET_EVERY, STOP, PRUNE = 4, 12, 0.1


@pytest.fixture
def gsplat_1_6(monkeypatch):
    """Puts a stand-in in gsplat's place; returns the arguments of its last call."""
    from gsplat.rendering import rasterization

    signature, last = inspect.signature(rasterization), {}

    def stand_in(**arguments):
        signature.bind(**arguments)  # no argument that the installed version does not know
        last.update(arguments)
        if arguments["tile_size"] not in TILES_OF_1_6:
            raise RuntimeError(f"Unsupported tile_size {arguments['tile_size']}; supported values are {{4, 16}}.")
        values = 3 if arguments["sh_degree"] is not None else arguments["colors"].shape[-1]
        total = {"RGB": values, "ED": 1, "RGB+ED": values + 1}[arguments["render_mode"]]
        chunk = arguments["channel_chunk"]
        for first in range(0, total, chunk):
            if min(chunk, total - first) not in CHANNELS_OF_1_6:
                raise ValueError(f"Unsupported number of channels: {min(chunk, total - first)}")
        return rasterize(**{name: value for name, value in arguments.items() if name != "channel_chunk"})

    monkeypatch.setattr(cuda, "load_gsplat", lambda: stand_in)
    monkeypatch.setattr(cuda, "version", lambda name: "1.6.0")
    cuda.available_tile_size.cache_clear()
    yield last
    cuda.available_tile_size.cache_clear()


def arguments_of(scene, colors, render_mode, tile_size, sh_degree=None):
    return {
        **scene,
        "colors": colors,
        "sh_degree": sh_degree,
        "render_mode": render_mode,
        "tile_size": tile_size,
        "near_plane": 0.01,
        "far_plane": 1e10,
        "eps2d": 0.3,
        "packed": False,
        "sparse_grad": False,
        "absgrad": False,
        "rasterize_mode": "classic",
        "channel_chunk": None,
    }


@pytest.mark.parametrize("channels", [*range(1, 70), 96, 127, 128, 130, 149, 192, 384])
@pytest.mark.parametrize("render_mode", ["RGB", "RGB+ED", "ED"])
def test_every_number_of_channels_is_rendered_as_asked_for(gsplat_1_6, channels, render_mode):
    scene = random_scene(40, 2, 23, 17, dtype=torch.float32)
    colors = torch.rand(40, channels, generator=torch.Generator().manual_seed(0))
    ours, wanted = colors.clone().requires_grad_(), colors.clone().requires_grad_()
    render, alpha, _ = cuda.rasterize_on_cuda(**arguments_of(scene, ours, render_mode, 16))
    expected, expected_alpha, _ = rasterize(**arguments_of(scene, wanted, render_mode, 16))
    assert torch.equal(alpha, expected_alpha)
    torch.testing.assert_close(render, expected)
    if render_mode != "ED":  # which shows no colour
        weights = torch.rand(render.shape, generator=torch.Generator().manual_seed(1))
        for image in (render, expected):
            (image * weights).sum().backward()
        assert ours.grad is not None and wanted.grad is not None and bool(wanted.grad.any())
        torch.testing.assert_close(ours.grad, wanted.grad)


def test_colours_of_each_view_and_spherical_harmonics_are_rendered_as_asked_for(gsplat_1_6):
    scene = random_scene(40, 2, 23, 17, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for colors, sh_degree in ((torch.rand(2, 40, 7, generator=generator), None), (torch.rand(40, 16, 3), 3)):
        arguments = arguments_of(scene, colors, "RGB+ED", 4, sh_degree)
        torch.testing.assert_close(cuda.rasterize_on_cuda(**arguments)[0], rasterize(**arguments)[0])


@pytest.mark.parametrize("grid", FEATURE_GRIDS.values(), ids=FEATURE_GRIDS)
@pytest.mark.parametrize("extra", [0, 2])  # a lift renders two channels beside the features
def test_each_rule_of_features_has_a_tile_that_is_there(gsplat_1_6, grid, extra):
    scene = random_scene(40, 1, 64, 48, dtype=torch.float32)
    for dimension in (8, 16, 32, 33, 64):
        colors = torch.rand(40, dimension + extra)
        render, _, info = cuda.rasterize_on_cuda(**arguments_of(scene, colors, "RGB", grid.tile_size))
        assert render.shape == (1, 48, 64, dimension + extra)
        assert info["tile_size"] == gsplat_1_6["tile_size"] <= grid.tile_size


@pytest.mark.parametrize("version, tile", [("1.4.0", 8), ("1.5.3+pt27cu126", 8), ("1.6.0", 4), ("1.10.1", 4)])
def test_the_tile_of_a_version(monkeypatch, version, tile):
    monkeypatch.setattr(cuda, "version", lambda name: version)
    cuda.available_tile_size.cache_clear()
    assert cuda.available_tile_size(8) == tile
    assert (cuda.available_tile_size(4), cuda.available_tile_size(16)) == (4, 16)
    cuda.available_tile_size.cache_clear()


class NeverResets(DefaultStrategy):
    """As 1.5.3's: refines, and leaves opacities alone."""

    def step_post_backward(self, params, optimizers, state, step, info, packed=False):
        self.calls = [*getattr(self, "calls", []), step]


def _steps_that_reset(strategy, steps):
    """The steps after which all opacities are at most twice the limit below which Gaussians are removed."""
    strategy.refine_start_iter, strategy.refine_stop_iter, strategy.reset_every = 10**6, STOP, RESET_EVERY
    strategy.prune_opa = PRUNE
    reset = []
    for step in steps:
        params = torch.nn.ParameterDict({"means": torch.zeros(5, 3), "opacities": torch.full((5,), 3.0)})
        optimizers = {name: torch.optim.Adam([value], lr=1e-3) for name, value in params.items()}
        for name, value in params.items():
            value.grad = torch.ones_like(value)
            optimizers[name].step()
        before = params["opacities"].detach().clone()
        means2d = torch.zeros(1, 5, 2, requires_grad=True)
        means2d.grad = torch.ones_like(means2d)
        radii = torch.ones(1, 5, 2 if metadata.version("gsplat") >= "1.5" else 1, dtype=torch.int32)
        radii = radii if radii.shape[-1] == 2 else radii[..., 0]
        info = {"means2d": means2d, "width": 8, "height": 8, "n_cameras": 1, "radii": radii, "gaussian_ids": None}
        strategy.step_post_backward(params, optimizers, strategy.initialize_state(1.0), step, info, packed=False)
        now = params["opacities"]
        if torch.equal(now, before):
            continue
        assert torch.sigmoid(now).max() < 2 * PRUNE + 1e-5
        assert not optimizers["opacities"].state[now]["exp_avg"].any()
        reset.append(step)
    return reset


def test_the_installed_version_resets_opacities():
    strategy = DefaultStrategy(verbose=False)
    compat.reset_opacities(strategy)
    assert _steps_that_reset(strategy, range(1, 20)) == [4, 8]


def test_opacities_are_reset_where_1_5_3_forgets_it(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "1.5.3")
    strategy = NeverResets(verbose=False)
    assert _steps_that_reset(strategy, range(1, 20)) == []
    compat.reset_opacities(strategy)
    assert _steps_that_reset(strategy, range(20)) == [4, 8]  # neither at 0 nor after refinement has ended
    assert strategy.calls == [*range(1, 20), *range(20)]


def test_a_strategy_without_resets_is_left_alone(monkeypatch):
    from gsplat.strategy import MCMCStrategy

    monkeypatch.setattr(compat, "version", lambda name: "1.5.3")
    strategy = MCMCStrategy(verbose=False)
    compat.reset_opacities(strategy)
    assert "step_post_backward" not in vars(strategy)


def test_training_resets_opacities(scene, make_config, make_trainer):
    trainer = make_trainer(make_config(scene, steps=7, refine_every=1, reset_alpha_every=5, warmup_length=100))
    model = trainer.pipeline.model
    with torch.no_grad():
        model.gauss_params["opacities"].fill_(4.0)
    trainer.train()
    # pulled up by one or two steps of Adam since
    assert torch.sigmoid(model.gauss_params["opacities"]).max() < 2 * model.strategy.prune_opa + 0.05
