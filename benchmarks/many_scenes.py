"""Many tiny scenes, some of them broken, a driver that is killed: is the student the same, and is anything left over?

    python -m benchmarks.many_scenes --scenes 200 --kills 5 --output benchmarks/results/many_scenes.json

`fit3d` runs twice over the same scenes: undisturbed, and killed with SIGKILL at moments drawn from the seed.
"""

import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import tyro

from fit3d_ns.support.command_line import run_command
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_write_json

SCENES_A_ROOM = 40


@dataclass
class ManyScenesConfig:
    """Runs `fit3d` over many tiny scenes, undisturbed and killed."""

    scenes: int = 200
    """Cut from procedural rooms, the broken ones among them."""
    views: int = 8
    """Photos of each."""
    width: int = 112
    """Of a photo, in pixels; three quarters of it high."""
    steps: int = 30
    """Of geometry."""
    distill_steps: int = 100
    """Of the student."""
    kills: int = 5
    """Of the driver."""
    backbone: str = "dinov2_small_focus"
    """Teacher."""
    engine: str = "processes"
    """Of the run that is killed; the other one is run by processes."""
    at_once: int = 2
    """Scenes side by side."""
    seed: int = 0
    """Of rooms and kills."""
    work_dir: Path | None = None
    """Where everything goes, and stays; a temporary folder if not given."""
    output: Path = Path("outputs/many_scenes.json")
    """Raw numbers."""


