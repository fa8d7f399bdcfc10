"""The pictures that a run's outputs hold beside rgb, depth and accumulation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from fit3d_ns.scenes.teacher_views import seen_from
from fit3d_ns.support.errors import UserError
from fit3d_ns.viewer.clusters import UNASSIGNED, assign_clusters
from fit3d_ns.viewer.pictures import heat_over, label_colors, luminance, over, resize
from fit3d_ns.viewer.selection import similarity

if TYPE_CHECKING:
    from fit3d_ns.model import Fit3DSplatModel
    from fit3d_ns.viewer.feature_view import FeatureView

_SMALLEST_SIDE = 224
"""Pictures smaller than this, as while the camera moves, show features at this size all the same."""
_THIN = 1e-3
"""Accumulation below which nothing is there."""


@dataclass(frozen=True)
class Frame:
    """A camera and what splatfacto renders for it.

    Attributes:
        view: What pictures share.
        model: The scene.
        camera: One camera.
        rgb: [H, W, 3] in [0, 1].
        background: [H, W, 3] in [0, 1].
        accumulation: [H, W, 1] in [0, 1].
        visible: Crop box or selection; None for the whole scene.
    """

    view: "FeatureView"
    model: "Fit3DSplatModel"
    camera: Cameras
    rgb: Float[Tensor, "H W 3"]
    background: Float[Tensor, "H W 3"]
    accumulation: Float[Tensor, "H W 1"]
    visible: Any

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.rgb.shape[0], self.rgb.shape[1]

    def feature_size(self) -> tuple[int, int]:
        """Returns the size at which the feature grid's rule renders a photo like this."""
        factor = max(1.0, _SMALLEST_SIDE / min(self.size))
        height, width = (round(side * factor) for side in self.size)
        return self.model.feature_grid.render_size((height, width), self.model.patch_grid(height, width))

    def render(
        self, values: Float[Tensor, "N X"], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "X h w"], Float[Tensor, "1 h w"]]:
        """Renders values as features are rendered, divided by accumulation, and accumulation."""
        self.model.set_crop(self.visible)
        maps, alpha = self.model.render_low(self.camera, values.contiguous(), size)
        return torch.where(alpha > _THIN, maps / alpha.clamp_min(_THIN), 0.0), alpha

    def nothing_visible(self) -> bool:
        """Whether everything is cropped away."""
        return self.visible is not None and not bool(self.visible.within(self.model.means).any())


def feature_pca(frame: Frame) -> Float[Tensor, "H W 3"]:
    """Draws decoded features by their principal components."""
    colors, size = frame.view.colors(), frame.feature_size()
    # Colours are linear in features: each tap of the decoder that is used takes three channels instead of C.
    used = [(y, x) for y in range(3) for x in range(3) if bool(colors.kernel[:, :, y, x].any())] or [(1, 1)]
    taps = torch.cat([colors.kernel[:, :, y, x] for y, x in used])
    maps, alpha = frame.render(frame.view.features @ taps.T, size)
    padded = F.pad(maps[None], (1, 1, 1, 1), mode="replicate")[0].unflatten(0, (-1, 3))
    shifted = [padded[i][:, y : y + size[0], x : x + size[1]] for i, (y, x) in enumerate(used)]
    picture = torch.stack(shifted).sum(0) + colors.bias[:, None, None]
    return _before_background(frame, resize(picture, frame.size), alpha)


def feature_pca_low(frame: Frame) -> Float[Tensor, "H W 3"]:
    """Draws the Gaussians' own features, at full size and without the decoder's window, in the same colours."""
    colors = frame.view.colors()
    maps, alpha = frame.render(frame.view.features @ colors.kernel.sum((2, 3)).T, frame.size)
    return _before_background(frame, maps.permute(1, 2, 0) + colors.bias, alpha)


def similarity_to_click(frame: Frame) -> Float[Tensor, "H W 3"]:
    """Draws the cosine to the clicked point where it reaches the threshold; elsewhere the photo in shades of grey."""
    photo = luminance(frame.rgb)
    query, threshold = frame.view.query, frame.view.threshold
    if query is None:
        raise UserError("press `Click to query` in the control panel, then click on the scene.")
    space = frame.view.space()
    maps, alpha = frame.render(space.coordinates(frame.view.features), frame.feature_size())
    cosines = similarity(maps.permute(1, 2, 0), query, space)
    values, alpha = resize(cosines[None], frame.size)[..., 0], resize(alpha, frame.size)[..., 0]
    similar = (values >= threshold) & (alpha > 0.5)
    return torch.where(similar[..., None], heat_over(frame.rgb, values), photo)


def teacher_pca(frame: Frame) -> Float[Tensor, "H W 3"]:
    """Draws the teacher's own map of the photo that was taken where the camera stands, in the same colours."""
    if frame.view.teacher is None:
        raise UserError("this model has no scene.")
    index = frame.view.teacher.standing_at(frame.camera)
    if index is None:
        raise UserError(
            "the teacher saw training views only: click on one of the cameras in the scene to stand there, then press "
            "`Hide Train Cams`."
        )
    view, basis = frame.view.teacher.view(index), frame.view.colors().basis
    model = frame.model
    photo, camera = model.view_matrices(view.camera), model.view_matrices(frame.camera)
    places = seen_from(view.image_size, photo, frame.size, camera)
    colors = basis.to_rgb(view.patch_tokens.permute(1, 2, 0)).permute(2, 0, 1)
    picture = F.grid_sample(
        colors[None], places[None].to(colors), mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    inside = (places.abs() <= 1).all(-1, keepdim=True)
    return over(picture.permute(1, 2, 0), inside.to(colors), 0.25 * luminance(frame.rgb))


def view_variance(frame: Frame) -> Float[Tensor, "H W 3"]:
    """Draws how far the teacher's views disagree about what is seen, over the photo in shades of grey."""
    disagreement = frame.view.disagreement()
    maps, alpha = frame.render(disagreement.values[:, None], frame.size)
    heat = heat_over(frame.rgb, disagreement.shade(maps[0]), "inferno")
    return _before_background(frame, heat, alpha)


def clusters(frame: Frame) -> Float[Tensor, "H W 3"]:
    """Draws the cluster that most of what is seen at a pixel belongs to."""
    space = frame.view.space()
    centres = space.narrow(frame.view.centres())
    labels = assign_clusters(space.coordinates(frame.view.features), centres)
    # One channel a cluster; the last one for Gaussians without a feature.
    members = F.one_hot(torch.where(labels == UNASSIGNED, len(centres), labels), len(centres) + 1)
    maps, alpha = frame.render(members.to(frame.rgb), frame.size)
    winners = maps.argmax(0)
    colors = label_colors(torch.where(winners == len(centres), UNASSIGNED, winners)).to(frame.rgb)
    return _before_background(frame, colors * (0.6 + 0.4 * luminance(frame.rgb)), alpha)


PICTURES: dict[str, Callable[[Frame], Float[Tensor, "H W 3"]]] = {
    "feature_pca": feature_pca,
    "feature_pca_low": feature_pca_low,
    "similarity": similarity_to_click,
    "teacher_pca": teacher_pca,
    "view_variance": view_variance,
    "clusters": clusters,
}
"""What draws each output, by its name."""


def _before_background(
    frame: Frame, picture: Float[Tensor, "H W 3"], alpha: Float[Tensor, "1 h w"]
) -> Float[Tensor, "H W 3"]:
    picture = picture.nan_to_num(0.5, 0.5, 0.5).clamp(0, 1)
    return over(picture, resize(alpha, frame.size).clamp(0, 1), frame.background)
