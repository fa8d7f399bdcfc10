"""The rule by which low-dimensional features are rendered and brought onto a teacher's patch grid.

A patch of the teacher sees about 14 x 14 pixels, so *how* a rendered map is sampled down to the patch grid is part of
the target. Whoever reads the features later (evaluation, distillation) must use the rule they were fitted with, so
the rule is a small value that is stored with the scene.

Every rule here is linear, and so is the decoder (one 3x3 convolution). They commute: sampling the decoded map equals
decoding sampled *windows*. ``FeatureGrid.windows`` therefore gathers, for each patch, the 3x3 neighbourhood that the
convolution would have read, and the full-size map of the backbone's width (0.8 GB for 384 channels at 876x584) never
exists.
"""

import functools
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.json_files import build

GridName = Literal["paper", "fast"]
_LARGEST = 64
"""Pixels of a tile's side, or rendered for a patch's."""


@dataclass(frozen=True)
class FeatureGrid:
    """How low-dimensional features are rendered for a patch grid.

    Attributes:
        name: ``paper`` or ``fast``.
        supersample: Rendered pixels per patch and side; ``None`` renders at the image's own resolution.
        rasterize_mode: gsplat's ``classic`` (dilates small Gaussians) or ``antialiased`` (compensates for it).
        tile_size: Rasterizer tile in pixels. Small renders need small tiles to occupy a GPU.
        pooling: ``bilinear`` reads the decoded map at the patch centre as ``interpolate(mode="bilinear")`` does
            (2x2 pixels); ``area`` averages all pixels of the patch.
    """

    name: GridName
    supersample: int | None
    rasterize_mode: Literal["classic", "antialiased"]
    tile_size: int
    pooling: Literal["bilinear", "area"]

    def __post_init__(self) -> None:
        """Refuses sizes that no render can have."""
        if self.supersample is not None and not 1 <= self.supersample <= _LARGEST:
            raise ValueError(f"supersample is {self.supersample}, not from 1 to {_LARGEST}")
        if not 1 <= self.tile_size <= _LARGEST:
            raise ValueError(f"tile_size is {self.tile_size}, not from 1 to {_LARGEST}")
        if self.supersample is None and self.pooling == "area":
            raise ValueError("pooling is area, which needs a supersample factor")

    def render_size(self, image_size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        """Returns the height and width, in pixels, at which low-dimensional features are rendered.

        Args:
            image_size: Height and width of the photo in pixels.
            grid: Height and width of the teacher's map in patches.
        """
        if self.supersample is None:
            return image_size
        return grid[0] * self.supersample, grid[1] * self.supersample

    def windows(
        self, low: Float[Tensor, "D H W"], grid: tuple[int, int], offset: tuple[float, float] = (0.0, 0.0)
    ) -> Float[Tensor, "D 9 h w"]:
        """Samples, for each patch, the 3x3 window that the decoder's convolution reads.

        For any bias-free 3x3 kernel, contracting the result with the kernel equals convolving ``low`` (zero padding 1)
        and sampling the outcome on the patch grid with this rule.

        Args:
            low: Rendered low-dimensional map, of ``render_size``.
            grid: Height and width of the patch grid.
            offset: Shift of the sampling points, in patches (y, x), each in [-0.5, 0.5]. Only for ``bilinear``.

        Returns:
            Windows in the kernel's row-major order.
        """
        if self.pooling == "area":
            if self.supersample is None:
                raise ValueError("area pooling needs a supersample factor")
            boxes = _shifted_boxes(self.supersample, low.dtype, low.device)
            return F.conv2d(low[:, None], boxes, stride=self.supersample, padding=1)
        return _bilinear_windows(low, grid, offset)

    def to_dict(self) -> dict[str, Any]:
        """Returns the rule as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FeatureGrid":
        """Reads a rule written by ``to_dict``.

        Args:
            values: Its fields by name.

        Returns:
            The rule, its ranges checked.

        Raises:
            UserError: If a field is missing or unknown (a file of another version).
        """
        try:
            return build(cls, values)
        except DamagedFile as error:
            raise UserError(f"The stored feature grid {values} is not one this version knows: {error}.") from error


FEATURE_GRIDS: dict[str, FeatureGrid] = {
    # FiT3D renders and decodes at full image size, then resizes bilinearly without antialiasing (its engine.py).
    "paper": FeatureGrid(name="paper", supersample=None, rasterize_mode="classic", tile_size=16, pooling="bilinear"),
    # A quarter of a patch per pixel: rendering directly at the patch grid is slower (too few tiles) and aliases.
    "fast": FeatureGrid(name="fast", supersample=4, rasterize_mode="antialiased", tile_size=8, pooling="area"),
}


def sampling_offset(step: int) -> tuple[float, float]:
    """Returns the shift of the sampling points at a training step, in patches (y, x), each in [-0.5, 0.5).

    FiT3D takes the L1 loss at every pixel, against the teacher's map resized bilinearly to the image. One point per
    patch, moving from step to step through the patch, has the same expectation at a hundredth of the cost. The points
    are the R2 sequence of the plastic number, which is to two dimensions what the golden ratio is to one: evenly
    spread, and a pure function of the step, so training draws no random number for it and a resumed run sees the same
    points.

    Args:
        step: Of the training, from 0.
    """
    plastic = 1.32471795724474602596  # the real root of x^3 = x + 1
    return (0.5 + step / plastic) % 1.0 - 0.5, (0.5 + step / plastic**2) % 1.0 - 0.5


def sample_teacher(teacher: Float[Tensor, "C h w"], offset: tuple[float, float]) -> Float[Tensor, "C h w"]:
    """Reads a teacher map between its patch centres, as bilinear resizing to the image would.

    Args:
        teacher: Map of the backbone's patch features.
        offset: Shift of the sampling points, in patches (y, x).

    Returns:
        The map at the shifted points; beyond the outermost centres the border value is repeated.
    """
    if offset == (0.0, 0.0):
        return teacher
    height, width = teacher.shape[1:]
    points = _patch_points(height, width, height, width, offset, teacher)
    return F.grid_sample(
        teacher[None], points[None].to(teacher.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )[0]


def _patch_points(
    rows: int, columns: int, height: int, width: int, offset: tuple[float, float], sampled: Tensor
) -> Float[Tensor, "h w 2"]:
    """Patch centres plus offset in ``grid_sample``'s coordinates (x, y in [-1, 1], edges at the ends).

    Points stay within the outermost pixel centres, as ``interpolate`` keeps them. They are on the device of the map
    to be ``sampled`` and as precise as it is, at least float32.
    """
    like = {"device": sampled.device, "dtype": torch.promote_types(sampled.dtype, torch.float32)}
    y = (torch.arange(rows, **like) + 0.5 + offset[0]) / rows * height  # [h] pixels
    x = (torch.arange(columns, **like) + 0.5 + offset[1]) / columns * width  # [w] pixels
    y = y.clamp(0.5, height - 0.5) / height * 2 - 1
    x = x.clamp(0.5, width - 0.5) / width * 2 - 1
    return torch.stack([x[None, :].expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1)


@functools.lru_cache(maxsize=8)
def _shifted_boxes(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "9 1 S S"]:
    """The nine one-pixel shifts of a ``size`` x ``size`` average, as kernels of side ``size`` + 2."""
    boxes = torch.zeros(3, 3, 1, size + 2, size + 2, dtype=dtype, device=device)
    for y in range(3):
        for x in range(3):
            boxes[y, x, :, y : y + size, x : x + size] = 1.0 / size**2
    return boxes.flatten(0, 1)


def _bilinear_windows(
    low: Float[Tensor, "D H W"], grid: tuple[int, int], offset: tuple[float, float]
) -> Float[Tensor, "D 9 h w"]:
    """Bilinear samples of ``low`` at the nine one-pixel shifts of every patch centre, zero outside the map."""
    (rows, columns), (height, width) = grid, low.shape[1:]
    centres = _patch_points(rows, columns, height, width, offset, low)  # [h, w, 2]
    pixel = centres.new_tensor([2.0 / width, 2.0 / height])
    shifts = centres.new_tensor([[x, y] for y in (-1.0, 0.0, 1.0) for x in (-1.0, 0.0, 1.0)]) * pixel
    points = (centres[None] + shifts[:, None, None]).reshape(1, 9 * rows, columns, 2).to(low.dtype)
    sampled = F.grid_sample(low[None], points, mode="bilinear", padding_mode="zeros", align_corners=False)
    return sampled[0].reshape(low.shape[0], 9, rows, columns)
