"""From a trained run to a fine-tuned backbone, as a user would go."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from distill.cli import distil
from fit3d_ns.support.errors import UserError


def test_runs_become_bundles_and_bundles_a_backbone(run, make_config, tmp_path, caplog):
    bundles = tmp_path / "bundles"
    distil(make_config(runs=(run,), bundle_dir=bundles, bundles_only=True))
    assert "Scene 1/1 room: bundle made in" in caplog.text
    assert [path.name for path in bundles.iterdir()] == ["room-run"]
    assert not (tmp_path / "out").exists()
    distil(make_config(runs=(run,), bundle_dir=bundles, steps=3, output_dir=tmp_path / "from-runs"))
    assert "bundle found in" in caplog.text
    for path in [*run.rglob("config.yml"), *run.rglob("step-*.ckpt")]:
        path.unlink()
    distil(make_config(bundles, steps=3, output_dir=tmp_path / "from-bundles"))
    hashes = [
        json.loads((tmp_path / name / "card.json").read_text())["weights_sha256"]
        for name in ("from-runs", "from-bundles")
    ]
    assert hashes[0] == hashes[1]


def test_a_scene_that_is_gone_or_broken_is_named_with_this_commands_flags(run, tmp_path, make_config):
    room = (tmp_path / "room").rename(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    for root, sentence in (
        (None, "room is missing: .*--data-root"),
        ("empty", "empty is empty: name the folder that holds the scene"),
    ):
        config = make_config(runs=(run,), data_root=root and tmp_path / root, bundles_only=True)
        with pytest.raises(UserError, match=sentence) as error:
            distil(config)
        assert "--data," not in str(error.value) and "\n" not in str(error.value)
    photo = next((room / "images").iterdir())
    photo.write_bytes(photo.read_bytes()[:200])
    with pytest.raises(UserError, match=f"{photo.name}"):
        distil(make_config(runs=(run,), data_root=room, bundles_only=True))


def test_bundles_of_runs_of_one_name_do_not_replace_each_other(run, tmp_path, make_config, caplog):
    other = Path(shutil.copytree(run, tmp_path / "other" / "outputs"))
    config = next(other.rglob("config.yml"))
    config.write_text(re.sub("( *)- room\n", r"\1- twin\n\1- room\n", config.read_text()))  # another scene called room
    shutil.copytree(tmp_path / "room", tmp_path / "twin" / "room")
    bundles = tmp_path / "bundles"
    distil(make_config(runs=(run, other), bundle_dir=bundles, bundles_only=True))
    distil(make_config(runs=(other, run), bundle_dir=bundles, bundles_only=True))
    assert sorted(path.name for path in bundles.iterdir()) == ["room-run", "room-run-2"]
    assert caplog.text.count("bundle found in") == 2
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    next(run.rglob("config.yml")).unlink()
    distil(make_config(runs=(moved,), bundle_dir=bundles, bundles_only=True))
    assert len(list(bundles.iterdir())) == 2  # the bundle of a run that moved is made anew in its place


def test_a_run_that_was_never_lifted_is_refused(run, make_config):
    checkpoint = next(run.rglob("step-*.ckpt"))
    state = torch.load(checkpoint, weights_only=True)
    state["pipeline"]["_model.gauss_params.fit3d_features"].zero_()
    torch.save(state, checkpoint)
    with pytest.raises(UserError, match="features of the scene room are all zero: it was never lifted; run fit3d-lift"):
        distil(make_config(runs=(run,)))
