"""Multi-view correspondence of frozen features on a posed RGB-D scene: Probe3D's protocol on any scene."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from rich.console import Console
from torch import Tensor

from fit3d_ns.errors import UserError
from fit3d_ns.files import atomic_write_json, atomic_write_text
from fit3d_ns.report import Report
from fit3d_ns.view_geometry import View, correspondences
from probe.config import CorrespondenceConfig
from probe.datasets.posed_scene import PosedScene, read_posed_scene
from probe.datasets.samples import read_image, read_index
from probe.distributed import process_group
from probe.features import FrozenBackbones, Row, choose_rows, load_backbones, row_features
from probe.geometry import resize_nearest
from probe.progress import progress
from probe.results import ResultFolder, provenance
from probe.table import markdown_table

ANGLE_BINS = ((0.0, 15.0), (15.0, 30.0), (30.0, 60.0), (60.0, 180.0))
"""Degrees between the two cameras' orientations."""
RECALL_PIXELS = (5, 10, 20)
_OVERLAP_GRID = (12, 16)
_MIN_DISPLACEMENT = 0.05
"""Of the photo's width: pairs whose shared points move less say nothing."""
_SIMILARITIES_PER_STEP = 1 << 24


@dataclass(frozen=True)
class PosedPhoto:
    """A photo with camera and depth."""

    image: np.ndarray
    """uint8 [H, W, 3]."""
    view: View
    name: str


@dataclass(frozen=True)
class Matches:
    """The best matches of two views.

    Attributes:
        source: [M, 2] (x, y) in pixels of the first photo.
        target: [M, 2] (x, y) in pixels of the second, found by features.
        error: [M] distance in pixels between ``target`` and where the source's surface point really projects;
            infinite behind the camera.
    """

    source: Float[Tensor, "M 2"]
    target: Float[Tensor, "M 2"]
    error: Float[Tensor, "M"]


def run_correspondence(config: CorrespondenceConfig) -> None:
    """Scores the rows that need no training on a scene, and writes table.md, metrics.json and report.html.

    Args:
        config: The user's choices.

    Raises:
        UserError: If the scene has no depth, its views do not overlap, or weights do not fit.
    """
    if not 0 < config.grid_scale <= 1 or config.matches < 1 or config.pairs_per_bin < 1:
        raise UserError("--grid-scale must lie in (0, 1], --matches and --pairs-per-bin must be at least 1.")
    with process_group(config.device) as device:
        console = Console(stderr=True)
        chosen = config.assemblies or tuple(
            name for name in ("original", "tuned", "add", "concat") if config.tuned is not None or name == "original"
        )
        if "linear" in chosen:
            raise UserError("--assemblies linear is trained with a head, and correspondence trains none: leave it out.")
        rows = choose_rows(chosen, config.tuned is not None, config.control is not None)
        scene = read_posed_scene(config.data.expanduser())
        photos = load_photos(scene)
        pairs = choose_pairs_by_angle([photo.view for photo in photos], config.pairs_per_bin, config.min_overlap)
        backbones = load_backbones(
            config.backbone_spec(norm=True), config.tuned, config.control, rows, config.precision, device
        )
        question = {
            "probe": "correspondence",
            "scene": scene.name,
            "pairs": [[photos[a].name, photos[b].name] for a, b, _ in pairs],
            "rows": [row.name for row in rows],
            "backbones": backbones.identities,
            "settings": [config.matches, config.grid_scale, config.precision],
        }
        results = ResultFolder(config.output_dir, question)
        results.start()
        errors, shown = _score(photos, pairs, rows, backbones, config, device, console)
        summary = {
            "probe": "correspondence",
            "data": {"name": scene.name, "views": len(photos), "pairs": len(pairs)},
            "backbone": asdict(backbones.info),
            **provenance(device),
        }
        _write(results.folder, errors, pairs, photos, shown, summary, config.matches)
        console.print(f"Report: {results.folder / 'report.html'}", highlight=False)


