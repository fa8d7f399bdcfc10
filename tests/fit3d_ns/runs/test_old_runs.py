"""A run that version 0.1.0 trained: every command opens it, and sees what that version saw."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from paths import DATA

OLD_RUN = DATA / "run_0.1.0"


@pytest.fixture
def old_run(tmp_path, teacher_weights) -> Path:
    """The run as that version left it, its absolute paths those of this test; returns its config.yml."""
    scene = Path(shutil.copytree(DATA / "tiny_room", tmp_path / "tiny_room"))
    shutil.copy(OLD_RUN / "sparse_pc.ply", scene)
    shutil.copy(teacher_weights, tmp_path / "tiny.safetensors")
    run = tmp_path / "outputs" / "tiny_room" / "fit3d-splat" / "run"
    shutil.copytree(OLD_RUN / "nerfstudio_models", run / "nerfstudio_models")
    shutil.copy(OLD_RUN / "dataparser_transforms.json", run)

    def here(match: re.Match) -> str:
        return "".join(f"{match[1]}- {json.dumps(part)}\n" for part in tmp_path.parts)

    text, count = re.subn(r"^( *)- /\n\1- data\n", here, (OLD_RUN / "config.yml").read_text(), flags=re.MULTILINE)
    assert count == 3, "scene, outputs and weights"
    (run / "config.yml").write_text(text)
    return run / "config.yml"


def test_eval_measures_what_it_measured(old_run, tmp_path):
    from nerfstudio.scripts.eval import ComputePSNR

    ComputePSNR(load_config=old_run, output_path=tmp_path / "metrics.json").main()
    measured = json.loads((tmp_path / "metrics.json").read_text())["results"]
    for name, value in json.loads((OLD_RUN / "metrics.json").read_text()).items():
        assert measured[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_it_is_lifted_anew(old_run):
    from fit3d_ns.commands.lift.cli import main

    main(["--load-config", str(old_run)])
    (lifted,) = (old_run.parent / "lifts" / "fit3d-splat").iterdir()
    assert (lifted / "config.yml").exists()
    assert json.loads((lifted / "lift.json").read_text())["training_views"] == 12


def test_it_becomes_a_bundle(old_run, tmp_path, monkeypatch):
    from distill.cli import main
    from fit3d_ns.runs.bundle import find_bundles

    arguments = ["--runs", str(old_run.parent), "--bundle-dir", str(tmp_path / "bundles"), "--bundles-only"]
    monkeypatch.setattr(sys, "argv", ["fit3d-distill", *arguments])
    main()
    assert len(find_bundles([tmp_path / "bundles"])) == 1


def test_it_is_exported(old_run, tmp_path):
    from fit3d_ns.commands.export.cli import main

    main(["--load-config", str(old_run), "--output-dir", str(tmp_path / "exports"), "--no-video"])
    assert (tmp_path / "exports" / "splat.ply").stat().st_size > 120 * 50
