"""Tensor files carry a checksum: whatever was done to one is noticed, and what can be made anew is."""

import random

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.faults.mutations import ANY, SAFETENSORS, apply
from fit3d_ns.backbones import BackboneSpec, load_backbone
from fit3d_ns.data.feature_cache import FeatureCache
from fit3d_ns.support.errors import DamagedFile
from fit3d_ns.support.tensor_files import TensorSpec, read_tensors, write_tensors

SPECS = {
    "map": TensorSpec(torch.float16, (4, "h", "w")),
    "weights": TensorSpec(torch.float32, ("h",)),
    "photo": TensorSpec(torch.uint8, (3, 2, 2)),
}
KINDS = [name for name in (*ANY, *SAFETENSORS) if name != "missing"]


def tensors() -> dict[str, torch.Tensor]:
    return {
        "map": torch.arange(4 * 5 * 6).reshape(4, 5, 6).half(),
        "weights": torch.linspace(0, 1, 5),
        "photo": torch.arange(12).reshape(3, 2, 2).to(torch.uint8),
    }


def test_what_was_written_is_read(tmp_path):
    write_tensors(tmp_path / "a.safetensors", tensors(), {"id": "7"})
    found = read_tensors(tmp_path / "a.safetensors", SPECS)
    assert found.metadata == {"id": "7"}
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors().items())
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "b.safetensors", SPECS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_every_damage_is_noticed(tmp_path, monkeypatch, kind, seed):
    monkeypatch.setenv("FIT3D_FAULTS_MARKER", str(tmp_path / "marker"))
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors(), {"id": "7"})
    apply(kind, path, random.Random(seed))
    with pytest.raises(DamagedFile):
        read_tensors(path, SPECS)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("byte", range(0, 700, 7))
def test_any_bit_is_noticed(tmp_path, byte):
    """In the length, the header, the metadata or the data: each changes what is read, or is said."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors(), {"id": "7"})
    data = bytearray(path.read_bytes())
    data[byte % len(data)] ^= 1 << (byte % 8)
    path.write_bytes(bytes(data))
    try:
        found = read_tensors(path, SPECS)
    except DamagedFile:
        return
    # White space of the header alone can change without a word.
    assert found.metadata == {"id": "7"} and all(torch.equal(found.tensors[n], t) for n, t in tensors().items())


@pytest.mark.parametrize(
    "changed", [{"map": torch.zeros(4, 5, 6)}, {"weights": torch.zeros(4)}, {"more": torch.ones(1)}]
)
def test_other_tensors_are_refused_though_their_checksum_is_right(tmp_path, changed):
    write_tensors(tmp_path / "a.safetensors", {**tensors(), **changed})
    with pytest.raises(DamagedFile, match=next(iter(changed))):
        read_tensors(tmp_path / "a.safetensors", SPECS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 59, 119])
def test_values_that_are_not_finite_are_refused_though_their_checksum_is_right(tmp_path, value, place):
    broken = tensors()
    broken["map"].view(-1)[place] = value
    write_tensors(tmp_path / "a.safetensors", broken)
    with pytest.raises(DamagedFile, match="map holds NaN"):
        read_tensors(tmp_path / "a.safetensors", SPECS)


def test_a_file_without_checksum_is_a_matter_of_who_asks(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors")
    assert read_tensors(tmp_path / "a.safetensors", SPECS, checksum=False).tensors.keys() == SPECS.keys()
    with pytest.raises(DamagedFile, match="no checksum"):
        read_tensors(tmp_path / "a.safetensors", SPECS)


@pytest.fixture
def spec(teacher_weights) -> BackboneSpec:
    return BackboneSpec("test_vit", weights=teacher_weights)


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_maps_heal(spec, tmp_path, monkeypatch, caplog, kind):
    """Each damage is told once, the same maps are made anew, and the start after that makes nothing."""
    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path / "user"))
    monkeypatch.setenv("FIT3D_FAULTS_MARKER", str(tmp_path / "marker"))
    generator = torch.Generator().manual_seed(0)
    photos = [torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8, generator=generator) for _ in range(3)]
    teacher = load_backbone(spec, "cpu")

    def start() -> tuple[list[torch.Tensor], int]:
        cache, loads = FeatureCache(tmp_path / "cache", spec, None), []
        keys = cache.fill([lambda photo=photo: photo for photo in photos], lambda: loads.append(1) or teacher, "cpu")
        return [cache.load(key).clone() for key in keys], len(loads)

    expected, _ = start()
    file = sorted((tmp_path / "cache").rglob("*.safetensors"))[1]
    apply(kind, file, random.Random(1))
    caplog.clear()
    healed, loads = start()
    assert loads == 1 and all(torch.equal(one, other) for one, other in zip(healed, expected))
    told = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(told) == 1 and str(file) in told[0] and "made anew" in told[0]
    assert start()[1] == 0 and not (tmp_path / "marker").exists()


def test_precision_is_part_of_what_a_map_is(spec, tmp_path, monkeypatch):
    """Maps computed in bfloat16 have 8 significant bits: they are not those of float32, wherever they were made."""
    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path / "user"))
    photo = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    maps = {}
    for precision in ("fp32", "bf16"):
        cache = FeatureCache(tmp_path / "cache", spec, None, precision=precision)
        keys = cache.fill([lambda: photo], lambda: load_backbone(spec, "cpu"), "cpu")
        maps[precision] = cache.load(keys[0]).float()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    difference = (maps["fp32"] - maps["bf16"]).abs().max() / maps["fp32"].abs().max()
    assert 1e-4 < difference < 0.1
