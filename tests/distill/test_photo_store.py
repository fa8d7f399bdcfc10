"""Photos are decoded once, at the student's size, and nothing stale or broken is used."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.faults.kinds import NotApplicable
from benchmarks.faults.mutations import ANY, SAFETENSORS, apply
from distill.photo_store import PhotoStore
from distill.scenes import open_scenes
from fit3d_ns.backbones import resize_to_patches
from fit3d_ns.data.photos.bundled import read_photo
from fit3d_ns.support.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def scenes(make_scene):
    return open_scenes([make_scene(size=(50, 70))], None)


def test_photos_come_at_the_students_size(scenes):
    store = PhotoStore(scenes, 16, CPU)
    assert store.fill(show=False) == 6
    images = store.get([(0, 0), (0, 4)])
    for row, view in enumerate([0, 4]):
        photo = read_photo(scenes[0].info.views[view].photo).permute(2, 0, 1)[None].float()
        expected = resize_to_patches(photo, 16)[0].round().clamp(0, 255)
        assert images.shape[-2:] == expected.shape[-2:] == (48, 64)
        assert torch.equal(images[row].float(), expected)
    store.close()


@pytest.mark.parametrize("resident_bytes", [0, 10**9])
def test_second_start_decodes_nothing(scenes, resident_bytes):
    first = PhotoStore(scenes, 16, CPU)
    first.fill(show=False)
    shutil.rmtree(Path(scenes[0].info.views[0].photo.path).parent)
    again = PhotoStore(scenes, 16, CPU, resident_bytes=resident_bytes)
    assert again.fill(show=False) == 0
    for _ in range(2):
        assert torch.equal(again.get([(0, 2)]), first.get([(0, 2)]))
    for store in (first, again):
        store.close()


def test_processes_share_the_work(scenes):
    shares = [PhotoStore(scenes, 16, CPU).fill(rank, 4, show=False) for rank in range(4)]
    assert shares == [2, 2, 1, 1]
    assert PhotoStore(scenes, 16, CPU).fill(show=False) == 0


def test_changed_broken_and_missing_photos_are_named(scenes):
    photos = [Path(view.photo.path) for view in scenes[0].info.views]
    original = photos[1].read_bytes()
    Image.new("RGB", (70, 50)).save(photos[1])
    with pytest.raises(UserError, match=r"001\.png is not the one.*hash differs"):
        PhotoStore(scenes, 16, CPU).fill(show=False)
    photos[1].unlink()
    with pytest.raises(UserError, match=r"001\.png is missing"):
        PhotoStore(scenes, 16, CPU).fill(show=False)
    photos[1].write_bytes(original)
    assert PhotoStore(scenes, 16, CPU).fill(show=False) <= 6


def test_a_full_disk_is_said_before(scenes, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match="--cache-dir"):
        PhotoStore(scenes, 16, CPU).fill(show=False)


def test_moved_photos_are_found(scenes, tmp_path):
    folder = Path(scenes[0].info.views[0].photo.path).parent
    shutil.move(folder, tmp_path / "elsewhere" / folder.name)
    with pytest.raises(UserError, match="--data-root"):
        open_scenes([scenes[0].bundle.folder], None)
    moved = open_scenes([scenes[0].bundle.folder], tmp_path / "elsewhere")
    assert PhotoStore(moved, 16, CPU, data_root=tmp_path / "elsewhere").fill(show=False) == 6


@pytest.mark.parametrize("kind", [*ANY, *SAFETENSORS])
def test_damaged_decoded_photos_heal(scenes, tmp_path, monkeypatch, caplog, kind):
    monkeypatch.setenv("FIT3D_FAULTS_MARKER", str(tmp_path / "marker"))

    def start() -> tuple[torch.Tensor, int]:
        store = PhotoStore(scenes, 16, CPU, tmp_path / "photos")
        decoded = store.fill(show=False)
        images = store.get([(0, view) for view in range(6)])
        store.close()
        return images, decoded

    expected, _ = start()
    file = sorted((tmp_path / "photos").rglob("*.safetensors"))[2]
    try:
        apply(kind, file, random.Random(2))
    except NotApplicable:
        assert kind in ("NaN", "infinity"), "8-bit photos hold neither"
        return
    caplog.clear()
    healed, decoded = start()
    assert decoded == 1 and torch.equal(healed, expected) and start()[1] == 0
    told = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(told) == (kind != "missing") and all(str(file) in line for line in told)
    assert not (tmp_path / "marker").exists()
