"""What can be measured without labels: drift from the original, fidelity to the lifted targets, match between views."""

from collections.abc import Sequence
from pathlib import Path

import torch

from distill.evaluation import HeldOutViews
from distill.photo_store import PhotoStore
from distill.scenes import SceneCache, open_scenes
from distill.targets import LiftedTargets
from fit3d_ns.backbones import Backbone
from fit3d_ns.support.processes import World


class HeldOutScenes:
    """Held-out views of scenes with their lifted targets.

    Args:
        bundles: Of the scenes, all of one lift.
        original: The backbone that students start from.
        device: Where everything is.
        num_views: Most views of a scene.
        cache_dir: Of decoded photos.
    """

    def __init__(
        self, bundles: Sequence[Path], original: Backbone, device: torch.device, num_views: int, cache_dir: Path
    ) -> None:
        scenes = open_scenes(list(bundles), None)
        lifted = LiftedTargets(scenes, SceneCache(scenes, World(0, 1, device), "device"), device, "weight", 0.5)
        photos = PhotoStore(scenes, original.info.patch_size, device, cache_dir)
        photos.fill(show=False)
        self._views = [
            HeldOutViews(scenes, index, original, lifted, lifted, photos, num_views) for index in range(len(scenes))
        ]

    def measure(self, backbone: Backbone) -> dict[str, dict[str, float]]:
        """Measures a student on each scene.

        Args:
            backbone: In evaluation mode.

        Returns:
            By scene: ``drift``, the mean cosine of its features with the original's; ``cosine`` and ``l1`` to the
            lifted targets; ``match``, the share of points that features find again in another view.
        """
        measured = {views.scene.name: views.measure(views.maps(backbone)) for views in self._views}
        return {
            scene: {name.removeprefix("view_"): value for name, value in values.items()}
            for scene, values in measured.items()
        }
