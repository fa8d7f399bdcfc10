"""The page that ``fit3d-lift`` writes about a lift."""

import base64
import io
import json
import re

import numpy as np
import torch
from PIL import Image

from fit3d_ns.commands.lift.cli import run_lift
from fit3d_ns.lifting.operator import FeatureOperator
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.scenes.lift import disagreement_map, lift_scene
from fit3d_ns.scenes.views import resident_scene


def test_report_shows_views_where_they_disagree_and_what_was_measured(feature_run, lift_command, scene):
    trainer = feature_run(steps=40)
    lift = LiftSettings(select="fidelity", refinements=3, report_dims=(4, 16))
    (config,) = run_lift(lift_command(load_config=trainer.base_dir, lift=lift))
    page, record = (config.parent / "lift.html").read_text(), json.loads((config.parent / "lift.json").read_text())
    pictures = [re.search(r'src="data:image/png;base64,([^"]+)"', figure) for figure in page.split("<figure")[1:]]
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1])))) for found in pictures if found]
    assert len(decoded) == 12  # photo, teacher, lifted and heat map of three views
    photo, teacher, lifted, heat = decoded[:4]
    assert photo.shape == (72, 96, 3) and teacher.shape == lifted.shape == (5, 6, 3) and heat.shape == (20, 24, 3)
    with Image.open(scene / "images" / "frame_00001.png") as first:
        assert np.array_equal(photo, np.asarray(first.convert("RGB")))  # interval of 4: the first view is held out
    assert all(len(np.unique(picture)) > 20 for picture in decoded)
    assert [point["dim"] for point in record["dim_curve"]] == [4, 8, 16]
    for point in [*record["curve"], *record["dim_curve"]]:
        assert f"{point['feature_cosine']:.4g}" in page
    assert all(stage in page for stage in ("teacher", "aggregation", "refinement", "evaluation"))


def test_heat_map_is_bright_where_views_disagree(feature_run, lift_command):
    trainer = feature_run(steps=2)
    pipeline = trainer.pipeline
    pipeline.eval()
    scene = resident_scene(pipeline.datamanager, pipeline.model)
    lift = lift_scene(pipeline.model, scene, LiftSettings())
    camera = scene.held_out[0].view.camera
    operator = FeatureOperator(pipeline.model.geometry, pipeline.model.feature_grid)
    x = (pipeline.model.means @ camera.viewmat[:3, :3].T + camera.viewmat[:3, 3])[:, 0]
    lift.variance = torch.where(x < 0, lift.feature_energy, 0.0)  # by as much as features are long, on the left
    heat = disagreement_map(operator, scene.held_out[0], lift)
    left, right = heat[:, : heat.shape[1] // 3], heat[:, -heat.shape[1] // 3 :]
    alpha = operator.low_maps([camera], torch.ones(len(x), 1))[0, 0].detach().numpy()
    assert left.mean() > 0.8 * alpha[:, : heat.shape[1] // 3].mean() > 0 and right.mean() < 0.2 * left.mean()
