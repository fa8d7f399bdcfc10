"""Averaging a student with its original: weights in memory, and a finished result folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fit3d_ns.backbones import BackboneSpec, backbone_identity, hash_state_dict, load, load_backbone
from fit3d_ns.backbones.students.averaging import average_result, interpolate
from fit3d_ns.backbones.students.result_folder import write_weights
from fit3d_ns.support.errors import UserError

TINY_TEACHER = "test_vit"


def _state_dicts() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    student = {
        "weight": torch.randn(5, 3, generator=generator),
        "half": torch.randn(4, generator=generator).half(),
        "double": torch.randn(4, generator=generator).double(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
    }
    original = {name: tensor + 1 if tensor.is_floating_point() else tensor * 0 for name, tensor in student.items()}
    original["weight"][0, 0] = -0.0  # lost by arithmetic: 0 * x + -0. is +0.
    student["weight"][1, 1] = -0.0
    return student, original


@pytest.mark.parametrize("amount", [0, 0.0, 1, 1.0])
def test_ends_are_original_and_student_bit_for_bit(amount):
    student, original = _state_dicts()
    averaged = interpolate(student, original, amount)
    wanted = student if amount == 1 else original
    assert hash_state_dict(averaged) == hash_state_dict(wanted)
    averaged["weight"].zero_()  # copies: nobody's weights change
    assert hash_state_dict(wanted) != hash_state_dict(averaged)


@pytest.mark.parametrize("amount", [0.25, 0.6])
def test_every_tensor_is_averaged_in_fp32(amount):
    student, original = _state_dicts()
    averaged = interpolate(student, original, amount)
    assert list(averaged) == list(student)
    for name, tensor in averaged.items():
        assert tensor.dtype == student[name].dtype
        if tensor.is_floating_point():
            exact = amount * student[name].double() + (1 - amount) * original[name].double()
            rounding = torch.finfo(tensor.dtype).eps * 4
            torch.testing.assert_close(tensor.double(), exact, rtol=rounding, atol=rounding)
        else:
            assert torch.equal(tensor, student[name])


def test_weights_that_training_left_alone_stay_bit_for_bit():
    student, _ = _state_dicts()
    assert hash_state_dict(interpolate(student, student, 0.6)) == hash_state_dict(student)


@pytest.mark.parametrize("amount", [-0.1, 1.01, float("nan"), float("inf")])
def test_an_amount_outside_0_to_1_is_refused(amount, tmp_path):
    student, original = _state_dicts()
    with pytest.raises(UserError, match="--interpolate .*: give a number from 0"):
        interpolate(student, original, amount)
    with pytest.raises(UserError, match="--interpolate .*: give a number from 0"):
        average_result(tmp_path, amount)


def test_another_architecture_is_refused():
    student, original = _state_dicts()
    for broken, difference in (
        ({**original, "more": torch.ones(1)}, "'more' is only in the original"),
        ({name: tensor for name, tensor in original.items() if name != "half"}, "'half' is only in the student"),
        ({**original, "weight": torch.ones(5, 4)}, r"'weight' has shape \(5, 3\) and \(5, 4\)"),
    ):
        with pytest.raises(UserError, match=f"different architectures.*{difference}"):
            interpolate(student, broken, 0.5)


@pytest.fixture
def result(tmp_path, teacher_weights, monkeypatch):
    """A finished training's folder as an earlier version wrote it, with its student, original and card."""
    monkeypatch.setenv("FIT3D_CACHE", str(tmp_path / "cache"))
    spec = BackboneSpec(TINY_TEACHER, teacher_weights)
    original = load_backbone(spec, "cpu").model.state_dict()
    student = {name: tensor + 0.1 for name, tensor in original.items()}
    folder = tmp_path / "result"
    folder.mkdir()
    save_file(student, folder / "backbone.safetensors")
    card = {"student": backbone_identity(spec), "weights_sha256": hash_state_dict(student), "steps": 3}
    (folder / "card.json").write_text(json.dumps(card))
    return folder, student, original


def _card(folder) -> dict:
    return json.loads((folder / "card.json").read_text())


