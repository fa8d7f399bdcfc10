"""What the student learns: features rendered from the scenes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.scenes import Scene, SceneBank
from fit3d_ns.features.correspondences import View
from fit3d_ns.features.grid import FeatureGrid
from fit3d_ns.rasterization import rasterize
from fit3d_ns.runs.bundle import SceneTensors


@dataclass(frozen=True)
class Targets:
    """Targets of V views of one scene and one size."""

    maps: Float[Tensor, "V C h w"]
    """Decoded features on the patch grid."""
    weights: Float[Tensor, "V h w"]
    """How much each patch counts, in [0, 1]."""


class TargetSource(Protocol):
    """Makes targets; a pure function of scene and views."""

    def make(self, scene: int, views: Sequence[int]) -> Targets:
        """Returns the targets of views of one size, on the device.

        Args:
            scene: Position of the scene.
            views: Positions of the views in it.
        """
        ...

    def needs(self, scene: int) -> bool:
        """Returns whether targets of a scene still take its tensors."""
        ...


def render_low(
    scene: SceneTensors,
    values: Float[Tensor, "N X"],
    viewmats: Float[Tensor, "V 4 4"],
    Ks: Float[Tensor, "V 3 3"],
    image_size: tuple[int, int],
    render_size: tuple[int, int],
    feature_grid: FeatureGrid,
    render_mode: str = "RGB",
) -> tuple[Float[Tensor, "V X H W"], Float[Tensor, "V 1 H W"]]:
    """Renders values of the Gaussians into views of one size, by a feature grid's rule.

    Args:
        scene: Geometry, on the device.
        values: What to blend, on a zero background, fp32.
        viewmats: World to camera.
        Ks: Intrinsics at ``image_size``.
        image_size: Height and width of the photos, pixels.
        render_size: Height and width of the render, pixels.
        feature_grid: The rule.
        render_mode: See `fit3d_ns.rasterization.rasterize`.

    Returns:
        The render and its opacity in [0, 1].
    """
    scale = torch.tensor([render_size[1] / image_size[1], render_size[0] / image_size[0], 1.0], device=Ks.device)
    render, alpha, _ = rasterize(
        means=scene.means,
        quats=scene.quats,
        scales=scene.scales,
        opacities=scene.opacities,
        colors=values,
        viewmats=viewmats,
        Ks=Ks * scale[:, None],
        width=render_size[1],
        height=render_size[0],
        tile_size=feature_grid.tile_size,
        rasterize_mode=feature_grid.rasterize_mode,
        render_mode=render_mode,  # type: ignore[arg-type]
    )
    return render.permute(0, 3, 1, 2), alpha.permute(0, 3, 1, 2)


def decode_views(
    low: Float[Tensor, "V D H W"],
    decoder: Float[Tensor, "C D 3 3"],
    feature_grid: FeatureGrid,
    grid: tuple[int, int],
) -> Float[Tensor, "V C h w"]:
    """Decodes rendered maps on the patch grid: `FeatureDecoder.decode_patches` for several views at once."""
    views, channels = low.shape[:2]
    # Sampling treats channels alike and apart, so views may stand in line with them.
    windows = feature_grid.windows(low.flatten(0, 1), grid).unflatten(0, (views, channels))
    return torch.matmul(decoder.flatten(1), windows.flatten(1, 2).flatten(2)).unflatten(2, grid)


def accumulation_weights(alpha: Float[Tensor, "V h w"], rule: str, min_accumulation: float) -> Float[Tensor, "V h w"]:
    """Returns how much patches of opacity ``alpha`` count; see `DistillConfig.accumulation`."""
    if rule == "ignore":
        return torch.ones_like(alpha)
    if rule == "weight":
        return alpha.clamp(0, 1)
    return (alpha >= min_accumulation).to(alpha.dtype)


class LiftedTargets:
    """Renders targets at the poses of the photos, by the rule that the scene was lifted with.

    Args:
        scenes: The scenes.
        bank: Where their Gaussians are.
        device: Where to render.
        accumulation: See `DistillConfig.accumulation`.
        min_accumulation: See `DistillConfig.min_accumulation`.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        bank: SceneBank,
        device: torch.device,
        accumulation: str,
        min_accumulation: float,
    ):
        self._scenes = scenes
        self._bank = bank
        self._device = device
        self._accumulation = accumulation
        self._min_accumulation = min_accumulation

    @torch.no_grad()
    def make(self, scene: int, views: Sequence[int]) -> Targets:
        """Renders, decodes and weighs; see `TargetSource.make`."""
        held, tensors = self._scenes[scene], self._bank.get(scene)
        info = held.info
        grid = info.patch_grid(views[0])
        photo = info.views[views[0]].photo
        size = (photo.height, photo.width)
        low, alpha = render_low(
            tensors,
            tensors.features.float(),
            held.cameras.viewmats[list(views)].to(self._device, non_blocking=True),
            held.cameras.Ks[list(views)].to(self._device, non_blocking=True),
            size,
            info.feature_grid.render_size(size, grid),
            info.feature_grid,
        )
        maps = decode_views(low, tensors.decoder, info.feature_grid, grid)
        opacity = F.adaptive_avg_pool2d(alpha, grid)[:, 0]
        weights = accumulation_weights(opacity, self._accumulation, self._min_accumulation)
        return Targets(maps, weights * mask_weights(held, views, grid, self._device))

    def needs(self, scene: int) -> bool:
        """Every render does; see `TargetSource.needs`."""
        return True

    @torch.no_grad()
    def surface(self, scene: int, view: int) -> View:
        """Returns a camera with the depth that the scene shows there, to match features between views."""
        held, tensors = self._scenes[scene], self._bank.get(scene)
        info = held.info
        photo, (rows, columns) = info.views[view].photo, info.patch_grid(view)
        viewmat = held.cameras.viewmats[view].to(self._device)
        intrinsics = held.cameras.Ks[view].to(self._device)
        depth, alpha = render_low(
            tensors,
            tensors.opacities[:, None],  # any value: only depth is asked for
            viewmat[None],
            intrinsics[None],
            (photo.height, photo.width),
            (rows * 8, columns * 8),
            info.feature_grid,
            render_mode="ED",
        )
        return View(viewmat, intrinsics, photo.width, photo.height, depth[0, 0], alpha[0, 0])


def mask_weights(scene: Scene, views: Sequence[int], grid: tuple[int, int], device: torch.device) -> Tensor:
    """Returns what masks leave valid of the patches of views of one size, [V, h, w], ones where there is no mask."""
    if not any(view in scene.patch_weights for view in views):
        return torch.ones(len(views), *grid, device=device)
    weights = torch.ones(len(views), *grid)
    for row, view in enumerate(views):
        if view in scene.patch_weights:
            weights[row] = scene.patch_weights[view]
    return weights.to(device, non_blocking=True)
