"""What systems leave in folders is neither data nor a fault, whichever reader lists them."""

import json

import numpy as np
import pytest
from nerfstudio.data.dataparsers.arkitscenes_dataparser import ARKitScenesDataParserConfig
from nerfstudio.data.dataparsers.scannet_dataparser import ScanNetDataParserConfig
from PIL import Image
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation

from fit3d_ns.backbones.students.fine_tuned import find_fine_tuned
from fit3d_ns.data.dataparsers import read_checked

LEFTOVERS = (".DS_Store", "._0.jpg", "Thumbs.db", "desktop.ini")


def poses_of(scene):
    frames = json.loads((scene / "transforms.json").read_text())["frames"]
    return [np.array(frame["transform_matrix"]) @ np.diag([1, -1, -1, 1]) for frame in frames]


def as_scannet(scene, data):
    for name in ("color", "depth", "pose", "intrinsic"):
        (data / name).mkdir(parents=True)
    for number, pose in enumerate(poses_of(scene)):
        Image.new("RGB", (96, 72)).save(data / "color" / f"{number}.jpg")
        Image.fromarray(np.ones((72, 96), np.uint16)).save(data / "depth" / f"{number}.png")
        np.savetxt(data / "pose" / f"{number}.txt", pose)
    np.savetxt(data / "intrinsic" / "intrinsic_color.txt", np.diag([90.0, 90.0, 1.0, 1.0]))
    return ScanNetDataParserConfig(data=data, load_3D_points=False), ("color", "depth", "pose")


def as_arkitscenes(scene, data):
    frames = data / f"{data.name}_frames"
    names = ("lowres_wide", "lowres_depth", "lowres_wide_intrinsics")
    for name in names:
        (frames / name).mkdir(parents=True)
    lines = []
    for number, pose in enumerate(poses_of(scene)):
        frame = f"{data.name}_{number}.000"
        Image.new("RGB", (96, 72)).save(frames / "lowres_wide" / f"{frame}.png")
        Image.fromarray(np.ones((72, 96), np.uint16)).save(frames / "lowres_depth" / f"{frame}.png")
        (frames / "lowres_wide_intrinsics" / f"{frame}.pincam").write_text("96 72 90 90 48 36")
        inverse = np.linalg.inv(pose)
        turn = Rotation.from_matrix(inverse[:3, :3]).as_rotvec()
        lines.append(" ".join(str(value) for value in (float(number), *turn, *inverse[:3, 3])))
    (frames / "lowres_wide.traj").write_text("\n".join(lines) + "\n")
    return ARKitScenesDataParserConfig(data=data), tuple(f"{frames.name}/{name}" for name in names)


@pytest.mark.parametrize("write", [as_scannet, as_arkitscenes])
def test_dataparsers_that_list_folders(scene, tmp_path, write):
    config, folders = write(scene, tmp_path / "data")
    clean = read_checked(config.setup(), seeds=False).get_dataparser_outputs("train")
    for folder in folders:
        for name in LEFTOVERS:
            (tmp_path / "data" / folder / name).write_bytes(b"left behind")
    outputs = read_checked(config.setup(), seeds=False).get_dataparser_outputs("train")
    assert outputs.image_filenames == clean.image_filenames and len(clean.image_filenames) > 10
    assert np.array_equal(outputs.cameras.camera_to_worlds, clean.cameras.camera_to_worlds)


def test_folders_of_weights(tmp_path, teacher_weights):
    from safetensors.torch import load_file

    save_file(load_file(teacher_weights), tmp_path / "weights.safetensors")
    (tmp_path / "._weights.safetensors").write_bytes(b"left behind")
    assert find_fine_tuned(tmp_path, "--tuned").weights == tmp_path / "weights.safetensors"
