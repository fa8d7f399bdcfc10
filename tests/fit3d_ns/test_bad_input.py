"""Every mistake a user can make ends in one sentence that names the file or flag."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.runs.checkpoints import find_checkpoint, read_checkpoint
from fit3d_ns.support.errors import UserError


def edit(scene, change):
    path = scene / "transforms.json"
    transforms = json.loads(path.read_text())
    change(transforms)
    path.write_text(json.dumps(transforms))


def photos(scene):
    return sorted((scene / "images").iterdir())


def fails(make_trainer, config, pattern, train=False):
    with pytest.raises(UserError, match=pattern) as caught:
        trainer = make_trainer(config)
        if train:
            trainer.pipeline.datamanager.next_train(0)
    assert "\n" not in str(caught.value)


def test_missing_scene(tmp_path, make_config, make_trainer):
    fails(make_trainer, make_config(tmp_path / "nowhere"), "nowhere does not exist: check --data")


def test_folder_that_is_no_scene(tmp_path, make_config, make_trainer):
    (tmp_path / "empty").mkdir()
    fails(
        make_trainer,
        make_config(tmp_path / "empty"),
        "The scene .*empty is empty: name the folder that holds the scene",
    )


def test_missing_photo(scene, make_config, make_trainer):
    photos(scene)[3].unlink()
    fails(make_trainer, make_config(scene), f"{photos(scene)[0].parent}.*missing", train=True)


@pytest.mark.parametrize("trained", [False, True])
def test_a_run_that_is_refused_leaves_nothing(scene, make_config, make_trainer, trained):
    config = make_config(scene)
    checkpoint = config.get_checkpoint_dir() / "step-000000004.ckpt"
    if trained:
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
    photos(scene)[0].unlink()
    config.save_config()
    assert (config.get_base_dir() / "config.yml").is_file()
    fails(make_trainer, config, "is missing")
    assert checkpoint.exists() == (config.get_base_dir() / "config.yml").exists() == trained
    assert list(config.output_dir.iterdir()) == ([config.output_dir / config.experiment_name] if trained else [])


@pytest.mark.parametrize("damage", ["truncated", "text"])
def test_damaged_photo(scene, make_config, make_trainer, damage):
    for path in photos(scene)[2:]:  # the dataparser opens the first
        path.write_bytes(path.read_bytes()[:300] if damage == "truncated" else b"not an image at all")
    fails(make_trainer, make_config(scene), r"photo \S+/images/\S+ is truncated or not an image", train=True)


def test_photo_smaller_than_a_patch(scene, make_config, make_trainer):
    from PIL import Image

    for path in photos(scene):
        with Image.open(path) as image:
            small = image.resize((16, 12))
        small.save(path)
    edit(scene, lambda transforms: transforms.update(w=16, h=12, fl_x=10, fl_y=10, cx=8, cy=6))
    fails(make_trainer, make_config(scene), "smaller than one patch", train=True)


def test_no_poses(scene, make_config, make_trainer):
    edit(scene, lambda transforms: transforms.update(frames=[]))
    fails(make_trainer, make_config(scene), "holds no poses.*ns-process-data")


def test_view_without_pose(scene, make_config, make_trainer):
    edit(scene, lambda transforms: transforms["frames"][4].pop("transform_matrix"))
    fails(make_trainer, make_config(scene), "has no pose")


def test_one_view(scene, make_config, make_trainer):
    edit(scene, lambda transforms: transforms.update(frames=transforms["frames"][:1]))
    fails(make_trainer, make_config(scene), "only one view.*at least two")


def test_all_views_held_out(scene, make_config, make_trainer):
    names = [frame["file_path"] for frame in json.loads((scene / "transforms.json").read_text())["frames"]]
    edit(scene, lambda transforms: transforms.update(train_filenames=[], val_filenames=names, test_filenames=names))
    fails(make_trainer, make_config(scene), "held out")


def test_pose_that_is_not_finite(scene, make_config, make_trainer):
    def change(transforms):
        transforms["frames"][5]["transform_matrix"][0][3] = float("nan")

    edit(scene, change)
    name = json.loads((scene / "transforms.json").read_text())["frames"][5]["file_path"]
    fails(make_trainer, make_config(scene), f"{name}.*not finite")


def test_broken_json(scene, make_config, make_trainer):
    (scene / "transforms.json").write_text('{"frames": [')
    fails(make_trainer, make_config(scene), "transforms.json is not valid JSON")


@pytest.fixture
def colmap_scene(tmp_path):
    """A COLMAP model of three photos of 1700 x 20 pixels, without points."""
    from nerfstudio.data.utils import colmap_parsing_utils as colmap
    from PIL import Image

    model = tmp_path / "colmap_scene" / "colmap" / "sparse" / "0"
    model.mkdir(parents=True)
    (tmp_path / "colmap_scene" / "images").mkdir()
    nothing = {"qvec": np.array([1.0, 0, 0, 0]), "camera_id": 1, "xys": np.zeros((0, 2)), "point3D_ids": np.zeros(0)}
    images = {
        number: colmap.Image(id=number, tvec=np.array([0.1 * number, 0, 1]), name=f"{number}.png", **nothing)
        for number in (1, 2, 3)
    }
    for image in images.values():
        Image.new("RGB", (1700, 20)).save(tmp_path / "colmap_scene" / "images" / image.name)
    camera = colmap.Camera(id=1, model="PINHOLE", width=1700, height=20, params=np.array([800.0, 800.0, 850.0, 10.0]))
    colmap.write_cameras_binary({1: camera}, model / "cameras.bin")
    colmap.write_images_binary(images, model / "images.bin")
    colmap.write_points3D_binary({}, model / "points3D.bin")
    return tmp_path / "colmap_scene"


def colmap_config(make_config, scene):
    from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig

    config = make_config(scene)
    config.pipeline.datamanager.dataparser = ColmapDataParserConfig()
    return config


def test_truncated_colmap_model(colmap_scene, make_config, make_trainer):
    path = colmap_scene / "colmap" / "sparse" / "0" / "images.bin"
    path.write_bytes(path.read_bytes()[:-5])
    fails(
        make_trainer, colmap_config(make_config, colmap_scene), "images.bin cannot be read .*restore it, or compute the"
    )


def test_question_of_the_dataparser_without_a_terminal(colmap_scene, make_config, make_trainer, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    fails(make_trainer, colmap_config(make_config, colmap_scene), "`colmap --downscale-factor 1`")


def test_scene_without_seed_points_says_that_it_starts_at_random(scene, make_config, make_trainer, capsys):
    edit(scene, lambda transforms: transforms.pop("ply_file_path"))
    make_trainer(make_config(scene, num_random=200))
    assert "random positions" in " ".join(capsys.readouterr().err.split())


def test_unknown_backbone(scene, make_config, make_trainer):
    config = make_config(scene)
    config.pipeline.datamanager.backbone = "dinov2_smal"
    fails(make_trainer, config, "dinov2_small.*|--pipeline.datamanager.backbone")


def test_weights_of_another_architecture(scene, tmp_path, make_config, make_trainer):
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "resnet.safetensors")
    config = make_config(scene)
    config.pipeline.datamanager.backbone_weights = tmp_path / "resnet.safetensors"
    fails(make_trainer, config, "resnet.safetensors", train=True)


@pytest.mark.parametrize("dim", [0, -3, 65])
def test_feature_dim_out_of_range(scene, make_config, make_trainer, dim):
    sentence = f"--pipeline.model.feature-dim {dim} is out of range: 1 to the 64 channels"
    fails(make_trainer, make_config(scene, feature_dim=dim), sentence)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"refinements": -1}, "--refinements -1 is too small"),
        ({"report_dims": (4, 65)}, "--report-dims goes beyond the 64 channels"),
        ({"select": "fidelity"}, "--select fidelity needs held-out views"),
    ],
)
def test_lift_that_would_fail_after_training(scene, make_config, make_trainer, settings, sentence):
    config = make_config(scene, features="lift", lift=LiftSettings(**settings))
    config.pipeline.datamanager.dataparser.eval_mode = "all"
    fails(make_trainer, config, sentence)


def test_full_disk_while_caching(scene, make_config, make_trainer, monkeypatch):
    import errno

    from fit3d_ns.data import feature_cache

    def full(path, tensors, **options):
        raise UserError("full") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_cache, "write_tensors", full)
    fails(make_trainer, make_config(scene), "feature-cache-dir", train=True)
    assert not list((scene / ".fit3d_cache").rglob("*.safetensors"))


def test_several_gpus_for_one_scene(scene, make_config):
    from nerfstudio.scripts.train import main as ns_train

    config = make_config(scene)
    config.machine.num_devices = 2
    with pytest.raises(UserError, match="One scene trains on one GPU"):
        ns_train(config)  # before it starts a process for each


@pytest.mark.parametrize("size", [0, -1])
def test_batch_without_photos(scene, make_config, make_trainer, size):
    config = make_config(scene)
    config.pipeline.datamanager.feature_batch_size = size
    fails(make_trainer, config, f"feature-batch-size is {size}")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_device_that_cannot_render(scene, make_config, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"`{device}` of this machine.*--machine.device-type cpu"):
        make_config(scene).pipeline.setup(device=device)


def test_checkpoint_that_is_missing_or_torn(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    torn = tmp_path / "step-000000007.ckpt"
    torn.write_bytes(b"PK\x03\x04 torn")
    assert find_checkpoint(tmp_path) == torn
    with pytest.raises(UserError, match="of step 3, only of 7"):
        find_checkpoint(tmp_path, 3)
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_checkpoint(torn)
    assert "\n" not in str(caught.value)


def test_checkpoint_that_would_run_code_is_not_run(tmp_path):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "step-000000001.ckpt"
    torch.save({"pipeline": {"weight": torch.ones(2), "evil": Evil()}}, path)
    with pytest.raises(UserError, match=r"cannot be read \(it asks for `posix.mkdir`") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(pickle.dumps({"pipeline": Evil()}))
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_command_prints_the_sentence_and_no_traceback(tmp_path):
    ns_train = shutil.which("ns-train", path=str(__import__("pathlib").Path(sys.executable).parent))
    command = [ns_train, "fit3d-splat", "--data", str(tmp_path / "nowhere"), "--output-dir", str(tmp_path / "out")]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("Error: The scene")
    assert "Traceback" not in result.stderr + result.stdout
