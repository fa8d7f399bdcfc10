"""Controls: the teacher's own maps, blurred or shifted, with no 3D in them."""

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill.cli import distil
from distill.control_targets import ControlTargets, blur, low_dimensional_basis, shifted_mean
from distill.photo_store import PhotoStore
from distill.scenes import SceneCache, open_scenes
from distill.student import load_teacher
from distill.targets import LiftedTargets
from fit3d_ns.backbones import BackboneOutput, BackboneSpec
from fit3d_ns.features.metrics import feature_cosine
from fit3d_ns.support.processes import World

CPU = torch.device("cpu")
KINDS = ("control", "control-blur", "control-shift")


def parts_of(folder):
    scenes = open_scenes([folder], None)
    photos = PhotoStore(scenes, 16, CPU)
    photos.fill(show=False)
    scene_cache = SceneCache(scenes, World(0, 1, CPU))
    lifted = LiftedTargets(scenes, scene_cache, CPU, "weight", 0.5)
    return scenes, scene_cache, photos, load_teacher(scenes, CPU), lifted


def test_the_blur_is_as_far_from_the_teacher_as_lifting_is(make_scene):
    scenes, scene_cache, photos, teacher, lifted = parts_of(make_scene(size=(128, 160), wall=True, gaussians=2000))
    views = scenes[0].info.indices("train")

    # Random features have nothing of the teacher; stand-ins blurred by a known amount do.
    class Blurred(LiftedTargets):
        def make(self, scene, views):
            made = lifted.make(scene, views)
            maps = torch.cat([plain.make(scene, [view]).maps for view in views])
            return type(made)(blur(maps, torch.ones_like(made.weights), 0.7), made.weights)

    plain = ControlTargets("control", scenes, scene_cache, photos, teacher, lifted, CPU)
    standin = Blurred(scenes, scene_cache, CPU, "weight", 0.5)
    control = ControlTargets("control-blur", scenes, scene_cache, photos, teacher, standin, CPU)
    made = [control.make(0, [view]) for view in views]
    assert control.blurs[0] == pytest.approx(0.7, abs=0.05)
    with torch.no_grad():
        own = [teacher(photos.get([(0, view)]).float() / 255).patch_tokens[0] for view in views]

    def cosine(targets):
        weights = [lifted.make(0, [view]).weights[0] for view in views]
        return sum(float(feature_cosine(t.maps[0], map_, w)) for t, map_, w in zip(targets, own, weights)) / len(own)

    assert cosine(made) == pytest.approx(cosine([standin.make(0, [view]) for view in views]), abs=2e-3)
    assert cosine(made) < cosine([plain.make(0, [view]) for view in views]) - 0.01
    assert not control.needs(0) and ControlTargets(
        "control-blur", scenes, scene_cache, photos, teacher, lifted, CPU
    ).needs(0)


def test_what_is_masked_does_not_leak_into_the_blur():
    maps, weights = torch.ones(1, 2, 6, 8), torch.ones(1, 6, 8)
    maps[..., 4:] = 100.0
    weights[..., 4:] = 0.0
    blurred = blur(maps, weights, 1.0)
    torch.testing.assert_close(blurred[..., :4], torch.ones(1, 2, 6, 4))
    assert blur(maps, weights, 0.0) is maps
    single = torch.zeros(1, 1, 1, 9)
    single[..., 4] = 1.0
    row = blur(single, torch.ones(1, 1, 9), 1.0)[0, 0, 0]
    expected = torch.exp(-0.5 * (torch.arange(9.0) - 4) ** 2)
    torch.testing.assert_close(row[2:7], (expected / expected.sum())[2:7], atol=2e-3, rtol=0)


class PatchMeans(nn.Module):
    """A backbone that says what colour a patch has and, in a fourth channel, where it lies."""

    def __init__(self):
        super().__init__()
        self.info: Any = type("Info", (), {"patch_size": 8})()

    def forward(self, images):
        means = F.avg_pool2d(images, 8)
        rows = torch.arange(means.shape[2]).view(1, 1, -1, 1).expand(len(means), 1, -1, means.shape[3])
        return BackboneOutput(torch.cat([means, rows.float()], 1), None)


