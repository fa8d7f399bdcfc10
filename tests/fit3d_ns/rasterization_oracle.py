"""The rasterisation rules in plain torch: dense per tile, readable rather than fast, differentiated by autograd.

Written independently of the backends that it judges: covariances as 3x3 matrices, blending as a cumulative product
over all Gaussians of a tile.
"""

from typing import Any

import torch
from torch import Tensor


def oracle_rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    eps2d: float = 0.3,
    tile_size: int = 16,
    render_mode: str = "RGB",
    rasterize_mode: str = "classic",
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Renders colors [N, D] or [V, N, D]; names and meanings as in `fit3d_ns.rasterization.rasterize`.

    Returns:
        Render [V, H, W, X], alpha [V, H, W, 1] and a dictionary: ``radii`` [V, N], and ``pixel_means``, a list of
        (view, indices of Gaussians [n], their means2d repeated for each pixel of a tile [n, pixels, 2]) whose
        gradients, once retained, are those of single pixels.
    """
    renders, alphas, radii, pixel_means = [], [], [], []
    for view, (viewmat, K) in enumerate(zip(viewmats, Ks)):
        ids, means2d, depths, conics, compensations, radius = _project(
            means, quats, scales, viewmat, K, width, height, near_plane, far_plane, eps2d
        )
        radii.append(torch.zeros(len(means), dtype=torch.int32).index_put((ids,), radius.to(torch.int32)))
        opacity = opacities[ids] * (compensations if rasterize_mode == "antialiased" else 1)
        color = (colors if colors.dim() == 2 else colors[view])[ids]
        if render_mode != "RGB":
            color = torch.cat([color, depths[:, None]], -1) if "RGB" in render_mode else depths[:, None]
        render = means.new_zeros(height, width, color.shape[-1])
        alpha = means.new_zeros(height, width, 1)
        near_to_far = torch.sort(depths, stable=True).indices
        for top in range(0, height, tile_size):
            for left in range(0, width, tile_size):
                meets = near_to_far[_meets_tile(means2d, radius, left, top, tile_size)[near_to_far]]
                bottom, right = min(top + tile_size, height), min(left + tile_size, width)
                y, x = torch.meshgrid(torch.arange(top, bottom), torch.arange(left, right), indexing="ij")
                pixels = torch.stack([x.reshape(-1), y.reshape(-1)], -1).to(means.dtype) + 0.5
                tile_means = means2d[meets][:, None].expand(-1, len(pixels), -1)
                pixel_means.append((view, ids[meets], tile_means))
                tile_color, tile_alpha = _blend(tile_means - pixels, conics[meets], opacity[meets], color[meets])
                render = render.index_put((y, x), tile_color.reshape(*y.shape, -1))
                alpha = alpha.index_put((y, x), tile_alpha.reshape(*y.shape, 1))
        if "ED" in render_mode:
            render = torch.cat([render[..., :-1], render[..., -1:] / alpha.clamp_min(1e-10)], -1)
        renders.append(render)
        alphas.append(alpha)
    info = {"radii": torch.stack(radii), "pixel_means": pixel_means}
    return torch.stack(renders), torch.stack(alphas), info


def _project(means, quats, scales, viewmat, K, width, height, near_plane, far_plane, eps2d):
    in_camera = means @ viewmat[:3, :3].T + viewmat[:3, 3]
    ids = torch.nonzero((in_camera[:, 2] >= near_plane) & (in_camera[:, 2] <= far_plane))[:, 0]
    x, y, z = in_camera[ids].unbind(-1)
    axes = viewmat[:3, :3] @ _rotations(quats[ids]) @ torch.diag_embed(scales[ids])
    covariance = axes @ axes.mT
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    margin_x, margin_y = 0.3 * (0.5 * width / fx), 0.3 * (0.5 * height / fy)
    bounded_x = z * torch.clamp(x / z, -(cx / fx + margin_x), (width - cx) / fx + margin_x)
    bounded_y = z * torch.clamp(y / z, -(cy / fy + margin_y), (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack(
        [
            torch.stack([fx / z, zero, -fx * bounded_x / z**2], -1),
            torch.stack([zero, fy / z, -fy * bounded_y / z**2], -1),
        ],
        -2,
    )
    sharp = jacobian @ covariance @ jacobian.mT
    blurred = sharp + eps2d * torch.eye(2, dtype=means.dtype)
    compensations = torch.sqrt(torch.linalg.det(sharp) / torch.linalg.det(blurred))
    inverse = torch.linalg.inv(blurred)
    conics = torch.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], -1)
    means2d = torch.stack([fx * x / z + cx, fy * y / z + cy], -1)
    with torch.no_grad():
        half_trace = 0.5 * (blurred[:, 0, 0] + blurred[:, 1, 1])
        spread = torch.sqrt((half_trace**2 - torch.linalg.det(blurred)).clamp_min(0.01))
        radius = torch.ceil(3 * torch.sqrt(half_trace + spread))
        size = torch.tensor([width, height], dtype=means.dtype)
        keep = ((means2d + radius[:, None] > 0) & (means2d - radius[:, None] < size)).all(-1)
    return ids[keep], means2d[keep], z[keep], conics[keep], compensations[keep], radius[keep]


def _rotations(quats: Tensor) -> Tensor:
    w, x, y, z = (quats / quats.norm(dim=-1, keepdim=True)).unbind(-1)
    zero = torch.zeros_like(w)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
    return torch.eye(3, dtype=quats.dtype) + 2 * w[:, None, None] * cross + 2 * cross @ cross  # Rodrigues


def _meets_tile(means2d: Tensor, radius: Tensor, left: int, top: int, tile_size: int) -> Tensor:
    low, high = (means2d - radius[:, None]) / tile_size, (means2d + radius[:, None]) / tile_size
    tile = torch.tensor([left // tile_size, top // tile_size])
    return ((torch.floor(low) <= tile) & (tile < torch.ceil(high))).all(-1)


def _blend(delta: Tensor, conics: Tensor, opacity: Tensor, color: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets [n, P, 2] near to far, conics [n, 3], opacity [n], color [n, X] -> color [P, X], alpha [P, 1]."""
    dx, dy = delta.unbind(-1)
    a, b, c = conics[:, None].unbind(-1)
    sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
    alpha = torch.clamp_max(opacity[:, None] * torch.exp(-sigma), 0.999)
    alpha = torch.where((sigma >= 0) & (alpha >= 1 / 255), alpha, 0)
    after = torch.cumprod(1 - alpha, dim=0)
    before = torch.cat([torch.ones_like(after[:1]), after[:-1]])
    weight = torch.where(after > 1e-4, alpha * before, 0)  # the first to go below closes the pixel for all behind
    return weight.mT @ color, weight.sum(0)[:, None]


