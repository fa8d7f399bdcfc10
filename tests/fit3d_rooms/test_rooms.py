"""Rooms: the same bytes for a seed, geometry that agrees with itself, files that nerfstudio reads, clear refusals."""

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.faults.kinds import NotApplicable
from benchmarks.faults.mutations import apply, mutations_of
from fit3d_ns.support.errors import UserError
from fit3d_rooms.cli import RoomsConfig, main, make_rooms
from fit3d_rooms.dataset import RoomSettings, open_output

VIEWS, WIDTH, HEIGHT = 6, 96, 72
ARGUMENTS = ["--views", str(VIEWS), "--width", str(WIDTH), "--height", str(HEIGHT), "--seed", "3"]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory) -> Path:
    """A living room and a bedroom."""
    out = tmp_path_factory.mktemp("rooms") / "set"
    main([str(out), "--scenes", "2", "--workers", "2", *ARGUMENTS])
    return out


def hashes(folder: Path) -> dict[str, str]:
    """Relative path -> hash of all files below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def load(room: Path):
    """Returns poses [V, 4, 4], depth in metres [V, H, W], labels [V, H, W] and the file's content."""
    meta = json.loads((room / "transforms.json").read_text())
    depth, labels, poses = [], [], []
    for frame in meta["frames"]:
        stored = Image.open(room / frame["depth_file_path"])
        assert stored.mode.startswith("I;16")
        depth.append(np.array(stored) / 1000)
        labels.append(np.array(Image.open(room / frame["semantics_file_path"])))
        poses.append(frame["transform_matrix"])
        assert np.array(Image.open(room / frame["file_path"])).shape == (HEIGHT, WIDTH, 3)
    return np.array(poses), np.array(depth), np.array(labels), meta


