"""Probes without training: correspondence and retrieval, on features whose answer is known."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from probe_files import TINY, save_photo, save_png

from fit3d_ns.backbones import BackboneInfo, BackboneOutput
from fit3d_ns.features.correspondences import SurfaceView
from fit3d_ns.support.errors import UserError
from probe.config import CorrespondenceConfig, RetrievalConfig
from probe.data.own import read_posed_scene
from probe.features.rows import centre_pad
from probe.zero_shot import correspondence as correspondence_module
from probe.zero_shot.correspondence import load_photos, run_correspondence
from probe.zero_shot.matching import (
    _grid_depth,
    choose_pairs_by_angle,
    features_on_grid,
    match_views,
    recall,
    relative_angle,
    same_place_errors,
)
from probe.zero_shot.retrieval import patch_labels, retrieve, run_retrieval

FOCAL, HEIGHT, WIDTH = 60.0, 48, 64


def _camera(angle: float) -> np.ndarray:
    """Camera to world, OpenCV axes: on a circle around (0, 0, 2), looking at it."""
    turn = math.radians(angle)
    rotation = np.array([[math.cos(turn), 0, math.sin(turn)], [0, 1, 0], [-math.sin(turn), 0, math.cos(turn)]])
    pose = np.eye(4)
    pose[:3, :3] = rotation
    pose[:3, 3] = np.array([0, 0, 2]) - rotation @ np.array([0, 0, 2])
    return pose


def _view(angle: float) -> tuple[SurfaceView, np.ndarray]:
    """A view of a plane z = 4, and the world points [H, W, 3] that it sees."""
    pose = _camera(angle)
    columns, rows = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    rays = np.stack([(columns - WIDTH / 2) / FOCAL, (rows - HEIGHT / 2) / FOCAL, np.ones_like(rows)], -1)
    directions = rays @ pose[:3, :3].T
    depth = (4 - pose[2, 3]) / directions[..., 2]
    points = pose[:3, 3] + directions * depth[..., None]
    K = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]], dtype=torch.float64)
    view = SurfaceView(
        torch.from_numpy(np.linalg.inv(pose)), K, WIDTH, HEIGHT, torch.from_numpy(depth.astype(np.float32))
    )
    return view, points


def _features(points: np.ndarray) -> torch.Tensor:
    """Features that tell world points apart: waves of several lengths along x and y."""
    waves = [wave(points[..., axis] * length) for axis in (0, 1) for length in (1, 2, 4) for wave in (np.sin, np.cos)]
    return torch.from_numpy(np.stack(waves, -1)).float().flatten(0, 1)


def test_features_of_world_points_are_found_again():
    (first, points), (second, others) = _view(0), _view(20)
    assert relative_angle(first, second) == pytest.approx(20, abs=1e-6)
    matches = match_views(_features(points), _features(others), first, second, (HEIGHT, WIDTH), 500)
    assert len(matches.error) == 500
    assert float((matches.error <= 2).float().mean()) > 0.95
    # The plane's point (0, 0, 4) lies in the middle of the first photo, and 20 degrees further elsewhere.
    stay = same_place_errors(first, second, (HEIGHT, WIDTH))
    middle = (second.K @ (second.viewmat[:3, :3] @ torch.tensor([0.0, 0, 4]).double() + second.viewmat[:3, 3]))[:2]
    depth = (second.viewmat @ torch.tensor([0.0, 0, 4, 1]).double())[2]
    expected = float((middle / depth - torch.tensor([WIDTH / 2, HEIGHT / 2])).norm())
    assert expected > 5 and float(stay[HEIGHT // 2 * WIDTH + WIDTH // 2]) == pytest.approx(expected, abs=1.0)
    assert not same_place_errors(first, first, (HEIGHT, WIDTH)).max() > 1e-4
    blind = match_views(torch.randn(HEIGHT * WIDTH, 8), torch.randn(HEIGHT * WIDTH, 8), first, second, (48, 64), 500)
    assert float((blind.error <= 2).float().mean()) < 0.05
    # The mean is one over pairs, and pairs without a match are left out.
    assert recall([torch.tensor([0.0, 9.0]), torch.tensor([1.0]), torch.zeros(0)], 5.0) == pytest.approx(0.75)


def test_features_are_read_where_they_lie_on_the_photo():
    """Photos are padded to whole patches, half on each side: patch (0, 0) does not begin at the photo's corner."""
    size, patch, grid = (100, 131), 16, (25, 33)
    rows, columns = torch.meshgrid(torch.arange(7) + 0.5, torch.arange(9) + 0.5, indexing="ij")
    # 112 and 144 pixels with padding, 6 of it before the photo.
    patch_map = torch.stack([columns * patch - 6, rows * patch - 6])
    found = features_on_grid(patch_map, size, patch, grid).reshape(*grid, 2)
    y, x = torch.meshgrid((torch.arange(25) + 0.5) * 4, (torch.arange(33) + 0.5) * 131 / 33, indexing="ij")
    # Beyond the centres of the outermost patches, their features go on unchanged.
    torch.testing.assert_close(found[..., 0], x.clamp(2, 130), atol=1e-3, rtol=0)
    torch.testing.assert_close(found[..., 1], y.clamp(2, 98), atol=1e-3, rtol=0)


