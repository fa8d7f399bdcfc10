"""The feature cache: what its keys depend on, and what a kill, a race or a full disk leaves behind."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fit3d_ns.backbones import Backbone, BackboneSpec, load_backbone, resize_to_patches
from fit3d_ns.data import feature_cache
from fit3d_ns.data.feature_cache import FeatureCache, image_key
from fit3d_ns.support import tensor_files
from fit3d_ns.support.errors import UserError

FLAG = "--pipeline.datamanager.feature-cache-dir"
MAX_SIZE = 64


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> BackboneSpec:
    """A teacher of one random block."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), path)
    return BackboneSpec("vit_tiny_patch16_224", weights=path, layer=0)


@pytest.fixture(scope="module")
def teacher(spec) -> Backbone:
    return load_backbone(spec, "cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path_factory.getbasetemp() / "user-cache"))


@pytest.fixture
def images() -> list[torch.Tensor]:
    """Five images of two sizes, the fifth equal to the first."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(50, 100), (50, 100), (100, 50), (50, 100)]
    made = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator) for size in sizes]
    return [*made, made[0].clone()]


def sources(images):
    return [lambda image=image: image for image in images]


def fill(cache: FeatureCache, images, teacher: Backbone) -> tuple[list[str], int]:
    """Returns the keys and how often the teacher was loaded."""
    loads = []
    keys = cache.fill(sources(images), lambda: loads.append(1) or teacher, "cpu", batch_size=2)
    return keys, len(loads)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.tmp"))


def test_maps_are_the_teachers_own_in_half_precision(spec, teacher, images, tmp_path):
    cache = FeatureCache(tmp_path, spec, MAX_SIZE)
    keys, _ = fill(cache, images, teacher)
    for key, image in zip(keys, images):
        batch = resize_to_patches(image.permute(2, 0, 1)[None].float() / 255, 16, MAX_SIZE)
        with torch.no_grad():
            expected = teacher(batch).patch_tokens[0]
        loaded = cache.load(key)
        assert loaded.dtype == torch.float16 and loaded.shape == expected.shape
        assert torch.allclose(loaded.float(), expected, atol=2e-2, rtol=2e-3)
    assert cache.load(keys[0]).shape == (192, 2, 4) and cache.load(keys[2]).shape == (192, 4, 2)
    assert keys[4] == keys[0] and len(files(tmp_path)) == 4, "equal images share one map"


@pytest.mark.parametrize("room, opened", [(2**30, 5), (15000, 8), (0, 9)])
def test_images_are_kept_between_hashing_and_the_teacher_within_a_bound(
    room, opened, spec, teacher, images, tmp_path, monkeypatch
):
    """Each image takes 15,000 bytes, and the fifth, equal to the first, needs no map of its own."""
    monkeypatch.setattr("fit3d_ns.data.feature_cache._KEPT_IMAGES", room)
    calls = []
    counted = [lambda image=image: calls.append(1) or image for image in images]
    keys = FeatureCache(tmp_path, spec, MAX_SIZE).fill(counted, lambda: teacher, "cpu", batch_size=2)
    assert len(calls) == opened
    assert len(files(tmp_path)) == 4 and len(set(keys)) == 4


def test_second_start_loads_no_teacher_and_changes_nothing(spec, teacher, images, tmp_path, caplog):
    caplog.set_level(logging.INFO, "fit3d_ns")
    keys, loads = fill(FeatureCache(tmp_path, spec, MAX_SIZE), images, teacher)
    printed = caplog.text
    caplog.clear()
    assert loads == 1 and "4 of 4 views" in printed and "2x4, 4x2" in printed and "192 channels" in printed
    stamps = [path.stat().st_mtime_ns for path in files(tmp_path)]
    again, loads = fill(FeatureCache(tmp_path, spec, MAX_SIZE), images, teacher)
    printed = caplog.text
    assert again == keys and loads == 0
    assert "Making" not in printed and "MB in" in printed and tmp_path.name in printed
    assert [path.stat().st_mtime_ns for path in files(tmp_path)] == stamps


def test_only_what_is_missing_is_made(spec, teacher, images, tmp_path):
    fill(FeatureCache(tmp_path, spec, MAX_SIZE), images[:2], teacher)
    before = files(tmp_path)
    stamps = [path.stat().st_mtime_ns for path in before]
    fill(FeatureCache(tmp_path, spec, MAX_SIZE), images, teacher)
    assert [path.stat().st_mtime_ns for path in before] == stamps
    assert len(files(tmp_path)) == 4


def test_maps_are_memory_mapped_and_writing_to_one_changes_no_file(spec, teacher, images, tmp_path):
    cache = FeatureCache(tmp_path, spec, MAX_SIZE)
    keys, _ = fill(cache, images, teacher)
    loaded = cache.load(keys[0])
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert f"{keys[0]}.safetensors" in maps.read_text()
    original = loaded.clone()
    loaded.zero_()
    assert torch.equal(cache.load(keys[0]), original)


def test_key_of_an_image_is_its_pixels_and_shape():
    image = torch.arange(2 * 4 * 3, dtype=torch.uint8).reshape(2, 4, 3)
    changed = image.clone()
    changed[1, 2, 0] += 1
    keys = {image_key(image), image_key(changed), image_key(image.reshape(4, 2, 3))}
    assert len(keys) == 3
    assert image_key(image.clone()) == image_key(image.transpose(0, 1).contiguous().transpose(0, 1)) == image_key(image)
    for wrong in (image.float(), image[..., :2], image[..., 0]):
        with pytest.raises(ValueError, match="8-bit RGB"):
            image_key(wrong)


def test_folder_changes_with_each_ingredient_of_the_teacher(spec, teacher, tmp_path, monkeypatch):
    other = tmp_path / "other.safetensors"
    state_dict = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    state_dict["norm.bias"][0] += 1e-3
    save_file(state_dict, other)
    same = tmp_path / "same.safetensors"
    save_file(teacher.model.state_dict(), same)

    reference = FeatureCache(tmp_path, spec, MAX_SIZE).teacher_id
    assert FeatureCache(tmp_path / "elsewhere", replace(spec, weights=same), MAX_SIZE).teacher_id == reference
    assert FeatureCache(tmp_path, spec, None).teacher_id == FeatureCache(tmp_path, spec, 0).teacher_id
    changed = [
        FeatureCache(tmp_path, replace(spec, weights=other), MAX_SIZE),
        FeatureCache(tmp_path, replace(spec, layer=1), MAX_SIZE),
        FeatureCache(tmp_path, replace(spec, norm=False), MAX_SIZE),
        FeatureCache(tmp_path, replace(spec, normalization="imagenet"), MAX_SIZE),
        FeatureCache(tmp_path, spec, MAX_SIZE + 16),
        FeatureCache(tmp_path, spec, None),
    ]
    monkeypatch.setattr(feature_cache, "CACHE_SCHEMA", 99)
    changed.append(FeatureCache(tmp_path, spec, MAX_SIZE))
    monkeypatch.undo()
    monkeypatch.setattr("fit3d_ns.backbones.identity.IDENTITY_SCHEMA", 2)
    changed.append(FeatureCache(tmp_path, spec, MAX_SIZE))
    identities = [reference, *(cache.teacher_id for cache in changed)]
    assert len(set(identities)) == len(identities)


def test_teachers_do_not_share_maps(spec, teacher, images, tmp_path):
    keys, _ = fill(FeatureCache(tmp_path, spec, MAX_SIZE), images, teacher)
    assert not FeatureCache(tmp_path, replace(spec, norm=False), MAX_SIZE).has(keys[0])


def test_damaged_files_are_noticed_and_made_again(spec, teacher, images, tmp_path):
    cache = FeatureCache(tmp_path, spec, MAX_SIZE)
    keys, _ = fill(cache, images, teacher)
    whole = {path: path.read_bytes() for path in files(tmp_path)}
    truncated, empty, garbage, gone = files(tmp_path)
    truncated.write_bytes(whole[truncated][:-10])
    empty.write_bytes(b"")
    garbage.write_bytes(b"\xff" * 100)
    gone.unlink()
    for key in keys:
        assert not cache.has(key)
        with pytest.raises(UserError, match="missing from .* or damaged"):
            cache.load(key)
    assert fill(FeatureCache(tmp_path, spec, MAX_SIZE), images, teacher) == (keys, 1)
    assert {path: path.read_bytes() for path in files(tmp_path)} == whole


def test_failure_between_writing_and_renaming_leaves_nothing_torn(spec, teacher, images, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, spec, MAX_SIZE)
    rename, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 3:  # the teacher's description, one map, and in the middle of the second
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(cache, images, teacher)
    monkeypatch.undo()
    assert len(files(tmp_path)) == 1 and not temporaries(tmp_path)
    keys, _ = fill(cache, images, teacher)
    assert all(cache.has(key) for key in keys)


FILL_IN_A_PROCESS = """
import os, signal, sys, torch
from pathlib import Path
from fit3d_ns.backbones import BackboneSpec, load_backbone
from fit3d_ns.data.feature_cache import FeatureCache
folder, weights, images, die_at = sys.argv[1:]
spec = BackboneSpec("vit_tiny_patch16_224", weights=Path(weights), layer=0)
rename, calls = os.replace, []
def replace(source, target):
    if str(target).startswith(folder):
        calls.append(target)
        if len(calls) == int(die_at):
            os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
images = torch.load(images, weights_only=True)
cache = FeatureCache(Path(folder), spec, 64)
print(cache.fill([lambda i=i: i for i in images], lambda: load_backbone(spec, "cpu"), "cpu", batch_size=2))
"""


def start_filling(folder, spec, images, tmp_path, die_at=0) -> subprocess.Popen:
    torch.save(images, tmp_path / "images.pt")
    arguments = [str(folder.resolve()), str(spec.weights), str(tmp_path / "images.pt"), str(die_at)]
    return subprocess.Popen([sys.executable, "-c", FILL_IN_A_PROCESS, *arguments], stdout=subprocess.PIPE)


def test_a_killed_process_leaves_whole_files_only_and_the_next_goes_on(spec, teacher, images, tmp_path):
    folder = tmp_path / "cache"
    process = start_filling(folder, spec, images, tmp_path, die_at=4)
    process.communicate(timeout=900)
    assert process.returncode == -signal.SIGKILL
    survivors = files(folder)
    (left_over,) = temporaries(folder)
    assert len(survivors) == 2

    cache = FeatureCache(folder, spec, MAX_SIZE)
    keys, loads = fill(cache, images, teacher)
    assert loads == 1 and all(torch.isfinite(cache.load(key)).all() for key in keys)
    assert len(files(folder)) == 4
    assert left_over.exists(), "another process might still be writing it"
    os.utime(left_over, (0, 0))
    survivors[0].unlink()
    fill(cache, images, teacher)
    assert not left_over.exists(), "nobody writes one file for a day"


def test_two_processes_filling_at_once_give_the_same_complete_cache(spec, teacher, images, tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    processes = [start_filling(together, spec, images, tmp_path) for _ in range(2)]
    for process in processes:
        process.communicate(timeout=900)
        assert process.returncode == 0
    keys, loads = fill(FeatureCache(together, spec, MAX_SIZE), images, teacher)
    assert loads == 0 and not temporaries(together)
    fill(FeatureCache(alone, spec, MAX_SIZE), images, teacher)
    shared, own = FeatureCache(together, spec, MAX_SIZE), FeatureCache(alone, spec, MAX_SIZE)
    for key in keys:
        assert torch.allclose(shared.load(key).float(), own.load(key).float(), atol=1e-2)


def test_a_map_that_another_process_made_meanwhile_is_not_made_again(spec, teacher, images, tmp_path):
    cache = FeatureCache(tmp_path, spec, MAX_SIZE)

    def slow_teacher():
        fill(FeatureCache(tmp_path, spec, MAX_SIZE), images, teacher)
        return lambda _: pytest.fail("made twice")

    cache.fill(sources(images), slow_teacher, "cpu")  # type: ignore[arg-type]
    assert len(files(tmp_path)) == 4


def refuse_writing_below(folder: Path, code: int, monkeypatch) -> None:
    make = Path.mkdir

    def mkdir(self, *arguments, **options):
        if self.is_relative_to(folder):
            raise OSError(code, os.strerror(code))
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_read_only_folder_falls_back(code, spec, teacher, images, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fit3d_ns")
    scene, fallback = (tmp_path / "scene").resolve(), tmp_path / "fallback"
    cache = FeatureCache(scene, spec, MAX_SIZE, fallback)
    refuse_writing_below(scene, code, monkeypatch)
    keys, _ = fill(cache, images, teacher)
    assert len(files(fallback)) == 4 and not scene.exists()
    assert "fallback" in caplog.text
    assert fill(FeatureCache(scene, spec, MAX_SIZE, fallback), images, teacher) == (keys, 0)
    assert cache.load(keys[0]).shape == (192, 2, 4)


def test_read_only_folder_that_is_filled_already_is_used(spec, teacher, images, tmp_path, monkeypatch):
    scene, fallback = (tmp_path / "scene").resolve(), tmp_path / "fallback"
    fill(FeatureCache(scene, spec, MAX_SIZE), images[:2], teacher)
    refuse_writing_below(scene, errno.EROFS, monkeypatch)
    cache = FeatureCache(scene, spec, MAX_SIZE, fallback)
    keys, _ = fill(cache, images, teacher)
    assert len(files(scene)) == 2 and len(files(fallback)) == 2
    assert all(cache.has(key) for key in keys)


def test_no_writable_folder_is_one_sentence(spec, teacher, images, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written to .*file") as caught:
        fill(FeatureCache(tmp_path / "file" / "below", spec, MAX_SIZE), images, teacher)
    assert FLAG in str(caught.value)
    fill(FeatureCache(tmp_path / "file" / "below", spec, MAX_SIZE, tmp_path / "fallback"), images, teacher)
    assert len(files(tmp_path / "fallback")) == 4


def test_disk_that_fills_up_is_one_sentence_and_keeps_what_was_made(spec, teacher, images, tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path, spec, MAX_SIZE, tmp_path / "fallback")
    write, written = tensor_files.save_file, []

    def save(tensors, path, metadata):
        written.append(path)
        if len(written) == 3:
            path.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return write(tensors, path, metadata)

    monkeypatch.setattr(tensor_files, "save_file", save)
    with pytest.raises(UserError, match="No space left on device") as caught:
        fill(cache, images, teacher)
    monkeypatch.undo()
    assert FLAG in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(files(tmp_path)) == 2 and not temporaries(tmp_path)
    fill(cache, images, teacher)
    assert len(files(tmp_path)) == 4


def test_too_little_space_is_said_before_the_teacher_is_loaded(spec, images, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(UserError, match="has 0 MB left") as caught:
        FeatureCache(tmp_path, spec, MAX_SIZE).fill(sources(images), lambda: pytest.fail("loaded"), "cpu")
    assert FLAG in str(caught.value)


def test_features_that_are_not_finite_are_never_stored(spec, images, tmp_path):
    broken = load_backbone(spec, "cpu")
    broken.model.norm.bias.data[7] = 1e6  # type: ignore[union-attr, index]  # beyond half precision
    with pytest.raises(UserError, match="not finite in half precision"):
        fill(FeatureCache(tmp_path, spec, MAX_SIZE), images, broken)
    assert not files(tmp_path)


def test_images_smaller_than_a_patch_are_refused_before_any_work(spec, tmp_path):
    small = torch.zeros(10, 200, 3, dtype=torch.uint8)
    with pytest.raises(UserError, match="10x200 pixels is smaller than one patch"):
        FeatureCache(tmp_path, spec, MAX_SIZE).fill([lambda: small], lambda: pytest.fail("loaded"), "cpu")


def test_filling_leaves_the_random_numbers_of_training_alone(spec, images, tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    FeatureCache(tmp_path, spec, MAX_SIZE).fill(sources(images), lambda: load_backbone(spec, "cpu"), "cpu")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.gpu
def test_cuda_fills_in_bfloat16_what_the_cpu_would(spec, teacher, images, tmp_path):
    slow, fast = FeatureCache(tmp_path / "cpu", spec, MAX_SIZE), FeatureCache(tmp_path / "cuda", spec, MAX_SIZE)
    keys, _ = fill(slow, images, teacher)
    fast.fill(sources(images), lambda: load_backbone(spec, "cuda"), "cuda")
    for key in keys:
        a, b = slow.load(key).float().flatten(1), fast.load(key).float().flatten(1)
        assert torch.nn.functional.cosine_similarity(a, b, dim=0).min() > 0.999
