"""Training, lifting, bundles and the viewer read photos, masks and folders through one door."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import ORIENTATIONS, every_mode, save_turned
from PIL import Image

from fit3d_ns.data.photos.bundled import BundledPhoto, hash_file, read_photo
from fit3d_ns.data.photos.view_files import SmallerCopies
from fit3d_ns.support.errors import UserError

LEVELS = np.array([0, 51, 102, 170, 204, 255], np.uint8)


@pytest.fixture
def make_datamanager(make_config, parser):
    """Builds the data manager of a scene, as fit3d-distill does for bundles."""

    def make(scene, data_parser=parser, **fields):
        config = make_config(scene).pipeline.datamanager
        config.dataparser = data_parser
        for name, value in fields.items():
            setattr(config, name, value)
        return config.setup(device="cpu", test_mode="val", world_size=1, local_rank=0)

    return make


def edit(scene: Path, change) -> list[dict]:
    path = scene / "transforms.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return content["frames"]


def use_photos(scene: Path, names: list[str], **keys) -> None:
    """Lets the frames of a scene name other files, one after the other, beginning again at the end."""

    def change(content):
        for index, frame in enumerate(content["frames"]):
            frame["file_path"] = names[index % len(names)] if len(names) < len(content["frames"]) else names[index]
        content["frames"] = content["frames"][: len(names)]
        content.update(keys)

    edit(scene, change)


def photo_of(path: Path, **fields) -> BundledPhoto:
    with Image.open(path) as picture:
        return BundledPhoto(str(path), hash_file(path), picture.height, picture.width, **fields)


def test_one_picture_in_every_mode_is_the_same_for_all_who_read(scene, make_datamanager, tmp_path):
    """As training, as streamed for a lift, and as a bundle's student sees it."""
    grey = np.tile(np.repeat(LEVELS, 16), (72, 1))
    cases = [case for case in every_mode(scene / "images", grey) if case.readable]
    frames = edit(scene, lambda content: None)
    poses = [frame["transform_matrix"] for frame in frames]

    def change(content):
        content["frames"] = [
            {"file_path": f"images/{case.path.name}", "transform_matrix": poses[index % len(poses)]}
            for index, case in enumerate(cases)
        ]

    edit(scene, change)
    datamanager = make_datamanager(scene)
    found = 0
    for split in ("train", "eval"):
        dataset = datamanager.train_dataset if split == "train" else datamanager.eval_dataset
        for index, photo in enumerate(datamanager.photo_reader(split)):
            case = next(case for case in cases if case.path == dataset.image_filenames[index])
            trained = getattr(datamanager, f"cached_{split}")[index]["image"]
            assert torch.equal(trained, photo.image), case.name
            assert torch.equal(read_photo(photo_of(case.path)), photo.rgb), case.name
            error = np.abs(photo.rgb.numpy().astype(int) - case.shown)[:, 4::16]
            assert error.max() <= case.tolerance, case.name
            found += 1
    assert found == len(cases) > 40


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_every_orientation_is_the_same_for_all_who_read(scene, make_datamanager, suffix):
    frames = edit(scene, lambda content: None)
    shown, names = [], []
    for orientation, frame in zip(ORIENTATIONS, frames):
        shown.append(np.asarray(Image.open(scene / frame["file_path"]).convert("RGB")))
        names.append(f"images/turned_{orientation}{suffix}")
        save_turned(shown[-1], scene / names[-1], orientation)
    use_photos(scene, names)
    datamanager = make_datamanager(scene)
    for split in ("train", "eval"):
        dataset = datamanager.train_dataset if split == "train" else datamanager.eval_dataset
        for index, photo in enumerate(datamanager.photo_reader(split)):
            path = dataset.image_filenames[index]
            original = shown[names.index(f"images/{path.name}")]
            assert np.abs(photo.image.numpy().astype(int) - original).mean() < (
                6 if suffix in (".jpg", ".webp") else 0.1
            )
            assert torch.equal(getattr(datamanager, f"cached_{split}")[index]["image"], photo.image)
            described = replace(photo_of(path), height=72, width=96)
            assert torch.equal(read_photo(described), photo.rgb)


def test_poses_of_photos_on_their_side_are_refused_with_the_tag(scene, make_datamanager):
    frames = edit(scene, lambda content: None)
    for frame in frames:
        path = scene / frame["file_path"]
        stored = Image.open(path)
        tags = Image.Exif()
        tags[0x0112] = 6
        stored.load()
        stored.save(path, exif=tags)  # the camera describes what is stored
    datamanager = make_datamanager(scene)
    with pytest.raises(UserError, match=r"images/\S+ is 72x96 pixels once turned .*orientation 6 says.*96x72"):
        datamanager.photo_reader("train").read(0)


