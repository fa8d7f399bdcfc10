"""A training learns its targets, survives being killed, and leaves weights that timm loads."""

import json
import math
import os
import signal
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distill import trainer as trainer_module
from distill.checkpoint import list_checkpoints
from distill.cli import distil
from distill.prefetcher import Prefetcher
from distill.recipes import choose_recipe
from distill.scenes import open_scenes
from distill.step import DistillLoss, EagerStep, StepInput, learning_rate
from distill.student import load_student, plain_state_dict, prepare_training
from fit3d_ns.backbones import BackboneSpec, load, load_backbone
from fit3d_ns.support.errors import UserError


def weights_of(config):
    return load_file(config.output_dir / "backbone.safetensors")


def metrics_of(config):
    return json.loads((config.output_dir / "metrics.json").read_text())


def difference(first, second):
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_a_student_learns_what_the_scenes_show(make_scene, make_config, teacher_weights):
    config = make_config(make_scene("a"), make_scene("b", seed=1, masked=(0, 5)), steps=40, half=True)
    distil(config)
    metrics = metrics_of(config)
    assert metrics["mean"]["l1_after"] < 0.9 * metrics["mean"]["l1_before"]
    assert metrics["loss"]["l1"][-1] < 0.9 * metrics["loss"]["l1"][0]
    assert metrics["loss"]["step"] == [10, 20, 30, 40]
    card = json.loads((config.output_dir / "card.json").read_text())
    assert [scene["name"] for scene in card["scenes"]] == ["a", "b"]
    assert (card["steps"], card["training_views"], card["settings"]["batch_size"]) == (40, 8, 2)
    assert str(config.output_dir.parent) not in json.dumps(card)
    report = (config.output_dir / "report.html").read_text()
    assert report.count("data:image/png") == 2 * 4 and "fine-tuned" in report and "<svg" in report
    spec = BackboneSpec("test_vit", config.output_dir / "backbone.safetensors")
    tuned, original = load_backbone(spec, "cpu"), load_backbone(BackboneSpec("test_vit", teacher_weights), "cpu")
    assert tuned.identity["weights_sha256"] == card["weights_sha256"]
    image = torch.rand(1, 3, 48, 64)
    assert not torch.allclose(tuned(image).patch_tokens, original(image).patch_tokens, atol=1e-2)
    both = load(config.output_dir, assembly="concat", backbone_weights=teacher_weights)
    expected = torch.cat([original(image).patch_tokens, tuned(image).patch_tokens], dim=1)
    assert torch.equal(both(image), expected)
    half = load_file(config.output_dir / "backbone_fp16.safetensors")
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in weights_of(config).items())


def test_view_match_is_measured_where_views_overlap(make_scene, make_config):
    config = make_config(make_scene(views=8, held_out=3, gaussians=2000, size=(192, 256), wall=True), steps=1)
    distil(config)
    means = metrics_of(config)["mean"]
    assert {"view_match_before", "view_match_after", "view_match_target"} <= set(means)
    assert all(0 <= means[name] <= 1 for name in means if name.startswith("view_match_") and name[-1] != "s")


@pytest.mark.parametrize(
    "options", [{}, {"ema_decay": 0.8, "lora_rank": 2, "schedule": "cosine", "gradient_accumulation": 2}]
)
def test_killed_and_resumed_is_the_same_to_the_last_bit(make_scene, make_config, tmp_path, monkeypatch, options):
    folders = [make_scene("a"), make_scene("b", seed=1)]
    whole = make_config(*folders, steps=9, save_every=4, **options)
    distil(whole)
    killed = make_config(*folders, steps=9, save_every=4, output_dir=tmp_path / "killed", **options)
    rate = trainer_module.learning_rate

    def kill_at_step_six(recipe, step, num_steps):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(recipe, step, num_steps)

    with monkeypatch.context() as patched:
        patched.setattr(trainer_module, "learning_rate", kill_at_step_six)
        with pytest.raises(SystemExit) as stop:
            distil(killed)
    assert stop.value.code == 143
    assert list_checkpoints(killed.output_dir)[-1].name == "step-00000006.pt"
    assert not (killed.output_dir / "backbone.safetensors").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(UserError, match="go on with --resume"):
        distil(killed)
    killed.resume = True
    distil(killed)
    assert difference(weights_of(whole), weights_of(killed)) == 0
    assert metrics_of(whole)["loss"] == metrics_of(killed)["loss"]