def main(config: ManyScenesConfig) -> None:
    """Makes the rooms, runs both loops and writes what was seen.

    Args:
        config: The user's choices.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = config.work_dir or Path(temporary)
        scenes = root / "scenes"
        if not scenes.exists():
            _make_scenes(config, scenes)
        found: dict[str, Any] = {"config": {**asdict(config), "work_dir": None, "output": None}}
        for name, kills, engine in (("undisturbed", 0, "processes"), ("killed", config.kills, config.engine)):
            found[name] = _loop(config, scenes, root / name, kills, engine)
            atomic_write_json(config.output, found)
        found["same_student"] = found["killed"]["student"] == found["undisturbed"]["student"]
        atomic_write_json(config.output, found)
        print(json.dumps({key: value for key, value in found["killed"].items() if key != "memory"}, indent=2))
        print("The same student." if found["same_student"] else "ANOTHER STUDENT.")


def _make_scenes(config: ManyScenesConfig, folder: Path) -> None:
    """Cuts a few rooms, whose light takes half a minute each, into scenes of neighbouring views."""
    rooms, whole = folder.with_name("rooms"), config.views * SCENES_A_ROOM
    count = -(-config.scenes // SCENES_A_ROOM)
    words = ["--scenes", count, "--views", whole, "--width", config.width, "--height", config.width * 3 // 4]
    subprocess.run(["fit3d-rooms", str(rooms), *map(str, words), "--seed", str(config.seed)], check=True)
    made = []
    for number in range(config.scenes):
        room, start = rooms / f"room_{number // SCENES_A_ROOM:03d}", number % SCENES_A_ROOM * config.views
        made.append(folder / f"scene_{number:04d}")
        content = json.loads((room / "transforms.json").read_text())
        content["frames"] = [_cut_out(frame) for frame in content["frames"][start : start + config.views]]
        (made[-1] / "images").mkdir(parents=True)
        for frame in content["frames"]:
            shutil.copy(room / frame["file_path"], made[-1] / frame["file_path"])
        shutil.copy(room / content["ply_file_path"], made[-1])
        (made[-1] / "transforms.json").write_text(json.dumps(content))
    for break_scene, scene in zip(BREAKS, made[:: max(1, len(made) // len(BREAKS))], strict=False):
        break_scene(scene)


def _cut_out(frame: dict[str, Any]) -> dict[str, Any]:
    return {name: frame[name] for name in ("file_path", "transform_matrix")}


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(room: Path) -> None:
        path = room / "transforms.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def _photo(room: Path) -> Path:
    return room / json.loads((room / "transforms.json").read_text())["frames"][3]["file_path"]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BREAKS: tuple[Callable[[Path], Any], ...] = (
    lambda room: _photo(room).unlink(),
    lambda room: _cut(_photo(room)),
    lambda room: _cut(room / "transforms.json"),
    _edit(lambda content: content["frames"][2]["transform_matrix"][0].__setitem__(3, float("nan"))),
    _edit(lambda content: content["frames"].clear()),
    _edit(lambda content: content.update(camera_model="SQUARE")),
    _edit(lambda content: content.update(fl_x=0.0)),
    _edit(lambda content: content["frames"][1].pop("transform_matrix")),
    _edit(lambda content: [frame.update(mask_path="masks/none.png") for frame in content["frames"]]),
    _edit(lambda content: content.update(ply_file_path="none.ply")),
)
"""Ten ways to break a scene."""


def _loop(config: ManyScenesConfig, scenes: Path, out: Path, kills: int, engine: str) -> dict[str, Any]:
    """Runs the loop until it ends by itself, killing it at so many moments."""
    words = [sys.executable, "-m", "fit3d_loop", scenes, "--output-dir", out, "--backbone", config.backbone]
    words += ["--rounds", 1, "--geometry-steps", config.steps, "--engine", engine, "--threads", 1]
    words += ["--scenes-at-once", config.at_once, f"--distill-flags=--steps {config.distill_steps}"]
    words += ["--allow-failures", len(BREAKS)]
    dice = random.Random(config.seed)
    # The last moment is while the student is trained; the others fall while scenes are worked on.
    moments: list[float] = sorted(dice.uniform(0.02, 0.98) for _ in range(kills - 1)) + [1.0] * (kills > 0)
    memory: list[dict[str, float]] = []
    begin, killed = time.perf_counter(), []
    while True:
        log = (out.parent / f"{out.name}.log").open("ab")
        driver = psutil.Popen(list(map(str, words)), stdout=log, stderr=log)
        while driver.poll() is None:
            done = len(list((out / "scenes").glob("*.json"))) / config.scenes
            training = bool(list(out.glob("rounds/1/checkpoint*")))
            memory.append({"second": round(time.perf_counter() - begin, 1), "done": done, **_memory(driver)})
            if moments and done >= moments[0] and (moments[0] < 1.0 or training):
                driver.send_signal(9)
                driver.wait()
                killed.append({"scenes_done": done, "training": training})
                moments.pop(0)
                break
            time.sleep(1.0)
        else:
            break
    if driver.returncode != 0:
        raise UserError(f"The loop ended with status {driver.returncode}, see {out}.log.")
    metrics = json.loads((out / "metrics.json").read_text())
    return {
        "student": hashlib.sha256((out / "backbone.safetensors").read_bytes()).hexdigest(),
        "seconds": round(time.perf_counter() - begin, 1),
        "kills": killed,
        "failures": {name: one["sentence"].replace(str(scenes), "SCENES") for name, one in metrics["failures"].items()},
        "tracebacks": sum(len(re.findall("^Traceback", path.read_text(), re.M)) for path in out.glob("logs/*.log")),
        "left_over": sorted(str(path.relative_to(out)) for path in _left_over(out)),
        "files": sum(path.is_file() for path in out.rglob("*")),
        "megabytes": round(sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6, 1),
        "driver_megabytes": _by_progress(memory, "driver"),
        "all_processes_megabytes": _by_progress(memory, "all"),
        "memory": memory,
    }


def _memory(driver: psutil.Process) -> dict[str, float]:
    """Megabytes that the driver and all that it started hold alone (shared pages once for each sharer's part)."""
    held = {}
    try:
        for process in [driver, *driver.children(recursive=True)]:
            try:
                held[process.pid] = process.memory_full_info().pss / 1e6
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return {"driver": round(held.get(driver.pid, 0.0), 1), "all": round(sum(held.values()), 1)}


def _by_progress(memory: list[dict[str, float]], name: str) -> list[float]:
    """Peaks over each fifth of the scenes."""
    fifths = ([one[name] for one in memory if fifth / 5 <= one["done"] < (fifth + 1) / 5] for fifth in range(5))
    return [max(values, default=0.0) for values in fifths]


def _left_over(out: Path) -> list[Path]:
    """Temporary files, and what a finished loop has no use for."""
    found = [path for path in out.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".checkpoint-")]
    wasted = [path for name in ("bundles", "teacher_maps", "running") for path in (out / name).rglob("*")]
    checkpoints = list(out.glob("rounds/*/checkpoint*"))
    return found + checkpoints + [path for path in wasted if path.is_file()]


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(ManyScenesConfig)))
