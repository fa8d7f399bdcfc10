"""What the CPU backend promises around the numbers: threads, compilation, bad input, cheap imports."""

import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from rasterization_oracle import random_scene

from fit3d_ns.rasterization import rasterize
from fit3d_ns.support.errors import UserError

RENDER_ONCE = """
import torch
from fit3d_ns.rasterization import rasterize
t = lambda *rows: torch.tensor(rows)
render, _, _ = rasterize(
    t([0.1, 0.0, 2.0]), t([1.0, 0, 0, 0]), t([0.2, 0.1, 0.1]), t(0.8), t([1.0, 2.0, 3.0]), torch.eye(4)[None],
    t([20.0, 0, 10], [0, 20, 10], [0, 0, 1])[None], 20, 20)
from fit3d_ns.rasterization import kernels
print(render.sum().item(), kernels.blend_band.stats.cache_path)
"""


def run_python(code, **environment):
    """Runs code in a new process and returns the process, its output captured."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished_output(process):
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    return output.split()


@pytest.fixture
def thread_count():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def everything(scene, **options):
    """Render, alpha and all gradients of one pass."""
    leaves: dict[str, Any] = {
        name: value.clone().requires_grad_() for name, value in scene.items() if torch.is_tensor(value)
    }
    leaves["colors"] = torch.rand(len(scene["means"]), 16, 3, generator=torch.Generator().manual_seed(1)) - 0.3
    leaves["colors"].requires_grad_()
    leaves["Ks"].requires_grad_(False)
    render, alpha, info = rasterize(
        **leaves, width=scene["width"], height=scene["height"], sh_degree=3, absgrad=True, **options
    )
    info["means2d"].retain_grad()
    weights = torch.rand(render.shape, generator=torch.Generator().manual_seed(2))
    ((render * weights).sum() + (alpha * weights[..., :1]).sum()).backward()
    gradients = [leaf.grad for leaf in leaves.values() if leaf.requires_grad]
    return [render.detach(), alpha.detach(), info["means2d"].grad, info["means2d"].absgrad, *gradients]


@pytest.mark.parametrize("views, rasterize_mode", [(1, "antialiased"), (2, "classic")])
def test_bitwise_equal_for_any_number_of_threads(thread_count, views, rasterize_mode):
    # more Gaussians than torch leaves to one thread in a reduction
    scene = random_scene(40_000, views, 150, 110, dtype=torch.float32, size=0.02)
    results = []
    for threads in (1, 2, 3):
        thread_count(threads)
        results.append(everything(scene, rasterize_mode=rasterize_mode))
    for other in results[1:]:
        for one, another in zip(results[0], other, strict=True):
            assert one.any() and torch.equal(one, another)


def test_renders_at_once_from_several_python_threads():
    scene = random_scene(3000, 1, 100, 80, dtype=torch.float32)
    wanted = everything(scene)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: everything(scene), range(12)):
            assert all(torch.equal(one, another) for one, another in zip(wanted, results, strict=True))


def test_kernels_are_compiled_only_where_the_lock_is_held():
    from fit3d_ns.rasterization import kernels
    from fit3d_ns.rasterization.kernel_runner import compile_kernels

    for dtype in (torch.float32, torch.float64):
        compile_kernels(dtype)
        scene = random_scene(50, 3, 40, 30, dtype=dtype)
        colors = torch.rand(50, 4, dtype=dtype).requires_grad_()
        scene["means"] = scene["means"].mT.contiguous().mT.requires_grad_()  # memory in another order
        render, _, _ = rasterize(**scene, colors=colors, render_mode="RGB+ED")
        render.mean(0).sum().backward()  # an expanded gradient
    for name in ("pack_gaussians", "tile_bounds", "fill_tiles", "blend_band", "blend_band_backward", "gather_slots"):
        assert len(getattr(kernels, name).signatures) <= 2


def test_two_processes_compile_at_once(tmp_path):
    processes = [run_python(RENDER_ONCE, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)]
    first, second = (finished_output(process) for process in processes)
    assert first == second and first[1].startswith(str(tmp_path))
    assert list(tmp_path.rglob("*.nbc"))


def test_runs_without_a_folder_for_the_cache():
    no_folder = "import numba.core.caching as c\nc.CacheImpl._locator_classes = []\n"
    value, path = finished_output(run_python(no_folder + RENDER_ONCE))
    assert float(value) > 0 and path == "None"


def test_runs_when_the_cache_cannot_be_saved(tmp_path):
    full_disk = """
import numba.core.caching as c
def save(*_):
    raise OSError(28, "No space left on device")
c.IndexDataCacheFile.save = save
"""
    value, _ = finished_output(run_python(full_disk + RENDER_ONCE, NUMBA_CACHE_DIR=str(tmp_path)))
    assert float(value) > 0


def test_import_loads_neither_gsplat_nor_numba():
    code = "import sys, fit3d_ns.rasterization; print([m in sys.modules for m in ('gsplat', 'numba', 'nerfstudio')])"
    assert finished_output(run_python(code)) == ["[False,", "False,", "False]"]


@pytest.mark.parametrize(
    "change",
    [
        {"means": torch.zeros(5, 2)},
        {"opacities": torch.zeros(5, 1)},
        {"colors": torch.zeros(4, 3)},
        {"colors": torch.zeros(5, 0)},
        {"colors": torch.zeros(5, 3, dtype=torch.float16)},
        {"viewmats": torch.zeros(0, 4, 4), "Ks": torch.zeros(0, 3, 3)},
        {"sh_degree": 1},
        {"sh_degree": 2, "colors": torch.zeros(5, 4, 3)},
        {"render_mode": "depth"},
        {"rasterize_mode": "smooth"},
    ],
)
def test_wrong_arguments_are_refused(change):
    scene = random_scene(5, 1, 20, 20, dtype=torch.float32)
    with pytest.raises(ValueError):
        rasterize(**{**scene, "colors": torch.zeros(5, 3), **change})


@pytest.mark.parametrize("backend", [types.SimpleNamespace(_C=None), None])
def test_missing_cuda_kernels_are_said_in_one_sentence(monkeypatch, backend):
    import gsplat.cuda

    from fit3d_ns.rasterization import cuda

    # gsplat leaves _C None without a compiler; a module that is None fails to import, as a broken build does
    monkeypatch.setitem(sys.modules, "gsplat.cuda._backend", backend)
    monkeypatch.delattr(gsplat.cuda, "_backend", raising=False)
    cuda.load_gsplat.cache_clear()
    scene = random_scene(5, 1, 20, 20, dtype=torch.float32)
    with pytest.raises(UserError, match="^gsplat's CUDA kernels .*: install a gsplat wheel .*[.]$"):
        cuda.rasterize_on_cuda(
            **scene, colors=torch.zeros(5, 3), sh_degree=None, render_mode="RGB", channel_chunk=None, tile_size=16
        )
    cuda.load_gsplat.cache_clear()
