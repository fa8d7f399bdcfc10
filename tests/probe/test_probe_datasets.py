"""Every data set in its official layout, from tiny files; and what is said when files are not as they must be."""

import json
from pathlib import Path

import numpy as np
import pytest
from probe_files import save_photo, save_png

from fit3d_ns.support.errors import UserError
from probe.data.base import LabelRule, check_data, read_sample
from probe.data.choice import DataChoice, Kind
from probe.data.loading import load_data
from probe.data.own import read_posed_scene

LABELS = np.array([[0, 1, 2, 3], [4, 5, 12, 255]], np.uint8)
DEPTH = np.array([[0, 1000, 2000, 9000], [500, 700, 800, 30000]], np.uint16)


def _pair(photo: Path, target: Path, values: np.ndarray, size: tuple[int, int] = (2, 4)) -> None:
    save_photo(photo, size)
    save_png(target, values)


def _mmseg(root: Path, suffix: str = ".jpg") -> None:
    for split in ("training", "validation"):
        for name in ("b", "a"):
            _pair(root / "images" / split / f"{name}{suffix}", root / "annotations" / split / f"{name}.png", LABELS)


@pytest.mark.parametrize(
    "dataset,suffix,classes", [("ade20k", ".jpg", 150), ("nyuv2", ".png", 13), ("scannet", ".jpg", 40)]
)
def test_segmentation_in_the_layout_of_mmsegmentation(tmp_path, dataset, suffix, classes):
    root = tmp_path / ("ADEChallengeData2016" if dataset == "ade20k" else "")
    _mmseg(root, suffix)
    data = load_data(DataChoice(dataset, tmp_path, "segmentation"))
    assert [sample.name for sample in data.train] == ["a", "b"] and len(data.test) == 2 and data.validation is None
    assert len(data.classes) == classes
    _, target = read_sample(data, data.train[0])
    # 0 is no class, k is class k - 1.
    assert target.tolist() == [[255, 0, 1, 2], [3, 4, 11, 255]]
    check_data(data)


def test_scannetpp_labels_shifted_or_not(tmp_path):
    _mmseg(tmp_path, ".JPG")
    shifted = load_data(DataChoice("scannetpp", tmp_path, "segmentation"))
    plain = load_data(DataChoice("scannetpp", tmp_path, "segmentation", scannetpp_labels="toolkit"))
    assert len(plain.classes) == 100
    assert read_sample(shifted, shifted.test[0])[1].tolist() == [[255, 0, 1, 2], [3, 4, 11, 255]]
    assert read_sample(plain, plain.test[0])[1].tolist() == LABELS.tolist()


def test_nyuv2_thirteen_classes_in_the_layout_of_its_archives(tmp_path):
    for split in ("train", "test"):
        _pair(
            tmp_path / f"{split}_rgb" / "nyu_rgb_0001.png",
            tmp_path / f"{split}_seg13" / "new_nyu_class13_0001.png",
            LABELS,
        )
    data = load_data(DataChoice("nyuv2", tmp_path, "segmentation"))
    assert len(data.train) == len(data.test) == 1 and data.classes[0] == "bed"


def test_voc_reads_palette_images_and_its_own_lists(tmp_path):
    from PIL import Image

    root = tmp_path / "VOCdevkit" / "VOC2012"
    for stem in ("2007_000032", "2007_000039", "2007_000063"):
        save_photo(root / "JPEGImages" / f"{stem}.jpg", (2, 4))
        label = Image.fromarray(LABELS, "P")
        label.putpalette([value % 256 for value in range(768)])
        (root / "SegmentationClass").mkdir(exist_ok=True)
        label.save(root / "SegmentationClass" / f"{stem}.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000039\n2007_000032\n")
    (lists / "val.txt").write_text("2007_000063\n")
    data = load_data(DataChoice("voc", tmp_path, "segmentation"))
    assert [sample.image.stem for sample in data.train] == ["2007_000032", "2007_000039"] and len(data.test) == 1
    assert read_sample(data, data.train[0])[1].tolist() == LABELS.tolist() and data.classes[0] == "background"


