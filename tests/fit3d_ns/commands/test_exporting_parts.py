"""Parts of ``fit3d-export`` that need no run: PLY tables, folders, orbits, camera paths, videos."""

import math

import numpy as np
import pytest
import torch
from plyfile import PlyData

from fit3d_ns.commands.export.camera_path import orbit, path_along_views
from fit3d_ns.commands.export.video import video_writer
from fit3d_ns.data.photos.bundled import BundledPhoto
from fit3d_ns.data.points import splat_ply
from fit3d_ns.data.points.splat_ply import read_ply, visible_rows, write_splat_ply
from fit3d_ns.runs.bundle import BundleCameras, BundleView
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_folder

av = pytest.importorskip("av", reason="av is not installed")


def gaussians(count=1000, coefficients=8):
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": (1,)}
    shapes |= {"features_dc": (3,), "features_rest": (coefficients, 3)}
    return {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}


def test_rows_are_written_in_order_however_many_go_to_the_disk_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(splat_ply, "_ROWS_PER_CALL", 64)
    splat, features = gaussians(), torch.randn(1000, 5)
    splat["means"][10] = torch.nan
    splat["opacities"][[20, 21]] = torch.tensor([[-5.6], [-5.5]])  # 1/255 lies between
    rows = visible_rows(splat)
    assert (~rows).nonzero().flatten().tolist() == [10, 20]
    assert write_splat_ply(tmp_path / "a.ply", splat, features, ["made here"]) == 998
    for name, tensor in read_ply(tmp_path / "a.ply").items():
        assert torch.equal(tensor, splat[name][rows]), name
    read = PlyData.read(tmp_path / "a.ply")
    assert "made here" in read.comments
    assert np.array_equal(read["vertex"]["feat_4"], features[rows, 4])


def test_nothing_visible_and_a_full_disk_leave_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.ply"
    path.write_text("old")
    splat = gaussians(10)
    with pytest.raises(UserError, match="No Gaussian is left to write to .*a.ply"):
        write_splat_ply(path, {**splat, "opacities": splat["opacities"] - 100})

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(UserError, match="Cannot write .*a.ply .No space left"):
        write_splat_ply(path, splat)
    assert path.read_text() == "old" and [item.name for item in tmp_path.iterdir()] == ["a.ply"]


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "maps"
    for names in (("1", "2"), ("3",)):
        with atomic_folder(folder) as temporary:
            for name in names:
                (temporary / name).write_text(name)
        assert sorted(path.name for path in folder.iterdir()) == list(names)
    with pytest.raises(ZeroDivisionError):
        with atomic_folder(folder) as temporary:
            (temporary / "4").write_text("4")
            raise ZeroDivisionError
    assert [path.name for path in folder.iterdir()] == ["3"]
    assert [path.name for path in tmp_path.iterdir()] == ["maps"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        with atomic_folder(tmp_path / "file" / "maps"):
            pass


def views_at(eyes, targets):
    """Views that stand at ``eyes`` and look at ``targets``, z up, with a photo of 40 x 30 pixels each."""
    backward = torch.nn.functional.normalize(eyes - targets, dim=1)
    right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([[0.0, 0, 1]]).expand_as(eyes), backward))
    down = -torch.linalg.cross(backward, right)
    rotations = torch.stack([right, down, -backward], dim=1)  # world to camera, OpenCV axes
    viewmats = torch.eye(4).repeat(len(eyes), 1, 1)
    viewmats[:, :3, :3] = rotations
    viewmats[:, :3, 3] = -(rotations @ eyes[..., None])[..., 0]
    intrinsics = torch.tensor([[50.0, 0, 20], [0, 50, 15], [0, 0, 1]]).repeat(len(eyes), 1, 1)
    views = [
        BundleView(f"{number}.png", "train", BundledPhoto("0.png", "0" * 64, 30, 40)) for number in range(len(eyes))
    ]
    return views, BundleCameras(viewmats, intrinsics)