def test_a_finished_folder_is_averaged_again_and_again(result, teacher_weights):
    folder, student, original = result
    for amount in (0.6, 0.25, 0.0):
        files = average_result(folder, amount, teacher_weights)
        wanted = ["backbone.safetensors", "student.safetensors", "config.json", "card.json", "README.md"]
        assert [path.name for path in files] == wanted
        wanted = interpolate(student, original, amount)
        assert hash_state_dict(load_file(folder / "backbone.safetensors")) == hash_state_dict(wanted)
        assert hash_state_dict(load_file(folder / "student.safetensors")) == hash_state_dict(student)
        card = _card(folder)
        assert card["interpolate"] == amount and card["steps"] == 3 and card["assembly"] == "tuned"
        assert card["weights_sha256"] == hash_state_dict(wanted)
        assert card["student_sha256"] == hash_state_dict(student)
    average_result(folder, 1.0, teacher_weights)
    assert hash_state_dict(load_file(folder / "backbone.safetensors")) == hash_state_dict(student)
    assert not (folder / "student.safetensors").exists() and _card(folder)["assembly"] == "concat"
    average_result(folder, 0.5, teacher_weights)
    assert hash_state_dict(load_file(folder / "student.safetensors")) == hash_state_dict(student)


def test_the_card_says_how_a_result_is_used(result, teacher_weights, tmp_path):
    folder, _, _ = result
    assert load(folder, backbone_weights=teacher_weights).assembly == "concat"  # as its card's version did
    average_result(folder, 0.6, teacher_weights)
    assert load(folder).assembly == "tuned"
    assert load(folder, "concat", backbone_weights=teacher_weights).assembly == "concat"
    before = load(folder / "student.safetensors", backbone_weights=teacher_weights)
    assert before.assembly == "concat" and before.tuned is not None
    assert before.tuned.identity["weights_sha256"] == _card(folder)["student_sha256"]
    changed = {**_card(folder), "assembly": "sideways"}
    (folder / "card.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="card.json is damaged.*its checksum differs"):
        load(folder)
    del changed["checksum"]  # as cards of earlier versions are
    (folder / "card.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="card.json is damaged.*sideways"):
        load(folder)


def test_other_layouts_follow(result, teacher_weights):
    folder, student, original = result
    card = {"student": _card(folder)["student"]}
    write_weights(folder, student, student, card, half=True, dinov2_layout=False)
    average_result(folder, 0.5, teacher_weights)
    half = load_file(folder / "backbone_fp16.safetensors")
    for name, tensor in interpolate(student, original, 0.5).items():
        torch.testing.assert_close(half[name], tensor.half())


@pytest.mark.parametrize("killed_before", ["backbone.safetensors", "card.json"])
def test_a_killed_average_can_be_made_again(result, teacher_weights, monkeypatch, killed_before):
    folder, student, original = result
    from fit3d_ns.backbones.students import result_folder

    def die(path, *_):
        raise KeyboardInterrupt

    if killed_before == "card.json":
        monkeypatch.setattr(result_folder, "write_record", die)
    else:
        save = result_folder.save_file
        monkeypatch.setattr(
            result_folder, "save_file", lambda tensors, path: (die if "backbone" in path.name else save)(tensors, path)
        )
    with pytest.raises(KeyboardInterrupt):
        average_result(folder, 0.6, teacher_weights)
    monkeypatch.undo()
    monkeypatch.setenv("FIT3D_CACHE", str(folder.parent / "cache"))
    average_result(folder, 0.6, teacher_weights)
    wanted = interpolate(student, original, 0.6)
    assert hash_state_dict(load_file(folder / "backbone.safetensors")) == hash_state_dict(wanted)
    assert hash_state_dict(load_file(folder / "student.safetensors")) == hash_state_dict(student)
    assert not list(folder.glob(".*.tmp"))


def test_what_does_not_belong_together_is_refused_and_nothing_is_written(result, teacher_weights, tmp_path):
    folder, student, _ = result
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = tmp_path / "other.safetensors"
    save_file({name: tensor + 1 for name, tensor in student.items()}, other)
    with pytest.raises(
        UserError, match="other.safetensors does not hold the weights.*hashes differ.*--original-weights"
    ):
        average_result(folder, 0.5, other)
    with pytest.raises(UserError, match="There is no folder .*nowhere"):
        average_result(tmp_path / "nowhere", 0.5)
    with pytest.raises(UserError, match="holds no card.json"):
        average_result(tmp_path, 0.5)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_file({name: tensor + 2 for name, tensor in student.items()}, folder / "backbone.safetensors")
    with pytest.raises(UserError, match="does not hold the student that its card.json describes"):
        average_result(folder, 0.5, teacher_weights)
    (folder / "card.json").write_text("{")
    with pytest.raises(UserError, match="card.json is damaged"):
        average_result(folder, 0.5, teacher_weights)