def load_photos(scene: PosedScene) -> list[PosedPhoto]:
    """Reads a scene's photos and depths.

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
        depth = read_index(frame.depth).astype(np.float32) / np.float32(scene.depth_scale)
        fx, fy, cx, cy = frame.intrinsics
        K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
        view = View(torch.from_numpy(frame.viewmat), K, frame.size[1], frame.size[0], torch.from_numpy(depth))
        photos.append(PosedPhoto(image, view, frame.image.stem))
    return photos


def relative_angle(first: View, second: View) -> float:
    """Returns the angle between two cameras' orientations, degrees."""
    rotation = second.viewmat[:3, :3].double() @ first.viewmat[:3, :3].double().T
    return math.degrees(math.acos(max(-1.0, min(1.0, (float(rotation.trace()) - 1) / 2))))


def choose_pairs_by_angle(views: Sequence[View], per_bin: int, min_overlap: float) -> list[tuple[int, int, float]]:
    """Chooses pairs of views that see the same surface, as many in each range of angles, without chance.

    Args:
        views: V views.
        per_bin: Most pairs in a range.
        min_overlap: Least share of the first view's surface that the second sees.

    Returns:
        (a, b, angle in degrees), a < b.

    Raises:
        UserError: If no pair overlaps enough.
    """
    surface = [max(1, len(correspondences(view, view, _OVERLAP_GRID, _OVERLAP_GRID))) for view in views]
    by_bin: list[list[tuple[int, int, float]]] = [[] for _ in ANGLE_BINS]
    candidates = [
        (a, b, relative_angle(views[a], views[b])) for a in range(len(views)) for b in range(a + 1, len(views))
    ]
    for number, (low, high) in enumerate(ANGLE_BINS):
        inside = [pair for pair in candidates if low <= pair[2] < high or pair[2] == high == 180.0]
        # Looked at in an order that is spread over the scene; most pairs of a large scene see nothing in common.
        for a, b, angle in sorted(inside, key=lambda pair: (pair[0] * 7919 + pair[1] * 104729) % 65537):
            points = correspondences(views[a], views[b], _OVERLAP_GRID, _OVERLAP_GRID)
            if len(points) < min_overlap * surface[a] or _displacement(points) < _MIN_DISPLACEMENT:
                continue
            by_bin[number].append((a, b, angle))
            if len(by_bin[number]) == per_bin:
                break
    pairs = sorted(pair for found in by_bin for pair in found)
    if not pairs:
        raise UserError("No two views of the scene see enough of the same surface: lower --min-overlap.")
    return pairs


def match_views(
    map_a: Float[Tensor, "C h w"], map_b: Float[Tensor, "C h w"], a: View, b: View, grid: tuple[int, int], count: int
) -> Matches:
    """Matches two views by their features and measures the matches.

    Features and depth are sampled on a grid; every grid point of the first view with depth is matched with the one of
    the second, with depth, whose feature has the largest cosine; the ``count`` matches with the smallest ratio of
    nearest to second nearest distance are kept (Probe3D; Lowe's ratio test).

    Args:
        map_a: Features of the first view.
        map_b: Of the second.
        a: First camera and depth.
        b: Second.
        grid: Rows and columns of the grid.
        count: Matches kept at most.

    Returns:
        The matches, best first; none if a view has no depth.
    """
    features_a, features_b = (_unit(_on_grid(feature_map, grid)) for feature_map in (map_a, map_b))
    points_a, depth_a = _grid_points(a, grid)
    points_b, depth_b = _grid_points(b, grid)
    valid_a, valid_b = depth_a > 0, depth_b > 0
    if not bool(valid_a.any()) or int(valid_b.sum()) < 2:
        empty = points_a[:0]
        return Matches(empty, empty, empty[:, 0])
    device = features_a.device
    features_a, features_b = features_a[valid_a.to(device)], features_b[valid_b.to(device)]
    best, ratio = _nearest(features_a, features_b)
    order = ratio.argsort(stable=True)[:count].cpu()
    source, target = points_a[valid_a][order], points_b[valid_b][best.cpu()[order]]
    true, in_front = _project(source, depth_a[valid_a][order], a, b)
    error = torch.where(in_front, (target - true).norm(dim=-1), torch.inf)
    return Matches(source.float(), target.float(), error.float())


