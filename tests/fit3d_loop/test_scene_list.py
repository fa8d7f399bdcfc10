"""What users name as scenes: folders, lists, YAML; every format that is recognised; every mistake in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
from paths import TINY_ROOM
from tiny_scenes import make_scene

from fit3d_loop.scenes.scene_list import SceneSource, backbone_of, count_photos, read_scenes
from fit3d_ns.support.errors import UserError


def as_colmap(folder: Path, sparse: str = "sparse/0", images: str = "images") -> Path:
    (folder / sparse).mkdir(parents=True)
    (folder / sparse / "cameras.bin").touch()
    shutil.copytree(TINY_ROOM / "images", folder / images)
    return folder


def as_run(folder: Path, method: str = "fit3d-splat", backbone: str = "dinov2_small") -> Path:
    run = folder / method / "2026-01-01"
    (run / "nerfstudio_models").mkdir(parents=True)
    (run / "nerfstudio_models" / "step-000000009.ckpt").touch()
    text = f"!!python/object:x\nmethod_name: {method}\npipeline:\n  datamanager:\n    backbone: {backbone}\n"
    (run / "config.yml").write_text(text)
    return run


FORMATS = {
    "nerfstudio": (make_scene, ("nerfstudio-data",)),
    "colmap": (
        as_colmap,
        ("colmap", "--colmap-path", "sparse/0", "--images-path", "images", "--downscale-factor", "1"),
    ),
    "colmap_processed": (
        lambda folder: as_colmap(folder, "colmap/sparse/0"),
        ("colmap", "--colmap-path", "colmap/sparse/0", "--images-path", "images", "--downscale-factor", "1"),
    ),
    "colmap_input": (
        lambda folder: as_colmap(folder, "sparse", "input"),
        ("colmap", "--colmap-path", "sparse", "--images-path", "input", "--downscale-factor", "1"),
    ),
    "blender": (lambda folder: folder.mkdir() or (folder / "transforms_train.json").touch(), ("blender-data",)),
    "scannetpp": (
        lambda folder: (
            (folder / "dslr" / "nerfstudio").mkdir(parents=True)
            or (folder / "dslr" / "nerfstudio" / "transforms.json").touch()
        ),
        ("scannetpp-data",),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_recognised(tmp_path, name):
    make, parser = FORMATS[name]
    make(tmp_path / name)
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "notes").mkdir()
    (scene,), notes = read_scenes(tmp_path)
    assert (scene.name, scene.kind, scene.path, scene.parser) == (name, "photos", tmp_path / name, parser)
    assert notes == [f"{tmp_path / 'notes'}, which is no scene that can be recognised, was left out."]
    assert read_scenes(tmp_path / name)[0][0].parser == parser  # a scene itself


def test_photos_are_counted(tmp_path):
    for name in ("nerfstudio", "colmap_processed", "colmap_input"):
        FORMATS[name][0](tmp_path / name)
    counted = {scene.name: count_photos(scene)[0] for scene in read_scenes(tmp_path)[0]}
    assert counted == {"nerfstudio": 8, "colmap_processed": 16, "colmap_input": 16}


def test_all_forms_of_a_list_name_the_same_scenes(tmp_path):
    first, second = make_scene(tmp_path / "scenes" / "a"), as_colmap(tmp_path / "scenes" / "b")
    ply = tmp_path / "splat.ply"
    ply.touch()
    (tmp_path / "list.txt").write_text(
        f"# two scenes\n\n{first}\nscenes/b colmap --downscale-factor 2\nsplat.ply --data scenes/a\n".replace(
            "splat.ply --data scenes/a\n", ""
        )
    )
    (tmp_path / "list.yaml").write_text(
        json.dumps(["scenes/a", {"data": str(second), "dataparser": "colmap", "flags": ["--downscale-factor", 2]}])
    )
    (tmp_path / "scenes.yml").write_text(
        "scenes:\n- scenes/a\n- {data: scenes/b, dataparser: colmap, flags: --downscale-factor 2}\n"
    )
    lists = [read_scenes(tmp_path / name)[0] for name in ("list.txt", "list.yaml", "scenes.yml")]
    assert lists[0] == lists[1] == lists[2]
    assert [scene.parser for scene in lists[0]] == [("nerfstudio-data",), ("colmap", "--downscale-factor", "2")]


def test_flags_follow_what_was_recognised(tmp_path):
    make_scene(tmp_path / "a")
    (tmp_path / "list.yaml").write_text("- {data: a, name: kitchen, flags: [--eval-mode, all]}\n")
    (scene,), _ = read_scenes(tmp_path / "list.yaml")
    assert (scene.name, scene.parser) == ("kitchen", ("nerfstudio-data", "--eval-mode", "all"))


def test_paths_with_blanks_need_no_quotes(tmp_path):
    make_scene(tmp_path / "my living room")
    (tmp_path / "list.txt").write_text("my living room\n")
    (scene,), _ = read_scenes(tmp_path / "list.txt")
    assert scene.name == "my_living_room"


def test_runs_and_plys(tmp_path):
    make_scene(tmp_path / "scenes" / "a")
    run = as_run(tmp_path / "outputs" / "flat", "splatfacto")
    as_run(tmp_path / "outputs" / "nerf", "nerfacto")
    (tmp_path / "splat.ply").touch()
    (tmp_path / "list.txt").write_text(f"splat.ply --data scenes/a\n{run}\n")
    ply, taken = read_scenes(tmp_path / "list.txt")[0]
    assert (ply.name, ply.kind, ply.data) == ("a", "ply", tmp_path / "scenes" / "a")
    assert (taken.name, taken.kind, taken.path, taken.backbone) == ("flat", "run", run, None)
    scenes, notes = read_scenes(tmp_path / "outputs")
    assert [scene.path for scene in scenes] == [run]
    assert len(notes) == 1 and "nerf" in notes[0]


def test_the_teacher_is_that_of_the_runs(tmp_path):
    as_run(tmp_path / "one", backbone="dinov2_base")
    as_run(tmp_path / "two", backbone="dinov2_base")
    scenes, _ = read_scenes(tmp_path)
    assert backbone_of(scenes, None) == "dinov2_base" and backbone_of(scenes, "clip_base") == "clip_base"
    assert backbone_of([], None) == "dinov2_small"
    as_run(tmp_path / "three", backbone="clip_base")
    with pytest.raises(UserError, match=r"features of .*dinov2_base.*: choose one with --backbone") as caught:
        backbone_of(read_scenes(tmp_path)[0], None)
    assert "clip_base" in str(caught.value)


MISTAKES = {
    "nothing": ("nowhere", "There is no file or folder"),
    "an empty folder": ("empty", "holds no scene: a scene has transforms.json"),
    "an empty list": ("empty.txt", "holds no scene"),
    "a missing scene": ("missing.txt", r"names the scene .*gone, which does not exist: correct the list"),
    "one name twice": ("twice.txt", r"2 scenes are called a \(.*\): list them in a YAML file, each with a name"),
    "no YAML": ("broken.yaml", "is no YAML"),
    "no list": ("mapping.yaml", "holds no list of scenes"),
    "an unknown key": ("key.yaml", "Scene 1 of .* has path: known are data, name"),
    "a number": ("number.yaml", "Scene 1 of .* is neither a path nor a mapping"),
    "an entry of nothing": ("none.yaml", "names none of data, run and ply"),
    "a PLY alone": ("ply.txt", "without its photos"),
    "a PLY of a missing scene": ("ply2.txt", "names the scene .*gone, which does not exist"),
    "an open quote": ("quote.txt", "Line 1 of .* cannot be read"),
    "a folder of no scene": ("other.txt", "which is no scene that can be recognised: name its dataparser"),
    "flags that are none": ("flags.yaml", "flags of a scene in .* are neither a text nor a list"),
    "no text": ("binary.txt", "cannot be read"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(tmp_path, mistake):
    (tmp_path / "empty").mkdir()
    make_scene(tmp_path / "a")
    make_scene(tmp_path / "deep" / "a")
    (tmp_path / "s.ply").touch()
    files = {
        "empty.txt": "# none\n",
        "missing.txt": "a\ngone\n",
        "twice.txt": "a\ndeep/a\n",
        "broken.yaml": "- [",
        "mapping.yaml": "a: b",
        "key.yaml": "- path: a",
        "number.yaml": "- 3",
        "none.yaml": "- name: a",
        "ply.txt": "s.ply\n",
        "ply2.txt": "s.ply --data gone\n",
        "quote.txt": "b 'c\n",
        "other.txt": "empty\n",
        "flags.yaml": "- {data: a, flags: 3}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01\x81")
    name, pattern = MISTAKES[mistake]
    with pytest.raises(UserError, match=pattern) as caught:
        read_scenes(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", ["[" * 100_000, "2024-13-45", "!!timestamp x", "!!int x", "{[a]: b}", "!!python/name:os.x"]
)
def test_yaml_that_cannot_be_read_is_one_sentence(tmp_path, value):
    (tmp_path / "list.yaml").write_text(f"- data: {value}\n")
    with pytest.raises(UserError, match=r"list\.yaml is no YAML \(.+\): correct it") as caught:
        read_scenes(tmp_path / "list.yaml")
    assert "\n" not in str(caught.value)


def test_a_scannetpp_scene_without_poses_is_told_what_to_do(tmp_path):
    (tmp_path / "x" / "dslr" / "colmap").mkdir(parents=True)
    with pytest.raises(UserError, match="prepare it, docs/scannetpp.md"):
        read_scenes(tmp_path)


def test_identity_knows_flags():
    one = SceneSource("a", "photos", Path("/a"), "", ("colmap",))
    other = SceneSource("a", "photos", Path("/a"), "", ("colmap", "--downscale-factor", "2"))
    assert one.identity != other.identity
