"""Features on disk, computed by several processes."""

import threading
import time

import pytest
import torch
from probe_files import TINY

import probe.feature_store as module
from fit3d_ns.backbones import BackboneSpec, load_backbone
from fit3d_ns.support.errors import UserError
from probe.config import DataChoice
from probe.data.loading import load_data
from probe.feature_store import SHARD, FeatureStore
from probe.features import FrozenBackbones


def test_a_slow_process_misses_no_shard(tmp_path, weights, colored_blocks, monkeypatch):
    """Two processes (here: threads), of which one looks for missing shards when the other could have written some."""
    samples = list(load_data(DataChoice("folder", colored_blocks(), "segmentation")).train)
    samples = (samples * (4 * SHARD // len(samples) + 1))[: 4 * SHARD]
    backbones = FrozenBackbones({"original": load_backbone(BackboneSpec(TINY, weights["original"]), "cpu")}, "fp32")
    barrier, process = threading.Barrier(2, timeout=900), threading.local()
    is_complete = module.is_complete_safetensors

    def look(path):
        if process.rank == 1:
            time.sleep(0.2)
        return is_complete(path)

    monkeypatch.setattr(module, "rank", lambda: process.rank)
    monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(module, "wait_for_all", barrier.wait)
    monkeypatch.setattr(module, "is_complete_safetensors", look)
    errors = []

    def run(rank):
        process.rank = rank
        store = FeatureStore(tmp_path, {}, samples, mirrored=False)
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
        FeatureStore(tmp_path, {}, samples, mirrored=False)