def test_scannet_frames_are_split_by_scene(tmp_path):
    root = tmp_path / "scannet_frames_25k"
    for scene in ("scene0000_00", "scene0001_00"):
        for kind, values in (("label", LABELS), ("depth", DEPTH)):
            _pair(root / scene / "color" / "000000.jpg", root / scene / kind / "000000.png", values, (4, 8))
    (root / "scannetv2_train.txt").write_text("scene0000_00\n")
    (root / "scannetv2_val.txt").write_text("scene0001_00\n")
    data = load_data(DataChoice("scannet", tmp_path, "segmentation", classes="scannet20"))
    assert data.train[0].name == "scene0000_00_000000" and len(data.classes) == 20
    image, target = read_sample(data, data.train[0])
    # The photo is brought to the truth's size; ids that the benchmark leaves out are ignored.
    assert image.shape == (2, 4, 3) and target.tolist() == [[255, 0, 1, 2], [3, 4, 11, 255]]
    depth = load_data(DataChoice("scannet", tmp_path, "depth"))
    assert read_sample(depth, depth.test[0])[1][0, 1] == pytest.approx(1.0) and depth.max_depth == 10.0


def test_nyuv2_depth_in_the_folders_of_its_lists(tmp_path):
    _pair(tmp_path / "sync/den_0001/rgb_00001.jpg", tmp_path / "sync/den_0001/sync_depth_00001.png", DEPTH)
    official = tmp_path / "official_splits/test/den/"
    _pair(official / "rgb_00002.jpg", official / "sync_depth_00002.png", DEPTH)
    lists = tmp_path / "train.txt", tmp_path / "test.txt"
    lists[0].write_text("/den_0001/rgb_00001.jpg /den_0001/sync_depth_00001.png 518.8579\n")
    lists[1].write_text("den/rgb_00002.jpg den/sync_depth_00002.png 518.8579\n")
    data = load_data(DataChoice("nyuv2", tmp_path, "depth", split_file=lists))
    assert data.train[0].image.parent.parent.name == "sync" and data.test[0].name == "den_rgb_00002"
    assert read_sample(data, data.test[0])[1][0].tolist() == [0, 1, 2, 9]
    with pytest.raises(UserError, match=r"basement_0001a/rgb_00001.jpg.*official list nyu_train.*layout expected"):
        load_data(DataChoice("nyuv2", tmp_path, "depth"))


def test_kitti_in_the_layout_of_its_archives(tmp_path):
    drive = "2011_09_26_drive_0001_sync"
    image = f"2011_09_26/{drive}/image_02/data/0000000005.png"
    truth = f"{drive}/proj_depth/groundtruth/image_02/0000000005.png"
    _pair(tmp_path / image, tmp_path / "train" / truth, np.full((2, 4), 256 * 7, np.uint16))
    _pair(tmp_path / "input" / image.replace("05", "06"), tmp_path / "gt_depth" / truth.replace("05", "06"), DEPTH)
    lists = tmp_path / "a.txt", tmp_path / "b.txt"
    lists[0].write_text(f"{image} {truth} 721.5377\n{image} None 721.5377\n")
    lists[1].write_text(f"{image.replace('05', '06')} {truth.replace('05', '06')} 721.5377\n")
    data = load_data(DataChoice("kitti", tmp_path, "depth", split_file=lists))
    assert len(data.train) == 1 and data.max_depth == 80
    assert (read_sample(data, data.train[0])[1] == 7).all()


def test_official_lists_have_their_published_length():
    import lzma
    from importlib import resources

    counts = {}
    for name in ("nyu_train", "nyu_test", "kitti_eigen_train", "kitti_eigen_test"):
        content = lzma.decompress((resources.files("probe.data") / "splits" / f"{name}.txt.xz").read_bytes())
        lines = content.decode().splitlines()
        counts[name] = (len(lines), sum(line.endswith("None") for line in lines))
    assert counts["nyu_train"] == (24_231, 0) and counts["nyu_test"] == (654, 0)
    assert counts["kitti_eigen_train"] == (23_158, 0) and counts["kitti_eigen_test"] == (697, 45)