def circle(count, radius, height):
    angles = torch.arange(count) / count * 2 * math.pi
    return torch.stack([radius * angles.cos(), radius * angles.sin(), torch.full((count,), height)], dim=1)


def test_cameras_of_photos_become_nerfstudios(tmp_path):
    from nerfstudio.models.splatfacto import get_viewmat

    views, cameras = views_at(circle(5, 2.0, 1.0), torch.zeros(5, 3))
    path = path_along_views(views, cameras, "train")
    to_camera = getattr(get_viewmat, "_torchdynamo_orig_callable", get_viewmat)(path.cameras.camera_to_worlds)
    torch.testing.assert_close(to_camera, cameras.viewmats, atol=1e-5, rtol=0)
    torch.testing.assert_close(path.cameras.get_intrinsics_matrices(), cameras.Ks)
    assert path.camera(2, "cpu").height.item() == 30
    with pytest.raises(UserError, match="no eval views"):
        path_along_views(views, cameras, "eval")


def test_orbit_goes_round_an_object_that_was_photographed_from_all_sides():
    centre = torch.tensor([3.0, -1.0, 0.5])
    views, cameras = views_at(circle(24, 2.0, 1.0) + centre, centre.expand(24, 3))
    poses = orbit(views, cameras, 12).cameras.camera_to_worlds
    eyes = poses[:, :, 3]
    distance = (eyes - centre)[:, :2].norm(dim=1)
    assert distance.min() > 1.7 and distance.max() < 2.01
    torch.testing.assert_close(eyes[:, 2], torch.full((12,), 1.5), atol=1e-3, rtol=0)
    looks = -poses[:, :, 2]
    torch.testing.assert_close(looks, torch.nn.functional.normalize(centre - eyes, dim=1), atol=1e-3, rtol=0)
    assert bool((poses[:, 2, 1] > 0).all())  # upright
    steps = (eyes - eyes.roll(1, 0)).norm(dim=1)
    assert steps.max() < 1.5 * steps.min()  # closed, and even


@pytest.mark.parametrize("case", ["wall", "one spot", "one photo", "from above"])
def test_orbit_stays_near_the_photos_however_they_were_taken(case):
    eyes = {
        "wall": torch.tensor([[x, 0.0, 0.1 * x] for x in (-2.0, -1, 0, 1, 2)]),
        "one spot": torch.ones(6, 3),
        "one photo": torch.ones(1, 3),
        "from above": torch.tensor([[0.01, 0.0, 3.0], [0.0, 0.01, 3.0], [-0.01, 0.0, 3.0]]),
    }[case]
    targets = {
        "wall": eyes + torch.tensor([0.0, 4.0, 0.0]),
        "one spot": torch.ones(6, 3) + circle(6, 1.0, 0.0),
        "one photo": torch.zeros(1, 3),
        "from above": torch.zeros(3, 3),
    }[case]
    poses = orbit(*views_at(eyes, targets), 8).cameras.camera_to_worlds
    assert bool(torch.isfinite(poses).all())
    torch.testing.assert_close(poses[:, :, :3] @ poses[:, :, :3].mT, torch.eye(3).expand(8, 3, 3), atol=1e-4, rtol=0)
    nearest = torch.cdist(poses[:, :, 3], eyes).min(1).values
    assert nearest.max() < 1.1
    if case == "wall":  # it sways, and keeps looking at the wall
        assert bool((-poses[:, 1, 2] > 0.5).all())


def test_a_video_that_fails_half_way_leaves_nothing(tmp_path):
    frame = torch.rand(20, 30, 3)
    with pytest.raises(ZeroDivisionError):
        with video_writer(tmp_path / "a.mp4", (20, 30), 10) as append:
            append(frame)
            raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with video_writer(tmp_path / "a.mp4", (21, 31), 29.97) as append:
        append(torch.full((21, 31, 3), 0.25))
    with av.open(str(tmp_path / "a.mp4")) as video:
        (shown,) = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert shown.shape == (20, 30, 3) and np.abs(shown / 255 - 0.25).max() < 0.02