def test_pairs_are_chosen_by_angle_and_overlap():
    views = [_view(angle)[0] for angle in (0, 10, 12, 22, 45)]
    pairs = choose_pairs_by_angle(views, 2, 0.2)
    angles = [angle for _, _, angle in pairs]
    assert (
        all(a < b for a, b, _ in pairs) and any(angle < 15 for angle in angles) and any(angle >= 15 for angle in angles)
    )
    assert sum(angle < 15 for angle in angles) <= 2
    with pytest.raises(UserError, match="--min-overlap"):
        choose_pairs_by_angle(views, 2, 1.01)


def _write_scene(folder, angles) -> None:
    frames = []
    for index, angle in enumerate(angles):
        view, _ = _view(angle)
        save_photo(folder / "images" / f"{index}.png", (HEIGHT, WIDTH), 0)
        save_png(folder / "depths" / f"{index}.png", np.round(view.depth.numpy() * 1000).astype(np.uint16))
        pose = _camera(angle) @ np.diag([1.0, -1, -1, 1])
        frames.append(
            {
                "file_path": f"images/{index}.png",
                "depth_file_path": f"depths/{index}.png",
                "transform_matrix": pose.tolist(),
            }
        )
    lens = {"fl_x": FOCAL, "fl_y": FOCAL, "cx": WIDTH / 2, "cy": HEIGHT / 2, "w": WIDTH, "h": HEIGHT}
    (folder / "transforms.json").write_text(json.dumps({**lens, "frames": frames}))


ROOM = np.array([4.0, 2.5, 3.0])
"""Metres; the room reaches from the origin to here."""


class _Positions:
    """A backbone whose features say where in the room a surface lies, which the photos' colours tell."""

    info = BackboneInfo("positions", "positions", 9, 14, 1, 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0)
    identities = {"original": {"name": "positions"}}

    def __call__(self, images):
        patch = self.info.patch_size
        padded = centre_pad(images, patch, torch.zeros(1, 3, 1, 1))
        place = torch.nn.functional.avg_pool2d(padded, patch)
        waves = [wave(math.pi * place) for wave in (torch.sin, torch.cos)]
        return {"original": BackboneOutput(torch.cat([*waves, place], 1), None)}


