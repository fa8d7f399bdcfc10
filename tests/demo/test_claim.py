"""What the whole project claims, with real weights: 3D brings agreement between views to a room never seen before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from fit3d_ns.backbones import BackboneSpec, weights_available


@pytest.mark.slow
def test_students_of_lifted_features_find_points_again_in_an_unseen_room_and_the_control_does_not(tmp_path):
    """Three rooms are distilled, a fourth is probed; the control is trained alike on targets without 3D."""
    if not weights_available(BackboneSpec("dinov2_small_focus")):
        pytest.skip("needs the weights of dinov2_small_focus, which make setup brings")
    folder = Path(os.environ.get("FIT3D_CLAIM_DIR") or tmp_path / "demo")  # to look at the report afterwards
    command = [sys.executable, "-m", "demo", "--output-dir", str(folder), "--backbone", "dinov2_small_focus"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((folder / "metrics.json").read_text())["correspondence"]["rows"]
    original, tuned, control = (
        rows[name]["recall_in_photo_pixels"]["10px"] for name in ("original", "tuned", "control")
    )
    assert tuned > original + 0.05
    assert control < original + 0.02