def test_scannetpp_depth_needs_its_lists(tmp_path):
    _pair(tmp_path / "x/a.JPG", tmp_path / "x/a.png", DEPTH)
    with pytest.raises(UserError, match="scannetpp_train.txt.*--split-file"):
        load_data(DataChoice("scannetpp", tmp_path, "depth"))
    for split in ("train", "val"):
        (tmp_path / f"scannetpp_{split}.txt").write_text("x/a.JPG x/a.png\n")
    data = load_data(DataChoice("scannetpp", tmp_path, "depth"))
    assert data.max_depth == 20 and len(data.test) == 1


def test_folder_with_names_validation_split_and_hold_out(colored_blocks):
    root = colored_blocks()
    choice = DataChoice("folder", root, "segmentation")
    assert load_data(choice).classes == ("class 0", "class 1", "class 2")
    held_out = load_data(choice, 0.34)
    assert held_out.validation is not None
    assert len(held_out.train) == 4 and len(held_out.validation) == 2
    assert not {s.name for s in held_out.train} & {s.name for s in held_out.validation}
    assert {s.name for s in held_out.train} | {s.name for s in held_out.validation} == {
        s.name for s in load_data(choice).train
    }
    (root / "classes.txt").write_text("red\ngreen\nblue\nnever\n")
    assert load_data(choice).classes[3] == "never"
    for split in ("val", "valannot"):
        (root / split).mkdir()
    for split, source in (("val", "test"), ("valannot", "testannot")):
        (root / split / "photo_0.png").write_bytes((root / source / "photo_0.png").read_bytes())
    assert len(load_data(choice, 0.34).train) == 6 and len(load_data(choice, 0.34).validation or ()) == 1


def _room(folder: Path, frames: int) -> None:
    entries = []
    for index in range(frames):
        name = f"frame_{index:05d}.png"
        pose = np.eye(4)
        pose[0, 3] = index
        save_photo(folder / "images" / name, (20, 30), index)
        save_png(folder / "depths" / name, np.full((20, 30), 2000, np.uint16))
        save_png(folder / "semantics" / name, np.full((20, 30), index % 2, np.uint8))
        entries.append(
            {
                "file_path": f"images/{name}",
                "depth_file_path": f"depths/{name}",
                "semantics_file_path": f"semantics/{name}",
                "transform_matrix": pose.tolist(),
            }
        )
    lens = {"fl_x": 25.0, "fl_y": 25.0, "cx": 15.0, "cy": 10.0, "w": 30, "h": 20, "k1": 0.0}
    (folder / "transforms.json").write_text(json.dumps({"camera_model": "OPENCV", **lens, "frames": entries}))
    table = [{"id": 0, "name": "wall", "color": [9, 8, 7]}, {"id": 1, "name": "floor", "color": [1, 2, 3]}]
    (folder / "classes.json").write_text(json.dumps(table))


