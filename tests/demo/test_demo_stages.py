"""The demo's choices without the long work: what is run, what is refused."""

from pathlib import Path

import pytest
import tyro

from demo.config import DemoConfig, complete
from demo.results import comparisons
from demo.run import run_demo
from demo.stages import after_the_loop, as_typed, before_the_loop, loop_config, places, write_scene_list
from fit3d_loop.config import LoopConfig
from fit3d_loop.records import Places, try_lock
from fit3d_loop.scenes.scene_list import read_scenes
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
        ({"width": 0}, "--width 0 is out of range"),
        ({"height": 0}, "--height 0 is out of range"),
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
    words = [word for step in after_the_loop(config) for word in step.words]
    assert "--tuned" in words and "--control" not in words
    assert loop_config(config, cuda=False).controls == ()


def test_paths_with_spaces_stay_whole(tmp_path, monkeypatch):
    (tmp_path / "w w.pth").touch()
    monkeypatch.chdir(tmp_path)
    chosen = DemoConfig(output_dir=Path("my demo"), backbone=BACKBONE, backbone_weights=Path("w w.pth"))
    config = complete(chosen, cuda=False)
    steps = [before_the_loop(config).words, *(step.words for step in after_the_loop(config))]
    for words in [*steps, as_typed(loop_config(config, cuda=False))]:
        assert any("my demo/" in word for word in words)
        assert not any(word in ("my", "w", "w.pth") for word in words)


def test_the_loop_is_shown_as_it_can_be_typed():
    config = loop_config(complete(DemoConfig(backbone=BACKBONE), cuda=False), cuda=False)
    words = as_typed(config)
    assert words[0] == "fit3d" and tyro.cli(LoopConfig, args=list(words[1:])) == config


def test_held_out_views_are_those_of_the_list(tmp_path):
    config = complete(DemoConfig(output_dir=tmp_path, backbone=BACKBONE, rooms=2), cuda=False)
    for room in places(config).lifted_rooms:
        room.mkdir(parents=True)
        (room / "transforms.json").touch()
    scenes, _ = read_scenes(write_scene_list(config))
    assert [scene.name for scene in scenes] == ["room_000", "room_001"]
    assert scenes[0].parser == ("nerfstudio-data", "--eval-mode", "interval", "--eval-interval", "5")


def test_two_demos_do_not_share_a_folder(tmp_path):
    out = tmp_path / "out"
    with try_lock(Places(out).lock("demo")):
        with pytest.raises(UserError, match="Another demo is at work"):
            run_demo(DemoConfig(output_dir=out, backbone=BACKBONE))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be used"):
        run_demo(DemoConfig(output_dir=tmp_path / "file" / "out", backbone=BACKBONE))


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
