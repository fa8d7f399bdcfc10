"""Points that Gaussians start from: read in double precision, and judged by the Gaussians that are made of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fit3d_ns.compat import neighbour_distances
from fit3d_ns.data.points.ply_file import read_elements
from fit3d_ns.data.points.splat_ply import sh_to_rgb
from fit3d_ns.support.errors import DamagedFile, UserError, first_line

FEWEST = 4
"""Splatfacto takes a Gaussian's size from its three nearest neighbours."""
_NEIGHBOURS = 3
_FARTHEST = 1e6
"""In extents of the cameras: what lies farther has no parallax in float32."""
NO_POINTS = "--load-3D-points False"
"""What leaves the points out, after the name of most dataparsers."""
_SH = ("f_dc_0", "f_dc_1", "f_dc_2")
"""Colours of a splat whose Gaussians' centres are the points."""
_COLORS = (("red", "green", "blue"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"), _SH)
"""What programs call a point's colours."""


@dataclass(frozen=True)
class SeedPoints:
    """What is left of a scene's points."""

    positions: Float[Tensor, "N 3"] | None
    """float32, in the coordinates of the training; None where fewer than `FEWEST` are left."""
    colors: UInt8[Tensor, "N 3"] | None
    """8-bit RGB; of shape [0, 3] where the points have none. None with ``positions``."""
    remark: str | None = None
    """What was dropped and why, in one sentence without a full stop; None where all were taken."""


def read_point_cloud(
    path: Path, without: str = NO_POINTS
) -> tuple[Float[np.ndarray, "N 3"], UInt8[np.ndarray, "N 3 or 0 3"]]:
    """Reads the points of a PLY file.

    Args:
        path: The file; ASCII or binary.
        without: Flag of the dataparser that leaves the points out, for the sentence.

    Returns:
        Positions in double precision, and 8-bit colours: of shape [0, 3] if the file has none.

    Raises:
        UserError: If the file is missing, damaged, or holds no points.
    """
    try:
        elements = read_elements(path)
    except DamagedFile as error:
        raise _unreadable(path, str(error), without) from error
    vertices = elements.get("vertex", np.zeros(0))
    columns = vertices.dtype.names or ()
    if not {"x", "y", "z"} <= set(columns):
        raise _unreadable(path, "its vertices have no x, y and z", without)
    try:
        positions = np.stack([vertices[axis].astype(np.float64) for axis in "xyz"], axis=1)
        colors = np.zeros((0, 3), np.uint8)
        named = next((names for names in _COLORS if set(names) <= set(columns)), None)
        if named is not None:
            colors = np.stack([vertices[channel] for channel in named], axis=1)
            colors = _bytes(sh_to_rgb(torch.from_numpy(colors)).clamp(0, 1).numpy() if named == _SH else colors)
    except (ValueError, TypeError) as error:  # lists in the place of numbers
        raise _unreadable(path, first_line(error), without) from error
    return positions, colors


def read_colmap_points(folder: Path) -> tuple[Float[np.ndarray, "N 3"], UInt8[np.ndarray, "N 3"]]:
    """Reads the points of a COLMAP model.

    Args:
        folder: The model, with points3D.bin or points3D.txt.

    Returns:
        Positions in double precision, and 8-bit colours.

    Raises:
        UserError: If there are none, or they are damaged.
    """
    from nerfstudio.data.utils import colmap_parsing_utils as colmap

    readers = {"points3D.bin": colmap.read_points3D_binary, "points3D.txt": colmap.read_points3D_text}
    for name, read in readers.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            points = list(read(path).values())
            positions = np.array([point.xyz for point in points], dtype=np.float64).reshape(len(points), 3)
            colors = _bytes(np.array([point.rgb for point in points], dtype=np.int64).reshape(len(points), 3))
        except OSError as error:
            raise _unreadable(path, error.strerror or first_line(error)) from error
        except Exception as error:  # struct.error, IndexError, AssertionError, MemoryError ... of nerfstudio's reader
            raise _unreadable(path, first_line(error)) from error
        return positions, colors
    raise _unreadable(folder / "points3D.bin", "neither it nor points3D.txt is there")


def sift(positions: Float[Tensor, "N 3"], colors: UInt8[Tensor, "N 3"], extent: float, source: str) -> SeedPoints:
    """Drops the points of which no Gaussian can be made.

    A Gaussian's centre is a point, and its size the mean distance to the three nearest ones, stored as a logarithm
    (splatfacto): what is not finite has no centre, four points at one place have no size.

    Args:
        positions: float32, in the coordinates of the training.
        colors: 8-bit RGB, as many, or of shape [0, 3].
        extent: Distance of the farthest camera from the middle of all, in the same coordinates.
        source: Where the points come from, for the remark.

    Returns:
        The points that are left, with a remark on those that are not.

    Raises:
        UserError: If there are colours, but not one for each point.
    """
    if len(colors) not in (0, len(positions)):
        raise UserError(f"{source} has {len(positions)} points but {len(colors)} colours: mend it.")
    num_points = len(positions)
    dropped: dict[str, int] = {}
    kept = torch.arange(num_points)

    def keep(valid: Tensor, reason: str) -> None:
        nonlocal kept
        if not bool(valid.all()):
            dropped[reason] = dropped.get(reason, 0) + int((~valid).sum())
            kept = kept[valid]

    keep(torch.isfinite(positions).all(dim=1), "not finite")
    middle = positions[kept].double().median(dim=0).values if len(kept) else torch.zeros(3, dtype=torch.float64)
    far = (positions[kept].double() - middle).norm(dim=1) > _FARTHEST * max(extent, 1e-12)
    keep(~far, "too far away")
    while len(kept) >= FEWEST:
        sized = has_size(positions[kept])
        if bool(sized.all()):
            break
        copies = ~sized
        copies[_first_of_each(positions[kept], copies)] = False
        # Of points at one place the first is kept; where that does not help, none of them has a size.
        keep(~copies if bool(copies.any()) else sized, "at the place of another")
    counts = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    if len(kept) < FEWEST:
        left = f"{len(kept)} usable points are too few" if num_points else "there are no points"
        return SeedPoints(None, None, f"{source}: {left}" + (f" ({counts})" if counts else ""))
    if not dropped:
        return SeedPoints(positions, colors)
    remark = f"{source}: {num_points - len(kept):,} of {num_points:,} seed points are left out ({counts})"
    return SeedPoints(positions[kept], colors[kept] if len(colors) else colors, remark)


def has_size(positions: Float[Tensor, "N 3"]) -> Tensor:
    """Says of each point whether the Gaussian that splatfacto makes of it has a finite, positive size.

    Args:
        positions: float32, finite, at least `FEWEST`.

    Returns:
        Boolean, shape [N].
    """
    scales = neighbour_distances(positions, _NEIGHBOURS).mean(dim=-1).log()  # [N]
    sizes = scales.exp()
    # The rasteriser squares sizes.
    return torch.isfinite(scales) & (sizes > 0) & torch.isfinite(sizes.square())


def _first_of_each(positions: Float[Tensor, "N 3"], chosen: Tensor) -> Tensor:
    """Indices of the first of each place among the chosen points."""
    indices = chosen.nonzero()[:, 0]
    _, first = np.unique(positions[indices].numpy(), axis=0, return_index=True)
    return indices[torch.from_numpy(first)]


def _bytes(values: np.ndarray) -> np.ndarray:
    """8-bit colours of colours in [0, 255], of floats in [0, 1], or of 16 bits."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind in "iu" and values.dtype.itemsize == 2 and values.max(initial=0) > 255:
        values = np.round(values.astype(np.uint16) / 257)
    if np.issubdtype(values.dtype, np.floating):
        values = np.nan_to_num(values)
        values = np.round(values * 255.0) if values.size and values.max() <= 1.0 else values
    return values.clip(0, 255).astype(np.uint8)


def _unreadable(path: Path, reason: str, without: str = NO_POINTS) -> UserError:
    return UserError(
        f"The seed points {path} cannot be read ({reason}): restore the file, or start from random positions with "
        f"`{without}` after the dataparser's name."
    )
