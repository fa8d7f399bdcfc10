"""Targets without 3D: the teacher's own maps of the photos, which show what fine-tuning alone brings."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from distill.config import TargetKind
from distill.photo_store import PhotoStore
from distill.scenes import Scene, SceneCache
from distill.targets import LiftedTargets, Targets, mask_weights
from fit3d_ns.backbones import Backbone
from fit3d_ns.features.metrics import feature_cosine
from fit3d_ns.support.samples import evenly_spaced

NUM_SHIFTS = 8
"""Shifted views of a photo whose maps ``control-shift`` averages."""
_MATCHED_VIEWS = 8
"""Views of a scene on which the blur is matched to the lifted targets."""
_HALVINGS = 12
"""Of the interval in which the blur lies: to within a thousandth of its largest."""


class ControlTargets:
    """The teacher's own maps of the photos, projected on the directions that the scene's decoder can express.

    The same photos, the same basis, and no 3D: what a student gains here, it does not owe to lifting. Lifted targets
    are smoother than the teacher's maps, and an average over many views of each point; two kinds imitate that within
    one photo: ``control-blur`` blurs the maps until they are as far from the teacher's as the lifted targets are (in
    mean cosine, scene by scene), ``control-shift`` averages the maps of shifted photos.

    Args:
        kind: Which of the three.
        scenes: As opened; a scene's number is its place in this list.
        scene_cache: Where their decoders are.
        photos: Where the photos are.
        teacher: The scenes' teacher, frozen.
        lifted: The targets that the blur is matched to.
        device: Where to compute.
    """

    def __init__(
        self,
        kind: TargetKind,
        scenes: Sequence[Scene],
        scene_cache: SceneCache,
        photos: PhotoStore,
        teacher: Backbone,
        lifted: LiftedTargets,
        device: torch.device,
    ):
        self._kind = kind
        self._scenes = scenes
        self._scene_cache = scene_cache
        self._photos = photos
        self._teacher = teacher
        self._lifted = lifted
        self._device = device
        self._bases: dict[int, Float[Tensor, "C D"]] = {}
        self.blurs: dict[int, float] = {}
        """Standard deviation of each scene's blur, in patches, as far as it was needed so far."""

    @torch.no_grad()
    def make(self, scene: int, views: Sequence[int]) -> Targets:
        """Sees the photos, projects and blurs; see `TargetSource.make`.

        Args:
            scene: Its number.
            views: Numbers of its views, all of one size.

        Returns:
            Maps [V, C, h, w] and weights [V, h, w].
        """
        maps = self._project(scene, self._see(scene, views))
        weights = mask_weights(self._scenes[scene], views, _grid(maps), self._device)
        if self._kind == "control-blur":
            if scene not in self.blurs:
                self.blurs[scene] = self._match_blur(scene)
            maps = blur(maps, weights, self.blurs[scene])
        return Targets(maps, weights)

    def needs(self, scene: int) -> bool:
        """Returns whether a scene's decoder, or its blur, is still to be read; see `TargetSource.needs`.

        Args:
            scene: Its number.
        """
        return scene not in self._bases or (self._kind == "control-blur" and scene not in self.blurs)

    def _see(self, scene: int, views: Sequence[int]) -> Float[Tensor, "V C h w"]:
        images = self._photos.get([(scene, view) for view in views])
        usual = "bf16" if self._device.type == "cuda" else "fp32"
        precision = self._scenes[scene].info.teacher_precision or usual  # as the maps that were lifted
        with torch.autocast(self._device.type, torch.bfloat16, enabled=precision == "bf16"):
            if self._kind == "control-shift":
                return shifted_mean(self._teacher, images)
            return self._teacher(images.float() / 255.0).patch_tokens.float()

    def _project(self, scene: int, maps: Float[Tensor, "V C h w"]) -> Float[Tensor, "V C h w"]:
        if scene not in self._bases:
            self._bases[scene] = low_dimensional_basis(self._scene_cache.get(scene).decoder)
        basis = self._bases[scene]  # [C, D]
        return torch.matmul(basis, torch.matmul(basis.T, maps.flatten(2))).view_as(maps)

    def _match_blur(self, scene: int) -> float:
        """Returns the blur, in patches, at which the maps' mean cosine to the teacher's is the lifted targets'."""
        views = evenly_spaced(self._scenes[scene].info.indices("train"), _MATCHED_VIEWS)
        seen = []  # what the teacher says, the same in the basis, how much patches count
        wanted = 0.0
        for view in views:
            lifted = self._lifted.make(scene, [view])
            if bool(lifted.weights.any()):
                own = self._see(scene, [view])
                seen.append((own, self._project(scene, own), lifted.weights))
                wanted += float(feature_cosine(lifted.maps[0].float(), own[0], lifted.weights[0]))
        if not seen:
            return 0.0
        low, high = 0.0, float(max(max(_grid(own)) for own, _, _ in seen))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            blurred = [(own[0], blur(maps, weights, middle)[0], weights[0]) for own, maps, weights in seen]
            found = sum(float(feature_cosine(maps, own, weights)) for own, maps, weights in blurred)
            low, high = (middle, high) if found > wanted else (low, middle)
        return low


