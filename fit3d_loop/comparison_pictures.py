"""Some views through original, splat and student, in one basis of colours; a command, since it renders."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from distill.photo_store import PhotoStore
from distill.scenes import SceneCache, open_scenes
from distill.targets import LiftedTargets
from fit3d_ns.backbones import BackboneSpec, load_backbone
from fit3d_ns.backbones.students.result_folder import WEIGHTS_NAME, read_card
from fit3d_ns.features.pca import ColorBasis
from fit3d_ns.support.command_line import run_command
from fit3d_ns.support.errors import first_line
from fit3d_ns.support.files import atomic_folder, discard
from fit3d_ns.support.processes import join_world

_LOGGER = logging.getLogger(__name__)
COLUMNS = ("photo", "original", "lifted", "student")
_SCENES = 6


@dataclass
class PicturesCommand:
    """Shows what original, lifted features and student make of some held-out views."""

    output_dir: Path
    """Where pictures go, SCENE_COLUMN.png."""
    student: Path
    """Folder that fit3d-distill wrote."""
    bundles: tuple[Path, ...]
    """Scene bundles of its last round."""
    original_weights: Path | None = None
    """Local weights of what it was fine-tuned from."""
    cache_dir: Path | None = None
    """Where decoded photos are."""


def main() -> None:
    """Command line."""
    run_command(lambda: draw(tyro.cli(PicturesCommand)))


@torch.no_grad()
def draw(command: PicturesCommand) -> None:
    """Draws one held-out view, or a training view where none is held out, of the first scenes.

    Args:
        command: What to draw.

    Raises:
        UserError: If a bundle or backbone cannot be read, or the folder cannot be written to.
    """
    with join_world("auto") as world:
        scenes = open_scenes([*command.bundles[:_SCENES]], None)
        card = read_card(command.student)
        name, layer, norm = card["student"]["name"], card["student"]["layer"], card["student"]["norm"]
        files = (command.original_weights, command.student / WEIGHTS_NAME)
        original, student = (load_backbone(BackboneSpec(name, path, layer, norm), world.device) for path in files)
        photos = PhotoStore(scenes, original.info.patch_size, world.device, command.cache_dir)
        scene_cache = SceneCache(scenes, world)
        targets = LiftedTargets(scenes, scene_cache, world.device, "ignore", 0.0)
        rows = []
        try:
            for index, scene in enumerate(scenes):
                (view,), _ = scene.report_views(1)
                photo = photos.get([(index, view)])  # [1, 3, H, W]
                found = [backbone(photo.float() / 255).patch_tokens[0] for backbone in (original, student)]
                maps = [found[0], targets.make(index, [view]).maps[0], found[1]]  # each [C, h, w]
                rows.append((scene.name, photo[0].permute(1, 2, 0).cpu(), [map_.float().cpu() for map_ in maps]))
        finally:
            photos.close()
            scene_cache.close()
    basis = ColorBasis.fit(torch.cat([maps[0].flatten(1).T for _, _, maps in rows]))
    with atomic_folder(command.output_dir) as folder:
        for number, (name, photo, maps) in enumerate(rows):
            shown = [photo.numpy(), *(_colors(basis, map_) for map_ in maps)]
            for column, picture in zip(COLUMNS, shown):
                Image.fromarray(picture).save(folder / f"{number:02d}-{name}_{column}.png")


def _colors(basis: ColorBasis, features: torch.Tensor) -> np.ndarray:
    """[h, w, 3] colours of a map [C, h, w]."""
    return basis.to_rgb(features.permute(1, 2, 0)).mul(255).byte().numpy()


def read_pictures(folder: Path) -> list[list[tuple[str, np.ndarray]]]:
    """Returns what was drawn, a row for each scene: column and uint8 [H, W, 3].

    Args:
        folder: Of `draw`; no rows where there is none. A row with a damaged picture goes, and one line says so.
    """
    rows = []
    for path in sorted(folder.glob("*_photo.png")):
        named = {column: path.with_name(path.name.replace("_photo", f"_{column}")) for column in COLUMNS}
        try:
            rows.append([(column, _read(place)) for column, place in named.items()])
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises
            _LOGGER.warning("A picture of %s is damaged (%s): the report goes without it.", path, first_line(error))
            for place in named.values():
                discard(place)
    return rows


def picture_words(
    output_dir: Path, student: Path, bundles: Sequence[Path], weights: Path | None, cache: Path
) -> tuple[str, ...]:
    """Returns this command as typed.

    Args:
        output_dir: Where pictures go.
        student: Result folder of the student.
        bundles: Of the scenes that are shown.
        weights: Of the original backbone, where it was given some.
        cache: For decoded photos.
    """
    words = ["fit3d-loop-pictures", "--output-dir", output_dir, "--student", student, "--cache-dir", cache]
    words += [] if weights is None else ["--original-weights", weights]
    return tuple(map(str, [*words, "--bundles", *bundles[:_SCENES]]))


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))
