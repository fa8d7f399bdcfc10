"""Poses as a set: what is taken, what is mended with a remark, and what is refused by the frame's name."""

import json

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fit3d_ns.data.poses import check_poses
from fit3d_ns.support.errors import UserError

NUM = 9
NAMES = [f"images/{index}.png" for index in range(NUM)]
ODD = 4


def ring(radius: float = 2.0, origin=(0.0, 0.0, 0.0)) -> np.ndarray:
    """Cameras around a point, each turned by a rotation of its own."""
    poses = np.tile(np.eye(4), (NUM, 1, 1))
    poses[:, :3, :3] = Rotation.from_quat(np.random.default_rng(1).normal(size=(NUM, 4))).as_matrix()
    angles = np.linspace(0, 2 * np.pi, NUM, endpoint=False)
    poses[:, :3, 3] = np.array(origin) + radius * np.stack([np.cos(angles), np.sin(angles), 0.1 * angles], axis=1)
    return poses


def judge(poses, names=NAMES):
    return check_poses([np.asarray(pose).tolist() for pose in poses], names, "transforms.json")


@pytest.mark.parametrize("radius", [1e-6, 1e-3, 2.0, 1e3, 1e7])
@pytest.mark.parametrize("distance", [0, 1, 1e3, 1e6])
def test_rigid_poses_are_taken_as_they_are_wherever_they_lie(radius, distance):
    poses = ring(radius, (distance * radius, 0.5 * distance * radius, 0))
    judged = judge(poses)
    assert np.array_equal(judged.matrices, poses) and not judged.remarks
    origin = judged.origin(centred_later=True)
    rounded = (poses[:, :3, 3] - origin).astype(np.float32).astype(np.float64) + origin
    assert np.abs(rounded - poses[:, :3, 3]).max() < 1e-6 * radius
    assert origin.any() == (distance >= 1e3)
    assert judged.origin(centred_later=False).any() == (distance >= 1e6)


def test_a_missing_last_row_is_added():
    poses = ring()
    assert np.array_equal(judge([pose[:3] for pose in poses]).matrices, poses)


@pytest.mark.parametrize("scale", [0.01, 2.0, 1000.0])
def test_a_common_scale_is_divided_out_with_a_remark(scale):
    poses = ring()
    scaled = poses @ np.diag([scale, scale, scale, 1])
    judged = judge(scaled)
    np.testing.assert_allclose(judged.matrices, poses, atol=1e-12)
    assert len(judged.remarks) == 1 and f"scaled by {scale:g}" in judged.remarks[0]


def test_rounding_of_rotations_is_no_scale():
    poses = np.round(ring(), 4)
    judged = judge(poses)
    assert np.array_equal(judged.matrices, poses) and not judged.remarks


def change(entry, value):
    def apply(pose):
        pose[entry] = value
        return pose

    return apply


@pytest.mark.parametrize(
    "damage, said",
    [
        (change((0, 3), np.nan), "not finite"),
        (change((1, 1), -np.inf), "not finite"),
        (lambda pose: pose @ np.diag([-1, 1, 1, 1]), "mirrored"),
        (lambda pose: np.diag([1, -1, 1, 1]) @ pose, "mirrored"),
        (lambda pose: pose @ np.diag([1, 2, 1, 1]), "no rotation"),
        (lambda pose: pose @ np.diag([0, 0, 0, 1]), "no rotation"),
        (lambda pose: pose @ np.diag([2, 2, 2, 1]), "is scaled by 2, that of other views by 1"),
        (lambda pose: pose.T, "ends with the row"),
        (lambda pose: pose[:2], "3x4 or 4x4"),
        (lambda pose: pose.ravel(), "3x4 or 4x4"),
        (lambda pose: [["a"] * 4] * 4, "3x4 or 4x4"),
        (lambda pose: None, "3x4 or 4x4"),
        (change((0, 3), 2e4), "as far from the others"),
    ],
)
def test_what_is_no_pose_is_refused_by_frame(damage, said):
    poses = list(ring(origin=(5, 0, 0)))
    poses[ODD] = damage(poses[ODD].copy())
    with pytest.raises(UserError, match=said) as caught:
        check_poses(poses, NAMES, "transforms.json")
    assert NAMES[ODD] in str(caught.value) and "transforms.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 3), (5e6, 4e5, 100)])
def test_views_at_one_place_are_refused(place):
    poses = ring()
    noise = 1e-16 * np.random.default_rng(0).normal(size=(NUM, 3))
    poses[:, :3, 3] = np.array(place) * (1 + noise)
    with pytest.raises(UserError, match=f"All {NUM} views of transforms.json were taken at one place"):
        judge(poses)
    poses[ODD, 0, 3] += 1  # the spread of a single view
    with pytest.raises(UserError, match=f"{NAMES[ODD]}.*at one place"):
        judge(poses)


def test_two_and_three_views_may_stand_as_they_like():
    for count in (1, 2, 3):
        judge(ring()[:count], NAMES[:count])


def path_of_the_viewer(tmp_path, *matrices):
    frames = [{"camera_to_world": matrix, "fov": 60, "aspect": 1.5} for matrix in matrices]
    path = tmp_path / "camera_path.json"
    path.write_text(json.dumps({"render_height": 6, "render_width": 9, "seconds": 1.0, "camera_path": frames}))
    return path


def test_camera_paths_are_read_by_the_same_rules(tmp_path):
    from fit3d_ns.commands.export.camera_path import path_from_file

    here = np.eye(4, dtype=int).ravel().tolist()  # whole numbers, and twice at one place
    poses = path_from_file(path_of_the_viewer(tmp_path, here, here)).cameras.camera_to_worlds
    assert poses.shape == (2, 3, 4) and poses.dtype.is_floating_point
    for damage, said in (
        (np.diag([-1, 1, 1, 1]), "frame 1 .*camera_path.json is mirrored"),
        (np.diag([1, 2, 1, 1]), "frame 1 .*camera_path.json is no rotation"),
        (np.full((4, 4), np.nan), "frame 1 .*camera_path.json is not finite"),
    ):
        with pytest.raises(UserError, match=said):
            path_from_file(path_of_the_viewer(tmp_path, here, damage.ravel().tolist()))
    for damage in ([1, 2], "a", None, [[1]] * 4, {}):
        with pytest.raises(UserError, match="camera_path.json"):
            path_from_file(path_of_the_viewer(tmp_path, here, damage))
