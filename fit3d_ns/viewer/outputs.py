"""What a model's outputs hold beside rgb, depth and accumulation: pictures of its features, drawn when looked at."""

import logging
from collections import UserDict
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from fit3d_ns.scenes.teacher_views import seen_from
from fit3d_ns.support.errors import UserError
from fit3d_ns.viewer.clusters import UNASSIGNED, assign_clusters
from fit3d_ns.viewer.drawing import heat_over, label_colors, lettering, luminance, over, resize
from fit3d_ns.viewer.feature_view import FeatureView
from fit3d_ns.viewer.selection import similarity

_LOGGER = logging.getLogger(__name__)

_SMALLEST_SIDE = 224
"""Pictures smaller than this, as while the camera moves, show features at this size all the same."""
_THIN = 1e-3
"""Accumulation below which nothing is there."""


class LazyOutputs(UserDict):
    """One camera's outputs: splatfacto's, and `PICTURES`, which are drawn when they are read, once.

    Every output of a picture is [H, W, 3], finite, in [0, 1], of the size of ``rgb``.

    Args:
        view: What is looked at.
        camera: One camera.
        outputs: Of splatfacto for it; ``background`` is brought to the picture's size.
        crop: Crop box or selection that they were rendered with; None for the whole scene.
    """

    def __init__(self, view: FeatureView, camera: Cameras, outputs: dict[str, Tensor], crop: Any) -> None:
        background = outputs["background"].expand_as(outputs["rgb"])
        super().__init__({**outputs, "background": background, **dict.fromkeys(PICTURES)})
        self.view, self.model, self.camera = view, view.model, camera
        self._crop = crop

    def __getitem__(self, name: str) -> Tensor:
        if self.data[name] is None:
            self.data[name] = self._draw(name)
        return self.data[name]

    def draw_for_browser(self, shown: Collection[str | None]) -> None:
        """Draws the pictures that a browser shows, and makes all others grey.

        nerfstudio holds the lock that keeps training away only while outputs are computed, not while they are read; and
        it never starts a browser's thread again that an exception ended.

        Args:
            shown: Names of outputs.
        """
        from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException

        grey = self["rgb"].new_full((1, 1, 3), 0.5).expand_as(self["rgb"])
        for name in PICTURES:
            try:
                self.data[name] = self._draw(name) if name in shown else grey
            except IOChangeException:  # nerfstudio's own: a newer camera makes this picture superfluous
                raise
            except Exception as error:
                sentence = f"{name} cannot be drawn ({type(error).__name__}: {error})."
                if sentence not in _REPORTED:
                    _REPORTED.add(sentence)
                    _LOGGER.exception(sentence)
                self.data[name] = lettering(sentence, self["rgb"])

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the pictures."""
        return self["rgb"].shape[0], self["rgb"].shape[1]

    def feature_size(self) -> tuple[int, int]:
        """Returns the size at which the feature grid's rule renders a photo like this."""
        factor = max(1.0, _SMALLEST_SIDE / min(self.size))
        height, width = (round(side * factor) for side in self.size)
        return self.model.feature_grid.render_size((height, width), self.model.patch_grid(height, width))

    def render(
        self, values: Float[Tensor, "N X"], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "X h w"], Float[Tensor, "1 h w"]]:
        """Renders values as features are rendered, divided by accumulation, and accumulation.

        Args:
            values: [N, X] one row per Gaussian.
            size: Height h and width w of the maps in pixels.

        Returns:
            Maps [X, h, w] and accumulation [1, h, w] in [0, 1].
        """
        maps, alpha = self.model.render_low(self.camera, values.contiguous(), size, self._visible())
        return torch.where(alpha > _THIN, maps / alpha.clamp_min(_THIN), 0.0), alpha

    def _visible(self) -> Bool[Tensor, "N"] | None:
        return None if self._crop is None else self._crop.within(self.model.means).reshape(-1)

    @torch.no_grad()
    def _draw(self, name: str) -> Float[Tensor, "H W 3"]:
        """Draws a picture; where it cannot be, the picture says why."""
        visible = self._visible()
        try:
            return PICTURES[name](self) if visible is None or bool(visible.any()) else self["background"]
        except UserError as error:
            return lettering(f"{name}: {error}", self["rgb"])


_REPORTED: set[str] = set()
"""What went wrong while drawing and was printed already; a browser asks for the same picture many times a second."""


def look(view: FeatureView, render: Callable[..., Any], camera: Cameras, box: Any) -> LazyOutputs:
    """Renders a camera for whoever looks at it: the model's ``extra_outputs``.

    nerfstudio's viewer renders in one thread per browser and takes one picture of a frame, or two when its screen is
    split; every other reader of a model's outputs picks by name. So in such a thread the chosen pictures are drawn at
    once, while nerfstudio holds the lock that keeps training away, and elsewhere each when it is read.

    Args:
        view: What is looked at.
        render: Splatfacto's ``get_outputs_for_camera``.
        camera: One camera.
        box: Crop box, or None.

    Returns:
        Splatfacto's outputs and, drawn when they are read, pictures of features.
    """
    crop = view.visible(box)
    if not view.in_browser():
        return LazyOutputs(view, camera, render(camera, crop), crop)
    panel = view.viewer.control_panel
    try:
        outputs = LazyOutputs(view, camera, render(camera, crop), crop)
        outputs.draw_for_browser((panel.output_render, panel.split_output_render if panel.split else None))
    finally:
        view.model.set_background(view.background)  # nerfstudio gave it the viewer's, which no metric must see
    return outputs