def test_rooms_are_split_by_room_and_single_scenes_by_time(tmp_path):
    for index in range(4):
        _room(tmp_path / f"room_{index:03d}", 4)
    data = load_data(DataChoice("rooms", tmp_path, "segmentation"))
    assert (len(data.train), len(data.test)) == (12, 4)
    assert {sample.name[:8] for sample in data.test} == {"room_003"} and data.colors == ((9, 8, 7), (1, 2, 3))
    normals = load_data(DataChoice("rooms", tmp_path, "normals"))
    assert normals.train[0].intrinsics == (25, 25, 15, 10)
    _room(tmp_path / "long", 20)
    single = load_data(DataChoice("rooms", tmp_path / "long", "depth"))
    assert (len(single.train), len(single.test)) == (14, 5) and "within-scene" in single.notes[0]
    assert single.train[-1].name < single.test[0].name and read_sample(single, single.test[0])[1][0, 0] == 2
    scene = read_posed_scene(tmp_path / "long")
    np.testing.assert_allclose(scene.frames[0].viewmat, np.diag([1, -1, -1, 1]))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"transform_matrix": np.diag([-1.0, 1, 1, 1]).tolist()}, "mirrored"),
        ({"transform_matrix": np.full((4, 4), np.nan).tolist()}, "not finite"),
        ({"transform_matrix": np.diag([1.0, 2, 1, 1]).tolist()}, "no rotation"),
        ({"transform_matrix": np.diag([2.0, 2, 2, 1]).tolist()}, "scaled by 2"),
        ({"transform_matrix": [[1, 0, 0, 1e6], [0, 1, 0, 0], [0, 0, 1, 0]]}, "as far from the others"),
        ({"transform_matrix": None}, "no pose"),
        ({"fl_x": 0}, "fl_x of images/frame_00002.png.* is 0"),
        ({"w": "wide"}, "w of images/frame_00002.png.*not a finite number"),
        ({"k2": 0.1}, "lens with distortion"),
        ({"camera_model": "OPENCV_FISHEYE"}, "lens with distortion"),
        ({"camera_model": "EQUIRECTANGULAR"}, "camera_model of images/frame_00002.png"),
        ({"depth_unit_scale_factor": 1}, "depth_unit_scale_factor stands in the frame"),
    ],
)
def test_scenes_are_read_by_the_rules_of_training(tmp_path, change, said):
    _room(tmp_path / "room", 6)
    path = tmp_path / "room" / "transforms.json"
    content = json.loads(path.read_text())
    content["frames"][2].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as caught:
        read_posed_scene(tmp_path / "room")
    assert "images/frame_00002.png" in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_frame_says_itself_wins(tmp_path):
    _room(tmp_path / "room", 6)
    path = tmp_path / "room" / "transforms.json"
    content = json.loads(path.read_text())
    content["frames"][2].update(fl_x=26.5, cy=9.5, h=21)
    for frame in content["frames"]:
        frame["transform_matrix"] = (np.array(frame["transform_matrix"]) @ np.diag([2, 2, 2, 1]))[:3].tolist()
    path.write_text(json.dumps(content))
    frames = read_posed_scene(tmp_path / "room").frames
    assert frames[2].intrinsics == (26.5, 25, 15, 9.5) and frames[2].size == (21, 30)
    assert frames[1].intrinsics == (25, 25, 15, 10) and frames[1].size == (20, 30)
    np.testing.assert_allclose(frames[2].viewmat[:3, 3], [-2, 0, 0])
    for unit in (0, -1, "a", None, float("nan")):
        path.write_text(json.dumps({**content, "depth_unit_scale_factor": unit}))
        with pytest.raises(UserError, match="depth_unit_scale_factor of .*transforms.json"):
            read_posed_scene(tmp_path / "room")