def one_radius(info: dict[str, Any]) -> Tensor:
    """The radii [V, N] of a renderer's info, which has them as [V, N, 2] with gsplat 1.5 and later."""
    radii = info["radii"]
    if radii.dim() == 2:
        return radii
    assert torch.equal(radii[..., 0], radii[..., 1])
    return radii[..., 0]


def random_scene(
    number: int,
    views: int,
    width: int,
    height: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    size: float = 0.2,
) -> dict[str, Any]:
    """Geometry and cameras of a scene seen from the front; about a tenth is behind a camera or off the image.

    Args:
        number: N
        views: V
        width: Image width in pixels.
        height: Image height in pixels.
        seed: Of the generator; the same on every device.
        dtype: Of the tensors.
        device: Of the tensors.
        size: Median standard deviation of the Gaussians in world units, in a scene about 4 wide.

    Returns:
        Keyword arguments: means, quats, scales, opacities, viewmats, Ks, width, height.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    depth = uniform(number) * 6 + 2
    sideways = (uniform(number, 2) - 0.5) * torch.tensor([1.2, 1.2 * height / width], dtype=torch.float64)
    means = torch.cat([sideways * depth[:, None], depth[:, None]], dim=1)
    means[::17, 2] *= -1
    opacities = torch.sigmoid(1.5 * normal(number))
    opacities[::11] = 1.0  # reaches the bound on alpha
    viewmats = torch.eye(4, dtype=torch.float64).repeat(views, 1, 1)
    for v in range(views):
        angle = torch.tensor(0.15 * v, dtype=torch.float64)
        viewmats[v, 0, 0] = viewmats[v, 2, 2] = torch.cos(angle)
        viewmats[v, 0, 2], viewmats[v, 2, 0] = -torch.sin(angle), torch.sin(angle)
        viewmats[v, :3, 3] = torch.tensor([0.1 * v, -0.05 * v, 0.2 * v], dtype=torch.float64)
    K = torch.tensor([[0.9 * width, 0, 0.48 * width], [0, 0.95 * width, 0.53 * height], [0, 0, 1]])
    tensors = {
        "means": means,
        "quats": normal(number, 4),
        "scales": size * torch.exp(0.6 * normal(number, 3)),
        "opacities": opacities,
        "viewmats": viewmats,
        "Ks": K.repeat(views, 1, 1),
    }
    moved = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    return {**moved, "width": width, "height": height}