def test_resumed_with_other_memory_sees_the_same_views(make_scene, make_config, tmp_path, monkeypatch):
    folders = [make_scene(name, views=5, seed=seed) for seed, name in enumerate("abcde")]
    scene = open_scenes(folders[:1], None)[0].bundle.num_bytes() / 1e9
    whole = make_config(*folders, steps=10, scene_memory=2.5 * scene)
    distil(whole)
    assemble, seen = Prefetcher._assemble, []

    def record(self, batch, window):
        seen.extend((sample.scene, sample.view) for sample in batch.samples)
        return assemble(self, batch, window)

    monkeypatch.setattr(Prefetcher, "_assemble", record)
    for placement, memory in (("auto", 1.0), ("disk", 4.5 * scene)):
        seen.clear()
        cut = make_config(*folders, steps=4, scene_memory=2.5 * scene, output_dir=tmp_path / placement)
        distil(cut)
        cut.steps, cut.resume, cut.scene_placement, cut.scene_memory = 10, True, placement, memory
        distil(cut)
        assert sorted(seen) == [(scene, view) for scene in range(5) for view in range(3)]
        assert difference(weights_of(whole), weights_of(cut)) == 0
    roomy = make_config(*folders, steps=2, output_dir=tmp_path / "roomy")
    distil(roomy)  # all scenes are one block
    roomy.steps, roomy.resume, roomy.scene_memory = 4, True, 2.5 * scene
    with pytest.raises(UserError, match="GB of scenes at a time, but only 0.00 GB are for them: raise --scene-memory"):
        distil(roomy)


def test_checkpoints_are_pruned_and_torn_ones_named(make_scene, make_config):
    config = make_config(make_scene(), steps=6, save_every=1, keep_checkpoints=2)
    (config.output_dir / "checkpoints").mkdir(parents=True)
    (config.output_dir / "checkpoints" / ".step-00000003.pt.12-ab.tmp").write_bytes(b"killed while writing")
    distil(config)
    assert [path.name for path in list_checkpoints(config.output_dir)] == ["step-00000005.pt", "step-00000006.pt"]
    assert len(list((config.output_dir / "checkpoints").iterdir())) == 2  # also what a killed write had left
    last = list_checkpoints(config.output_dir)[-1]
    last.write_bytes(last.read_bytes()[:1000])
    config.resume, config.steps = True, 8
    with pytest.raises(UserError, match=r"step-00000006\.pt cannot be read.*delete it"):
        distil(config)
    last.unlink()
    distil(config)
    assert metrics_of(config)["steps"] == 8


def test_a_checkpoint_that_would_run_a_command_is_refused_by_name(make_scene, make_config, tmp_path):
    config = make_config(make_scene(), steps=2, resume=True)
    mark = tmp_path / "executed"

    class Planted:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    path = config.output_dir / "checkpoints" / "step-00000001.pt"
    path.parent.mkdir(parents=True)
    torch.save({"schema": 1, "model": Planted()}, path)
    with pytest.raises(
        UserError, match=rf"{path.name} cannot be read \(it asks for `\w+.system`, .* not loaded"
    ) as error:
        distil(config)
    assert "\n" not in str(error.value) and "False" not in str(error.value)
    assert not mark.exists()