def test_what_is_wrong_is_said_with_the_file(tmp_path, colored_blocks):
    def check(root, kind: Kind = "segmentation", **options):
        return check_data(load_data(DataChoice("folder", root, kind, **options)))

    root = colored_blocks("missing")
    (root / "trainannot" / "photo_2.png").unlink()
    with pytest.raises(UserError, match=r"train/photo_2.png has no truth .*trainannot.photo_2.png.*layout expected"):
        check(root)
    root = colored_blocks("range")
    (root / "classes.txt").write_text("red\ngreen\n")
    with pytest.raises(UserError, match=r"annot/photo_\d.png holds the label 2, but the data set has 2 classes"):
        check(root)
    root = colored_blocks("size")
    save_png(root / "testannot" / "photo_1.png", np.zeros((47, 64), np.uint8))
    with pytest.raises(UserError, match=r"testannot/photo_1.png has 64x47 pixels but its photo .* 64x48"):
        check(root)
    root = colored_blocks("torn")
    content = (root / "train" / "photo_3.png").read_bytes()
    (root / "train" / "photo_3.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"photo .*train/photo_3.png is truncated or not an image"):
        check(root)
    root = colored_blocks("text")
    (root / "testdepth" / "photo_0.png").write_text("no picture")
    with pytest.raises(UserError, match=r"depth map .*testdepth/photo_0.png is truncated or not an image"):
        check(root, "depth")
    root = colored_blocks("colour")
    save_photo(root / "trainannot" / "photo_0.png", (48, 64))
    with pytest.raises(UserError, match=r"trainannot/photo_0.png is a picture of mode RGB"):
        check(root)
    root = colored_blocks("deep")
    with pytest.raises(UserError, match=r"No pixel of the training depths.*photo_0.png.*--max-depth"):
        check(root, "depth", max_depth=0.5)
    for path in (root / "testdepth").iterdir():
        save_png(path, np.zeros((48, 64), np.uint16))
    with pytest.raises(UserError, match=r"No pixel of the test depths.*testdepth/photo_0.png"):
        check(root, "depth")
    with pytest.raises(UserError, match="kitti has no segmentation probe"):
        load_data(DataChoice("kitti", root, "segmentation"))
    with pytest.raises(UserError, match="--class-names"):
        load_data(DataChoice("folder", root, "segmentation", class_names=tmp_path / "nope.txt"))
    for flag, choice in (
        ("--split-file", DataChoice("folder", root, "segmentation", split_file=(root, root))),
        ("--classes", DataChoice("folder", root, "segmentation", classes="scannet20")),
        ("--scannetpp-labels", DataChoice("folder", root, "segmentation", scannetpp_labels="toolkit")),
        ("--depth-scale", DataChoice("nyuv2", root, "depth", depth_scale=5000.0)),
    ):
        with pytest.raises(UserError, match=f"{flag} is for --dataset .* not for {choice.dataset}: leave it out"):
            load_data(choice)
    for flag, choice in (
        ("--max-depth", DataChoice("folder", root, "segmentation", max_depth=5.0)),
        ("--class-names", DataChoice("folder", root, "depth", class_names=root / "classes.txt")),
    ):
        with pytest.raises(UserError, match=f"{flag} is for .*, not for {choice.kind}: leave it out"):
            load_data(choice)
    root = colored_blocks("instances")
    save_png(root / "trainannot" / "photo_1.png", np.full((48, 64), 26001, np.uint16))
    with pytest.raises(UserError, match=r"trainannot/photo_1.png holds the label 26001.*class ids"):
        check(root)
    root = colored_blocks("mask")
    for path in [*(root / "trainannot").iterdir(), *(root / "testannot").iterdir()]:
        save_png(path, np.where(np.arange(64) < 9, 0, 255)[None].repeat(48, 0).astype(np.uint8))
    with pytest.raises(UserError, match=r"mask has 1 class, and segmentation needs 2 to 255"):
        check(root)
    (tmp_path / "empty").mkdir()
    for name in ("ade20k", "voc", "nyuv2", "scannetpp"):
        with pytest.raises(UserError, match="layout expected is"):
            load_data(DataChoice(name, tmp_path / "empty", "segmentation"))
    with pytest.raises(UserError, match="holds no rooms"):
        load_data(DataChoice("rooms", tmp_path / "empty", "depth"))


def test_label_rules():
    path = Path("label.png")
    assert LabelRule(3).apply(np.array([[0, 2, 255]]), path).tolist() == [[0, 2, 255]]
    assert LabelRule(2, zero_is_ignored=True).apply(np.array([[0, 2, 255]]), path).tolist() == [[255, 1, 255]]
    with pytest.raises(UserError, match="label 3.*1 to 2"):
        LabelRule(2, zero_is_ignored=True).apply(np.array([[3]]), path)
    assert LabelRule(2, ids=(5, 9)).apply(np.array([[9, 5, 4, 255, 0]]), path).tolist() == [[1, 0, 255, 255, 255]]
