"""Gaussians as the PLY files in which 3D Gaussian Splatting programs exchange their scenes.

The counterpart of `fit3d_ns.lifting.ply`, which reads them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Optional

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fit3d_ns.exporting.ply_table import Columns, write_ply_table

SH_C0 = 0.28209479177387814
"""The constant spherical harmonic, 1 / (2 sqrt(pi))."""
INVISIBLE = -5.5373
"""Logit of the opacity 1/255, as ``ns-export`` rounds it: rasterizers skip Gaussians below."""
FULL_SH = 15
"""Coefficients beyond the constant one of degree 3, which programs with a fixed layout expect."""


def rgb_to_sh(rgb: Float[Tensor, "*shape 3"]) -> Float[Tensor, "*shape 3"]:
    """The constant coefficient that shows a colour in [0, 1] from all sides."""
    return (rgb - 0.5) / SH_C0


def sh_to_rgb(coefficient: Float[Tensor, "*shape 3"]) -> Float[Tensor, "*shape 3"]:
    """The inverse of `rgb_to_sh`; a coefficient may stand for a colour beyond [0, 1]."""
    return coefficient * SH_C0 + 0.5


def standard_gaussians(parameters: Mapping[str, Tensor], sh_degree: int) -> dict[str, Tensor]:
    """Turns a splatfacto model's parameters into those of the files.

    They differ in one thing: at degree 0 splatfacto keeps the logits of colours instead of a coefficient.

    Args:
        parameters: Splatfacto's ``gauss_params``; other names than its own are left out.
        sh_degree: The model's.

    Returns:
        As `fit3d_ns.lifting.ply.read_ply` returns.
    """
    names = ("means", "scales", "quats", "opacities", "features_dc", "features_rest")
    gaussians = {name: parameters[name].detach() for name in names}
    if sh_degree == 0:
        gaussians["features_dc"] = rgb_to_sh(gaussians["features_dc"].sigmoid())
    return gaussians


def splatfacto_parameters(gaussians: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `standard_gaussians`; colours beyond [0, 1], which have no logit, are cut.

    Args:
        gaussians: As `fit3d_ns.lifting.ply.read_ply` returns.
    """
    parameters = dict(gaussians)
    if parameters["features_rest"].shape[1] == 0:
        parameters["features_dc"] = torch.logit(sh_to_rgb(parameters["features_dc"]), eps=1e-6)
    return parameters


def visible_rows(gaussians: Mapping[str, Tensor]) -> Bool[Tensor, "N"]:
    """Says which Gaussians ``ns-export gaussian-splat`` would write: finite ones of an opacity of at least 1/255.

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
    features: Optional[Float[Tensor, "N D"]] = None,
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
        Columns(("x", "y", "z"), means),
        Columns(("nx", "ny", "nz"), means.new_zeros(1, 1).expand(len(means), 3)),
        _numbered("f_dc", gaussians["features_dc"]),
        _numbered("f_rest", rest.transpose(1, 2).flatten(1)),
        Columns(("opacity",), gaussians["opacities"]),
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


def _numbered(name: str, values: Tensor) -> Columns:
    return Columns([f"{name}_{number}" for number in range(values.shape[1])], values)
