"""Gives scenes of ScanNet++ a ``transforms.json`` and seed points, so that nerfstudio reads them.

    python docs/scannetpp_scenes.py scannetpp/data --scenes scannetpp/splits/nvs_sem_train.txt

Two files are added to each scene's folder; photos and masks stay where they are, as downloaded. nerfstudio's own
reader of ScanNet++ has no seed points, and its reader of COLMAP models refuses this fisheye lens.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from nerfstudio.data.utils.colmap_parsing_utils import qvec2rotmat, read_cameras_text, read_images_text
from nerfstudio.process_data.colmap_utils import create_ply_from_colmap, parse_colmap_camera_params

from fit3d_ns.support.command_line import run_command
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_json

APPLIED = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0]])
"""COLMAP's world to nerfstudio's, z up: what `ns-process-data` applies."""
SEED_POINTS = "sparse_pc.ply"


@dataclass
class Scenes:
    """Which scenes are prepared."""

    data: tyro.conf.Positional[Path]
    """Folder of the scenes, each with `dslr/` in it."""
    scenes: Path | None = None
    """File with one scene id per line, such as splits/nvs_sem_train.txt; all folders of DATA without it."""


def prepare_scene(scene: Path) -> int:
    """Writes ``transforms.json`` and the seed points of a scene.

    Args:
        scene: Its folder, with ``dslr/colmap``, ``dslr/resized_images`` and, if there are masks,
            ``dslr/resized_anon_masks``.

    Returns:
        The number of photos.

    Raises:
        UserError: If a file is missing or damaged.
    """
    model = scene / "dslr" / "colmap"
    try:
        cameras = read_cameras_text(model / "cameras.txt")
        images = read_images_text(model / "images.txt")
        create_ply_from_colmap(SEED_POINTS, model, scene, torch.from_numpy(APPLIED).float())
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{model} holds no COLMAP model that can be read ({error}): download it again.") from error
    if len(cameras) != 1 or not images:
        raise UserError(f"{model} has {len(cameras)} cameras and {len(images)} photos: expected one camera.")
    frames = [_frame(scene, image) for image in sorted(images.values(), key=lambda image: image.name)]
    masked = [frame for frame in frames if "mask_path" in frame]
    if masked and len(masked) < len(frames):
        raise UserError(f"{scene} has masks for {len(masked)} of {len(frames)} photos: download the scene again.")
    camera = parse_colmap_camera_params(next(iter(cameras.values())))
    atomic_write_json(
        scene / "transforms.json",
        {**camera, "applied_transform": APPLIED.tolist(), "ply_file_path": SEED_POINTS, "frames": frames},
    )
    return len(frames)


def _frame(scene: Path, image: Any) -> dict[str, Any]:
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3], world_to_camera[:3, 3] = qvec2rotmat(image.qvec), image.tvec
    pose = np.linalg.inv(world_to_camera) * [1, -1, -1, 1]  # OpenGL's axes
    frame = {
        "file_path": f"dslr/resized_images/{image.name}",
        "transform_matrix": [*(APPLIED @ pose).tolist(), [0.0, 0.0, 0.0, 1.0]],
    }
    mask = Path("dslr/resized_anon_masks") / Path(image.name).with_suffix(".png")
    if (scene / mask).is_file():
        frame["mask_path"] = mask.as_posix()
    return frame


def main(args: list[str] | None = None) -> None:
    """Command line."""

    def command() -> None:
        chosen = tyro.cli(Scenes, args=args)
        try:
            listed = chosen.scenes.read_text().split() if chosen.scenes else chosen.data.iterdir()
            names = sorted(Path(name).name for name in listed)
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read ({error.strerror}): check the path.") from error
        failures = []
        for name in names:
            try:
                print(f"{name}: {prepare_scene(chosen.data / name)} photos")
            except UserError as error:
                failures.append(name)
                print(f"Error: {error}", file=sys.stderr)
        if failures:
            raise UserError(f"{len(failures)} of {len(names)} scenes could not be prepared: {', '.join(failures)}.")

    run_command(command)


if __name__ == "__main__":
    main()
