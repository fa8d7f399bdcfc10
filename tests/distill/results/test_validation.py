"""Scenes that are only measured, curves while it trains, and what is measured at all."""

import json

import pytest
import torch

from distill.cli import distil
from distill.evaluation import AMOUNTS, Averages, HeldOutViews, measure_scene
from distill.photo_store import PhotoStore
from distill.scenes import SceneCache, open_scenes
from distill.targets import LiftedTargets
from fit3d_ns.backbones import BackboneSpec, load_backbone
from fit3d_ns.backbones.students.averaging import interpolate
from fit3d_ns.features.correspondences import correspondences
from fit3d_ns.features.metrics import choose_pairs, feature_cosine, feature_l1, match_rate
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import World

CPU = torch.device("cpu")


def lines_of(config):
    return [json.loads(line) for line in (config.output_dir / "curves.jsonl").read_text().splitlines()]


def metrics_of(config):
    return json.loads((config.output_dir / "metrics.json").read_text())


def test_measures_are_those_of_the_features_themselves(make_scene, teacher_weights):
    folder = make_scene(views=8, held_out=3, gaussians=2000, size=(192, 256), wall=True)
    scenes = open_scenes([folder], None)
    photos = PhotoStore(scenes, 16, CPU)
    photos.fill(show=False)
    lifted = LiftedTargets(scenes, SceneCache(scenes, World(0, 1, CPU)), CPU, "weight", 0.5)
    original = load_backbone(BackboneSpec("test_vit", teacher_weights), "cpu")
    before = original.model.state_dict()
    generator = torch.Generator().manual_seed(3)
    student = {
        name: tensor + 0.2 * tensor.std().nan_to_num() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in before.items()
    }
    held_out = HeldOutViews(scenes, 0, original, lifted, lifted, photos, 24)
    averages = Averages(load_backbone(BackboneSpec("test_vit", teacher_weights), "cpu"), student, before)
    result = measure_scene(held_out, averages, 0.6, num_pictures=2)
    views = scenes[0].info.indices("eval")
    surfaces = [lifted.surface(0, view) for view in views]
    pairs = choose_pairs(surfaces, [scenes[0].info.patch_grid(view) for view in views])
    assert pairs
    targets = [lifted.make(0, [view]) for view in views]

    def by_hand(amount):
        backbone = load_backbone(BackboneSpec("test_vit", teacher_weights), "cpu")
        backbone.model.load_state_dict(interpolate(student, before, amount))
        with torch.no_grad():
            return [backbone(photos.get([(0, view)]).float() / 255).patch_tokens[0] for view in views]

    def match(maps):
        grids = [(map_.shape[1], map_.shape[2]) for map_ in maps]
        both_ways = [way for pair in pairs for way in (pair, pair[::-1])]
        points = [correspondences(surfaces[a], surfaces[b], grids[a], grids[b]) for a, b in both_ways]
        counts = [match_rate(maps[a], maps[b], found) for (a, b), found in zip(both_ways, points)]
        total = sum(number for _, number in counts)
        return sum(hits for hits, _ in counts) / total, total

    own = by_hand(0.0)
    for amount in AMOUNTS:
        maps = by_hand(amount)
        both = list(zip(maps, targets))
        assert result.curve[amount] == pytest.approx(
            {
                "l1": sum(float(feature_l1(m, t.maps[0], t.weights[0])) for m, t in both) / len(views),
                "cosine": sum(float(feature_cosine(m, t.maps[0], t.weights[0])) for m, t in both) / len(views),
                "drift": sum(float(feature_cosine(m, o)) for m, o in zip(maps, own)) / len(views),
                "view_match": match(maps)[0],
            },
            rel=2e-3,
        )
    rate, num_points = match(by_hand(0.6))
    assert result.metrics["view_match_after"] == pytest.approx(rate)
    assert result.metrics["view_match_before"] == result.curve[0.0]["view_match"]
    assert result.metrics["view_match_points"] == num_points
    of_targets = match([target.maps[0].half().float() for target in targets])[0]
    assert result.metrics["view_match_target"] == pytest.approx(of_targets)
    assert len({round(values["view_match"], 6) for values in result.curve.values()}) > 1
    assert len(result.pictures) == 2
    torch.testing.assert_close(result.pictures[1].tuned, by_hand(0.6)[1], rtol=1e-4, atol=1e-4)