def recall(errors: Sequence[Tensor], pixels: float) -> Optional[float]:
    """Returns the mean over pairs of the share of matches within some pixels; None without a pair."""
    shares = [float((error <= pixels).float().mean()) for error in errors if error.numel()]
    return sum(shares) / len(shares) if shares else None


def _score(
    photos: list[PosedPhoto],
    pairs: list[tuple[int, int, float]],
    rows: Sequence[Row],
    backbones: FrozenBackbones,
    config: CorrespondenceConfig,
    device: torch.device,
    console: Console,
) -> tuple[dict[str, list[Tensor]], dict[str, Matches]]:
    """Returns the errors of every pair by row, and the matches of the pair that is shown."""
    errors: dict[str, list[Tensor]] = {row.name: [] for row in rows}
    shown: dict[str, Matches] = {}
    features: dict[int, Any] = {}
    last_use = {index: number for number, (a, b, _) in enumerate(pairs) for index in (a, b)}
    with progress(console, "matching", len(pairs)) as advance:
        for number, (a, b, _) in enumerate(pairs):
            for index in (a, b):
                if index not in features:
                    image = torch.from_numpy(photos[index].image.transpose(2, 0, 1).copy()).to(device)
                    features[index] = backbones(image[None].float() / 255)
            view_a, view_b = photos[a].view, photos[b].view
            grid = (max(2, round(view_a.height * config.grid_scale)), max(2, round(view_a.width * config.grid_scale)))
            for row in rows:
                map_a, map_b = (row_features(row, features[index]).patch_tokens[0] for index in (a, b))
                matches = match_views(map_a, map_b, view_a, view_b, grid, config.matches)
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
    count: int,
) -> None:
    counts = [sum(low <= angle < high for _, _, angle in pairs) for low, high in ANGLE_BINS]
    header = ["features", *(f"{pixels} px" for pixels in RECALL_PIXELS)]
    header += [f"10 px, {low:.0f}-{high:.0f}° ({n})" for (low, high), n in zip(ANGLE_BINS, counts)]
    rows, numbers = [], {}
    for name, values in errors.items():
        overall = [recall(values, pixels) for pixels in RECALL_PIXELS]
        by_angle = [
            recall([error for error, (_, _, angle) in zip(values, pairs) if low <= angle < high], 10.0)
            for low, high in ANGLE_BINS
        ]
        numbers[name] = {
            "recall": dict(zip((f"{pixels}px" for pixels in RECALL_PIXELS), overall)),
            "recall_10px_by_angle": dict(zip((f"{low:.0f}-{high:.0f}" for low, high in ANGLE_BINS), by_angle)),
        }
        rows.append([name, *("–" if value is None else f"{value:.3f}" for value in (*overall, *by_angle))])
    atomic_write_json(folder / "metrics.json", {**summary, "pairs_by_angle": counts, "rows": numbers})
    title = f"Correspondence: {summary['backbone']['name']} on {summary['data']['name']}"
    sentence = (
        f"{len(pairs)} pairs of views (in brackets: pairs by relative angle), {count} best matches each by ratio test; "
        "share of matches that land within 5, 10 or 20 pixels of the true place, averaged over pairs."
    )
    atomic_write_text(
        folder / "table.md", f"# {title}\n\n{sentence}\n\n{markdown_table(header, rows)}\n`{summary['command']}`\n"
    )
    report = Report(title)
    report.add_text(sentence)
    report.add_table(rows, header)
    report.add_heading("Matches of one pair")
    report.add_text("Every 20th match: green within 10 pixels of the true place, red beyond.")
    a, b, angle = pairs[_shown_pair(pairs)]
    for name, matches in shown.items():
        share = recall([matches.error], 10.0) or 0.0
        report.add_pictures(
            [(f"{photos[a].name} and {photos[b].name}, {angle:.0f}° apart", _draw(photos[a], photos[b], matches))],
            title=f"{name}: {share:.0%} within 10 pixels",
        )
    report.add_heading("How this was made")
    report.add_code(summary["command"])
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items() if version)
    report.add_text(f"{versions}; {summary['device']}.")
    report.write(folder / "report.html")


