"""Features on disk, computed by several processes."""

import random
import threading
import time

import pytest
import torch
from probe_files import TINY

import probe.features.store as module
from benchmarks.faults.mutations import ANY, SAFETENSORS, apply
from fit3d_ns.backbones import BackboneSpec, load_backbone
from fit3d_ns.support.errors import UserError
from probe.config import DataChoice
from probe.data.loading import load_data
from probe.features.rows import FrozenBackbones
from probe.features.store import SHARD, FeatureStore


def test_a_slow_process_misses_no_shard(tmp_path, weights, colored_blocks, monkeypatch):
    """Two processes (here: threads), of which one looks for missing shards when the other could have written some."""
    samples = list(load_data(DataChoice("folder", colored_blocks(), "segmentation")).train)
    samples = (samples * (4 * SHARD // len(samples) + 1))[: 4 * SHARD]
    backbones = FrozenBackbones({"original": load_backbone(BackboneSpec(TINY, weights["original"]), "cpu")}, "fp32")
    barrier, process = threading.Barrier(2, timeout=900), threading.local()
    read_tensors = module.read_tensors

    def look(path, **options):
        if process.rank == 1:
            time.sleep(0.2)
        return read_tensors(path, **options)

    monkeypatch.setattr(module, "rank", lambda: process.rank)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(module, "wait_for_all", barrier.wait)
    monkeypatch.setattr(module, "read_tensors", look)
    errors = []

    def run(rank):
        process.rank = rank
        store = FeatureStore(tmp_path, {}, samples, mirrored=False, with_truth=True)
        read = lambda index: {"views": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}  # noqa: E731
        try:
            store.fill(read, backbones, torch.device("cpu"), 0, "features")
            store.load(range(len(samples)), None, torch.device("cpu"))
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_photo_that_is_gone_is_named(tmp_path, colored_blocks):
    samples = load_data(DataChoice("folder", colored_blocks(), "segmentation")).train
    samples[0].image.unlink()
    with pytest.raises(UserError, match=r"photo_0.png cannot be read"):
        FeatureStore(tmp_path, {}, samples, mirrored=False, with_truth=True)


@pytest.mark.parametrize("kind", [*ANY, *SAFETENSORS])
def test_damaged_features_heal(tmp_path, weights, colored_blocks, monkeypatch, caplog, kind):
    monkeypatch.setenv("FIT3D_FAULTS_MARKER", str(tmp_path / "marker"))
    samples = list(load_data(DataChoice("folder", colored_blocks(), "segmentation")).train)[:3]
    backbones = FrozenBackbones({"original": load_backbone(BackboneSpec(TINY, weights["original"]), "cpu")}, "fp32")

    def start():
        asked = []
        store = FeatureStore(tmp_path, {}, samples, mirrored=True, with_truth=True)

        def read(index):
            asked.append(index)
            generator = torch.Generator().manual_seed(index)
            views = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=generator)
            return {"views": views, "target": torch.full((2, 2), index)}

        store.fill(read, backbones, torch.device("cpu"), 0, "features")
        return store.load([0, 2], [0, 1], torch.device("cpu"))["original"].patch_tokens, len(asked)

    expected, _ = start()
    (file,) = tmp_path.rglob("*.safetensors")
    apply(kind, file, random.Random(3))
    caplog.clear()
    healed, asked = start()
    assert asked == 3 and torch.equal(healed, expected) and start()[1] == 0
    told = [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()]
    assert len(told) == (kind != "missing") and all(str(file) in line for line in told)
    assert not (tmp_path / "marker").exists()
