"""The segment that is looked at, as a file."""

from pathlib import Path

from fit3d_ns.errors import UserError
from fit3d_ns.exporting.splat_ply import standard_gaussians, write_splat_ply
from fit3d_ns.viewer.feature_view import FeatureView


def export_segment(view: FeatureView, path: Path) -> int:
    """Writes the Gaussians that are similar to the query, with their features, as ``ns-export`` writes splats.

    Args:
        view: With a query.
        path: The file; it must not exist.

    Returns:
        The number of Gaussians written.

    Raises:
        UserError: If nothing was clicked, nothing is similar, the file exists, or it cannot be written.
    """
    if path.suffix != ".ply":
        raise UserError(f"{path} is no name of a PLY file: let it end in .ply.")
    if path.exists():
        raise UserError(f"{path} exists: choose another name.")
    chosen = view.similar()
    model = view.model
    gaussians = standard_gaussians(dict(model.gauss_params.items()), model.config.sh_degree)
    picked = {name: values[chosen] for name, values in gaussians.items()}
    return write_splat_ply(path, picked, view.features[chosen])
