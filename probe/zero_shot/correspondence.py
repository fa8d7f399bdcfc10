"""Multi-view correspondence of frozen features on a posed RGB-D scene: Probe3D's protocol on any scene."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fit3d_ns.data.photos.picture_files import open_depth
from fit3d_ns.features.correspondences import SurfaceView
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_text
from fit3d_ns.support.html_report import Report
from fit3d_ns.support.json_files import write_record
from fit3d_ns.support.processes import join_world, require_one_process
from fit3d_ns.support.progress import progress
from probe.config import CorrespondenceConfig
from probe.data.base import read_image
from probe.data.own import PosedScene, read_posed_scene
from probe.features.partners import require_one_each
from probe.features.rows import FrozenBackbones, Row, choose_untrained_rows, load_backbones, row_features
from probe.output_folder import METRICS_NAME, PAGE_NAME, TABLE_NAME, ResultFolder, markdown_table, provenance
from probe.zero_shot.matching import (
    ANGLE_BINS,
    Matches,
    choose_pairs_by_angle,
    features_on_grid,
    match_views,
    recall,
    same_place_errors,
)

_LOGGER = logging.getLogger(__name__)
SAME_PLACE = "same place"
"""Row of matches that stay where they are in the picture: what pairs that move little give away."""
RECALL_PIXELS = (5, 10, 20)
"""Of the grid that is matched, as in Probe3D's script, which projects with intrinsics scaled to the grid."""


@dataclass(frozen=True)
class PosedPhoto:
    """A photo with camera and depth."""

    image: np.ndarray
    """uint8 [H, W, 3]."""
    view: SurfaceView
    """Its camera and depth."""
    name: str
    """Of the photo's file."""


def run_correspondence(config: CorrespondenceConfig) -> None:
    """Scores the rows that need no training on a scene, and writes table.md, metrics.json and report.html.

    Args:
        config: The user's choices.

    Raises:
        UserError: If the scene has no depth, its views do not overlap, or weights do not fit.
    """
    if not 0 < config.grid_scale <= 1 or config.matches < 1 or config.pairs_per_bin < 1 or config.long_side < 2:
        raise UserError(
            "--grid-scale must lie in (0, 1], --matches and --pairs-per-bin must be at least 1, --long-side at least 2."
        )
    with join_world(config.device) as world:
        require_one_process("correspondence")
        device = world.device
        spec, partners, sentence = config.find_backbones(None, config.final_norm)
        require_one_each(partners, "correspondence")
        rows = choose_untrained_rows(config.assemblies, partners, "correspondence")
        _LOGGER.info(sentence)
        scene = read_posed_scene(config.data.expanduser())
        photos = load_photos(scene, config.long_side)
        pairs = choose_pairs_by_angle([photo.view for photo in photos], config.pairs_per_bin, config.min_overlap)
        backbones = load_backbones(spec, partners, rows, config.precision, device)
        settings = {
            "probe": "correspondence-v1",
            "scene": scene.name,
            "pairs": [[photos[a].name, photos[b].name] for a, b, _ in pairs],
            "rows": [row.name for row in rows],
            "backbones": backbones.identities,
            "settings": [config.matches, config.grid_scale, config.long_side, config.precision],
        }
        results = ResultFolder(config.output_dir, settings)
        results.start()
        errors, shown = _score(photos, pairs, rows, backbones, config, device)
        summary = {
            "probe": "correspondence",
            "protocol": "correspondence-v1",
            "data": {
                "name": scene.name,
                "views": len(photos),
                "pairs": len(pairs),
                "size": list(photos[0].image.shape[:2]),
            },
            "backbone": asdict(backbones.info),
            **provenance(device),
        }
        _write(results.folder, errors, pairs, photos, shown, summary, config)
        _LOGGER.info("Report: %s", results.folder / PAGE_NAME)


def load_photos(scene: PosedScene, long_side: int) -> list[PosedPhoto]:
    """Reads a scene's photos and depths.

    Args:
        scene: Of `read_posed_scene`.
        long_side: Photos are shrunk to this long side at most, pixels, and their intrinsics with them.

    Returns:
        The photos in the order of the scene's frames.

    Raises:
        UserError: If a frame has no depth, or its photo another size than its intrinsics say.
    """
    photos = []
    for frame in scene.frames:
        if frame.depth is None:
            raise UserError(f"The frame {frame.image} has no depth_file_path in transforms.json, which matches need.")
        image = read_image(frame.image)
        if image.shape[:2] != frame.size:
            raise UserError(
                f"{frame.image} has {image.shape[1]}x{image.shape[0]} pixels, but transforms.json says "
                f"{frame.size[1]}x{frame.size[0]}."
            )
        height, width = frame.size
        if max(frame.size) > long_side:
            height, width = (max(1, round(side * long_side / max(frame.size))) for side in frame.size)
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        depth = open_depth(frame.depth).astype(np.float32) / np.float32(scene.depth_scale)
        fx, fy, cx, cy = frame.intrinsics
        K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
        K[0] *= width / frame.size[1]
        K[1] *= height / frame.size[0]
        view = SurfaceView(torch.from_numpy(frame.viewmat), K, width, height, torch.from_numpy(depth))
        photos.append(PosedPhoto(image, view, frame.image.stem))
    return photos