def with_masks(scene: Path, suffix: str = ".png", size=(72, 96), mode: str = "L", **options) -> np.ndarray:
    """Gives every frame a mask that hides the left third; returns it."""
    (scene / "masks").mkdir(exist_ok=True)
    mask = np.zeros((72, 96), np.uint8)
    mask[:, 32:] = 255

    def change(content):
        for frame in content["frames"]:
            name = f"masks/{Path(frame['file_path']).stem}{suffix}"
            image = Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST).convert(mode)
            image.save(scene / name, **options)
            frame["mask_path"] = name

    edit(scene, change)
    return mask == 255


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"suffix": ".jpg", "quality": 70},
        {"mode": "RGB"},
        {"mode": "RGBA"},
        {"mode": "P"},
        {"mode": "1"},
        {"size": (36, 48)},
        {"size": (144, 192), "suffix": ".webp"},
    ],
    ids=str,
)
def test_masks_count_where_they_are_shown_white(scene, make_datamanager, how):
    expected = with_masks(scene, **how)
    datamanager = make_datamanager(scene)
    for index, photo in enumerate(datamanager.photo_reader("train")):
        assert photo.mask is not None
        found = photo.mask[..., 0].numpy()
        assert (found != expected)[:, [*range(28), *range(36, 96)]].sum() == 0
        assert torch.equal(datamanager.cached_train[index]["mask"], photo.mask)
        weights = photo.weights((3, 6))
        assert weights is not None and weights[:, :2].max() < 0.1 and weights[:, 2:].min() > 0.9


def test_masks_of_another_shape_or_missing_are_refused_by_name(scene, make_datamanager):
    with_masks(scene)
    path = sorted((scene / "masks").iterdir())[2]
    Image.new("L", (50, 72)).save(path)
    datamanager = make_datamanager(scene)
    with pytest.raises(UserError, match=rf"{path} has 50x72 pixels and its photo .*{path.stem}.\w+ 96x72"):
        list(datamanager.photo_reader("train"))
    path.unlink()
    with pytest.raises(UserError, match=f"The mask {path} is missing"):
        make_datamanager(scene)


@pytest.mark.parametrize("key", ["mask_path", "depth_file_path"])
def test_masks_in_some_frames_only_are_refused_by_frame(scene, make_datamanager, key):
    with_masks(scene)

    def change(content):
        for frame in content["frames"]:
            frame["depth_file_path"] = frame["mask_path"]
        for frame in content["frames"][3:5]:
            del frame[key]

    name = edit(scene, change)[3]["file_path"]
    with pytest.raises(UserError, match=rf"2 of 16 frames in \S+transforms.json have no {key}, {name} first"):
        make_datamanager(scene)


def test_sizes_from_the_photos_are_those_that_are_shown(scene, make_datamanager):
    """Where transforms.json gives no size: that of the turned photo, whatever Pillow says of TIFF files."""
    for suffix in (".tif", ".jpg", ".png"):
        frames = edit(scene, lambda content: [content.pop(key, None) for key in ("w", "h")])
        names = []
        for frame in frames[:4]:
            with Image.open(scene / frame["file_path"]) as picture:
                shown = np.asarray(picture.convert("RGB"))
            names.append(f"images/{Path(frame['file_path']).stem}_on_its_side{suffix}")
            save_turned(shown, scene / names[-1], 8)
        copy = Path(shutil.copytree(scene, scene.with_name(f"sizes{suffix[1:]}")))
        use_photos(copy, names)
        datamanager = make_datamanager(copy)
        assert {photo.size for photo in datamanager.photo_reader("train")} == {(72, 96)}


def test_smaller_copies_in_folders_are_found_by_their_whole_paths(scene, make_datamanager, parser):
    frames = edit(scene, lambda content: None)
    originals = [frame["file_path"] for frame in frames]

    def change(content):
        for index, frame in enumerate(content["frames"]):
            frame["file_path"] = f"images\\{('left', 'right')[index % 2]}\\{index // 2}.png"

    for index, original in enumerate(originals):
        for folder, size in (("images", (96, 72)), ("images_2", (48, 36))):
            target = scene / folder / ("left", "right")[index % 2] / f"{index // 2}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(scene / original).resize(size).save(target)
    edit(scene, change)
    datamanager = make_datamanager(scene, half_size(parser))
    names = [Path(name).relative_to(scene / "images_2") for name in datamanager.train_dataset.image_filenames]
    assert len(set(names)) == len(names) and {name.parts[0] for name in names} == {"left", "right"}
    assert {photo.size for photo in datamanager.photo_reader("train")} == {(36, 48)}
    for index in range(len(originals)):
        shutil.copy(scene / "images_2" / "left" / f"{index // 2}.png", scene / "images_2" / f"{index // 2}.png")
    shutil.rmtree(scene / "images_2" / "left")
    shutil.rmtree(scene / "images_2" / "right")
    with pytest.raises(UserError, match=r"images_2/\d.png may be the smaller copy of any of 2 photos of that name"):
        make_datamanager(scene, half_size(parser))


def test_damaged_mask_is_named(scene, make_datamanager):
    with_masks(scene)
    path = sorted((scene / "masks").iterdir())[1]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=f"The mask {path} is truncated or not an image"):
        list(make_datamanager(scene).photo_reader("train"))


