"""The tiny room in every format whose cameras this package reads itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

FORMATS = ("nerfstudio", "instant_ngp", "blender", "scannetpp")
"""Those that are a transforms.json or a variant of it."""


def transforms(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def edit(path: Path, change) -> None:
    """Changes a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_format(scene: Path, kind: str, target: Path) -> Path:
    """Writes the scene in one of `FORMATS`, every fourth view held out where the format says so itself.

    Returns:
        The file that describes most of it.
    """
    content = transforms(scene / "transforms.json")
    frames = content["frames"]
    held_out = frames[::4]
    training = [frame for frame in frames if frame not in held_out]
    if kind in ("nerfstudio", "instant_ngp"):
        shutil.copytree(scene, target)
        return target / "transforms.json"
    if kind == "blender":
        shutil.copytree(scene / "images", target / "images")
        shutil.copy(scene / "sparse_pc.ply", target)
        for split, chosen in (("train", training), ("val", held_out)):
            named = [{**frame, "file_path": "./" + frame["file_path"].removesuffix(".png")} for frame in chosen]
            (target / f"transforms_{split}.json").write_text(
                json.dumps({"camera_angle_x": 2 * np.arctan(content["w"] / 2 / content["fl_x"]), "frames": named})
            )
        return target / "transforms_train.json"
    assert kind == "scannetpp"
    shutil.copytree(scene / "images", target / "dslr" / "resized_images" / "images")
    path = target / "dslr" / "nerfstudio" / "transforms.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**content, "frames": training, "test_frames": held_out, "has_mask": False}))
    return path


def parser_config(kind: str, data: Path, **fields: Any) -> Any:
    """Nerfstudio's configuration of the format's dataparser."""
    from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
    from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
    from nerfstudio.data.dataparsers.instant_ngp_dataparser import InstantNGPDataParserConfig
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
    from nerfstudio.data.dataparsers.scannetpp_dataparser import ScanNetppDataParserConfig

    if kind == "nerfstudio":
        config: Any = NerfstudioDataParserConfig(load_3D_points=True)
    elif kind == "blender":
        config = BlenderDataParserConfig(ply_path=Path("sparse_pc.ply"))
    elif kind == "colmap":
        config = ColmapDataParserConfig(colmap_path=Path("sparse/0"))
    else:
        config = {"instant_ngp": InstantNGPDataParserConfig, "scannetpp": ScanNetppDataParserConfig}[kind]()
    config.data = data
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def read(kind: str, data: Path, split: str = "train", seeds: bool = True, **fields: Any) -> Any:
    """What the format's dataparser gives by this package's rules."""
    from fit3d_ns.data.dataparsers import read_checked

    return read_checked(parser_config(kind, data, **fields).setup(), seeds).get_dataparser_outputs(split)


def as_colmap(scene: Path, folder: Path, cameras: list[str] | None = None, points: bool = True) -> Path:
    """Writes the scene as COLMAP's text files.

    Args:
        scene: In nerfstudio's format.
        folder: Where to.
        cameras: What cameras.txt says of each camera, without its id; the views take turns. None: the scene's pinhole.
        points: Whether points3D.txt is written, of the seed points.
    """
    from plyfile import PlyData

    content = transforms(scene / "transforms.json")
    shutil.copytree(scene / "images", folder / "images")
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    if cameras is None:
        cameras = ["PINHOLE " + " ".join(str(content[name]) for name in ("w", "h", "fl_x", "fl_y", "cx", "cy"))]
    (model / "cameras.txt").write_text("".join(f"{number} {line}\n" for number, line in enumerate(cameras, start=1)))
    lines = []
    for number, frame in enumerate(content["frames"], start=1):
        to_world = np.array(frame["transform_matrix"]) @ np.diag([1.0, -1, -1, 1])  # OpenGL to OpenCV axes
        to_camera = np.linalg.inv(to_world)
        x, y, z, w = Rotation.from_matrix(to_camera[:3, :3]).as_quat()
        numbers = " ".join(map(str, (w, x, y, z, *to_camera[:3, 3])))
        camera = 1 + (number - 1) % len(cameras)
        lines += [f"{number} {numbers} {camera} {Path(frame['file_path']).name}", ""]
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    if points:
        rows = PlyData.read(scene / "sparse_pc.ply")["vertex"]
        (model / "points3D.txt").write_text(
            "".join(
                f"{i} {row['x']} {row['y']} {row['z']} {row['red']} {row['green']} {row['blue']} 0.5 1 0\n"
                for i, row in enumerate(rows, start=1)
            )
        )
    return folder
