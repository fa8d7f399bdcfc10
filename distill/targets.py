"""What the student learns: features rendered from the scenes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from distill.scenes import Scene, SceneCache
from fit3d_ns.features.correspondences import SurfaceView
from fit3d_ns.features.rendering import decode_views, render_depth


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
        """Returns whether targets of a scene still take its tensors.

        Args:
            scene: Its number.
        """
        ...


def accumulation_weights(alpha: Float[Tensor, "V h w"], rule: str, min_accumulation: float) -> Float[Tensor, "V h w"]:
    """Returns how much patches of opacity ``alpha`` count; see `DistillConfig.accumulation`.

    Args:
        alpha: Opacity of rendered patches, in [0, 1].
        rule: ``ignore``, ``weight`` or ``drop``.
        min_accumulation: Least opacity that counts under ``drop``, in [0, 1].
    """
    if rule == "ignore":
        return torch.ones_like(alpha)
    if rule == "weight":
        return alpha.clamp(0, 1)
    return (alpha >= min_accumulation).to(alpha.dtype)


class LiftedTargets:
    """Renders targets at the poses of the photos, by the rule that the scene was lifted with.

    Args:
        scenes: As opened; a scene's number is its place in this list.
        scene_cache: Where their Gaussians are.
        device: Where to render.
        accumulation: See `DistillConfig.accumulation`.
        min_accumulation: See `DistillConfig.min_accumulation`.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        scene_cache: SceneCache,
        device: torch.device,
        accumulation: str,
        min_accumulation: float,
    ):
        self._scenes = scenes
        self._scene_cache = scene_cache
        self._device = device
        self._accumulation = accumulation
        self._min_accumulation = min_accumulation

    @torch.no_grad()
    def make(self, scene: int, views: Sequence[int]) -> Targets:
        """Renders, decodes and weighs; see `TargetSource.make`.

        Args:
            scene: Its number.
            views: Numbers of its views, all of one size.

        Returns:
            Maps [V, C, h, w] and weights [V, h, w].
        """
        held, tensors = self._scenes[scene], self._scene_cache.get(scene)
        info = held.info
        grid = info.patch_grid(views[0])
        photo = info.views[views[0]].photo
        size = (photo.height, photo.width)
        maps, alpha = decode_views(
            tensors.geometry,
            tensors.features.float(),
            tensors.decoder,
            held.cameras.viewmats[list(views)].to(self._device, non_blocking=True),
            held.cameras.Ks[list(views)].to(self._device, non_blocking=True),
            size,
            grid,
            info.feature_grid,
        )
        opacity = F.adaptive_avg_pool2d(alpha, grid)[:, 0]  # [V, h, w]
        weights = accumulation_weights(opacity, self._accumulation, self._min_accumulation)
        return Targets(maps, weights * mask_weights(held, views, grid, self._device))

    def needs(self, scene: int) -> bool:
        """Returns True: every render takes the scene's tensors.

        Args:
            scene: Its number.
        """
        return True

    @torch.no_grad()
    def surface(self, scene: int, view: int) -> SurfaceView:
        """Returns a camera with the depth that the scene shows there, to match features between views.

        Args:
            scene: Its number.
            view: Its number in the scene.
        """
        held, tensors = self._scenes[scene], self._scene_cache.get(scene)
        info = held.info
        photo, (rows, columns) = info.views[view].photo, info.patch_grid(view)
        viewmat = held.cameras.viewmats[view].to(self._device)
        intrinsics = held.cameras.Ks[view].to(self._device)
        size = (photo.height, photo.width)
        depth, alpha = render_depth(
            tensors.geometry, viewmat[None], intrinsics[None], size, (rows * 8, columns * 8), info.feature_grid
        )
        return SurfaceView(viewmat, intrinsics, photo.width, photo.height, depth[0, 0], alpha[0, 0])


def mask_weights(scene: Scene, views: Sequence[int], grid: tuple[int, int], device: torch.device) -> Tensor:
    """Returns what masks leave valid of the patches of views of one size, [V, h, w], ones where there is no mask.

    Args:
        scene: As opened.
        views: Numbers of its views.
        grid: Height h and width w, patches.
        device: Where the weights go.
    """
    if not any(view in scene.patch_weights for view in views):
        return torch.ones(len(views), *grid, device=device)
    weights = torch.ones(len(views), *grid)
    for row, view in enumerate(views):
        if view in scene.patch_weights:
            weights[row] = scene.patch_weights[view]
    return weights.to(device, non_blocking=True)
