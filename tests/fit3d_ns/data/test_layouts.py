"""Advice for a scene follows from what lies in its folder; every layout is tried with every dataparser."""

import json
import re
import shutil

import pytest
from PIL import Image
from scene_formats import as_colmap, edit, parser_config, write_format

from fit3d_ns.data.dataparsers import read_checked
from fit3d_ns.data.layouts import layout_advice
from fit3d_ns.support.errors import UserError


def a_photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def angles_only(scene, target):
    shutil.copytree(scene, target)

    def change(content):
        for key in ("fl_x", "fl_y", "camera_model", "k1", "k2", "p1", "p2"):
            content.pop(key, None)
        content["camera_angle_x"] = 1.0

    edit(target / "transforms.json", change)


LAYOUTS = {
    "nerfstudio": (shutil.copytree, "holds transforms.json: .*`nerfstudio-data`"),
    "instant-ngp": (angles_only, "holds transforms.json: end the command with `instant-ngp-data`"),
    "blender": (lambda scene, t: write_format(scene, "blender", t), "holds transforms_train.json: .*`blender-data`"),
    "scannetpp": (lambda scene, t: write_format(scene, "scannetpp", t), "holds dslr/nerfstudio/.*`scannetpp-data`"),
    "3dgs": (as_colmap, "holds a COLMAP model in sparse/0: .*`colmap`"),
    "one folder down": (
        lambda scene, t: shutil.copytree(scene, t / "inner"),
        r"holds no scene itself, but inner below it does: name .*inner with --data",
    ),
    "photos": (lambda scene, t: a_photo(t / "a.JPG"), "holds photos without poses: run `ns-process-data images --data"),
    "photos in images": (lambda scene, t: a_photo(t / "images" / "a.png"), "images --data .*/images --output-dir"),
    "video": (lambda scene, t: (t.mkdir(), (t / "x.MP4").touch()), "holds videos: run `ns-process-data video"),
    "splat": (lambda scene, t: (t.mkdir(), (t / "x.ply").touch()), "holds splats and no photos: .*`fit3d-lift --ply`"),
    "runs": (
        lambda scene, t: ((t / "r").mkdir(parents=True), (t / "r" / "config.yml").touch()),
        "is the output of ns-train: name the scene with --data, and a run with --load-config",
    ),
    "llff": (lambda scene, t: (t.mkdir(), (t / "poses_bounds.npy").touch()), "holds LLFF's poses_bounds.npy: run"),
    "metashape": (
        lambda scene, t: (t.mkdir(), (t / "cameras.xml").touch()),
        "ns-process-data metashape .*--xml cameras",
    ),
    "nothing": (lambda scene, t: (t.mkdir(), (t / ".DS_Store").touch()), "is empty: name the folder"),
}
OWN = {"nerfstudio": "nerfstudio", "instant-ngp": "instant_ngp", "blender": "blender", "3dgs": "colmap"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["nerfstudio", "instant_ngp", "blender", "colmap"])
def test_what_lies_there_is_said_by_every_dataparser(layout, kind, scene, tmp_path):
    make, said = LAYOUTS[layout]
    data = tmp_path / "data"
    make(scene, data)
    parser = read_checked(parser_config(kind, data).setup(), seeds=False)
    if OWN.get(layout) == kind or (layout, kind) == ("nerfstudio", "instant_ngp"):
        assert len(parser.get_dataparser_outputs("train").image_filenames) > 1
        return
    with pytest.raises(UserError) as caught:
        parser.get_dataparser_outputs("train")
    message = str(caught.value)
    if (layout, kind) == ("instant-ngp", "nerfstudio"):
        assert "end the command with `instant-ngp-data`" in message
        return
    assert str(data) in message and "\n" not in message
    assert re.search(said, message), message


@pytest.mark.parametrize("place", ["sparse/0", "sparse", "colmap", "."])
def test_a_colmap_model_is_found_where_it_lies(place, scene, tmp_path):
    from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig

    data = as_colmap(scene, tmp_path / "data")
    if place != "sparse/0":
        target = data / place
        target.mkdir(exist_ok=True)
        for file in (data / "sparse/0").iterdir():
            shutil.move(file, target / file.name)
        shutil.rmtree(data / "sparse/0")
    parser = ColmapDataParserConfig(data=data, downscale_factor=1).setup()
    outputs = read_checked(parser, seeds=True).get_dataparser_outputs("train")
    assert len(outputs.image_filenames) > 1 and "points3D_xyz" in outputs.metadata
    named = ColmapDataParserConfig(data=data, downscale_factor=1, colmap_path=data / "elsewhere").setup()
    with pytest.raises(UserError, match=rf"does not lie in .*elsewhere but in {place}: leave --colmap-path out"):
        read_checked(named, seeds=True).get_dataparser_outputs("train")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("walk.mov", "is a video: run `ns-process-data video --data .*walk.mov"),
        ("scene.spz", "is a splat or a point cloud"),
        ("scene.zip", "is an archive: unpack it"),
        ("photo.jpg", "is a photo: name the folder"),
    ],
)
def test_a_file_in_a_scenes_place_is_called_what_it_is(name, said, tmp_path):
    (tmp_path / name).touch()
    assert re.search(said, layout_advice(tmp_path / name) or "")
    (tmp_path / "other.json").write_text(json.dumps({}))
    assert layout_advice(tmp_path / "other.json") is None