def test_validation_scenes_are_measured_while_it_trains(make_scene, make_config, tmp_path):
    folders, other = [make_scene("a"), make_scene("b", seed=1)], make_scene("other", seed=2)
    config = make_config(
        *folders, validation_bundles=(other,), validate_every=4, steps=10, interpolate=0.5, report_views=5
    )
    distil(config)
    scenes = metrics_of(config)["validation"]["scenes"]
    assert [(scene["views"], scene["held_out"]) for scene in scenes.values()] == [(5, True)]  # of six, trained on four
    watched = metrics_of(config)["validation"]["while_training"]
    assert watched["step"] == [0, 4, 8, 10]
    assert watched["drift"][0] == pytest.approx(1.0) and watched["drift"] == sorted(watched["drift"], reverse=True)
    final = metrics_of(config)["validation"]["mean"]
    for name in ("l1", "cosine", "drift"):
        assert watched[name][0] == pytest.approx(final[f"{name}_before"], rel=1e-4)
        assert watched[name][-1] == pytest.approx(final[f"{name}_after"], rel=1e-4)  # of the averaged student
    card = json.loads((config.output_dir / "card.json").read_text())
    assert [scene["name"] for scene in card["scenes"]] == ["a", "b"] and card["training_views"] == 8
    assert [scene["name"] for scene in card["validation_scenes"]] == ["other"]
    curves = lines_of(config)
    assert [line["step"] for line in curves if "validation/l1" in line] == [0, 4, 8, 10]
    assert [(line["step"], line["train/l1"]) for line in curves if "train/l1" in line] == [
        (10, metrics_of(config)["loss"]["l1"][0])
    ]
    page = (config.output_dir / "report.html").read_text()
    assert "On scenes that were not trained on" in page and "Validation scenes, of what the result would be" in page
    alone = make_config(*folders, steps=10, interpolate=0.5, output_dir=tmp_path / "alone")
    distil(alone)  # validation changes nothing
    hashes = [
        json.loads((folder / "card.json").read_text())["weights_sha256"]
        for folder in (config.output_dir, alone.output_dir)
    ]
    assert hashes[0] == hashes[1]


def test_a_scene_is_not_trained_and_validated_on(make_scene, make_config, caplog):
    folders = [make_scene("a"), make_scene("b", seed=1)]
    config = make_config(*folders, validation_bundles=(folders[1],), steps=1)
    distil(config)
    assert "1 of 2 scenes are only validated on" in caplog.text
    card = json.loads((config.output_dir / "card.json").read_text())
    assert [scene["name"] for scene in card["scenes"]] == ["a"]
    with pytest.raises(UserError, match="All scenes are named by --validation-runs"):
        distil(make_config(*folders, validation_bundles=tuple(folders)))


def test_curves_of_a_resumed_training_are_those_of_a_whole_one(make_scene, make_config, tmp_path):
    folder, other = make_scene("a"), make_scene("other", seed=2)
    options = {"validation_bundles": (other,), "validate_every": 3, "log_every": 2, "save_every": 2}
    whole = make_config(folder, steps=8, output_dir=tmp_path / "whole", **options)
    distil(whole)
    cut = make_config(folder, steps=8, output_dir=tmp_path / "cut", **options)
    distil(cut)
    checkpoints = cut.output_dir / "checkpoints"
    (checkpoints / "step-00000008.pt").unlink()
    with (cut.output_dir / "curves.jsonl").open("a") as file:
        file.write('{"step": 9, "tra')  # killed while it wrote
    cut.resume = True
    distil(cut)
    assert lines_of(cut) == lines_of(whole)
    assert metrics_of(cut)["validation"]["while_training"] == metrics_of(whole)["validation"]["while_training"]


def test_tensorboard_has_the_same_curves(make_scene, make_config):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, other = make_scene("a"), make_scene("other", seed=2)
    config = make_config(folder, validation_bundles=(other,), vis="tensorboard", log_every=2, steps=6, validate_every=3)
    distil(config)
    events = event_accumulator.EventAccumulator(str(config.output_dir / "tensorboard"))
    events.Reload()
    for name in ("train/l1", "validation/l1", "validation/drift"):
        wanted = [(line["step"], line[name]) for line in lines_of(config) if name in line]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted])


def test_a_tool_that_is_missing_is_named(make_scene, make_config, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--vis wandb needs the package wandb"):
        distil(make_config(make_scene(), vis="wandb", steps=1))


def test_so_many_scenes_are_measured_whatever_their_number(make_scene, make_config):
    """What comes after training must not grow with the number of scenes."""
    folders = [make_scene(name, seed=seed) for seed, name in enumerate("abc")]
    config = make_config(*folders, validation_bundles=(make_scene("other", seed=9),), steps=2, measured_scenes=2)
    distil(config)
    metrics = json.loads((config.output_dir / "metrics.json").read_text())
    assert [key.split()[-1] for key in metrics["scenes"]] == ["a", "c"]
    assert len(metrics["validation"]["scenes"]) == 1
    page = (config.output_dir / "report.html").read_text()
    assert "Means over 2 of the 3 scenes, evenly spaced" in page and "lifted into 3 scenes" in page
