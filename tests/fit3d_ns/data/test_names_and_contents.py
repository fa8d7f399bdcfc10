"""What clouds, phones, archives and other systems put in a file's place, or make of its name, is said by name."""

import gzip
import io
import json
import os
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from plyfile import PlyData, PlyElement
from safetensors.torch import save_file
from scene_formats import as_colmap, edit, read

from fit3d_ns.backbones import BackboneSpec, load_backbone
from fit3d_ns.data.folders import spelled_otherwise
from fit3d_ns.data.photos.picture_files import open_photo
from fit3d_ns.data.photos.view_files import check_masks_show_something
from fit3d_ns.data.points.seed_points import read_point_cloud
from fit3d_ns.data.points.splat_ply import read_ply
from fit3d_ns.data.scene_checks import explain_unreadable_scene
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.foreign_files import what_it_is

TINY = "test_vit"


def in_a_zip(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", data)
    return file.getvalue()


CONTENTS = {
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "pointer of Git LFS.*git lfs pull",
    ),
    "git-annex": (b"/annex/objects/SHA256E-s9--00.png\n", "pointer of git-annex"),
    "cloud": (b"", "it is empty"),
    "crash": (bytes(4096), "nothing but zeros"),
    "web page": (b"\n<!DOCTYPE html>\n<html><body>403</body></html>", "a web page"),
    "page with a mark": (b"\xef\xbb\xbf<HTML>", "a web page"),
    "gzip": (gzip.compress(b"something"), "compressed with gzip"),
    "zip": (in_a_zip(b"something"), "a zip archive"),
    "7z": (b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_what_stands_in_a_files_place_is_said_by_all_who_read(tmp_path, content):
    data, said = CONTENTS[content]

    def put(name: str) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    readers = {
        "photo.png": open_photo,
        "points.ply": read_point_cloud,
        "splat.ply": read_ply,
        "weights.safetensors": lambda path: load_backbone(BackboneSpec(TINY, weights=path), "cpu"),
        "weights.pth": lambda path: load_backbone(BackboneSpec(TINY, weights=path), "cpu"),
    }
    for name, read_file in readers.items():
        with pytest.raises(UserError, match=said) as caught:
            read_file(put(name))
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture.*convert it to JPEG or PNG"),
        ("a.dng", b"II*\0\x08\0\0\0" + bytes([7] * 99), "a camera's raw picture"),
        ("a.exr", b"v/1\x01" + bytes([7] * 99), "an OpenEXR picture"),
        ("a.png", b"just text", "its format is unknown"),
    ],
)
def test_pictures_that_are_not_read_here(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"photo .*{name} .*{said}"):
        open_photo(tmp_path / name)
    with pytest.raises(UserError, match=f"photo .*{name} .*{said}"), explain_unreadable_scene(tmp_path):
        Image.open(tmp_path / name)  # as dataparsers do with the first


@pytest.mark.parametrize("suffix", [".splat", ".ksplat", ".spz", ".sog", ".pcd", ".las"])
def test_other_formats_of_splats_and_points_are_called_by_their_name(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(os.urandom(320))
    for read_file in (read_ply, read_point_cloud):
        with pytest.raises(UserError, match=f"a{suffix} cannot be read .*it is a {suffix} file.* PLY"):
            read_file(path)


def test_what_a_file_should_be_is_nothing_else(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png")
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert [what_it_is(path) for path in sorted(tmp_path.iterdir())] == [None] * 3
    assert what_it_is(tmp_path / "nowhere") is None


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("written", ["safetensors", "torch", "torch before 1.6"])
def test_weights_are_told_by_their_content(tmp_path, written, suffix):
    state = timm.create_model(TINY, num_classes=0).state_dict()
    path = tmp_path / f"weights{suffix}"
    if written == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=written == "torch")
    loaded = load_backbone(BackboneSpec(TINY, weights=path), "cpu").state_dict()
    name = next(key for key in loaded if key.endswith("blocks.0.attn.qkv.weight"))
    assert torch.equal(loaded[name], state["blocks.0.attn.qkv.weight"])


def test_a_torchscript_program_is_called_one(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "a.pt"))
    with pytest.raises(UserError, match=r"a\.pt holds no weights \(it is a TorchScript program.*state dict"):
        load_backbone(BackboneSpec(TINY, weights=tmp_path / "a.pt"), "cpu")


