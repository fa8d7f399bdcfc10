"""What a training leaves: the student averaged with its original, and how further rounds begin."""

import json

import pytest
import torch
from safetensors.torch import load_file

from distill import session as session_module
from distill.cli import distil
from distill.scenes import open_scenes
from distill.student import load_original, load_student
from fit3d_ns.backbones import BackboneSpec, hash_state_dict, load
from fit3d_ns.backbones.students.averaging import interpolate
from fit3d_ns.support.errors import UserError


def card_of(config):
    return json.loads((config.output_dir / "card.json").read_text())


def weights_of(config, name="backbone.safetensors"):
    return load_file(config.output_dir / name)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5}, {"lora_rank": 2}, {"lora_rank": 2, "ema_decay": 0.5}])
def test_the_result_is_averaged_and_the_student_stays_beside_it(make_scene, make_config, teacher_weights, options):
    config = make_config(make_scene(), interpolate=0.3, steps=4, **options)
    distil(config)
    student, original = weights_of(config, "student.safetensors"), load_file(teacher_weights)
    averaged = weights_of(config)
    assert hash_state_dict(averaged) == hash_state_dict(interpolate(student, original, 0.3))
    assert hash_state_dict(student) != hash_state_dict(original)
    card = card_of(config)
    assert card["interpolate"] == card["settings"]["interpolate"] == 0.3 and card["assembly"] == "tuned"
    assert card["weights_sha256"] == hash_state_dict(averaged)
    assert card["student_sha256"] == hash_state_dict(student)
    assert card["start_sha256"] == card["student"]["weights_sha256"] == hash_state_dict(original)
    assert load(config.output_dir).assembly == "tuned"


@pytest.mark.parametrize("amount", [0.0, 1.0])
def test_the_ends_are_original_and_student_bit_for_bit(make_scene, make_config, teacher_weights, tmp_path, amount):
    folder = make_scene()
    config = make_config(folder, interpolate=amount, output_dir=tmp_path / "ends")
    distil(config)
    plain = make_config(folder, output_dir=tmp_path / "plain")  # the paper's recipe averages nothing
    distil(plain)
    wanted = weights_of(plain) if amount == 1 else load_file(teacher_weights)
    assert hash_state_dict(weights_of(config)) == hash_state_dict(wanted)
    assert (config.output_dir / "student.safetensors").exists() == (amount < 1)
    assert not (plain.output_dir / "student.safetensors").exists()
    assert card_of(plain)["assembly"] == "concat" and card_of(plain)["recipe"] == "paper"


def test_a_student_of_another_backbone_is_averaged_with_its_own_original(make_scene, make_config, tmp_path):
    import timm
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file(other, tmp_path / "other.safetensors")
    config = make_config(
        make_scene(), student="test_vit", student_weights=tmp_path / "other.safetensors", interpolate=0.5, steps=3
    )
    distil(config)
    student = weights_of(config, "student.safetensors")
    assert hash_state_dict(weights_of(config)) == hash_state_dict(interpolate(student, other, 0.5))
    assert card_of(config)["student"]["weights_sha256"] == hash_state_dict(other)


