"""``fit3d-lift --ply``: splats that other programs trained."""

import json

import pytest
import torch
from lifted_runs import opened, splat_of, write_ply
from scene_formats import as_colmap

from fit3d_ns.commands.lift.cli import run_lift
from fit3d_ns.data.points.splat_ply import read_ply


def test_ply_round_trip(tmp_path, splatfacto_run):
    splat = splat_of(splatfacto_run())
    write_ply(tmp_path / "splat.ply", splat)
    for name, tensor in read_ply(tmp_path / "splat.ply").items():
        assert torch.equal(tensor, splat[name]), name


@pytest.mark.parametrize("coordinates", ["nerfstudio", "scene", "colmap"])
def test_ply_in_either_coordinates(tmp_path, scene, splatfacto_run, lift_command, coordinates, monkeypatch):
    """ns-export writes nerfstudio's turned and scaled world, 3DGS that of the scene's files."""
    # Photos count as large, for which nerfstudio's COLMAP parser would ask on the terminal before it shrinks them.
    monkeypatch.setattr("nerfstudio.data.dataparsers.colmap_dataparser.MAX_AUTO_RESOLUTION", 50)
    run = splatfacto_run(steps=40)
    splat = splat_of(run)
    if coordinates != "nerfstudio":
        stored = json.loads((run.parent / "dataparser_transforms.json").read_text())
        transform, scale = torch.tensor(stored["transform"]), stored["scale"]
        rotation = transform[:, :3]
        splat["means"] = (splat["means"] / scale - transform[:, 3]) @ rotation
        splat["scales"] = splat["scales"] - torch.log(torch.tensor(scale))
    write_ply(tmp_path / "splat.ply", splat)
    data = as_colmap(scene, tmp_path / "colmap" / "scene") if coordinates == "colmap" else scene
    (config,) = run_lift(lift_command(ply=tmp_path / "splat.ply", data=data, output_dir=tmp_path / "from_ply"))
    splats = tmp_path / "from_ply" / "scene" / "fit3d-splat" / "splat"
    assert config == splats / "lifts" / "fit3d-splat" / "test_vit" / "config.yml"
    loaded, pipeline = opened(config)
    parser = loaded.pipeline.datamanager.dataparser
    assert (parser.orientation_method == "none") == (coordinates != "nerfstudio")
    assert torch.equal(pipeline.model.means.detach(), splat["means"])
    assert pipeline.get_average_eval_image_metrics()["feature_cosine"] > 0.3