def halve(scene: Path, folder: str, names) -> None:
    for name in names:
        target = scene / folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(scene / folder.removesuffix("_2") / name) as picture:
            picture.resize((picture.width // 2, picture.height // 2)).save(target)


def half_size(parser):
    return replace(parser, downscale_factor=2)


def test_smaller_photos_without_smaller_masks(scene, make_datamanager, parser):
    with_masks(scene)
    names = sorted(path.name for path in (scene / "images").iterdir())
    halve(scene, "images_2", names)
    datamanager = make_datamanager(scene, half_size(parser))
    photo = datamanager.photo_reader("train").read(0)
    assert datamanager.train_dataset.image_filenames[0].parent.name == "images_2"
    assert datamanager.train_dataset.mask_filenames[0].parent.name == "masks"
    assert photo.size == (36, 48) and photo.mask is not None
    assert photo.mask[:, 17:].all() and not photo.mask[:, :15].any()
    halve(scene, "masks_2", [f"{Path(name).stem}.png" for name in names])
    datamanager = make_datamanager(scene, half_size(parser))
    assert datamanager.train_dataset.mask_filenames[0].parent.name == "masks_2"


def test_a_mask_of_another_scene_is_no_original(tmp_path, scene, make_datamanager):
    """Only folders below the scene hold its originals, though the scene's own name may end like a copy's."""
    with_masks(scene)
    other = Path(shutil.copytree(scene, tmp_path / "scene_2"))
    path = sorted((other / "masks").iterdir())[0]
    path.unlink()
    with pytest.raises(UserError, match=f"The mask {path} is missing"):
        make_datamanager(other)


def test_no_two_views_read_one_file(scene, make_datamanager, parser):
    frames = edit(scene, lambda content: content["frames"][5].update(file_path=content["frames"][2]["file_path"]))
    with pytest.raises(UserError, match=rf"Two views of the scene read the photo \S+{frames[2]['file_path']}"):
        make_datamanager(scene)
    both = replace(parser, eval_mode="all")
    edit(scene, lambda content: content["frames"].pop(5))
    datamanager = make_datamanager(scene, both)
    assert len(datamanager.train_dataset) == len(datamanager.eval_dataset) == 15


def test_smaller_copies_belong_to_whole_paths(tmp_path):
    for name in ("images_2/left/1.png", "images_2/right/1.png", "images_2/2.png", "images_4/1.png", "images_2/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [Path("images/left/1.png"), Path("images/right/1.png"), Path("images/left/2.png"), Path("images/3.png")]
    copies = SmallerCopies(tmp_path, names)
    assert copies.find(names[0], "images_2") == tmp_path / "images_2/left/1.png"
    assert copies.find(names[1], "images_2") == tmp_path / "images_2/right/1.png"
    assert copies.find(names[2], "images_2") == tmp_path / "images_2/2.png"  # no other file has the name
    assert copies.find(names[3], "images_2") == tmp_path / "images_2/3.png"
    with pytest.raises(UserError, match=r"images_4/1.png may be the smaller copy of any of 2 .*images_4/left/1.png"):
        copies.find(names[0], "images_4")
    assert copies.find(names[2], "images_4") == tmp_path / "images_4/left/2.png"  # missing there, and named so
    apart = SmallerCopies(tmp_path, [Path("left/1.png"), Path("right/1.png")])
    assert apart.find(Path("left/1.png"), "images_2") == tmp_path / "images_2/left/1.png"
    assert apart.find(Path("right/1.png"), "images_2") == tmp_path / "images_2/right/1.png"


def test_evaluation_and_bundles_keep_no_photo(scene, make_datamanager):
    """What does not train opens photos one by one, and gives the views that training gives."""
    streaming, training = make_datamanager(scene), make_datamanager(scene)
    training.next_train(0)
    views = list(streaming.fixed_indices_eval_dataloader)
    assert not {"cached_train", "cached_eval"} & set(vars(streaming)) and "train" not in streaming._keys
    for (camera, batch), (other_camera, other) in zip(views, training.fixed_indices_eval_dataloader):
        assert torch.equal(batch["image"], other["image"]) and torch.equal(batch["teacher"], other["teacher"])
        assert torch.equal(camera.get_intrinsics_matrices(), other_camera.get_intrinsics_matrices())
        assert torch.equal(camera.camera_to_worlds, other_camera.camera_to_worlds)
        assert camera.metadata["image_size"] == other_camera.metadata["image_size"]
    assert len(views) == len(training.eval_dataset) > 0


def test_reading_ahead_is_bounded(scene, make_datamanager, monkeypatch):
    from fit3d_ns.data.photos import reader as photo_reader

    reader = make_datamanager(scene).photo_reader("train")
    reader.read(0)
    assert len(reader._opened) == 7
    monkeypatch.setattr(photo_reader, "_AHEAD_BYTES", 3 * 96 * 72 * 4)
    small = photo_reader.PhotoReader(reader._dataset, "uint8")
    small.read(0)
    assert len(small._opened) == 2
    small.read(7)
    assert len(small._opened) == 0  # whoever skips photos does not want those in between
