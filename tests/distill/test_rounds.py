"""Two rounds by hand, as a user would go: distil, lift with the result as teacher, distil again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from distill.cli import distil
from fit3d_ns.backbones import hash_state_dict
from fit3d_ns.commands.lift.cli import LiftCommand, run_lift
from fit3d_ns.runs.checkpoints import find_checkpoint, read_extra_state
from fit3d_ns.support.errors import UserError


def lift(**fields) -> list[Path]:
    return run_lift(LiftCommand(**fields))


@pytest.fixture
def first(run, make_config, tmp_path):
    """The first round's result."""
    config = make_config(runs=(run,), recipe="auto", steps=3, output_dir=tmp_path / "first")
    distil(config)
    return config.output_dir


def test_the_averaged_student_teaches_the_next_round(run, first, make_config, teacher_weights, tmp_path, caplog):
    card = json.loads((first / "card.json").read_text())
    (next(run.rglob("config.yml")).parent / "lift.json").write_text("{}")  # as where it was lifted while training
    with pytest.raises(UserError, match="No finished run.*has features of its teacher since it was trained"):
        lift(runs=run)
    (lifted,) = lift(runs=run, backbone_weights=first)
    assert lifted.parent.name == f"{card['student']['name']}-{card['weights_sha256'][:8]}"
    identity = read_extra_state(find_checkpoint(lifted))["teacher_identity"]
    assert identity["weights_sha256"] == card["weights_sha256"]
    assert {name: identity[name] for name in ("layer", "norm", "mean")} == {
        name: card["student"][name] for name in ("layer", "norm", "mean")
    }
    assert lift(runs=run, backbone_weights=first) == [lifted]  # done already, and its own output is no source
    assert {path.parent for path in run.rglob("config.yml")} == {lifted.parent, lifted.parents[3]}
    config = make_config(
        runs=(run,), recipe="auto", steps=3, original_weights=teacher_weights, output_dir=tmp_path / "second"
    )
    names = f"test_vit, {lifted.parent.name}"
    with pytest.raises(UserError, match=rf"features of several teachers \({names}\): pick one with --teacher"):
        distil(config)
    caplog.clear()
    distil(replace(config, teacher=lifted.parent.name))
    assert "itself a student of test_vit.r160_in1k: the next one starts from test_vit.r160_in1k itself" in caplog.text
    second = json.loads((config.output_dir / "card.json").read_text())
    assert second["teacher"]["weights_sha256"] == card["weights_sha256"]
    assert second["start_sha256"] == second["student"]["weights_sha256"] == card["student"]["weights_sha256"]
    assert second["student"]["weights_sha256"] == hash_state_dict(load_file(teacher_weights))


def test_runs_are_picked_by_their_teacher(run, first, make_config, teacher_weights, tmp_path):
    lift(runs=run, backbone_weights=first)
    results = {}
    for teacher in ("test_vit", str(first)):
        config = make_config(
            runs=(run,), teacher=teacher, bundles_only=True, bundle_dir=tmp_path / f"bundles{len(results)}"
        )
        distil(config)
        (bundle,) = (tmp_path / f"bundles{len(results)}").iterdir()
        results[teacher] = json.loads((bundle / "scene.json").read_text())["info"]
    assert results["test_vit"]["teacher_original"] is None
    original = results[str(first)]["teacher_original"]
    assert original["weights_sha256"] == results["test_vit"]["teacher"]["weights_sha256"]
    with pytest.raises(UserError, match="No finished run of fit3d-splat.*features of .*test_vit.*--teacher clip_base"):
        distil(make_config(runs=(run,), teacher="clip_base", bundles_only=True))


def test_flags_that_contradict_the_card_are_refused(run, first, tmp_path):
    for flags, sentence in (
        ({"backbone_layer": 2}, "^--backbone-layer 2: the card of .*first says 5; leave --backbone-layer out"),
        ({"backbone": "dinov2_small"}, "^--backbone dinov2_small: the card of .*first says test_vit"),
        ({"backbone_norm": False}, "^--backbone-norm False: the card of .*first says True"),
        ({"backbone_normalization": "imagenet"}, "^--backbone-normalization imagenet: the card"),
    ):
        with pytest.raises(UserError, match=sentence):
            lift(runs=run, backbone_weights=first, **flags)
    lift(runs=run, backbone_weights=first, backbone="test_vit", backbone_layer=-1, name="mine")  # says the same
    assert any(path.name == "mine" for path in run.rglob("*"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="holds 0 .safetensors files: name one with --backbone-weights"):
        lift(runs=run, backbone_weights=tmp_path / "nothing")
    weights = load_file(first / "student.safetensors")
    (first / "backbone.safetensors").unlink()
    from safetensors.torch import save_file

    save_file(weights, first / "backbone.safetensors")
    with pytest.raises(UserError, match="do not belong together"):
        lift(runs=run, backbone_weights=first)