def feature_pca(frame: LazyOutputs) -> Float[Tensor, "H W 3"]:
    """Draws decoded features by their principal components.

    Args:
        frame: The rendered view.

    Returns:
        [H, W, 3] in [0, 1].
    """
    colors, size = frame.view.colors(), frame.feature_size()
    # Colours are linear in features: each tap of the decoder that is used takes three channels instead of C.
    used = [(y, x) for y in range(3) for x in range(3) if bool(colors.kernel[:, :, y, x].any())] or [(1, 1)]
    taps = torch.cat([colors.kernel[:, :, y, x] for y, x in used])
    maps, alpha = frame.render(frame.view.features @ taps.T, size)
    padded = F.pad(maps[None], (1, 1, 1, 1), mode="replicate")[0].unflatten(0, (-1, 3))
    shifted = [padded[i][:, y : y + size[0], x : x + size[1]] for i, (y, x) in enumerate(used)]
    picture = torch.stack(shifted).sum(0) + colors.bias[:, None, None]
    return _before_background(frame, resize(picture, frame.size), alpha)


def feature_pca_low(frame: LazyOutputs) -> Float[Tensor, "H W 3"]:
    """Draws the Gaussians' own features, at full size and without the decoder's window, in the same colours.

    Args:
        frame: The rendered view.

    Returns:
        [H, W, 3] in [0, 1].
    """
    colors = frame.view.colors()
    maps, alpha = frame.render(frame.view.features @ colors.kernel.sum((2, 3)).T, frame.size)
    return _before_background(frame, maps.permute(1, 2, 0) + colors.bias, alpha)


def similarity_to_click(frame: LazyOutputs) -> Float[Tensor, "H W 3"]:
    """Draws the cosine to the clicked point where it reaches the threshold; elsewhere the photo in shades of grey.

    Args:
        frame: The rendered view.

    Returns:
        [H, W, 3] in [0, 1].

    Raises:
        UserError: If nothing was clicked.
    """
    photo = luminance(frame["rgb"])
    query, threshold = frame.view.query, frame.view.threshold
    if query is None:
        raise UserError("press `Click to query` in the control panel, then click on the scene.")
    space = frame.view.space()
    maps, alpha = frame.render(space.coordinates(frame.view.features), frame.feature_size())
    cosines = similarity(maps.permute(1, 2, 0), query, space)
    values, alpha = resize(cosines[None], frame.size)[..., 0], resize(alpha, frame.size)[..., 0]
    similar = (values >= threshold) & (alpha > 0.5)
    return torch.where(similar[..., None], heat_over(frame["rgb"], values), photo)


def teacher_pca(frame: LazyOutputs) -> Float[Tensor, "H W 3"]:
    """Draws the teacher's own map of the photo that was taken where the camera stands, in the same colours.

    Args:
        frame: The rendered view.

    Returns:
        [H, W, 3] in [0, 1].

    Raises:
        UserError: If the camera stands where no training photo was taken.
    """
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
    return over(picture.permute(1, 2, 0), inside.to(colors), 0.25 * luminance(frame["rgb"]))


def view_variance(frame: LazyOutputs) -> Float[Tensor, "H W 3"]:
    """Draws how far the teacher's views disagree about what is seen, over the photo in shades of grey.

    Args:
        frame: The rendered view.

    Returns:
        [H, W, 3] in [0, 1].
    """
    disagreement = frame.view.disagreement()
    maps, alpha = frame.render(disagreement.values[:, None], frame.size)
    heat = heat_over(frame["rgb"], disagreement.shade(maps[0]), "inferno")
    return _before_background(frame, heat, alpha)


def clusters(frame: LazyOutputs) -> Float[Tensor, "H W 3"]:
    """Draws the cluster that most of what is seen at a pixel belongs to.

    Args:
        frame: The rendered view.

    Returns:
        [H, W, 3] in [0, 1].
    """
    space = frame.view.space()
    centres = space.narrow(frame.view.centres())
    labels = assign_clusters(space.coordinates(frame.view.features), centres)
    # One channel a cluster; the last one for Gaussians without a feature.
    members = F.one_hot(torch.where(labels == UNASSIGNED, len(centres), labels), len(centres) + 1)
    maps, alpha = frame.render(members.to(frame["rgb"]), frame.size)
    winners = maps.argmax(0)
    colors = label_colors(torch.where(winners == len(centres), UNASSIGNED, winners)).to(frame["rgb"])
    return _before_background(frame, colors * (0.6 + 0.4 * luminance(frame["rgb"])), alpha)


PICTURES: dict[str, Callable[[LazyOutputs], Float[Tensor, "H W 3"]]] = {
    "feature_pca": feature_pca,
    "feature_pca_low": feature_pca_low,
    "similarity": similarity_to_click,
    "teacher_pca": teacher_pca,
    "view_variance": view_variance,
    "clusters": clusters,
}
"""What draws each output, by its name."""


def _before_background(
    frame: LazyOutputs, picture: Float[Tensor, "H W 3"], alpha: Float[Tensor, "1 h w"]
) -> Float[Tensor, "H W 3"]:
    picture = picture.nan_to_num(0.5, 0.5, 0.5).clamp(0, 1)
    return over(picture, resize(alpha, frame.size).clamp(0, 1), frame["background"])
