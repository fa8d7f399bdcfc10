"""A sample of the faults, drawn by a seed: none of them ends in a wrong result, a traceback or code from a file."""

import json
import os
import subprocess
import sys

from paths import ROOT


def test_a_sample_of_faults_ends_well(tmp_path):
    output = tmp_path / "faults.json"
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.faults", "--seed", "11", "--jobs", "2"]
    counts = ["--damages", "28", "--kills", "8", "--limits", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    places = ["--output", str(output), "--folder", str(tmp_path / "worlds")]
    ended = subprocess.run(
        [*program, *counts, *places],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=900,
        check=False,
    )
    assert output.is_file(), ended.stdout[-3000:] + ended.stderr[-3000:]
    cases = json.loads(output.read_text())["cases"]
    bad = [case for case in cases if not case["good"]]
    assert not bad, json.dumps(bad, indent=1)
    assert sum(case["what"] == "damage" for case in cases) == 28 and sum(case["what"] == "kill" for case in cases) == 8