def test_the_automatic_recipe_is_the_default_and_says_what_it_does(make_scene, make_config, caplog):
    config = make_config(make_scene(), recipe="auto", lr=None, clip=None, steps=None)
    distil(config)
    said = caplog.text
    assert "Recipe auto: 4 views of 1 scene, so 220 steps of 2" in said and "0.6 x student + 0.4 x original" in said
    card = card_of(config)
    assert card["recipe"] == "auto" and card["steps"] == 220
    recorded = {name: card["settings"][name] for name in ("lr", "schedule", "warmup_steps", "ema_decay", "clip")}
    assert recorded == {"lr": 5e-5, "schedule": "cosine", "warmup_steps": 22, "ema_decay": 0.9864, "clip": 0.1}
    assert card["settings"]["accumulation"] == "weight" and card["moving_average"]
    metrics = json.loads((config.output_dir / "metrics.json").read_text())
    curve = metrics["interpolation"]
    assert curve["amount"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert curve["drift"][0] == pytest.approx(1.0) and curve["drift"] == sorted(curve["drift"], reverse=True)
    assert curve["l1"][0] == pytest.approx(metrics["mean"]["l1_before"])
    assert curve["l1"][-1] < curve["l1"][2] < curve["l1"][0]
    assert curve["l1"][3] < metrics["mean"]["l1_after"] < curve["l1"][2]  # 0.6 lies between 0.5 and 0.75
    report = (config.output_dir / "report.html").read_text()
    assert "How much of the student" in report and "--average-only" in report and "assembly=&#34;tuned" in report


def test_a_finished_folder_is_averaged_anew_by_the_command(make_scene, make_config, teacher_weights, caplog):
    config = make_config(make_scene(), interpolate=0.6, steps=3, half=True)
    distil(config)
    student, original = weights_of(config, "student.safetensors"), load_file(teacher_weights)
    again = make_config(average_only=config.output_dir, interpolate=0.2, original_weights=teacher_weights)
    distil(again)  # names no scenes
    assert "0.2 x student + 0.8 x original" in caplog.text
    wanted = interpolate(student, original, 0.2)
    assert hash_state_dict(weights_of(config)) == hash_state_dict(wanted)
    half = weights_of(config, "backbone_fp16.safetensors")
    assert all(torch.equal(half[name], tensor.half()) for name, tensor in wanted.items())
    assert card_of(config)["interpolate"] == 0.2 and card_of(config)["steps"] == 3
    with pytest.raises(UserError, match="--interpolate 7: give a number from 0"):
        distil(make_config(average_only=config.output_dir, interpolate=7))


def test_a_training_killed_before_its_average_resumes_to_the_same(make_scene, make_config, tmp_path, monkeypatch):
    folder = make_scene()
    whole = make_config(folder, interpolate=0.6, output_dir=tmp_path / "whole")
    distil(whole)
    killed = make_config(folder, interpolate=0.6, output_dir=tmp_path / "killed")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(session_module, "interpolate", die)
        with pytest.raises(KeyboardInterrupt):
            distil(killed)
    assert not (killed.output_dir / "backbone.safetensors").exists()
    killed.resume = True
    distil(killed)
    for name in ("backbone.safetensors", "student.safetensors"):
        assert hash_state_dict(weights_of(whole, name)) == hash_state_dict(weights_of(killed, name))


@pytest.fixture
def second_round(make_scene, make_config, tmp_path):
    """A first round's result, and a scene whose features come from it."""
    first = make_config(make_scene("first"), interpolate=0.6, output_dir=tmp_path / "first")
    distil(first)
    spec = BackboneSpec("test_vit", first.output_dir / "backbone.safetensors")
    return first, make_scene("second", spec=spec)


def test_the_next_round_starts_from_the_original_and_is_averaged_with_it(
    second_round, make_config, teacher_weights, caplog
):
    first, folder = second_round
    config = make_config(folder, original_weights=teacher_weights, interpolate=0.5, steps=3)
    distil(config)
    assert "teacher is itself a student of test_vit" in caplog.text
    card, original = card_of(config), load_file(teacher_weights)
    assert card["teacher"]["weights_sha256"] == card_of(first)["weights_sha256"]
    assert card["start_sha256"] == card["student"]["weights_sha256"] == hash_state_dict(original)
    student = weights_of(config, "student.safetensors")
    assert hash_state_dict(weights_of(config)) == hash_state_dict(interpolate(student, original, 0.5))
    assert "a further round" in (config.output_dir / "report.html").read_text()
    both = load(config.output_dir, "concat", backbone_weights=teacher_weights)  # the original of the first round
    assert both.original is not None


def test_the_next_round_may_start_from_the_teacher(second_round, make_config, teacher_weights):
    first, folder = second_round
    config = make_config(folder, original_weights=teacher_weights, start_from="teacher", interpolate=0.5, steps=1)
    scenes = open_scenes([folder], None)
    start = load_student(config, scenes, torch.device("cpu"))
    assert start.identity["weights_sha256"] == card_of(first)["weights_sha256"]
    original = load_original(config, scenes, start, torch.device("cpu"))
    assert original.identity["weights_sha256"] == hash_state_dict(load_file(teacher_weights))
    distil(config)
    card = card_of(config)
    assert card["start_sha256"] == card_of(first)["weights_sha256"] != card["student"]["weights_sha256"]
    averaged = interpolate(weights_of(config, "student.safetensors"), load_file(teacher_weights), 0.5)
    assert hash_state_dict(weights_of(config)) == hash_state_dict(averaged)


def test_another_original_is_refused(second_round, make_config):
    first, folder = second_round
    other = first.output_dir / "student.safetensors"
    with pytest.raises(UserError, match="does not hold the weights.*teacher was fine-tuned from.*--original-weights"):
        distil(make_config(folder, original_weights=other, steps=1))


def test_another_students_input_is_normalised_as_its_teachers(make_scene, make_config, teacher_weights):
    spec = BackboneSpec("test_vit", teacher_weights, normalization="imagenet")
    scenes = open_scenes([make_scene(spec=spec)], None)
    own = BackboneSpec("test_vit", teacher_weights)
    for student in (None, "test_vit"):
        config = make_config(student=student, student_weights=teacher_weights)
        loaded = load_student(config, scenes, torch.device("cpu"))
        assert loaded.info.mean == (0.485, 0.456, 0.406)
    from fit3d_ns.backbones import describe_backbone

    assert describe_backbone(own).mean != (0.485, 0.456, 0.406)
