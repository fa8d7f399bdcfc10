"""nerfstudio's dataparsers, made to heed everything that a scene says of lenses, poses, seed points and splits.

A dataparser goes on deciding which files there are, how a scene is turned, centred and scaled, and which views are held
out. What it reads is checked and completed before, by hooks on its instance, and its cameras are replaced afterwards by
those of `fit3d_ns.data.scene_file`. Dataparsers that are not known here are judged by what comes out of them.
"""

from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig
from nerfstudio.data.dataparsers.blender_dataparser import Blender
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParser
from nerfstudio.data.dataparsers.instant_ngp_dataparser import InstantNGP
from nerfstudio.data.dataparsers.nerfstudio_dataparser import Nerfstudio
from nerfstudio.data.dataparsers.scannetpp_dataparser import ScanNetpp

from fit3d_ns.data.dataparsers.base import SceneReader
from fit3d_ns.data.dataparsers.colmap import ColmapReader
from fit3d_ns.data.dataparsers.transforms import BlenderReader, InstantNGPReader, NerfstudioReader, ScanNetppReader
from fit3d_ns.data.splits import check_hold_out


def read_checked(parser: DataParser, seeds: bool) -> DataParser:
    """Makes a dataparser read scenes by the rules of this package.

    Args:
        parser: Any of nerfstudio's; changed in place.
        seeds: Whether the scene's points are wanted. If not, files of points are not opened.

    Returns:
        The same dataparser.

    Raises:
        UserError: If a flag of the dataparser is out of range.
    """
    check_hold_out(parser.config)
    readers = (
        (ColmapDataParser, ColmapReader),
        (Nerfstudio, NerfstudioReader),
        (InstantNGP, InstantNGPReader),
        (Blender, BlenderReader),
        (ScanNetpp, ScanNetppReader),
    )
    reader = next((reader for kind, reader in readers if isinstance(parser, kind)), SceneReader)
    parser.get_dataparser_outputs = reader(parser, seeds).outputs  # type: ignore[method-assign]
    return parser


def without_seed_points(config: DataParserConfig) -> None:
    """Lets a dataparser leave a scene's points alone, for commands whose Gaussians come from elsewhere.

    Args:
        config: Of the dataparser; changed in place.
    """
    for name, nothing in (("load_3D_points", False), ("ply_path", None)):
        if hasattr(config, name):
            setattr(config, name, nothing)
