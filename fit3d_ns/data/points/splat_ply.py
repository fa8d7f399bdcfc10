"""PLY files in which 3D Gaussian Splatting programs exchange their scenes."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from plyfile import PlyData, PlyElement
from torch import Tensor

from fit3d_ns.data.points.ply_file import read_elements
from fit3d_ns.rasterization import gaussian_axes
from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.files import atomic_path

_LOGGER = logging.getLogger(__name__)
_COLUMNS = {
    "means": ("x", "y", "z"),
    "scales": ("scale_0", "scale_1", "scale_2"),
    "quats": ("rot_0", "rot_1", "rot_2", "rot_3"),
    "opacities": ("opacity",),
    "features_dc": ("f_dc_0", "f_dc_1", "f_dc_2"),
}


_REST = re.compile(r"f_rest_\d+")
_MANY = 100
"""Gaussians, of which trained ones have logits of both signs."""
_PLANE = 0.01
"""Thickness that a 2D Gaussian is given, as a share of its shorter side."""


def read_ply(path: Path) -> dict[str, Tensor]:
    """Reads Gaussians as 3DGS, 2DGS, gsplat and ``ns-export gaussian-splat`` write them.

    Those of 2DGS, which have no third scale, become flat 3D ones; a warning says so.

    Args:
        path: A PLY file, ASCII or binary.

    Returns:
        Splatfacto's parameters: ``means`` [N, 3], ``scales`` [N, 3] (logarithms), ``quats`` [N, 4] (wxyz),
        ``opacities`` [N, 1] (logits), ``features_dc`` [N, 3], ``features_rest`` [N, K, 3], all float32.

    Raises:
        UserError: If the file is missing, damaged, or has another layout, which is named where it is a common one.
    """
    try:
        elements = read_elements(path, mapped=True)
    except DamagedFile as error:
        raise UserError(f"The file {path} cannot be read ({error}): check --ply, or export the file again.") from error
    vertices = elements.get("vertex", np.zeros(0))
    columns: set[str] = set(vertices.dtype.names or ())
    missing = [name for names in _COLUMNS.values() for name in names if name not in columns]
    flat = missing == ["scale_2"]
    if missing and not flat:
        raise UserError(f"{path} {_layout(columns, missing, 'face' in elements)}")
    if len(vertices) == 0:
        raise UserError(f"The file {path} holds no Gaussians: export it again.")
    if flat:
        _LOGGER.warning(f"{path} holds 2D Gaussians (2DGS): they are taken as 3D ones of {_PLANE:.0%} of their width.")
    return _parameters(vertices, path)


def _layout(columns: set[str], missing: list[str], has_faces: bool) -> str:
    """Says what a file holds instead of Gaussians, and the way out."""
    way_out = "export one with `ns-export gaussian-splat` or take the point_cloud.ply of 3DGS."
    if "packed_position" in columns:
        return "is a compressed PLY of SuperSplat: open it there and export it as PLY, uncompressed."
    if {"red", "green", "blue"} <= columns and set(missing) == set(_COLUMNS["features_dc"]):
        return (
            "has plain colours instead of spherical harmonics, as `ns-export gaussian-splat --ply-color-mode rgb` "
            "writes them: export it with --ply-color-mode sh_coeffs."
        )
    if columns.isdisjoint(name for key in ("scales", "quats", "opacities") for name in _COLUMNS[key]):
        kind = "is a mesh" if has_faces else "is a point cloud" if {"x", "y", "z"} <= columns else "has no vertices"
        return f"{kind}, no file of Gaussians: {way_out}"
    return f"lacks the columns {', '.join(missing)}: it is no whole file of Gaussians; {way_out}"


def _parameters(vertices: np.ndarray, path: Path) -> dict[str, Tensor]:
    names = vertices.dtype.names or ()
    rest = sorted((name for name in names if _REST.fullmatch(name)), key=lambda name: int(name.split("_")[-1]))
    bands = len(rest) // 3 + 1
    if len(rest) % 3 or math.isqrt(bands) ** 2 != bands:
        raise UserError(f"{path} has {len(rest)} f_rest columns, which is no whole degree of spherical harmonics.")
    parameters = {
        key: _stack(vertices, [name for name in columns if name in names]) for key, columns in _COLUMNS.items()
    }
    without_rotation = int((parameters["quats"] == 0).all(1).sum())
    if without_rotation:
        raise UserError(
            f"{without_rotation} of {len(vertices)} Gaussians in {path} have a rotation of no length (rot_0 to rot_3 "
            "are 0): export the file again, or remove those Gaussians."
        )
    lowest, highest = (float(value) for value in parameters["opacities"].aminmax())
    if len(vertices) >= _MANY and lowest >= 0 and highest <= 1 and highest - lowest > 0.01:
        _LOGGER.warning(
            f"The opacities in {path} all lie from 0 to 1, as programs write them that store no logits: they are taken "
            "as logits; if the splat looks too transparent or too dense, export it as 3DGS does."
        )
    if parameters["scales"].shape[1] == 2:
        thickness = parameters["scales"].min(1, keepdim=True).values + math.log(_PLANE)  # [N, 1]
        parameters["scales"] = torch.cat([parameters["scales"], thickness], 1)
    # The file holds all red coefficients, then all green, then all blue.
    colors = _stack(vertices, rest).reshape(len(vertices), 3, bands - 1) if rest else torch.zeros(len(vertices), 3, 0)
    return {**parameters, "features_rest": colors.transpose(1, 2).contiguous()}


def _stack(vertices: np.ndarray, names: Sequence[str]) -> Tensor:
    return torch.from_numpy(np.stack([vertices[name].astype(np.float32) for name in names], axis=1))  # [N, k]


def sh_degree(parameters: dict[str, Tensor]) -> int:
    """Returns the degree of the spherical harmonics in ``features_rest``.

    Args:
        parameters: With ``features_rest`` [N, K, 3].
    """
    return math.isqrt(parameters["features_rest"].shape[1] + 1) - 1


_ROWS_PER_CALL = 2**18
"""Rows that go to the disk at once, which bounds the memory: 130 MB for a splat with 64 features."""


@dataclass(frozen=True)
class PlyColumns:
    """Columns of a PLY file that lie side by side.

    Attributes:
        names: Their k names.
        values: [N, k], on any device; uint8 becomes ``uchar``, everything else ``float``.
    """

    names: Sequence[str]
    values: Num[Tensor, "N k"]


def write_ply_table(
    path: Path, columns: Sequence[PlyColumns], rows: Int[Tensor, "M"], comments: Iterable[str] = ()
) -> None:
    """Writes columns as a binary little-endian PLY file of vertices, whole or not at all.

    Args:
        path: The file; what stands there is replaced.
        columns: In the order of the file.
        rows: Rows to write, in this order.
        comments: Lines for the header.

    Raises:
        UserError: If there is no row, or the file cannot be written.
    """
    if len(rows) == 0:
        raise UserError(f"No Gaussian is left to write to {path}: all are invisible, not finite or not selected.")
    kinds = ["u1" if block.values.dtype == torch.uint8 else "<f4" for block in columns]
    blocks = np.dtype([(str(n), kind, (len(block.names),)) for n, (kind, block) in enumerate(zip(kinds, columns))])
    singles = np.dtype([(name, kind) for kind, block in zip(kinds, columns) for name in block.names])
    # plyfile would hold the whole table, twice: it writes the header, of a table that takes no memory.
    vertices = PlyElement.describe(np.broadcast_to(np.zeros(1, singles), len(rows)), "vertex")
    header = PlyData([vertices], byte_order="<", comments=list(comments)).header
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(f"{header}\n".encode("ascii"))
        for chosen in rows.split(_ROWS_PER_CALL):
            table = np.empty(len(chosen), blocks)
            for number, block in enumerate(columns):
                table[str(number)] = block.values.detach()[chosen.to(block.values.device)].cpu().numpy()
            file.write(table.view(np.uint8).data)


SH_C0 = 0.28209479177387814
"""The constant spherical harmonic, 1 / (2 sqrt(pi))."""
INVISIBLE = -5.5373
"""Logit of the opacity 1/255, as ``ns-export`` rounds it: rasterizers skip Gaussians below."""
FULL_SH = 15
"""Coefficients beyond the constant one of degree 3, which programs with a fixed layout expect."""


def rgb_to_sh(rgb: Float[Tensor, "*shape 3"]) -> Float[Tensor, "*shape 3"]:
    """Returns the constant coefficient that shows a colour from all sides.

    Args:
        rgb: In [0, 1].
    """
    return (rgb - 0.5) / SH_C0


def sh_to_rgb(coefficient: Float[Tensor, "*shape 3"]) -> Float[Tensor, "*shape 3"]:
    """Returns the colour of a constant coefficient: the inverse of `rgb_to_sh`.

    Args:
        coefficient: Any; it may stand for a colour beyond [0, 1].
    """
    return coefficient * SH_C0 + 0.5


def standard_gaussians(parameters: Mapping[str, Tensor], sh_degree: int) -> dict[str, Tensor]:
    """Turns a splatfacto model's parameters into those of the files.

    They differ in one thing: at degree 0 splatfacto keeps the logits of colours instead of a coefficient.

    Args:
        parameters: Splatfacto's ``gauss_params``; other names than its own are left out.
        sh_degree: The model's.

    Returns:
        As `fit3d_ns.data.points.splat_ply.read_ply` returns.
    """
    names = ("means", "scales", "quats", "opacities", "features_dc", "features_rest")
    gaussians = {name: parameters[name].detach() for name in names}
    if sh_degree == 0:
        gaussians["features_dc"] = rgb_to_sh(gaussians["features_dc"].sigmoid())
    return gaussians


def splatfacto_parameters(gaussians: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns splatfacto's parameters, the inverse of `standard_gaussians`; colours beyond [0, 1] are cut.

    Args:
        gaussians: As `fit3d_ns.data.points.splat_ply.read_ply` returns.
    """
    parameters = dict(gaussians)
    if parameters["features_rest"].shape[1] == 0:
        parameters["features_dc"] = torch.logit(sh_to_rgb(parameters["features_dc"]), eps=1e-6)
    return parameters