def _score(
    photos: list[PosedPhoto],
    pairs: list[tuple[int, int, float]],
    rows: Sequence[Row],
    backbones: FrozenBackbones,
    config: CorrespondenceConfig,
    device: torch.device,
) -> tuple[dict[str, list[Tensor]], dict[str, Matches]]:
    """Returns the errors of every pair by row, and the matches of the pair that is shown."""
    errors: dict[str, list[Tensor]] = {name: [] for name in (*(row.name for row in rows), SAME_PLACE)}
    shown: dict[str, Matches] = {}
    features: dict[int, Any] = {}
    last_use = {index: number for number, (a, b, _) in enumerate(pairs) for index in (a, b)}
    with progress("matching", len(pairs)) as advance:
        for number, (a, b, _) in enumerate(pairs):
            for index in (a, b):
                if index not in features:
                    image = torch.from_numpy(photos[index].image.transpose(2, 0, 1).copy()).to(device)
                    features[index] = backbones(image[None].float() / 255)
            view_a, view_b = photos[a].view, photos[b].view
            grid = (max(2, round(view_a.height * config.grid_scale)), max(2, round(view_a.width * config.grid_scale)))
            errors[SAME_PLACE].append(same_place_errors(view_a, view_b, grid))
            for row in rows:
                on_grid = [
                    features_on_grid(
                        row_features(row, features[index]).patch_tokens[0],
                        (view.height, view.width),
                        backbones.info.patch_size,
                        grid,
                    )
                    for index, view in ((a, view_a), (b, view_b))
                ]
                matches = match_views(on_grid[0], on_grid[1], view_a, view_b, grid, config.matches)
                errors[row.name].append(matches.error)
                if number == _shown_pair(pairs):
                    shown[row.name] = matches
            for index in (a, b):
                if last_use[index] == number:
                    features.pop(index, None)
            advance(1)
    return errors, shown


def _write(
    folder: Path,
    errors: dict[str, list[Tensor]],
    pairs: list[tuple[int, int, float]],
    photos: list[PosedPhoto],
    shown: dict[str, Matches],
    summary: dict[str, Any],
    config: CorrespondenceConfig,
) -> None:
    cell = 1 / config.grid_scale
    counts = [sum(low <= angle < high for _, _, angle in pairs) for low, high in ANGLE_BINS]
    header = ["features", *(f"{pixels} px" for pixels in RECALL_PIXELS)]
    header += [f"10 px, {low:.0f}-{high:.0f}° ({n})" for (low, high), n in zip(ANGLE_BINS, counts)]
    rows, numbers = [], {}
    for name, values in errors.items():
        overall = [recall(values, pixels * cell) for pixels in RECALL_PIXELS]
        by_angle = [
            recall([error for error, (_, _, angle) in zip(values, pairs) if low <= angle < high], 10 * cell)
            for low, high in ANGLE_BINS
        ]
        numbers[name] = {
            "recall": dict(zip((f"{pixels}px" for pixels in RECALL_PIXELS), overall)),
            "recall_10px_by_angle": dict(zip((f"{low:.0f}-{high:.0f}" for low, high in ANGLE_BINS), by_angle)),
            "recall_in_photo_pixels": {f"{pixels}px": recall(values, pixels) for pixels in RECALL_PIXELS},
        }
        rows.append([name, *("–" if value is None else f"{value:.3f}" for value in (*overall, *by_angle))])
    title = f"Correspondence: {summary['backbone']['name']} on {summary['data']['name']}"
    height, width = summary["data"]["size"]
    sentence = (
        f"Features {'after' if config.final_norm else 'before'} the final norm; {len(pairs)} pairs of views (in "
        f"brackets: pairs by relative angle), {config.matches} best matches each by "
        "ratio test; share of matches that land within 5, 10 or 20 pixels of the true place, averaged over pairs. "
        f"Pixels are those of the grid that is matched, as in Probe3D: each is {cell:g} pixels of a photo of "
        f"{width}x{height}. '{SAME_PLACE}' matches every point with the same place of the other photo."
    )
    atomic_write_text(
        folder / TABLE_NAME, f"# {title}\n\n{sentence}\n\n{markdown_table(header, rows)}\n`{summary['command']}`\n"
    )
    report = Report(title)
    report.add_text(sentence)
    report.add_table(rows, header)
    report.add_heading("Matches of one pair")
    report.add_text("Every 20th match: green within 10 pixels of the true place, red beyond.")
    a, b, angle = pairs[_shown_pair(pairs)]
    for name, matches in shown.items():
        share = recall([matches.error], 10 * cell) or 0.0
        picture = _draw(photos[a], photos[b], matches, 10 * cell)
        report.add_pictures(
            [(f"{photos[a].name} and {photos[b].name}, {angle:.0f}° apart", picture)],
            title=f"{name}: {share:.0%} within 10 pixels",
        )
    report.add_heading("How this was made")
    report.add_code(summary["command"])
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items() if version)
    report.add_text(f"{versions}; {summary['device']}.")
    report.write(folder / PAGE_NAME)
    write_record(folder / METRICS_NAME, {**summary, "pairs_by_angle": counts, "rows": numbers})


def _shown_pair(pairs: list[tuple[int, int, float]]) -> int:
    """The pair that pictures are made of: the one with the smallest angle."""
    return min(range(len(pairs)), key=lambda number: pairs[number][2])


def _draw(a: PosedPhoto, b: PosedPhoto, matches: Matches, limit: float) -> np.ndarray:
    height = max(a.image.shape[0], b.image.shape[0])
    canvas = Image.new("RGB", (a.image.shape[1] + b.image.shape[1], height))
    canvas.paste(Image.fromarray(a.image), (0, 0))
    canvas.paste(Image.fromarray(b.image), (a.image.shape[1], 0))
    draw = ImageDraw.Draw(canvas)
    for source, target, error in list(zip(matches.source, matches.target, matches.error))[::20]:
        color = (40, 220, 90) if float(error) < limit else (240, 60, 60)
        x, y = float(source[0]), float(source[1])
        draw.line([x, y, float(target[0]) + a.image.shape[1], float(target[1])], fill=color, width=1)
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], outline=color)
    return np.asarray(canvas)