def _shown_pair(pairs: list[tuple[int, int, float]]) -> int:
    """The pair that pictures are made of: the one with the smallest angle."""
    return min(range(len(pairs)), key=lambda number: pairs[number][2])


def _draw(a: PosedPhoto, b: PosedPhoto, matches: Matches) -> np.ndarray:
    from PIL import Image, ImageDraw

    height = max(a.image.shape[0], b.image.shape[0])
    canvas = Image.new("RGB", (a.image.shape[1] + b.image.shape[1], height))
    canvas.paste(Image.fromarray(a.image), (0, 0))
    canvas.paste(Image.fromarray(b.image), (a.image.shape[1], 0))
    draw = ImageDraw.Draw(canvas)
    for source, target, error in list(zip(matches.source, matches.target, matches.error))[::20]:
        color = (40, 220, 90) if float(error) <= 10 else (240, 60, 60)
        x, y = float(source[0]), float(source[1])
        draw.line([x, y, float(target[0]) + a.image.shape[1], float(target[1])], fill=color, width=1)
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], outline=color)
    return np.asarray(canvas)


def _on_grid(feature_map: Float[Tensor, "C h w"], grid: tuple[int, int]) -> Float[Tensor, "hw C"]:
    # A patch map padded by some pixels is shifted by less than half a patch; Probe3D resizes likewise.
    resized = F.interpolate(feature_map[None], size=grid, mode="bilinear", align_corners=False)
    return resized[0].flatten(1).T


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1)


def _grid_points(view: View, grid: tuple[int, int]) -> tuple[Float[Tensor, "M 2"], Float[Tensor, "M"]]:
    """Pixels (x, y) of a grid's cell centres, and the depth there."""
    rows, columns = grid
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    points = torch.stack([x * view.width / columns, y * view.height / rows], -1).reshape(-1, 2).double()
    depth = torch.from_numpy(resize_nearest(view.depth.numpy(), grid).copy()).reshape(-1).double()
    return points, depth


def _nearest(a: Float[Tensor, "M C"], b: Float[Tensor, "K C"]) -> tuple[Tensor, Tensor]:
    """For each of a: the place of the nearest of b by cosine, and the ratio of the two smallest distances."""
    places, ratios = [], []
    for part in a.split(max(1, _SIMILARITIES_PER_STEP // len(b))):
        cosines, indices = (part @ b.T).topk(2, dim=1)
        distances = (1 - cosines).clamp_min(1e-9)
        places.append(indices[:, 0])
        ratios.append(distances[:, 0] / distances[:, 1])
    return torch.cat(places), torch.cat(ratios)


def _project(
    points: Float[Tensor, "M 2"], depth: Float[Tensor, "M"], a: View, b: View
) -> tuple[Float[Tensor, "M 2"], Bool[Tensor, "M"]]:
    """Where the surface points that one view sees lie in the other, and whether in front of it."""
    homogeneous = torch.cat([points, torch.ones_like(points[:, :1])], 1)
    in_a = (homogeneous @ torch.linalg.inv(a.K.double()).T) * depth[:, None]
    a_to_b = b.viewmat.double() @ torch.linalg.inv(a.viewmat.double())
    in_b = in_a @ a_to_b[:3, :3].T + a_to_b[:3, 3]
    projected = in_b @ b.K.double().T
    in_front = in_b[:, 2] > 1e-6
    return projected[:, :2] / torch.where(in_front, projected[:, 2], 1.0)[:, None], in_front


def _displacement(points: Any) -> float:
    """Median shift of shared points between two photos laid over each other, as a share of the width."""
    rows, columns = _OVERLAP_GRID
    source = torch.stack([points.patch_index % columns, points.patch_index // columns], -1) + 0.5
    return float((points.target - source).norm(dim=-1).median()) / columns if len(points) else 0.0
