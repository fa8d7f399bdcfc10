"""One rasterisation for both devices, with gsplat's signature."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.support.errors import UserError

RENDER_MODES = ("RGB", "ED", "RGB+ED")
RASTERIZE_MODES = ("classic", "antialiased")


def rasterize(
    means: Float[Tensor, "N 3"],
    quats: Float[Tensor, "N 4"],
    scales: Float[Tensor, "N 3"],
    opacities: Float[Tensor, "N"],
    colors: Float[Tensor, "*channels"],
    viewmats: Float[Tensor, "V 4 4"],
    Ks: Float[Tensor, "V 3 3"],
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,
    sh_degree: int | None = None,
    packed: bool = False,
    tile_size: int = 16,
    render_mode: Literal["RGB", "ED", "RGB+ED"] = "RGB",
    sparse_grad: bool = False,
    absgrad: bool = False,
    rasterize_mode: Literal["classic", "antialiased"] = "classic",
    channel_chunk: int | None = None,
) -> tuple[Float[Tensor, "V H W X"], Float[Tensor, "V H W 1"], dict[str, Any]]:
    """Rasterises N Gaussians into V pinhole views: with gsplat on CUDA, with the CPU backend otherwise.

    Keyword names and meanings are those of ``gsplat.rendering.rasterization``. Differentiable in everything but
    ``Ks``. On the CPU a gradient that nobody asks for is not computed: with detached geometry the backward pass only
    sums colours.

    Args:
        means: Centres in world coordinates. [N, 3]
        quats: Rotations as wxyz quaternions of any length but zero. [N, 4]
        scales: Standard deviations along the Gaussian's axes, world units, positive. [N, 3]
        opacities: In [0, 1]. [N]
        colors: Without ``sh_degree`` any number D of values per Gaussian, [N, D] or [V, N, D]; with it, coefficients
            of spherical harmonics, [N, K, 3] or [V, N, K, 3].
        viewmats: World to camera, OpenCV axes. [V, 4, 4]
        Ks: Intrinsics in pixels; the centre of the first pixel is at (0.5, 0.5). [V, 3, 3]
        width: Image width W in pixels.
        height: Image height H in pixels.
        near_plane: Nearer Gaussians are left out, world units.
        far_plane: Farther Gaussians are left out, world units.
        eps2d: Blur added to the projected covariance, pixels squared.
        sh_degree: Degree of the spherical harmonics to use, 0 to 4, or None for plain colours.
        packed: gsplat's packed layout; the CPU backend has one layout, the dense one.
        tile_size: Side of a tile in pixels. 16 by default; 4 is faster on CUDA for renders of few tiles.
        render_mode: "RGB" for the colours on a zero background, "ED" for expected depth (accumulated depth over
            alpha), "RGB+ED" for colours with expected depth as the last channel.
        sparse_grad: gsplat's sparse gradients, only with ``packed``; always dense on the CPU.
        absgrad: Sets ``info["means2d"].absgrad`` in the backward pass: gradients summed by absolute value over pixels.
            gsplat sets it anew in each launch: above 65 channels on CUDA it is that of one launch only.
        rasterize_mode: "antialiased" scales opacities down by what ``eps2d`` adds to small Gaussians.
        channel_chunk: Channels per launch on CUDA; by default one launch up to 65 channels, then launches of 64. The
            CPU backend always blends all channels in one pass.

    Returns:
        Render [V, H, W, X] (X = D, 1, or D + 1), alpha [V, H, W, 1] in [0, 1], and gsplat's dictionary of
        intermediate results: ``means2d`` [V, N, 2] (``retain_grad`` works on it), ``radii`` (0 where culled; [V, N],
        or [V, N, 2] with gsplat 1.5 and later), ``depths`` [V, N], ``conics`` [V, N, 3], ``opacities`` [V, N],
        ``width``, ``height``, ``n_cameras``, ``tile_size``, ``tile_width``, ``tile_height``; on CUDA also gsplat's tile
        lists.

    Raises:
        ValueError: A shape, dtype, device or mode is wrong.
        UserError: On CUDA, gsplat's kernels cannot be loaded.
    """
    _check_arguments(means, quats, scales, opacities, colors, viewmats, Ks, sh_degree)
    if render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode {render_mode!r} is none of {RENDER_MODES}")
    if rasterize_mode not in RASTERIZE_MODES:
        raise ValueError(f"rasterize_mode {rasterize_mode!r} is none of {RASTERIZE_MODES}")
    arguments: dict[str, Any] = {
        "means": means,
        "quats": quats,
        "scales": scales,
        "opacities": opacities,
        "colors": colors,
        "viewmats": viewmats,
        "Ks": Ks,
        "width": width,
        "height": height,
        "near_plane": near_plane,
        "far_plane": far_plane,
        "eps2d": eps2d,
        "sh_degree": sh_degree,
        "tile_size": tile_size,
        "render_mode": render_mode,
        "absgrad": absgrad,
        "rasterize_mode": rasterize_mode,
    }
    # Imported here: gsplat and numba each take about a second, and only one of them is ever needed.
    if means.device.type == "cuda":
        from fit3d_ns.rasterization.cuda import rasterize_on_cuda

        return rasterize_on_cuda(packed=packed, sparse_grad=sparse_grad, channel_chunk=channel_chunk, **arguments)
    if means.device.type == "cpu":
        from fit3d_ns.rasterization.cpu import rasterize_on_cpu

        return rasterize_on_cpu(**arguments)
    raise ValueError(f"rasterisation runs on cuda or cpu, not on {means.device.type}")


def check_backend(device: torch.device) -> None:
    """Checks, before any long work, that `rasterize` can run on a device, and imports and compiles what it takes.

    So nothing of it is left to the first picture: nerfstudio's viewer ends a render that a newer camera makes
    superfluous at any line, also inside an import, which then stays half done.

    Args:
        device: Where training or rendering will run.

    Raises:
        UserError: The device is neither the CPU nor a CUDA device of this machine, or gsplat's kernels are missing.
    """
    if device.type == "cpu":
        from fit3d_ns.rasterization import cpu  # noqa: F401
        from fit3d_ns.rasterization.kernel_runner import compile_kernels

        compile_kernels(torch.float32)
        return
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UserError(
            f"Gaussians cannot be rendered on the device `{device.type}` of this machine: use --machine.device-type "
            "cpu, or cuda with a CUDA build of torch and an NVIDIA GPU."
        )
    from fit3d_ns.rasterization.cuda import load_gsplat

    load_gsplat()


def _check_arguments(means, quats, scales, opacities, colors, viewmats, Ks, sh_degree) -> None:
    n, v = len(means), len(viewmats)
    tensors = {"means": means, "quats": quats, "scales": scales, "opacities": opacities, "viewmats": viewmats, "Ks": Ks}
    shapes = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,), "viewmats": (v, 4, 4)}
    for name, shape in {**shapes, "Ks": (v, 3, 3)}.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has the shape {tuple(tensors[name].shape)} instead of {shape}")
    if v == 0:
        raise ValueError("there is no view to render")
    per_gaussian = 1 if sh_degree is None else 2  # dimensions that follow N
    leading = tuple(colors.shape[: colors.dim() - per_gaussian])
    if leading not in ((n,), (v, n)) or 0 in colors.shape[-per_gaussian:]:
        wanted = "[N, D] or [V, N, D]" if sh_degree is None else "[N, K, 3] or [V, N, K, 3]"
        raise ValueError(f"colors has the shape {tuple(colors.shape)} instead of {wanted} with N = {n}, V = {v}")
    if sh_degree is not None and not (0 <= sh_degree <= 4 and colors.shape[-1] == 3):
        raise ValueError("spherical harmonics need 3 colour channels and a degree from 0 to 4")
    if sh_degree is not None and (sh_degree + 1) ** 2 > colors.shape[-2]:
        raise ValueError(f"sh_degree {sh_degree} needs {(sh_degree + 1) ** 2} coefficients, not {colors.shape[-2]}")
    if any(tensor.dtype != means.dtype or tensor.device != means.device for tensor in (*tensors.values(), colors)):
        raise ValueError("all tensors must have the dtype and the device of means")
    if means.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"means must be float32 or float64, not {means.dtype}")