def visible_rows(gaussians: Mapping[str, Tensor]) -> Bool[Tensor, "N"]:
    """Returns which Gaussians ``ns-export gaussian-splat`` would write: finite ones of an opacity of at least 1/255.

    Args:
        gaussians: As `write_splat_ply`.
    """
    visible = gaussians["opacities"].squeeze(-1) >= INVISIBLE
    for values in gaussians.values():
        visible = visible & torch.isfinite(values.flatten(1)).all(1)
    return visible


def write_splat_ply(
    path: Path,
    gaussians: Mapping[str, Tensor],
    features: Float[Tensor, "N D"] | None = None,
    comments: Iterable[str] = (),
) -> int:
    """Writes Gaussians in the layout of 3DGS and ``ns-export``, with their features as further columns.

    Columns: ``x y z``, ``nx ny nz`` (zeros), ``f_dc_0..2``, ``f_rest_*`` (all red coefficients, then green, then blue),
    ``opacity`` (logit), ``scale_0..2`` (logarithms), ``rot_0..3`` (wxyz, of any length), ``feat_0..``; all float32.
    Rows that `visible_rows` refuses are left out.

    Args:
        path: The file; what stands there is replaced, in one step.
        gaussians: ``means`` [N, 3], ``scales`` [N, 3] (logarithms), ``quats`` [N, 4] (wxyz), ``opacities`` [N, 1]
            (logits), ``features_dc`` [N, 3] and ``features_rest`` [N, K, 3] (spherical harmonics); on any device. A
            splatfacto model's own are brought here by `standard_gaussians`.
        features: Written as ``feat_0`` to ``feat_{D-1}``.
        comments: Lines for the header.

    Returns:
        The number of Gaussians written.

    Raises:
        UserError: If no Gaussian is left, or the file cannot be written.
    """
    means, rest = gaussians["means"], gaussians["features_rest"]
    columns = [
        PlyColumns(("x", "y", "z"), means),
        PlyColumns(("nx", "ny", "nz"), means.new_zeros(1, 1).expand(len(means), 3)),
        _numbered("f_dc", gaussians["features_dc"]),
        _numbered("f_rest", rest.transpose(1, 2).flatten(1)),
        PlyColumns(("opacity",), gaussians["opacities"]),
        _numbered("scale", gaussians["scales"]),
        _numbered("rot", gaussians["quats"]),
    ]
    if features is not None:
        columns.append(_numbered("feat", features))
    rows = visible_rows(gaussians).nonzero().squeeze(-1)
    write_ply_table(path, columns, rows, ["Vertical Axis: z", *comments])
    return len(rows)


