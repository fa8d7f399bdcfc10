"""The probe sees photos, labels and depths as the rest of the project does, and says what it leaves out of folders."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from picture_files import ORIENTATIONS, every_mode, save_turned
from PIL import Image
from probe_files import save_photo, save_png

from fit3d_ns.data.photos.picture_files import open_photo, over_black
from fit3d_ns.support.errors import UserError
from probe.data.base import check_data, read_image, read_sample
from probe.data.choice import DataChoice, Kind
from probe.data.loading import load_data


def load(root: Path, kind: Kind = "segmentation", **options):
    data = load_data(DataChoice("folder", root, kind, **options))
    return data, check_data(data)


def test_photos_of_every_mode(tmp_path):
    grey = np.tile(np.repeat(np.array([0, 51, 102, 170, 255], np.uint8), 8), (24, 1))
    for case in every_mode(tmp_path, grey):
        if case.readable:
            assert np.array_equal(read_image(case.path), over_black(open_photo(case.path))), case.name
        else:
            with pytest.raises(UserError, match=case.path.name):
                read_image(case.path)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("turned", ["photo", "truth", "both"])
def test_orientation_of_photo_and_truth(colored_blocks, orientation, turned):
    """Whichever file is stored on its side: what is shown of both belongs together."""
    root = colored_blocks(train=2, test=2)
    expected = [read_sample(*sample) for sample in samples(root)]
    for folder in ("train", "test"):
        for path in (root / folder).iterdir() if turned != "truth" else ():
            save_turned(np.asarray(Image.open(path)), path, orientation)
    for folder in ("trainannot", "testannot", "traindepth", "testdepth"):
        for path in (root / folder).iterdir() if turned != "photo" else ():
            save_turned(np.asarray(Image.open(path)), path, orientation)
    load(root)
    load(root, "depth")
    for (image, target), sample in zip(expected, samples(root)):
        found = read_sample(*sample)
        assert np.array_equal(found[0], image) and np.array_equal(found[1], target)


def samples(root: Path):
    kinds: tuple[Kind, ...] = ("segmentation", "depth")
    for kind in kinds:
        data = load_data(DataChoice("folder", root, kind))
        yield from ((data, sample) for sample in [*data.train, *data.test])


def test_suffixes_in_any_spelling_and_what_systems_leave_behind(colored_blocks):
    root = colored_blocks(train=8)
    photos = sorted((root / "train").iterdir())
    for path, suffix in zip(photos, (".webp", ".Jpg", ".JPEG", ".TIF", ".bmp", ".tiff", ".PNG", ".png")):
        Image.open(path).save(
            path.with_suffix(".tmp"), {".webp": "WEBP", ".Jpg": "JPEG", ".JPEG": "JPEG"}.get(suffix, "PNG")
        )
        path.unlink()
        path.with_suffix(".tmp").rename(path.with_suffix(suffix))
    (root / "trainannot" / "photo_3.png").rename(root / "trainannot" / "photo_3.PNG")
    for folder in ("train", "trainannot"):
        for name in (".DS_Store", "._photo_0.png", "Thumbs.db", "desktop.ini", "photo_0.png~", ".hidden.jpg"):
            (root / folder / name).write_bytes(b"x")
    (root / "train" / "notes.txt").write_text("x")
    (root / "train" / "raw").mkdir()
    shutil.copy(root / "trainannot" / "photo_0.png", root / "trainannot" / "of_a_lost_photo.png")
    data, _ = load(root)
    assert [sample.name for sample in data.train] == [f"photo_{index}" for index in range(8)]
    (note,) = data.notes
    for part in ("12 leftovers of the system", "1 files .txt", "1 folders", "1 truths without a photo"):
        assert part in note, note
    assert load(colored_blocks("clean"))[0].notes == ()


def test_photos_that_share_a_truth_are_named(colored_blocks):
    root = colored_blocks()
    shutil.copy(root / "train" / "photo_1.png", root / "train" / "photo_1.jpg")
    with pytest.raises(UserError, match=r"photo_1.jpg and .*photo_1.png have one truth, .*trainannot/photo_1.png"):
        load(root)


@pytest.mark.parametrize("damage", ["npy", "float", "rgb", "palette"])
def test_depth_that_is_no_16_bit_png(colored_blocks, damage):
    root = colored_blocks()
    for path in (root / "traindepth").iterdir():
        values = np.asarray(Image.open(path))
        if damage == "npy":
            np.save(path.with_suffix(".npy"), values)
            path.unlink()
        elif damage == "float":
            Image.fromarray(values.astype(np.float32)).save(path, format="TIFF")
        elif damage == "rgb":
            save_photo(path, values.shape)
        else:
            Image.fromarray((values // 1000).astype(np.uint8)).convert("P").save(path)
    with pytest.raises(UserError, match=r"traindepth/photo_\d.*16-bit PNG"):
        load(root, "depth")


def test_named_depth_of_another_format(tmp_path):
    for split in ("train", "val"):
        save_photo(tmp_path / split / "a.jpg", (20, 30))
        np.save(tmp_path / split / "a.npy", np.ones((20, 30)))
        (tmp_path / f"scannetpp_{split}.txt").write_text(f"{split}\\a.jpg {split}/a.npy\n")
    with pytest.raises(UserError, match=r"train/a.npy .*depth must be 16-bit PNG"):
        check_data(load_data(DataChoice("scannetpp", tmp_path, "depth")))


def test_depth_in_whole_metres_is_remarked_on(colored_blocks):
    root = colored_blocks()
    assert load(root, "depth")[1].remarks == ()
    for path in [*(root / "traindepth").iterdir(), *(root / "testdepth").iterdir()]:
        save_png(path, (np.asarray(Image.open(path)) // 1000).astype(np.uint8))
    (remark,) = load(root, "depth")[1].remarks
    assert "from 0.001 m to 0.003 m at 1000 units a metre" in remark and "--depth-scale 1" in remark
    assert load(root, "depth", depth_scale=1.0)[1].remarks == ()