SPELLINGS = {
    "capitals": ("images/IMG_1.JPG", "images/img_1.jpg"),
    "two characters for one": (unicodedata.normalize("NFD", "images/Küche.png"), "images/Küche.png"),
    "percent": ("images/photo 1.png", "images/photo%201.png"),
    "blank at the end": ("images/a.png", "images/a.png "),
    "no suffix": ("images/a.png", "images/a"),
    "another suffix": ("images/a.png", "images/a.jpg"),
    "a suffix too many": ("images/a.png", "images/a.png.png"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_that_are_spelled_otherwise_are_shown(tmp_path, spelling):
    there, named = (tmp_path / name for name in SPELLINGS[spelling])
    there.parent.mkdir()
    Image.new("RGB", (4, 4)).save(there)
    (there.parent / f"._{there.name}").touch()
    assert spelled_otherwise(named) == there
    assert spelled_otherwise(named.with_name("other.png")) is None
    with pytest.raises(UserError, match="is missing, but .* is there, spelled otherwise") as caught:
        open_photo(named)
    assert str(there) in str(caught.value)


@pytest.mark.parametrize("spelling", ["capitals", "no suffix", "blank at the end"])
def test_a_scene_with_names_of_another_system(scene, make_config, make_trainer, spelling):
    change = {"capitals": str.upper, "no suffix": lambda name: name[:-4], "blank at the end": lambda name: f"{name} "}

    def rename(content):
        for frame in content["frames"]:
            folder, name = frame["file_path"].split("/")
            frame["file_path"] = f"{folder}/{change[spelling](name)}"

    edit(scene / "transforms.json", rename)
    with pytest.raises(UserError, match="is missing, but .*frame_00001.png is there"):
        make_trainer(make_config(scene))


def test_paths_of_another_machine(scene, make_config, make_trainer):
    for root in ("C:\\Users\\me\\scan\\", "/home/me/scan/"):

        def move(content, root=root):
            for frame in content["frames"]:
                frame["file_path"] = root + "images/" + Path(frame["file_path"]).name

        edit(scene / "transforms.json", move)
        with pytest.raises(UserError, match=f"is missing, but {scene}/images/frame_00001.png is there: .* relative"):
            make_trainer(make_config(scene))


def test_links_that_lead_nowhere(scene, make_config, make_trainer):
    for path in (scene / "images").iterdir():
        path.unlink()
        path.symlink_to("../.git/annex/objects/x")
    with pytest.raises(UserError, match=r"frame_00001.png is a link to ../.git/annex/objects/x, which is missing"):
        make_trainer(make_config(scene))


def test_a_renamed_download_is_found(scene, make_config, make_trainer):
    (scene / "transforms.json").rename(scene / "transforms (1).json")
    with pytest.raises(UserError, match=r"holds transforms \(1\).json: rename it to transforms.json"):
        make_trainer(make_config(scene))


def test_names_with_blanks_in_colmaps_text(scene, tmp_path):
    plain = read("colmap", as_colmap(scene, tmp_path / "plain"))
    data = as_colmap(scene, tmp_path / "data")
    table = next(data.rglob("images.txt"))
    table.write_text(table.read_text().replace("frame_", "Screenshot 12 "))
    for path in (data / "images").iterdir():
        path.rename(path.with_name(path.name.replace("frame_", "Screenshot 12 ")))
    found = read("colmap", data)
    assert [path.name.replace("Screenshot 12 ", "frame_") for path in found.image_filenames] == [
        path.name for path in plain.image_filenames
    ]
    assert all(path.is_file() for path in found.image_filenames)
    assert torch.equal(found.cameras.camera_to_worlds, plain.cameras.camera_to_worlds)


def test_masks_that_hide_everything_are_refused(tmp_path):
    black, white = tmp_path / "black.png", tmp_path / "white.png"
    Image.new("L", (8, 8)).save(black)
    Image.new("L", (8, 8), 255).save(white)
    with pytest.raises(UserError, match=r"All 2 masks of the scene are black all over \(.*black.png\)"):
        check_masks_show_something([black, black])
    check_masks_show_something([black, white])
    check_masks_show_something(None)
    check_masks_show_something([])


def test_a_scene_whose_masks_hide_everything_is_refused(scene, make_config, make_trainer):
    (scene / "masks").mkdir()
    Image.new("L", (96, 72)).save(scene / "masks" / "black.png")
    edit(scene / "transforms.json", lambda m: [f.update(mask_path="masks/black.png") for f in m["frames"]])
    with pytest.raises(UserError, match="masks of the scene are black all over"):
        make_trainer(make_config(scene))


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4", "f8"])
@pytest.mark.parametrize("names", ["red green blue", "diffuse_red diffuse_green diffuse_blue", "r g b"])
def test_colours_of_points_by_all_their_names_and_types(tmp_path, names, dtype):
    colors = np.random.default_rng(0).integers(0, 256, (20, 3)).astype(np.uint8)
    colors[0] = 255
    stored = {"u2": colors.astype(np.uint16) * 257, "i2": colors.astype(np.int16)}.get(dtype, colors.astype(dtype))
    rows = np.zeros(20, [(axis, "f4") for axis in "xyz"] + [(name, dtype) for name in names.split()])
    for index, name in enumerate(names.split()):
        rows[name] = stored[:, index]
    PlyData([PlyElement.describe(rows, "vertex")]).write(tmp_path / "a.ply")
    assert np.array_equal(read_point_cloud(tmp_path / "a.ply")[1], colors)


def test_colours_of_a_splat_that_serves_as_points(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (20, 3)).astype(np.uint8)
    rows = np.zeros(20, [(name, "f4") for name in ("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity")])
    for channel in range(3):
        rows[f"f_dc_{channel}"] = (colors[:, channel] / 255 - 0.5) / 0.28209479177387814
    rows["f_dc_0"][0] = 9.0  # brighter than white
    PlyData([PlyElement.describe(rows, "vertex")]).write(tmp_path / "a.ply")
    colors[0, 0] = 255
    assert np.array_equal(read_point_cloud(tmp_path / "a.ply")[1], colors)


@pytest.mark.parametrize("named", [None, ["a.ply", "b.ply"], 7])
def test_a_name_of_points_that_is_none(scene, named):
    edit(scene / "transforms.json", lambda content: content.update(ply_file_path=named))
    if named is None:
        assert "points3D_xyz" not in read("nerfstudio", scene).metadata
        return
    with pytest.raises(UserError, match="ply_file_path of .*transforms.json is .*, not a file's name") as caught:
        read("nerfstudio", scene)
    assert json.dumps(named) in str(caught.value)
