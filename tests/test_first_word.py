"""A command answers at once: `--help` imports nothing heavy, what is slow to import waits for the work that needs it.

What is imported is counted, not the time that it takes, which depends on what else a machine does.
"""

import subprocess
import sys

import pytest
from paths import DATA

HEAVY = (
    "nerfstudio",
    "open3d",
    "matplotlib",
    "sklearn",
    "scipy",
    "torchvision",
    "torchmetrics",
    "timm",
    "numba",
    "gsplat",
)
COMMANDS = {
    "fit3d": "fit3d_loop.cli",
    "fit3d-distill": "distill.cli",
    "fit3d-probe": "probe.cli",
    "fit3d-lift": "fit3d_ns.commands.lift.cli",
    "fit3d-export": "fit3d_ns.commands.export.cli",
    "fit3d-rooms": "fit3d_rooms.cli",
}
FIRST_LINE = {  # what a command says first where no run has to be opened, by its arguments
    "fit3d-distill": (["--bundles", ".", "--output-dir", "out", "--device", "cpu"], "Distillation into out"),
    "fit3d-probe": (["segmentation", "--data", "nowhere", "--output-dir", "out"], "Segmentation on nowhere"),
    "fit3d-lift": (["--ply", "splat.ply", "--data", "scene"], "Lifting onto splat.ply"),
    "fit3d-export": (["--load-config", "run/config.yml", "--output-dir", "out"], "Exporting run/config.yml to out"),
    "fit3d": ([".", "--plan", "--output-dir", "out"], "Scenes of . into out"),
}


def imported_by(module: str, arguments: list[str], stop_at: str, cwd) -> set[str]:
    """Runs a command up to the line that begins with ``stop_at`` (or its end); returns what it had imported by then."""
    program = f"""
import logging, sys
from importlib import import_module
class Stop(logging.Handler):
    def emit(self, record):
        if {stop_at!r} and record.getMessage().startswith({stop_at!r}):
            raise SystemExit(0)
for package in ("fit3d_ns", "distill", "probe", "fit3d_loop"):
    logging.getLogger(package).addHandler(Stop())
sys.argv = ["command", *{arguments!r}]
ended = None
try:
    import_module({module!r}).main()
except SystemExit as end:
    ended = end.code
print("ended", ended)
print("imported", *sorted({{name.split(".")[0] for name in sys.modules}}))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd, timeout=300, check=False
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines[-2] in ("ended 0", "ended None"), result.stdout + result.stderr
    if not stop_at:
        assert "usage:" in result.stdout or "in all, about" in result.stdout
    return set(lines[-1].split()[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(command, tmp_path):
    subcommand = [[], ["depth"]] if command == "fit3d-probe" else [[]]
    for words in subcommand:
        imported = imported_by(COMMANDS[command], [*words, "--help"], "", tmp_path)
        assert imported.isdisjoint((*HEAVY, "torch", "numpy")), imported & {*HEAVY, "torch", "numpy"}


@pytest.mark.parametrize("command", FIRST_LINE)
def test_the_first_line_of_work_waits_for_torch_at_most(command, tmp_path):
    arguments, line = FIRST_LINE[command]
    (tmp_path / "scene.json").touch()  # of a bundle, which is opened after that line
    imported = imported_by(COMMANDS[command], arguments, line, tmp_path)
    assert imported.isdisjoint(HEAVY), imported & {*HEAVY}


def test_a_plan_imports_what_describes_the_backbone_and_nothing_that_works(tmp_path):
    words = [str(DATA), "--plan", "--output-dir", "out", "--backbone", "dinov2_small"]  # a scene and a trained run
    imported = imported_by(COMMANDS["fit3d"], words, "", tmp_path)
    allowed = {"timm", "torchvision"}  # which timm imports
    assert imported.isdisjoint({*HEAVY} - allowed), imported & ({*HEAVY} - allowed)


@pytest.mark.parametrize("module", ["distill.session", "fit3d_ns.backbones.dense_features"])
def test_work_on_bundles_imports_nothing_of_stage_one(module, tmp_path):
    program = f"import sys, {module}; print(*sorted(set(name.split('.')[0] for name in sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert set(result.stdout.split()).isdisjoint((*HEAVY,)), set(result.stdout.split()) & {*HEAVY}
