"""The demo's stages without the long work: what is run, what is skipped, what is refused."""

import json
from pathlib import Path

import pytest

from demo.cli import run_demo
from demo.config import DemoConfig, complete
from demo.results import comparisons
from demo.runner import hold, run_stages
from demo.stages import Stage, stages
from fit3d_ns.support.errors import UserError

BACKBONE = "dinov2_small_focus"


def test_sizes_suit_the_machine():
    small, large = complete(DemoConfig(), cuda=False), complete(DemoConfig(), cuda=True)
    assert small.splat_steps and large.splat_steps and small.splat_steps < large.splat_steps
    assert complete(DemoConfig(views=8), cuda=True).views == 8


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"rooms": 5}, "--rooms 5 is too large"),
        ({"rooms": 0}, "--rooms 0 is too small"),
        ({"views": 2}, "--views 2 is too small"),
        ({"width": 20}, "--width 20 is out of range"),
        ({"backbone": "nosuch"}, "--backbone nosuch: neither fit3d-ns nor timm"),
        ({"backbone_weights": Path("nosuch.pth")}, "no file nosuch.pth: check --backbone-weights"),
    ],
)
def test_bad_choices_leave_nothing_that_a_next_start_would_meet(tmp_path, choice, words):
    with pytest.raises(UserError, match=words):
        run_demo(DemoConfig(output_dir=tmp_path / "out", **choice))
    assert not (tmp_path / "out" / "demo.json").exists()


def test_without_a_control_nothing_asks_for_one():
    config = complete(DemoConfig(backbone=BACKBONE, control=False), cuda=False)
    words = [word for stage in stages(config, cuda=False) for word in stage.command]
    assert "--tuned" in words and "--control" not in words and "control" not in words


def test_paths_with_spaces_stay_whole(tmp_path, monkeypatch):
    (tmp_path / "w w.pth").touch()
    monkeypatch.chdir(tmp_path)
    chosen = DemoConfig(output_dir=Path("my demo"), backbone=BACKBONE, backbone_weights=Path("w w.pth"))
    config = complete(chosen, cuda=False)
    for stage in stages(config, cuda=False):
        assert any(word.startswith("my demo/") for word in stage.command)
        assert not any(word in ("my", "w", "w.pth") for word in stage.command)


def test_only_the_same_command_counts_as_done(tmp_path, capsys):
    # A command that refuses to run tells whether it was run.
    stage = Stage("rooms", "Make rooms", ("fit3d-rooms", str(tmp_path / "rooms"), "--views", "1"), 1.0)
    record = {"command": [*stage.command, "--seed", "7"], "seconds": 2.0, "cpu_seconds": 3.0, "resumed": False}
    path = tmp_path / "stages" / "rooms.json"
    path.parent.mkdir()
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="ended with the error above: fit3d-rooms .*--views 1"):
        run_stages(tmp_path, [stage])
    assert "--views 1 is too few" in capsys.readouterr().err
    path.write_text(json.dumps({**record, "command": list(stage.command)}))
    (done,) = run_stages(tmp_path, [stage])
    assert (done.seconds, done.cpu_seconds) == (2.0, 3.0)


def test_a_command_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(UserError, match="fit3d-nothing is not installed"):
        run_stages(tmp_path, [Stage("none", "None", ("fit3d-nothing",), 1.0)])


def test_two_demos_do_not_share_a_folder(tmp_path):
    with hold(tmp_path / "out"):
        with pytest.raises(UserError, match="Another demo is at work"):
            hold(tmp_path / "out")
    hold(tmp_path / "out").release()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used"):
        hold(tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("higher_is_better", "low", "high", "verdict"),
    [
        (True, 0.01, 0.05, "better"),
        (True, -0.01, 0.05, "not told apart"),
        (True, -0.05, -0.01, "worse"),
        (False, 0.01, 0.05, "worse"),
        (False, -0.05, -0.01, "better"),
    ],
)
def test_only_an_interval_without_zero_is_a_difference(higher_is_better, low, high, verdict):
    value = (low + high) / 2
    difference = {"row": "tuned", "baseline": "original", "value": value, "low": low, "high": high}
    (comparison,) = comparisons([difference], higher_is_better)
    assert comparison.verdict == verdict and comparison.low < comparison.gain < comparison.high
    assert comparison.gain == pytest.approx(value if higher_is_better else -value)