def _look(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Camera to world, OpenCV axes, y down."""
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    pose[:3, 3] = position
    return pose


def _write_room(folder, size: tuple[int, int] = (240, 320), focal: float = 220.0) -> None:
    """A box seen from inside: depth exact to a millimetre, colours that are positions."""
    rng = np.random.default_rng(0)
    frames = []
    columns, rows = np.meshgrid(np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5)
    rays = np.stack([(columns - size[1] / 2) / focal, (rows - size[0] / 2) / focal, np.ones_like(rows)], -1)
    for index, angle in enumerate((0, 12, 24, 50, 75, 90)):
        turn = math.radians(angle)
        position = ROOM / 2 + [-1.2 * math.sin(turn), 0.2 * rng.standard_normal(), -0.9 * math.cos(turn)]
        pose = _look(position, ROOM / 2 + [0.3 * math.sin(turn), 0.1, 0.5 * math.cos(turn)])
        directions = rays @ pose[:3, :3].T
        with np.errstate(divide="ignore"):
            walls = np.where(directions > 0, (ROOM - position) / directions, -position / directions)
        depth = walls.min(-1)
        points = position + directions * depth[..., None]
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray((points / ROOM * 255).round().astype(np.uint8)).save(folder / "images" / f"{index}.png")
        save_png(folder / "depths" / f"{index}.png", np.round(depth * 1000).astype(np.uint16))
        entry = {"file_path": f"images/{index}.png", "depth_file_path": f"depths/{index}.png"}
        frames.append({**entry, "transform_matrix": (pose @ np.diag([1.0, -1, -1, 1])).tolist()})
    lens = {"fl_x": focal, "fl_y": focal, "cx": size[1] / 2, "cy": size[0] / 2, "w": size[1], "h": size[0]}
    (folder / "transforms.json").write_text(json.dumps({**lens, "frames": frames}))


def test_recall_of_features_that_are_positions_is_complete(tmp_path, monkeypatch):
    """The whole command on a room with exact depth and poses: whatever is missing would be a fault of the protocol."""
    _write_room(tmp_path / "room")
    monkeypatch.setattr(correspondence_module, "load_backbones", lambda *_: _Positions())
    config = CorrespondenceConfig(tmp_path / "room", output_dir=tmp_path / "out", device="cpu", min_overlap=0.3)
    run_correspondence(config)
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert all(count >= 2 for count in numbers["pairs_by_angle"])
    row = numbers["rows"]["original"]
    assert row["recall"]["5px"] > 0.97 and min(row["recall_10px_by_angle"].values()) > 0.97
    # One pixel of the grid is four of the photo.
    assert 0.9 < row["recall_in_photo_pixels"]["10px"] <= row["recall"]["5px"]
    assert numbers["rows"]["same place"]["recall"]["10px"] < 0.3


def test_correspondence_command(tmp_path, weights):
    _write_scene(tmp_path / "scene", (0, 10, 20, 30))
    config = CorrespondenceConfig(
        tmp_path / "scene",
        TINY,
        weights["original"],
        (str(weights["tuned"]),),
        output_dir=tmp_path / "out",
        device="cpu",
    )
    run_correspondence(config)
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(numbers["rows"]) == ["original", "tuned", "add", "concat", "same place"]
    assert sum(numbers["pairs_by_angle"]) >= 3 and 0 <= numbers["rows"]["original"]["recall"]["20px"] <= 1
    assert "<img" in (tmp_path / "out" / "report.html").read_text()
    config.assemblies = ("linear",)
    with pytest.raises(UserError, match="linear is trained with a head"):
        run_correspondence(config)
    config.assemblies, config.final_norm = None, True
    with pytest.raises(UserError, match="another probe.*backbones"):
        run_correspondence(config)
    config.final_norm, config.long_side = False, 32
    with pytest.raises(UserError, match="another probe.*settings"):
        run_correspondence(config)
    assert load_photos(read_posed_scene(tmp_path / "scene"), 32)[0].view.K[:2].tolist() == [[30, 0, 16], [0, 30, 12]]
    text = json.loads((tmp_path / "scene" / "transforms.json").read_text())
    (tmp_path / "scene" / "transforms.json").write_text(json.dumps({**text, "k1": 0.1}))
    with pytest.raises(UserError, match="lens with distortion"):
        run_correspondence(config)


def test_patch_labels_and_votes_by_hand():
    labels = torch.tensor([[0, 1, 2, 2], [0, 0, 255, 255], [255, 255, 1, 1], [255, 255, 1, 1]], dtype=torch.uint8)
    shares = patch_labels(labels, (2, 2), 3)
    torch.testing.assert_close(shares[:, 0, 0], torch.tensor([0.75, 0.25, 0.0]))
    torch.testing.assert_close(shares[:, 0, 1], torch.tensor([0.0, 0.0, 1.0]))
    assert not shares[:, 1, 0].any()
    memory = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=1)
    votes = retrieve(torch.tensor([[[2.0]], [[0.0]]]), memory, torch.eye(3), 2, 0.1)
    weight = math.exp(10) / (math.exp(10) + math.exp(10 / math.sqrt(2)))
    torch.testing.assert_close(votes[:, 0, 0], torch.tensor([weight, 0.0, 1 - weight]), rtol=1e-4, atol=1e-6)


def test_retrieval_command_finds_colours(tmp_path, weights, colored_blocks):
    config = RetrievalConfig(
        colored_blocks(), TINY, weights["original"], output_dir=tmp_path / "out", device="cpu", workers=0
    )
    run_retrieval(config)
    rows = json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"]
    assert list(rows) == ["original"] and rows["original"]["aacc"]["mean"] > 0.6


@pytest.mark.parametrize("grid", [(3, 4), (6, 8), (5, 9)])
@pytest.mark.parametrize("scale", [1, 2])
def test_depth_is_read_where_its_point_is(grid, scale):
    """At the centre of a cell, not at its corner, also where depth has another size than the photo."""
    rows, columns = HEIGHT * scale, WIDTH * scale
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    for coordinate, axis in ((x / scale, 0), (y / scale, 1)):
        points, depth = _grid_depth(SurfaceView(torch.eye(4), torch.eye(3), WIDTH, HEIGHT, coordinate), grid)
        assert (depth - points[:, axis]).abs().max() <= 0.5