def test_shifted_photos_are_brought_back_to_their_patches():
    teacher: Any = PatchMeans()
    ramp = torch.arange(96.0).view(1, 1, 1, 96).expand(1, 3, 64, 96) * 2
    images = ramp.to(torch.uint8)
    shifted, plain = shifted_mean(teacher, images), teacher(images.float() / 255).patch_tokens
    # Away from the border, where photos are continued, a linear ramp is found where it was.
    torch.testing.assert_close(shifted[:, :3, 2:-2, 2:-2], plain[:, :3, 2:-2, 2:-2], atol=1e-3, rtol=0)
    # What a backbone says by place alone moves with the shifts: their mean is none, and each row's share is averaged.
    torch.testing.assert_close(shifted[:, 3, 2:-2, 2:-2], plain[:, 3, 2:-2, 2:-2], atol=0.1, rtol=0)
    steps = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    steps[..., 48:] = 255
    assert 0.02 < float(shifted_mean(teacher, steps)[0, 0, 4, 5]) < 0.5  # an edge between patches is softened


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_learns_from_the_teacher_alone(make_scene, make_config, teacher_weights, tmp_path, monkeypatch, kind):
    elsewhere = tmp_path / "moved.safetensors"  # as on another machine
    shutil.copy(teacher_weights, elsewhere)
    folder = make_scene(spec=BackboneSpec("test_vit", elsewhere))
    elsewhere.unlink()
    made, make = [], LiftedTargets.make
    monkeypatch.setattr(LiftedTargets, "make", lambda self, *args: made.append(args) or make(self, *args))
    config = make_config(folder, targets=kind, steps=30, student_weights=teacher_weights)
    distil(config)
    views = len(open_scenes([folder], None)[0].info.indices("train"))
    assert len(made) == (views if kind == "control-blur" else 0)  # only to match the blur
    metrics = json.loads((config.output_dir / "metrics.json").read_text())
    card = json.loads((config.output_dir / "card.json").read_text())
    assert ("blur_patches" in card) == (kind == "control-blur")
    assert metrics["targets"] == kind and metrics["mean"]["l1_after"] < metrics["mean"]["l1_before"]
    assert "without 3D" in (config.output_dir / "report.html").read_text()


def test_students_and_controls_beside_each_other_are_shown_together(make_scene, make_config, tmp_path):
    folder = make_scene(views=8, held_out=3, gaussians=2000, size=(192, 256), wall=True)
    other = make_scene("other", seed=1)
    for name, bundle, targets in (
        ("tuned", folder, "lifted"),
        ("apart", other, "lifted"),
        ("control", folder, "control"),
    ):
        distil(make_config(bundle, targets=targets, steps=1, output_dir=tmp_path / "results" / name))
    page = (tmp_path / "results" / "control" / "report.html").read_text()
    assert "With and without 3D" in page and "tuned: lifted" in page and "this: control" in page
    assert "apart: lifted" not in page
    assert "With and without 3D" not in (tmp_path / "results" / "tuned" / "report.html").read_text()


def test_the_basis_leaves_out_what_the_decoder_does_not_use():
    decoder = torch.zeros(6, 3, 3, 3)
    decoder[0, 0, 1, 1], decoder[3, 1, 1, 1] = 2.0, -1.0
    basis = low_dimensional_basis(decoder)
    assert basis.shape == (6, 2)
    torch.testing.assert_close((basis @ basis.T).diagonal(), torch.tensor([1.0, 0, 0, 1, 0, 0]))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_computes_as_it_did_for_the_lift(make_scene, monkeypatch, precision):
    """Its own maps differ between precisions by more than half precision does: control and target must share one."""
    scenes, scene_cache, photos, teacher, lifted = parts_of(make_scene())
    info = replace(scenes[0].info, teacher_precision=precision)
    monkeypatch.setattr(scenes[0].bundle, "info", info)
    seen = ControlTargets("control", scenes, scene_cache, photos, teacher, lifted, CPU)._see(0, [0])
    images = photos.get([(0, 0)]).float() / 255
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        expected = teacher(images).patch_tokens.float()
    assert torch.equal(seen, expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "fp32"):
        assert not torch.equal(seen, teacher(images).patch_tokens.float())