def write_colored_splat_ply(
    path: Path, gaussians: Mapping[str, Tensor], rgb: Float[Tensor, "N 3"], comments: Iterable[str] = ()
) -> int:
    """Writes Gaussians in other colours, the same from all sides.

    The file has the 62 columns of the original 3DGS program whatever the model's degree, because some viewers read no
    other layout.

    Args:
        path: As `write_splat_ply`.
        gaussians: As `write_splat_ply`; ``features_dc`` and ``features_rest`` are only asked whether they are finite.
        rgb: Colours in [0, 1].
        comments: Lines for the header.

    Returns:
        The number of Gaussians written, the same rows as `write_splat_ply`.

    Raises:
        UserError: As `write_splat_ply`.
    """
    flat = rgb.new_zeros(1, 1, 1).expand(len(rgb), FULL_SH, 3)
    rows = visible_rows(gaussians)
    kept = {name: values[rows] for name, values in gaussians.items()}
    return write_splat_ply(
        path, {**kept, "features_dc": rgb_to_sh(rgb)[rows], "features_rest": flat[rows]}, comments=comments
    )


def _numbered(name: str, values: Tensor) -> PlyColumns:
    return PlyColumns([f"{name}_{number}" for number in range(values.shape[1])], values)


def write_point_cloud(
    path: Path, gaussians: Mapping[str, Tensor], rgb: Float[Tensor, "N 3"], comments: Iterable[str] = ()
) -> int:
    """Writes one point for every Gaussian that `fit3d_ns.data.points.splat_ply.write_splat_ply` writes, in that order.

    Columns: ``x y z``, ``nx ny nz`` (the Gaussian's shortest axis, of either sign), ``red green blue`` (uchar) and
    ``opacity`` (float, 0 to 1, which Open3D's tensor reader finds and others skip).

    Args:
        path: The file; what stands there is replaced, in one step.
        gaussians: As of `fit3d_ns.data.points.splat_ply.write_splat_ply`.
        rgb: Colours, cut to [0, 1].
        comments: Lines for the header.

    Returns:
        The number of points.

    Raises:
        UserError: If no point is left, or the file cannot be written.
    """
    rows = visible_rows(gaussians).nonzero().squeeze(-1)
    columns = [
        PlyColumns(("x", "y", "z"), gaussians["means"]),
        PlyColumns(("nx", "ny", "nz"), shortest_axes(gaussians["quats"], gaussians["scales"])),
        PlyColumns(("red", "green", "blue"), (rgb.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)),
        PlyColumns(("opacity",), gaussians["opacities"].sigmoid()),
    ]
    write_ply_table(path, columns, rows, comments)
    return len(rows)


def shortest_axes(quats: Float[Tensor, "N 4"], scales: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
    """Returns the unit vector along which each Gaussian is thinnest: the normal of a flat one.

    Args:
        quats: wxyz, of any length.
        scales: Sizes along the axes, or their logarithms.
    """
    axes = torch.stack([torch.stack(axis, -1) for axis in gaussian_axes(quats.detach().float())], 1)  # [N, axis, 3]
    thinnest = scales.detach().argmin(1)
    return axes[torch.arange(len(quats), device=quats.device), thinnest.to(quats.device)]
