"""A run is measured against the teacher that it was trained with, whatever lies at its place by now."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fit3d_ns.support.errors import UserError


@pytest.fixture
def run(scene, make_config, make_trainer, parser, teacher_weights, tmp_path, own_cache):
    """A trained run with weights of its own; returns its config.yml and the weight file."""
    weights = tmp_path / "teacher.safetensors"
    shutil.copy(teacher_weights, weights)
    config = make_config(scene, steps=3, feature_init="random")
    config.timestamp, config.pipeline.datamanager.dataparser = "run", parser
    config.pipeline.datamanager.backbone_weights = weights
    config.save_config()
    make_trainer(config).train()
    return config.get_base_dir() / "config.yml", weights


def evaluate(config, tmp_path) -> dict[str, float]:
    from nerfstudio.scripts.eval import ComputePSNR

    ComputePSNR(load_config=config, output_path=tmp_path / "metrics.json").main()
    results = json.loads((tmp_path / "metrics.json").read_text())["results"]
    return {name: value for name, value in results.items() if name.startswith("feature")}


def test_cached_maps_need_no_weights(run, tmp_path):
    config, weights = run
    expected = evaluate(config, tmp_path)
    weights.unlink()
    assert evaluate(config, tmp_path) == expected and expected


def test_replaced_weights_are_not_measured_against(run, scene, tmp_path):
    config, weights = run
    expected = evaluate(config, tmp_path)
    save_file({name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in load_file(weights).items()}, weights)
    assert evaluate(config, tmp_path) == expected
    shutil.rmtree(scene / ".fit3d_cache")
    with pytest.raises(UserError, match="trained with other weights of test_vit.*restore those weights"):
        evaluate(config, tmp_path)
