"""The harness that damages, kills and starves the commands: it sees every reader, and a sample of it ends well."""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from paths import ROOT

from benchmarks.faults.commands import Command
from benchmarks.faults.damage import Case, all_cases, judge
from benchmarks.faults.harness import FaultsConfig, recorded
from benchmarks.faults.kinds import NotApplicable
from benchmarks.faults.mutations import ANY, FORMATS, apply, mutations_of
from benchmarks.faults.reading import one_of_each_kind
from benchmarks.faults.world import World
from fit3d_ns.support.errors import UserError

READERS = {
    "open": "open(path).read()",
    "Path.read_bytes": "path.read_bytes()",
    "os.open": "os.close(os.open(path, os.O_RDONLY))",
    "safe_open": "import safetensors; safetensors.safe_open(path, framework='pt').__enter__()",
    "load_file": "from safetensors.torch import load_file; load_file(path)",
    "read_tensors": "from fit3d_ns.support.tensor_files import read_tensors; read_tensors(path, checksum=False)",
    "torch.load": "import torch; torch.load(path)",
    "numpy.load": "import numpy; numpy.load(path)",
    "Pillow": "from PIL import Image; Image.open(path)",
    "plyfile": "from plyfile import PlyData; PlyData.read(path)",
    "COLMAP": "from nerfstudio.data.utils.colmap_parsing_utils import read_cameras_binary as read; read(path)",
}
NEEDED = {
    "train": "transforms.json sparse_pc.ply frame_#.png teacher.safetensors",
    "colmap": "cameras.bin images.bin points#D.bin",
    "colmap-text": "cameras.txt images.txt points#D.txt",
    "resume": "config.yml dataparser_transforms.json step-#.ckpt #.safetensors",
    "init": "dataparser_transforms.json step-#.ckpt",
    "eval": "config.yml step-#.ckpt #.safetensors",
    "eval-lift": "config.yml step-#.ckpt lift.safetensors",
    "lift": "config.yml step-#.ckpt lift.json lift.safetensors",
    "ply": "splat.ply transforms.json lift.safetensors",
    "bundle": "config.yml scene.json scene.safetensors",
    "export": "config.yml step-#.ckpt camera_path.json export.json",
    "export-lift": "config.yml lift.safetensors step-#.ckpt",
    "distill": "scene.json scene.safetensors step-#.pt #.safetensors teacher.safetensors",
    "validate": "scene.json scene.safetensors step-#.pt",
    "average": "card.json student.safetensors probes.json metrics.json",
    "probe": "backbone.safetensors card.json features_#.safetensors index.json question.json original.safetensors",
    "depth": "#.png original.sums.safetensors",
    "fast": "seed_#.json index.json",
    "retrieval": "names.txt #.png card.json",
    "correspondence": "transforms.json frame_#.png",
    "rooms": "rooms.json room.json",
    "fit3d": "scenes.yaml loop.json one.json student#.json card.json metrics.json",
    "fit3d-runs": "scenes.txt config.yml splat.ply card.json metrics.json cameras.txt images.txt",
}
"""Names of files, digits as #, that a command must be seen to read; the harness finds them by itself."""


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_of_a_file_goes_unseen(tmp_path, reader):
    """Whether or not it can read what is there."""
    (tmp_path / "file").write_bytes(b"nothing")
    program = f"""
import os
from contextlib import suppress
from pathlib import Path
import safetensors.torch, fit3d_ns.support.tensor_files
from benchmarks.faults.reading import watch_reads
watch_reads(Path({str(tmp_path)!r}), Path({str(tmp_path)!r}).with_suffix('.log'))
path = Path({str(tmp_path / "file")!r})
with suppress(Exception):
    {READERS[reader]}
open(Path({str(tmp_path)!r}) / 'written', 'w').close()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, capture_output=True)
    assert set(tmp_path.with_suffix(".log").read_text().splitlines()) == {"file"}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_damage_changes_a_file_or_does_not_apply(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("FIT3D_FAULTS_MARKER", str(tmp_path / "marker"))
    whole, applied = _whole_file(tmp_path / f"whole{suffix}"), set()
    for kind in mutations_of(whole):
        path = tmp_path / f"file{suffix}"
        path.write_bytes(whole.read_bytes())
        for seed in range(5):
            try:
                apply(kind, path, random.Random(seed))
            except NotApplicable:
                assert path.read_bytes() == whole.read_bytes()
                continue
            applied.add(kind)
            break
        assert path.is_dir() or path.is_symlink() or not path.exists() or path.read_bytes() != whole.read_bytes()
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    assert applied == set(mutations_of(whole)) >= set(ANY)


def _whole_file(path: Path) -> Path:
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    content = {"a": {"b": 1.5, "word": "x"}, "list": [1, 2, 3], "flag": True, "count": 7}
    if path.suffix == ".safetensors":
        save_file({"a": torch.ones(2, 3), "b": torch.ones(4, 2)}, path)
    elif path.suffix in (".pt", ".pth", ".ckpt"):
        torch.save({"pipeline": {"x": torch.ones(4), "y": torch.ones(2, 2)}, "step": 3}, path)
    elif path.suffix == ".png":
        Image.new("RGB", (8, 8)).save(path)
    elif path.suffix == ".ply":
        data = ROOT / "tests" / "data" / "tiny_room" / "sparse_pc.ply"
        path.write_bytes(data.read_bytes())
    elif path.suffix in (".yml", ".yaml"):
        path.write_text("name: word\nnumber: 3\nitems:\n- a\nflag: true\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_text("first 1 2 3\nsecond 4.5 x y\n" * 20)
    return path


def _command_with_a_log(world: World) -> Callable[[], None]:
    """Refuses, as ``fit3d`` does, a folder that holds anything but a result; writes a log under ever another name."""
    folder = world.root / "f"

    def call() -> None:
        json.loads((world.root / "cache" / "input.json").read_text())
        if any(folder.glob("geometry/*")) and not (folder / "result.json").is_file():
            raise UserError("f holds files of another command (geometry): choose another --output-dir.")
        (folder / "geometry").mkdir(parents=True, exist_ok=True)
        (folder / "geometry" / f"events.{time.time_ns()}").touch()
        (folder / "geometry" / f"latest.{time.time_ns()}").symlink_to("nowhere")
        (folder / "result.json").write_text("1")

    return call


def test_a_second_start_from_nothing_finds_nothing_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("FIT3D_CACHE", "")
    monkeypatch.setenv("FIT3D_FAULTS_MARKER", "")
    world = World(tmp_path / "worlds")
    (world.root / "cache").mkdir()
    (world.root / "cache" / "input.json").write_text(json.dumps({"a": 1}))
    call = _command_with_a_log(world)
    world.make("logger", call)
    world.keep()
    expected = {"f/result.json": 1}
    command = Command("logger", call, ("f/result.json",), first=(expected, 0.1), second=expected)
    for anew, damage in ((True, "[]"), (False, "a number"), (True, "null")):
        verdict = judge(world, command, Case("logger", "cache/input.json", damage, anew, 0))
        assert verdict is not None and verdict.end == "equal", verdict


def test_the_seed_decides_the_cases_whatever_hashes_names_hold(tmp_path):
    orders = []
    for number, hashes in enumerate((("0" * 32, "f" * 32), ("f" * 32, "0" * 32))):
        root = tmp_path / str(number)
        files = [Path("cache") / one / name for one, name in zip(hashes, ("maps.json", "index.json"))]
        for path in files:
            (root / path).parent.mkdir(parents=True)
            (root / path).write_text("{}")
        command = Command("lift", print, ("o/*",), inputs=tuple(one_of_each_kind(files)))
        orders.append([case.key for case in all_cases([command], root, seed=5)])
    assert orders[0] == orders[1] and len(set(orders[0])) == len(orders[0]) > 20


def test_a_stopped_harness_goes_on_after_the_last_whole_line(tmp_path):
    config = FaultsConfig(output=tmp_path / "faults.json")
    whole = [{"what": "kill", "number": 0, "good": True, "seed": 0}, {"what": "kill", "number": 1, "good": False}]
    broken = {"what": "harness", "good": False, "text": "full disk"}
    torn = json.dumps({"what": "damage", "text": "ends with }", "good": True})[: -len(', "good": true}') - 1]
    assert torn.endswith("}")
    config.log.write_text("".join(json.dumps(record) + "\n" for record in (*whole, broken)) + torn)
    assert recorded(config) == whole
    assert [json.loads(line) for line in config.log.read_text().splitlines()] == whole  # what comes next is appended
    assert recorded(replace(config, again=True)) == whole[:1]


def test_a_harness_that_came_to_its_end_runs_again_what_ended_badly(tmp_path):
    config = FaultsConfig(output=tmp_path / "faults.json")
    cases = [{"what": "kill", "number": 0, "good": True, "seed": 0}, {"what": "kill", "number": 1, "good": False}]
    config.output.write_text(json.dumps({"cases": cases}))
    assert recorded(config) == [], "another start is another run"
    assert recorded(replace(config, again=True)) == cases[:1]
    assert [json.loads(line) for line in config.log.read_text().splitlines()] == cases[:1]


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("faults")
    worlds = Path(
        tempfile.mkdtemp(prefix="fit3d-faults-")
    )  # pytest's folders are root's alone; one case is another user
    worlds.chmod(0o755)
    program = [sys.executable, "-W", "ignore", "-m", "benchmarks.faults", "--seed", "11", "--jobs", "1"]
    counts = ["--damages", "28", "--kills", "8", "--limits", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    places = ["--output", str(folder / "faults.json"), "--folder", str(worlds / "worlds")]
    ended = subprocess.run(
        [*program, *counts, *places],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=1800,
        check=False,
    )
    shutil.rmtree(worlds, ignore_errors=True)
    assert (folder / "faults.json").is_file(), ended.stdout[-3000:] + ended.stderr[-3000:]
    return json.loads((folder / "faults.json").read_text())


def test_every_file_that_a_command_reads_is_damaged(sample):
    seen = {command: {name for _, name in kinds} for command, kinds in sample["reads"].items()}
    assert seen.keys() == NEEDED.keys() | {"bundle-colmap"}
    missing = {command: set(names.split()) - seen[command] for command, names in NEEDED.items()}
    assert not any(missing.values()), {command: names for command, names in missing.items() if names}
    formats = {*FORMATS, ".md"}  # what people read has no format: it is damaged as any file is
    unknown = {name for names in seen.values() for name in names if Path(name).suffix not in formats}
    assert not unknown


def test_a_sample_of_faults_ends_well(sample):
    cases = sample["cases"]
    bad = [case for case in cases if not case["good"]]
    assert not bad, json.dumps(bad, indent=1)
    assert sum(case["what"] == "damage" for case in cases) == 28 and sum(case["what"] == "kill" for case in cases) == 8