def low_dimensional_basis(decoder: Float[Tensor, "C D 3 3"]) -> Float[Tensor, "C R"]:
    """Returns orthonormal directions that span what a decoder makes of features that do not change between pixels.

    Args:
        decoder: Kernel of the scene's decoder. For a lifted scene these directions are its principal components.

    Returns:
        R directions, at most D; fewer where the decoder uses fewer.
    """
    left, strengths, _ = torch.linalg.svd(decoder.sum((2, 3)).double(), full_matrices=False)
    return left[:, strengths > strengths[0] * 1e-6].float()


def blur(maps: Float[Tensor, "V C h w"], weights: Float[Tensor, "V h w"], sigma: float) -> Float[Tensor, "V C h w"]:
    """Blurs maps by a Gaussian over the patches that count.

    Args:
        maps: Features on the patch grid.
        weights: How much each patch counts, in [0, 1]; what is masked out does not leak into its neighbours.
        sigma: Standard deviation, patches; 0 for none.

    Returns:
        The blurred maps; zero where nothing that counts is near.
    """
    if sigma <= 0:
        return maps
    # Reflected at the border, so at most the map's own size; beyond three deviations there is nothing.
    radius = [max(min(math.ceil(3 * sigma), side - 1), 0) for side in _grid(maps)[::-1]]
    size = [2 * side + 1 for side in radius]
    from torchvision.transforms.v2.functional import gaussian_blur  # torchvision takes seconds to import

    counted = gaussian_blur(weights[:, None], size, [sigma, sigma])  # [V, 1, h, w]
    return gaussian_blur(maps * weights[:, None], size, [sigma, sigma]) / counted.clamp_min(1e-6)


def shifted_mean(teacher: Backbone, images: UInt8[Tensor, "V 3 H W"]) -> Float[Tensor, "V C h w"]:
    """Averages a teacher's maps of shifted photos, each brought back to the patches of the photo itself.

    The shifts lie evenly within one patch to every side, so each patch is seen cut in many ways and at other places
    of the position embedding.

    Args:
        teacher: The backbone.
        images: Photos.

    Returns:
        The mean map.
    """
    patch = teacher.info.patch_size
    total = None
    for dx, dy in _shifts(patch):
        padded = F.pad(images.float() / 255.0, [patch] * 4, mode="replicate")
        height, width = images.shape[-2:]
        shifted = padded[..., patch + dy : patch + dy + height, patch + dx : patch + dx + width]
        maps = teacher(shifted).patch_tokens.float()
        h, w = _grid(maps)
        x = (torch.arange(w, device=maps.device) + 0.5 - dx / patch) / w * 2 - 1
        y = (torch.arange(h, device=maps.device) + 0.5 - dy / patch) / h * 2 - 1
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None].expand(len(maps), -1, -1, -1)
        back = F.grid_sample(maps, places, mode="bilinear", padding_mode="border", align_corners=False)
        total = back if total is None else total + back
    assert total is not None
    return total / NUM_SHIFTS


def _shifts(patch: int) -> list[tuple[int, int]]:
    """Pixels to the right and down: `NUM_SHIFTS` points spread over a square of two patches (Hammersley's set)."""
    shifts = []
    for index in range(NUM_SHIFTS):
        reversed_bits = int(f"{index:03b}"[::-1], 2) / NUM_SHIFTS
        x, y = (index + 0.5) / NUM_SHIFTS, reversed_bits + 0.5 / NUM_SHIFTS
        shifts.append((round(patch * (2 * x - 1)), round(patch * (2 * y - 1))))
    return shifts


def _grid(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]