def test_a_checkpoint_of_another_training_is_refused(make_scene, make_config):
    folders = [make_scene("a"), make_scene("b", seed=1)]
    config = make_config(*folders, steps=2)
    distil(config)
    config.resume = True
    for change, sentence in (
        ({"lr": 2e-3}, r"other settings, lr \(0.001, now 0.002\)"),
        ({"bundles": tuple(folders[:1])}, "other settings, scenes"),
        ({"student_layer": 2}, r"of another backbone \(layer: 5, now 2\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            distil(make_config(*folders, **{"steps": 2, "resume": True, **change}))


def test_a_falling_learning_rate_is_not_resumed_over_another_length(make_scene, make_config):
    folder = make_scene()
    distil(make_config(folder, steps=2, schedule="cosine"))
    with pytest.raises(UserError, match="falls over 2 steps, not 4"):
        distil(make_config(folder, steps=4, schedule="cosine", resume=True))


def test_a_broken_loss_names_the_batch_and_saves_nothing(make_scene, make_config, monkeypatch):
    config = make_config(make_scene(), steps=8, save_every=2)
    forward, calls = DistillLoss.forward, []

    def break_third(self, *inputs):
        calls.append(1)
        return forward(self, *inputs) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(DistillLoss, "forward", break_third)
    with pytest.raises(
        UserError,
        match=r"loss of step 3, or its gradient, is NaN or infinite \(batch: scene/00\d\.png, scene/00\d\.png\)",
    ):
        distil(config)
    assert [path.name for path in list_checkpoints(config.output_dir)] == ["step-00000002.pt"]


def test_fully_masked_views_do_not_break_the_loss(make_scene, make_config, monkeypatch):
    folder = make_scene(views=3, held_out=0, masked=(0, 1, 2))
    monkeypatch.setattr(
        "fit3d_ns.runs.bundle.SceneBundle.read_patch_weights", lambda self: dict.fromkeys(range(3), torch.zeros(3, 4))
    )
    config = make_config(folder, steps=3)
    distil(config)
    assert metrics_of(config)["loss"]["l1"] == [0.0]


def test_parts_of_a_batch_add_up(make_scene, make_config, tmp_path):
    folder = make_scene(views=8, masked=(0, 3))
    results = []
    for accumulate in (1, 4):
        config = make_config(
            folder,
            steps=4,
            batch_size=4,
            gradient_accumulation=accumulate,
            lr=1e-4,
            output_dir=tmp_path / str(accumulate),
        )
        distil(config)
        results.append((weights_of(config), metrics_of(config)["loss"]["l1"]))
    assert difference(results[0][0], results[1][0]) < 2e-5
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


def test_placements_train_alike(make_scene, make_config, tmp_path, caplog):
    """With blocks of scenes the order differs, yet each epoch shows every view; on one scene all is equal."""
    folder = make_scene()
    places = {"device": "all resident", "host": "in host memory", "disk": "memory-mapped from disk"}
    results = []
    for placement, memory in (("device", 0.0), ("host", 0.0), ("disk", 1.0)):
        config = make_config(
            folder, scene_placement=placement, photo_memory=memory, steps=5, output_dir=tmp_path / placement
        )
        caplog.clear()
        distil(config)
        assert places[placement] in caplog.text
        results.append(weights_of(config))
    assert difference(results[0], results[1]) == difference(results[0], results[2]) == 0


def test_blocks_after_the_layer_stay_as_they_were(make_scene, make_config, teacher_weights):
    config = make_config(make_scene(spec=BackboneSpec("test_vit", teacher_weights, layer=2)), steps=3)
    distil(config)
    before, after = load_file(teacher_weights), weights_of(config)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    blocks = {int(name.split(".")[1]) for name in changed if name.startswith("blocks.")}
    assert blocks == {0, 1, 2}
    assert {"patch_embed.proj.weight", "pos_embed", "norm.weight"} <= changed


def test_low_rank_updates_merge_into_plain_weights(make_scene, make_config, teacher_weights):
    config = make_config(make_scene(), lora_rank=2)
    scenes = open_scenes(list(config.bundles), None)
    student = load_student(config, scenes, torch.device("cpu"))
    image = torch.rand(1, 3, 48, 64)
    with torch.no_grad():
        before = student(image).patch_tokens
    parameters = prepare_training(student, config)
    assert sum(parameter.numel() for parameter in parameters) < 0.2 * sum(p.numel() for p in student.parameters())
    with torch.no_grad():
        assert torch.equal(student(image).patch_tokens, before)
        for parameter in parameters:
            parameter.normal_(std=0.1)
        changed = student(image).patch_tokens
    merged = load_student(config, scenes, torch.device("cpu"))
    merged.model.load_state_dict(plain_state_dict(student.model), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(merged(image).patch_tokens, changed, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed, before, atol=1e-2)


def test_the_moving_average_is_what_is_saved(make_scene, make_config):
    config = make_config(make_scene(), steps=3, ema_decay=0.25, save_every=1, keep_checkpoints=3)
    distil(config)
    models = [torch.load(path, weights_only=True)["model"] for path in list_checkpoints(config.output_dir)]
    saved = weights_of(config)
    for name, first in models[0].items():
        average = first
        for model in models[1:]:
            average = 0.25 * average + 0.75 * model[name]
        torch.testing.assert_close(saved[name], average, atol=1e-6, rtol=1e-5)
    assert difference(saved, models[-1]) > 1e-5


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_is_cut_to_its_largest_norm(make_scene, make_config, accumulate):
    config = make_config(make_scene())
    student = load_student(config, open_scenes(list(config.bundles), None), torch.device("cpu"))
    parameters = prepare_training(student, config)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0)  # moves the weights by just the gradient
    images = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8)
    inputs = StepInput(images, torch.randn(2, 64, 3, 4), torch.ones(2, 3, 4), torch.tensor(24.0), torch.tensor(1.0))
    EagerStep(DistillLoss(student, bf16=False), optimizer, parameters, 0.01, accumulate).run(inputs)
    moved = torch.stack([(old - new).norm() for old, new in zip(before, parameters)]).norm()
    assert float(moved) == pytest.approx(0.01, rel=1e-3)


def test_checkpointed_blocks_run_again_in_the_backward_pass(make_scene, make_config):
    config = make_config(make_scene(), gradient_checkpointing=True)
    student = load_student(config, open_scenes(list(config.bundles), None), torch.device("cpu"))
    prepare_training(student, config)
    runs: list[bool] = []
    model: Any = student.model
    model.blocks[2].attn.register_forward_hook(lambda *_: runs.append(True))
    loss = student(torch.rand(1, 3, 48, 64)).patch_tokens.sum()
    assert len(runs) == 1
    loss.backward()
    assert len(runs) == 2
    with torch.no_grad():
        student(torch.rand(1, 3, 48, 64))
    assert len(runs) == 3


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"precision": "bf16"}])
def test_memory_and_speed_options_change_little(make_scene, make_config, tmp_path, options):
    folder = make_scene()
    losses = []
    for extra in ({}, options):
        config = make_config(folder, steps=6, output_dir=tmp_path / str(len(losses)), lr=1e-4, log_every=1, **extra)
        distil(config)
        losses.append(metrics_of(config)["loss"]["l1"])
    tolerance = 2e-2 if "precision" in options else 1e-6
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


def test_learning_rates(make_config):
    recipe = choose_recipe(make_config(lr=2.0, warmup_steps=4, schedule="cosine"), 10, 1)
    assert [learning_rate(recipe, step, 14) for step in (0, 3, 4, 9)] == pytest.approx([0.5, 2.0, 2.0, 1.0])
    assert learning_rate(recipe, 14, 14) == pytest.approx(0.0)
    assert learning_rate(choose_recipe(make_config(lr=2.0), 10, 1), 13, 14) == 2.0