def project(points: np.ndarray, pose: np.ndarray, meta: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel column, pixel row and z-depth of world points [N, 3]; pixel centres at half integers, OpenGL axes."""
    x, y, z = ((points - pose[:3, 3]) @ pose[:3, :3]).T
    depth = -z
    safe = np.where(depth > 1e-6, depth, 1.0)
    return meta["fl_x"] * x / safe + meta["cx"], meta["cy"] - meta["fl_y"] * y / safe, depth


def seen_depth(points: np.ndarray, pose: np.ndarray, depth: np.ndarray, meta: dict) -> tuple[np.ndarray, np.ndarray]:
    """z-depth of the points that fall into the picture, and what the depth map holds there."""
    u, v, z = project(points, pose, meta)
    inside = (z > 0.05) & (u > 0.5) & (u < WIDTH - 0.5) & (v > 0.5) & (v < HEIGHT - 0.5)
    rows, columns = v[inside].astype(int), u[inside].astype(int)
    return z[inside], depth[rows, columns]


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the seed points with Open3D, as nerfstudio does."""
    import open3d

    cloud = open3d.io.read_point_cloud(str(path))
    return np.asarray(cloud.points), np.asarray(cloud.colors)


def test_bytes_depend_on_the_seed_alone(rooms, tmp_path):
    """One core, one worker, another set of rooms, in another process: the same files."""
    again = tmp_path / "again"
    code = "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from fit3d_rooms.cli import main; "
    code += "main(sys.argv[1:])"
    command = [
        sys.executable,
        "-c",
        code,
        str(again),
        "--scenes",
        "1",
        "--start-scene",
        "1",
        "--workers",
        "1",
        *ARGUMENTS,
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert hashes(again / "room_001") == hashes(rooms / "room_001")
    assert len(hashes(again / "room_001")) == 3 * VIEWS + 4


def test_classes(rooms):
    """Ids mean the same in every room, at least 12 classes are seen in two rooms, and nothing is void."""
    tables = [json.loads((rooms / name / "classes.json").read_text()) for name in ("room_000", "room_001")]
    index = json.loads((rooms / "rooms.json").read_text())
    assert tables[0] == tables[1] == index["classes"]
    assert [entry["id"] for entry in tables[0]] == list(range(len(tables[0])))
    present = [np.unique(load(rooms / name)[2]) for name in ("room_000", "room_001")]
    assert max(p.max() for p in present) < len(tables[0])
    assert len(np.union1d(*present)) >= 12
    names = {entry["name"]: entry["id"] for entry in tables[0]}
    for name in ("wall", "floor"):
        assert all(names[name] in p for p in present)
    assert [room["kind"] for room in index["rooms"]] == ["living room", "bedroom"]


def test_labels_name_what_is_there(rooms):
    """Floor pixels lie at height 0, and the ceiling is one horizontal plane above everything."""
    names = {e["name"]: e["id"] for e in json.loads((rooms / "rooms.json").read_text())["classes"]}
    for name in ("room_000", "room_001"):
        poses, depth, labels, meta = load(rooms / name)
        heights = np.stack([back_project(p, d, meta)[:, 2].reshape(HEIGHT, WIDTH) for p, d in zip(poses, depth)])
        assert np.abs(heights[labels == names["floor"]]).max() < 0.01
        assert heights.min() > -0.01
        assert heights.max() < 2.9
        if (labels == names["ceiling"]).any():
            assert heights[labels == names["ceiling"]].min() > heights.max() - 0.02


def back_project(pose: np.ndarray, depth: np.ndarray, meta: dict) -> np.ndarray:
    """World points [H * W, 3] of all pixel centres."""
    v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    rays = np.stack([(u - meta["cx"]) / meta["fl_x"], -(v - meta["cy"]) / meta["fl_y"], -np.ones_like(u)], -1)
    return (rays * depth[..., None]).reshape(-1, 3) @ pose[:3, :3].T + pose[:3, 3]


def test_depth_agrees_between_views(rooms):
    """A surface point of one view is never in front of what another view sees, and often is what it sees."""
    poses, depth, _, meta = load(rooms / "room_000")
    agreeing = []
    for i in range(VIEWS):
        j = (i + 1) % VIEWS
        z, stored = seen_depth(back_project(poses[i], depth[i], meta), poses[j], depth[j], meta)
        if len(z) < 500:
            continue
        tolerance = 0.04 * stored
        # At silhouettes the nearest pixel may see past a thin thing.
        assert (z < stored - tolerance).mean() < 0.08
        agreeing.append((np.abs(z - stored) < tolerance).mean())
    assert len(agreeing) >= 3
    assert np.mean(agreeing) > 0.5


def test_seed_points_lie_on_what_is_seen(rooms):
    """Seed points project onto the depth maps and carry the colours of the pictures."""
    points, colors = read_ply(rooms / "room_001" / "sparse_pc.ply")
    poses, depth, _, meta = load(rooms / "room_001")
    assert len(points) > 0.2 * VIEWS * WIDTH * HEIGHT
    found = np.zeros(len(points), bool)
    same_color = []
    for pose, stored, frame in zip(poses, depth, meta["frames"]):
        u, v, z = project(points, pose, meta)
        inside = np.flatnonzero((z > 0.05) & (u > 0) & (u < WIDTH) & (v > 0) & (v < HEIGHT))
        rows, columns = v[inside].astype(int), u[inside].astype(int)
        hit = np.abs(z[inside] - stored[rows, columns]) < 0.002
        found[inside[hit]] = True
        image = np.array(Image.open(rooms / "room_001" / frame["file_path"])) / 255
        same_color.append(np.abs(image[rows[hit], columns[hit]] - colors[inside[hit]]).max(1) < 0.15)
    assert found.all()
    assert np.concatenate(same_color).mean() > 0.9


def test_cameras_stand_in_free_space():
    """Cameras keep away from furniture on the plan, from every surface in space, and stay at eye height."""
    from fit3d_rooms.geometry import RayScene
    from fit3d_rooms.rendering import Camera
    from fit3d_rooms.room import plan_room
    from fit3d_rooms.walk import clearance

    layout, scene, poses, _ = plan_room(5, 2, Camera(96, 72, 60.0), 12)
    positions = poses[:, :3, 3]
    assert clearance(layout, positions[:, :2]).min() > 0.25
    assert ((positions[:, 2] > 1.2) & (positions[:, 2] < 1.7)).all()
    assert np.linalg.norm(positions[1:] - positions[:-1], axis=1).min() > 0.05
    assert np.allclose(poses[:, :3, :3] @ poses[:, :3, :3].transpose(0, 2, 1), np.eye(3), atol=1e-12)
    around = np.random.default_rng(0).normal(size=(400, 3))
    around /= np.linalg.norm(around, axis=1, keepdims=True)
    rays = RayScene(scene)
    for position in positions:
        faces, _, distance = rays.first_hit(position[None], around)
        assert (faces >= 0).all()
        assert distance.min() > 0.12


def test_footprints_do_not_overlap():
    """Furniture stands beside, not inside, other furniture, and within the walls."""
    from fit3d_rooms.building.layout import overlap
    from fit3d_rooms.rendering import Camera
    from fit3d_rooms.room import plan_room

    layout, _, _, _ = plan_room(5, 0, Camera(96, 72, 60.0), 4)
    assert len(layout.placements) >= 4
    for i, first in enumerate(layout.solids):
        assert layout.inside(first, -0.01)
        assert not any(overlap(first, second, -0.001) for second in layout.solids[i + 1 :])


def test_nerfstudio_reads_it(rooms):
    """The stock dataparser finds pictures, depth, cameras and seed points that fit together."""
    from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

    room = rooms / "room_000"
    parser = NerfstudioDataParserConfig(data=room, load_3D_points=True, eval_mode="interval", eval_interval=3).setup()
    outputs = parser.get_dataparser_outputs("train")
    assert len(outputs.image_filenames) < VIEWS
    assert len(parser.get_dataparser_outputs("val").image_filenames) >= 1
    points = outputs.metadata["points3D_xyz"].double().numpy()
    assert len(points) == len(outputs.metadata["points3D_rgb"])
    meta = json.loads((room / "transforms.json").read_text())
    for camera in range(len(outputs.image_filenames)):
        pose = outputs.cameras.camera_to_worlds[camera].double().numpy()
        depth = np.array(Image.open(outputs.metadata["depth_filenames"][camera])) / 1000 * outputs.dataparser_scale
        z, stored = seen_depth(points, pose, depth, meta)
        assert (z < stored - 0.05 * stored).mean() < 0.08
        assert (np.abs(z - stored) < 0.02 * stored).mean() > 0.3


def test_finished_rooms_are_kept(rooms, capsys):
    """A second run with the same settings makes nothing anew; other settings are refused."""
    before = {path: path.stat().st_mtime_ns for path in rooms.rglob("*.png")}
    main([str(rooms), "--scenes", "2", *ARGUMENTS])
    assert {path: path.stat().st_mtime_ns for path in rooms.rglob("*.png")} == before
    with pytest.raises(SystemExit) as stopped:
        main([str(rooms), "--scenes", "2", *ARGUMENTS[:-1], "4"])
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert "seed 3 instead of 4" in message
    assert "Traceback" not in message


FAKE = """
import os, signal, sys
import numpy as np
from fit3d_rooms import dataset, room
from fit3d_rooms.rendering import Camera, RenderedView
def fake(seed, index, views, width, height, workers, progress):
    flat = np.zeros((height, width), np.uint8)
    view = RenderedView(np.zeros((height, width, 3), np.uint8), np.ones((height, width), np.float32), flat)
    return room.RenderedRoom("studio", Camera(width, height, 50.0), np.stack([np.eye(4)] * views), [view] * views)
room.render_room = fake
rename = os.replace
def killed(source, target):
    if sys.argv[1] == "kill" and str(target).endswith("room_001"):
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = killed
from fit3d_rooms.cli import main
from fit3d_rooms.dataset import RoomSettings, open_output
main(sys.argv[2:])
"""


def test_killed_run_goes_on(tmp_path):
    """A kill at the worst moment leaves no half room; the next run makes what is missing and tidies up."""
    out = tmp_path / "out"

    def run(mode: str) -> int:
        command = [sys.executable, "-c", FAKE, mode, str(out), "--scenes", "3", "--views", "2", "--width", "64"]
        return subprocess.run([*command, "--height", "48"], check=False, capture_output=True).returncode

    assert run("kill") < 0
    assert sorted(path.name for path in out.glob("room_*")) == ["room_000"]
    assert list(out.glob(".room_001.partial-*"))
    first = hashes(out / "room_000"), (out / "room_000" / "room.json").stat().st_mtime_ns
    assert run("finish") == 0
    assert sorted(path.name for path in out.glob("room_*")) == ["room_000", "room_001", "room_002"]
    assert not list(out.glob(".*"))
    assert (hashes(out / "room_000"), (out / "room_000" / "room.json").stat().st_mtime_ns) == first
    assert len(json.loads((out / "rooms.json").read_text())["rooms"]) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"views": 1}, "--views 1 is too few"),
        ({"width": 8}, "--width 8 is out of range"),
        ({"height": 100_000}, "--height 100000 is out of range"),
        ({"scenes": 0}, "--scenes 0 is too small"),
        ({"seed": -1}, "--seed -1 is too small"),
        ({"start_scene": -1}, "--start-scene -1 is too small"),
        ({"workers": 0}, "--workers 0 is too small"),
    ],
)
def test_bad_values(tmp_path, change, words):
    """Each bad value is named, and nothing is written."""
    with pytest.raises(UserError, match=words):
        make_rooms(RoomsConfig(tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_bad_folders(tmp_path):
    """Files and other people's folders are left alone."""
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        make_rooms(RoomsConfig(file))
    with pytest.raises(UserError, match="cannot be written"):
        make_rooms(RoomsConfig(file / "below"))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "rooms.json").write_text("[]")
    with pytest.raises(UserError, match="holds no rooms of this program"):
        make_rooms(RoomsConfig(theirs))
    assert os.listdir(theirs) == ["rooms.json"]
    assert (theirs / "rooms.json").read_text() == "[]"


def test_foreign_folder_with_a_room_name(rooms, tmp_path):
    """A folder that only bears a room's name is not overwritten."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(rooms / "rooms.json", out)
    (out / "room_000").mkdir()
    (out / "room_000" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="not a finished room"):
        make_rooms(RoomsConfig(out, scenes=1, views=VIEWS, width=WIDTH, height=HEIGHT, seed=3))
    assert (out / "room_000" / "diary.txt").read_text() == "mine"


def test_open3d_is_loaded_only_when_needed():
    """Importing the package and the command's module loads no Open3D."""
    code = "import sys, fit3d_ns, fit3d_rooms.cli, fit3d_rooms.room; sys.exit('open3d' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_damaged_index_is_refused_or_made_anew(rooms, tmp_path, monkeypatch):
    """Every kind of damage that the harness knows."""
    monkeypatch.setenv("FIT3D_FAULTS_MARKER", str(tmp_path / "marker"))
    settings, path = RoomSettings(3, VIEWS, WIDTH, HEIGHT), tmp_path / "out" / "rooms.json"
    path.parent.mkdir()
    ends = set()
    for kind, seed in itertools.product(mutations_of(path), range(4)):
        shutil.copy(rooms / "rooms.json", path)
        try:
            apply(kind, path, random.Random(seed))
        except NotApplicable:
            continue
        try:
            open_output(path.parent, settings)
            ends.add("made anew")
        except UserError as error:
            assert "\n" not in str(error) and str(path.parent) in str(error), (kind, error)
            ends.add("refused")
        except OSError as error:  # said by the command, with the file's name
            assert path.is_dir() or path.is_symlink(), (kind, error)
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    assert ends == {"made anew", "refused"}
