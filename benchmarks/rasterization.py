"""Times rasterisation side by side: projection, blending and the full backward pass, in milliseconds.

On a machine without CUDA: the CPU backend against the plain-torch formulation of the tests. With CUDA: gsplat against
the CPU backend. Run from the repository's root: ``python benchmarks/rasterization.py [--threads 2] [--repeat 9]``.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fit3d_ns.rasterization import rasterize

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fit3d_ns"))
from rasterization_oracle import oracle_rasterize, random_scene  # noqa: E402

SCENES = [(20_000, 160, 120, 67), (20_000, 160, 120, 3), (50_000, 200, 150, 67), (50_000, 200, 150, 3)]


def milliseconds(function: Callable[[], None], repeat: int, device: str) -> float:
    """Returns the median wall time of one call, after two calls to warm up.

    Args:
        function: That is timed.
        repeat: Timed calls.
        device: ``cpu`` or ``cuda``.
    """
    times = []
    for _ in range(repeat + 2):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def time_scene(
    renderer: Callable, number: int, width: int, height: int, channels: int, repeat: int, device: str
) -> tuple[float, float, float]:
    """Times forward alone, forward and full backward, and forward and backward to colours with detached geometry.

    Args:
        renderer: `rasterize`, or another of its signature.
        number: Gaussians.
        width: Of the image, pixels.
        height: Of the image, pixels.
        channels: Of a Gaussian's colour.
        repeat: Timed calls.
        device: ``cpu`` or ``cuda``.

    Returns:
        Three times, milliseconds.
    """
    scene = random_scene(number, 1, width, height, dtype=torch.float32, device=device, size=0.06)
    cameras = {name: scene.pop(name) for name in ("viewmats", "Ks", "width", "height")}
    colors = torch.rand(number, channels, device=device, requires_grad=True)
    weights = torch.rand(1, height, width, channels, device=device)
    leaves = {name: tensor.requires_grad_() for name, tensor in scene.items()}

    def run(geometry: dict[str, torch.Tensor], backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            render = renderer(**geometry, **cameras, colors=colors)[0]
        if backward:
            render.backward(weights)
            for leaf in (colors, *leaves.values()):
                leaf.grad = None

    detached = {name: leaf.detach() for name, leaf in leaves.items()}
    return (
        milliseconds(lambda: run(leaves, False), repeat, device),
        milliseconds(lambda: run(leaves, True), repeat, device),
        milliseconds(lambda: run(detached, True), repeat, device),
    )


def main() -> None:
    """Prints one row per scene and backend."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeat", type=int, default=9, help="timed calls; the median is printed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    renderers: list[tuple[str, Callable, str, int]] = [("CPU backend", rasterize, "cpu", arguments.repeat)]
    if torch.cuda.is_available():
        renderers.append((f"gsplat on {torch.cuda.get_device_name()}", rasterize, "cuda", arguments.repeat))
    else:
        renderers.append(("plain torch", oracle_rasterize, "cpu", min(arguments.repeat, 3)))
    print(f"torch {torch.__version__}, {arguments.threads} CPU threads, one view, median of {arguments.repeat} in ms\n")
    print("| Gaussians | size | channels | backend | forward | with full backward | with backward to colours only |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for number, width, height, channels in SCENES:
        for name, renderer, device, repeat in renderers:
            times = time_scene(renderer, number, width, height, channels, repeat, device)
            cells = [f"{number}", f"{width}x{height}", f"{channels}", name, *(f"{value:.1f}" for value in times)]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
