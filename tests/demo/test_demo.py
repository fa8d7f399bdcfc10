"""The demo as a user starts it: killed, finished, started again; its page and its numbers."""

import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT, TINY_ROOM

from demo.config import DemoConfig
from demo.run import run_demo
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.json_files import read_record
from fit3d_rooms.dataset import RoomSettings, write_index

RUN = "loop/geometry/room_000/fit3d-splat/geometry"
SETTINGS = RoomSettings(seed=3, views=16, width=96, height=72)


def start(folder: Path, weights: Path, *more: str) -> subprocess.Popen:
    """Starts a tiny demo: one room lifted, one held out."""
    words = [sys.executable, "-m", "demo", "--output-dir", str(folder), "--rooms", "1", "--seed", str(SETTINGS.seed)]
    words += ["--views", str(SETTINGS.views), "--width", str(SETTINGS.width), "--height", str(SETTINGS.height)]
    words += ["--backbone", "test_vit", "--backbone-weights", str(weights), "--splat-steps", "40"]
    words += ["--distill-steps", "60", *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "FIT3D_CACHE": str(folder / "cache"), "COLUMNS": "200"}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def kill_when(process: subprocess.Popen, folder: Path, pattern: str) -> str:
    """Kills the demo as soon as a file is there."""
    until = time.monotonic() + 900
    while not any(folder.glob(pattern)) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output[-3000:]
    return output


def modified(folder: Path) -> dict[str, int]:
    """When each file below a folder was written."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def tables(page: str) -> list[list[str]]:
    """All rows of all tables of a page, as text."""
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]


@pytest.fixture(scope="module")
def demo(tmp_path_factory, teacher_weights):
    """A demo that was killed while it trained a splat, and came to its end when it was started again."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    shutil.copytree(TINY_ROOM, folder / "rooms" / "room_000")  # a finished room of these settings
    write_index(folder / "rooms", SETTINGS)
    killed = kill_when(start(folder, teacher_weights), folder, f"{RUN}/nerfstudio_models/step-*.ckpt")
    files = modified(folder / "rooms")
    process = start(folder, teacher_weights)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-3000:]
    return {"folder": folder, "killed": killed, "output": output, "rooms": files}


def test_a_killed_demo_goes_on_where_it_was(demo):
    folder = demo["folder"]
    assert "Make 2 rooms (" in demo["killed"] and "Make 2 rooms: done before" in demo["output"]
    now = modified(folder / "rooms")
    assert {name: now[name] for name in demo["rooms"]} == demo["rooms"]
    log = re.sub(r"\s", "", (folder / "loop/logs/room_000-geometry.log").read_text())  # lines are wrapped
    assert re.search(r"DoneloadingNerfstudiocheckpointfrom\S*step-0000000[123]\d\.ckpt", log)
    records = [
        json.loads(path.read_text()) for path in [*folder.glob("steps/*.json"), *folder.glob("loop/steps/*.json")]
    ]
    assert len(records) == 8 and all(one["seconds"] > 0 and one["cpu_seconds"] > 0 for one in records)
    checkpoints = [path.name for path in (folder / RUN / "nerfstudio_models").iterdir()]
    assert checkpoints == ["step-000000039.ckpt"]


def test_the_page_tells_the_whole_story(demo):
    page = (demo["folder"] / "report.html").read_text()
    headings = [html.unescape(text) for text in re.findall(r"<h2>(.*?)</h2>", page)]
    assert headings == [
        "In short: the held-out room",
        "1. Photos",
        "2. Features lifted into splats",
        "3. Distillation",
        "4. The held-out room through the backbones",
        "5. Probe: segmentation",
        "6. Probe: depth",
        "Do it yourself",
    ]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    for name, count in {"teacher": 2, "lifted": 2, "truth": 6, "original": 10, "tuned": 10, "control": 4}.items():
        assert captions.count(name) == count, name
    assert page.count("<svg") == 1
    assert "95 % interval" in page and "owed to 3D" in page


def test_numbers_of_the_page_are_those_of_the_files(demo):
    folder = demo["folder"]
    rows = tables((folder / "report.html").read_text())
    found = json.loads((folder / "correspondence/metrics.json").read_text())["rows"]
    for kind, metric in (("segmentation", "miou"), ("depth", "rmse")):
        metrics = json.loads((folder / f"loop/probes/{kind}/metrics.json").read_text())["rows"]
        assert list(metrics) == ["original", "tuned", "concat", "control", "control_concat"]
        for name, values in metrics.items():
            cell = f"{values[metric]['mean']:.4f}"
            matching = [row for row in rows if row[0] == name and cell in row]
            assert len(matching) == 2, (kind, name)  # in short, and in the probe's own table
            if name in found:
                assert f"{found[name]['recall_in_photo_pixels']['10px']:.4g}" in matching[0]
        differences = json.loads((folder / f"loop/probes/{kind}/metrics.json").read_text())["differences"]
        assert {("tuned", "original"), ("tuned", "control")} <= {(one["row"], one["baseline"]) for one in differences}
        for one in differences:
            gain = one["value"] if kind == "segmentation" else -one["value"]
            assert any(row[1:4] == [one["row"], one["baseline"], f"{gain:+.4f}"] for row in rows)
    together = json.loads((folder / "metrics.json").read_text())
    assert together["depth"] == read_record(folder / "loop/probes/depth/metrics.json")
    scores = json.loads((folder / "eval/room_000/eval.json").read_text())["results"]
    lift = json.loads((folder / RUN / "lift.json").read_text())
    expected = [str(lift["gaussians"]), *(f"{scores[name]:.4g}" for name in ("psnr", "ssim", "feature_cosine"))]
    assert any(row[:5] == ["room_000", *expected] for row in rows)
    for name, place in (("tuned", "loop/rounds/1"), ("control", "loop/controls/control")):
        mean = json.loads((folder / place / "metrics.json").read_text())["mean"]
        assert any(
            row[:3] == [f"{name}, after", f"{mean['l1_after']:.4g}", f"{mean['cosine_after']:.4g}"] for row in rows
        )


def test_the_commands_of_the_page_can_be_typed(demo):
    folder = demo["folder"]
    commands = [html.unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", (folder / "report.html").read_text())]
    names = [command.split()[0] for command in commands]
    assert names == [
        *("fit3d", "fit3d-rooms", "fit3d-distill", "fit3d-distill", "fit3d-probe", "fit3d-probe"),
        *("ns-eval", "fit3d-probe", ".venv/bin/ns-viewer"),
    ]
    metrics = folder / "loop/probes/depth/metrics.json"
    before = json.loads(metrics.read_text())
    assert before["command"] == commands[5]
    environment = {**os.environ, "FIT3D_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    for command, module in ((commands[5], "probe.cli"), (commands[0], "fit3d_loop")):
        words = [sys.executable, "-m", module, *shlex.split(command)[1:]]
        subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=900)
    assert json.loads(metrics.read_text())["rows"] == before["rows"]


def test_a_finished_demo_does_nothing_again(demo, teacher_weights):
    folder = demo["folder"]
    before = {**modified(folder / "steps"), **modified(folder / "loop" / "steps")}
    output, _ = start(folder, teacher_weights).communicate(timeout=900)
    assert output.count("done before") == 5
    assert {**modified(folder / "steps"), **modified(folder / "loop" / "steps")} == before


def test_a_folder_of_another_demo_is_refused(demo):
    config = DemoConfig(output_dir=demo["folder"], rooms=1, splat_steps=41)
    with pytest.raises(UserError, match="was begun with .* instead of .*: go on with the same"):
        run_demo(config)
