"""What the documentation shows is true: commands parse, flags and sentences exist, each command is tested or marked.

To parse is to be read by the real command-line configuration. Tested means that `RUN_BY` names a test that runs that
program in that way; marked means that the line before the block says what it takes that a test cannot have, as in
``<!-- needs: a GPU -->``.
"""

import ast
import re
import shlex
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import tyro
from documentation import PAGES, ROOT, Command, commands
from flag_tables import MARKER, read_flags

_PROBES = "tests/probe/test_probe_run.py::test_"
RUN_BY = {
    "make": ".ci/run",
    "make demo": "tests/demo/test_demo.py::test_the_page_tells_the_whole_story",
    "ns-train fit3d-splat": "tests/fit3d_ns/commands/test_commands.py::test_killed_run_resumes_to_the_same_result",
    "ns-train fit3d-splat --load-dir": (
        "tests/fit3d_ns/commands/test_commands.py::test_killed_run_resumes_to_the_same_result"
    ),
    "ns-train fit3d-splat --pipeline.model.features": (
        "tests/fit3d_ns/commands/test_lifting_runs.py::test_training_with_lifted_features"
    ),
    "ns-train fit3d-splat --pipeline.model.init-from": (
        "tests/fit3d_ns/test_training.py::test_init_from_freezes_geometry_and_trains_features"
    ),
    "ns-viewer": "tests/fit3d_ns/commands/test_commands.py::test_viewer_opens_the_run_without_waking_the_teacher",
    "ns-eval": "tests/fit3d_ns/commands/test_commands.py::test_eval_from_another_directory",
    "ns-render dataset": "tests/fit3d_ns/commands/test_commands.py::test_render_from_another_directory",
    "ns-export gaussian-splat": "tests/fit3d_ns/commands/test_commands.py::test_export_from_another_directory",
    "fit3d-lift --load-config": (
        "tests/fit3d_ns/commands/test_lifting_runs.py::test_splatfacto_run_becomes_a_run_like_a_trained_one"
    ),
    "fit3d-lift --runs": "tests/fit3d_ns/commands/test_lifting_runs.py::test_all_runs_below_a_folder",
    "fit3d-lift --ply": "tests/fit3d_ns/commands/test_lifting_ply.py::test_ply_in_either_coordinates",
    "fit3d": "tests/fit3d_loop/test_loop.py::test_a_killed_driver_goes_on_to_the_same_student",
    "fit3d-distill --runs": "tests/demo/test_demo.py::test_the_page_tells_the_whole_story",
    "fit3d-distill --runs --resume": "tests/demo/test_demo.py::test_a_killed_demo_goes_on_where_it_was",
    "fit3d-distill --runs --targets": "tests/demo/test_demo.py::test_the_page_tells_the_whole_story",
    "fit3d-distill --average-only": (
        "tests/distill/results/test_averaged_results.py::test_a_finished_folder_is_averaged_anew_by_the_command"
    ),
    "fit3d-distill --runs --teacher": "tests/distill/test_rounds.py::test_runs_are_picked_by_their_teacher",
    "fit3d-lift --runs --backbone-weights": (
        "tests/distill/test_rounds.py::test_the_averaged_student_teaches_the_next_round"
    ),
    "fit3d-distill --bundles": "tests/distill/test_distill_training.py::test_a_student_learns_what_the_scenes_show",
    "fit3d-distill --runs --bundles-only": (
        "tests/distill/test_runs.py::test_runs_become_bundles_and_bundles_a_backbone"
    ),
    "fit3d-probe segmentation --dataset": _PROBES + "fast_segmentation_learns_and_reports",
    "fit3d-probe depth --dataset": _PROBES + "depth_runs_both_protocols",
    "fit3d-probe normals --dataset": "tests/probe/test_probe_run.py::test_normals_are_probed_on_a_room",
    "fit3d-probe retrieval --dataset": "tests/probe/test_probe_matching.py::test_retrieval_command_finds_colours",
    "fit3d-probe correspondence": "tests/probe/test_probe_matching.py::test_correspondence_command",
    "fit3d-export": "tests/fit3d_ns/commands/test_exporting.py::test_bundle_feature_maps_and_video_along_a_path",
    "fit3d-rooms": "tests/fit3d_rooms/test_rooms.py::test_finished_rooms_are_kept",
    "torchrun -m distill": "tests/distill/test_distributed.py::test_two_processes_equal_one",
}
"""Programs with the subcommands and flags that make another command of them, and the test that runs that."""
OF_THE_SHELL = {"cd", "echo", "export", "source", "wait"}


def _mentioned(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][\w.-]*\w", text, re.IGNORECASE))


@cache
def _configurations() -> dict[str, Any]:
    """What tyro reads each program's arguments into."""
    from nerfstudio.configs.method_configs import AnnotatedBaseConfigUnion
    from nerfstudio.scripts.eval import ComputePSNR
    from nerfstudio.scripts.exporter import Commands as ExportCommands
    from nerfstudio.scripts.process_data import Commands as ProcessCommands
    from nerfstudio.scripts.render import Commands as RenderCommands
    from nerfstudio.scripts.viewer.run_viewer import RunViewer

    from benchmarks.evidence.config import EvidenceConfig
    from benchmarks.evidence.figure import EvidenceFigure
    from benchmarks.faults.harness import FaultsConfig
    from benchmarks.loop import PackingConfig
    from benchmarks.many_scenes import ManyScenesConfig
    from benchmarks.photo_memory import Benchmark as PhotoMemory
    from demo.config import DemoConfig
    from distill.config import DistillConfig
    from fit3d_loop.config import LoopConfig
    from fit3d_ns.commands.export.cli import ExportCommand
    from fit3d_ns.commands.lift.cli import LiftCommand
    from fit3d_rooms.cli import RoomsConfig
    from probe.config import Command as ProbeCommand

    return {
        "ns-train": AnnotatedBaseConfigUnion,
        "ns-eval": ComputePSNR,
        "ns-export": tyro.conf.FlagConversionOff[ExportCommands],  # type: ignore[valid-type]
        "ns-process-data": ProcessCommands,
        "ns-render": tyro.conf.FlagConversionOff[RenderCommands],  # type: ignore[valid-type]
        "ns-viewer": tyro.conf.FlagConversionOff[RunViewer],
        "fit3d": LoopConfig,
        "fit3d-distill": DistillConfig,
        "fit3d-export": ExportCommand,
        "fit3d-lift": LiftCommand,
        "fit3d-probe": ProbeCommand,
        "fit3d-rooms": RoomsConfig,
        "demo": DemoConfig,
        "benchmarks.evidence": EvidenceConfig,
        "benchmarks.faults": FaultsConfig,
        "benchmarks.loop": PackingConfig,
        "benchmarks.many_scenes": ManyScenesConfig,
        "benchmarks.photo_memory": PhotoMemory,
        "benchmarks.evidence.figure": EvidenceFigure,
    }


def _read(program: str, arguments: list[str], show: bool = False) -> Any:
    return tyro.cli(_configurations()[program], prog=program, args=arguments, console_outputs=show)


def _check_make(arguments: list[str]) -> None:
    for target in (word for word in arguments if "=" not in word):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def _check_script(path: str, arguments: list[str]) -> None:
    """The script is there and has fields or arguments of these names."""
    names = {name for name in re.findall(r"\w+", (ROOT / path).read_text())}
    for flag in arguments:
        assert not flag.startswith("--") or flag[2:].replace("-", "_") in names, flag


def _check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        _check_module(arguments[1], arguments[2:])
    elif arguments[0] != "poses.py":  # which the page itself contains
        _check_script(arguments[0], arguments[1:])


def _check_module(module: str, arguments: list[str]) -> None:
    _read({"distill": "fit3d-distill", "probe.cli": "fit3d-probe"}.get(module, module), arguments)


def _check_torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    chosen = get_args_parser().parse_args([word.replace("$SLURM_JOB_ID", "1") for word in arguments])
    check = _check_module if chosen.module else _check_script
    check(chosen.training_script, chosen.training_script_args)


def _check_pytest(arguments: list[str]) -> None:
    for path in (word for word in arguments if word.startswith("tests")):
        assert (ROOT / path).exists(), path


CHECKS: dict[str, Callable[[list[str]], Any]] = {
    "make": _check_make,
    "pytest": _check_pytest,
    "python": _check_python,
    "torchrun": _check_torchrun,
}
NOT_OURS = {"pip", "sudo", "ls", "sed", "ray", "srun"}
"""Programs whose arguments nobody checks here; they need a marker all the same."""


def _shown() -> list[Command]:
    return [command for command in commands() if command.words[0] not in OF_THE_SHELL]


def test_every_page_with_commands_is_read():
    """A block that the reader overlooks would be checked by nobody."""
    shown = {shlex.join(command.words) for command in _shown()}
    assert "ns-train fit3d-splat --data path/to/scene" in shown, "fenced"
    assert "fit3d-distill --runs lifts/k1 --steps 140 --seed 1 --output-dir distilled/k1" in shown, "indented"
    assert any("--camera-path camera_path.json" in line and "--no-splat" in line for line in shown), "on two lines"
    assert {command.page for command in _shown()} >= {"README.md", "docs/lifting.md", "docs/commands/probe.md"}


@pytest.fixture
def all_programs_installed(tmp_path, monkeypatch):
    """ns-process-data leaves at once where FFmpeg or COLMAP are missing; `make setup` installs neither.

    It also makes its output folder while it reads its arguments.
    """
    monkeypatch.chdir(tmp_path)
    from nerfstudio.utils import install_checks

    for name in ("check_ffmpeg_installed", "check_colmap_installed"):
        monkeypatch.setattr(install_checks, name, lambda *_: None)


@pytest.mark.parametrize("page", sorted({command.page for command in _shown()}))
@pytest.mark.usefixtures("all_programs_installed")
def test_commands_parse(page):
    programs = set(_configurations()) | set(CHECKS) | NOT_OURS
    for command in _shown():
        program, *arguments = command.words
        if command.page != page or (command.needs and program not in programs):
            continue
        assert program in programs, f"{command}: which program is this?"
        if program in NOT_OURS:
            continue
        check = CHECKS.get(program, partial(_read, program))
        try:
            check(arguments)
        except SystemExit as error:
            pytest.fail(f"{command}: the command line refuses this ({error})")


def test_commands_are_tested_or_marked():
    for command in _shown():
        if command.needs is None:
            words = set(command.words)
            found = [key for key in RUN_BY if key.split()[0] == command.words[0] and set(key.split()) <= words]
            assert found, f"{command}: name the test that runs it in RUN_BY, or put a marker before its block"


@pytest.mark.parametrize("command", RUN_BY)
def test_the_tests_named_are_there(command):
    path, _, name = RUN_BY[command].partition("::")
    tree = (ROOT / path).read_text()
    assert not name or name in {node.name for node in ast.walk(ast.parse(tree)) if isinstance(node, ast.FunctionDef)}


@cache
def _flags_of(program: str, *subcommand: str) -> set[str]:
    """Every flag in a program's help."""
    from contextlib import redirect_stdout
    from io import StringIO

    text = StringIO()
    with redirect_stdout(text), pytest.raises(SystemExit):
        _read(program, [*subcommand, "--help"], show=True)
    return _mentioned(text.getvalue())


TABLES = {
    "fit3d": [("fit3d",)],
    "train": [("ns-train", "fit3d-splat")],
    "lift": [("fit3d-lift",)],
    "distill": [("fit3d-distill",)],
    "probe": [("fit3d-probe", kind) for kind in ("segmentation", "depth", "normals", "retrieval", "correspondence")],
    "export": [("fit3d-export",)],
    "rooms": [("fit3d-rooms",)],
}


@pytest.mark.parametrize("page", TABLES)
def test_flag_tables_are_those_of_the_commands(page, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = (ROOT / "docs" / "commands" / f"{page}.md").read_text()
    shown = [flag for match in MARKER.finditer(text) for flag in read_flags(match[1], match[2], match[3] or "--")]
    names = {flag.name for flag in shown if flag.name.startswith("--")}
    known = set().union(*(_flags_of(*program) for program in TABLES[page]))
    assert names <= known
    if page != "train":  # which has all of splatfacto's as well
        positive = {flag.replace("--no-", "--") for flag in names}
        assert known - names - positive - {flag.replace("--", "--no-") for flag in positive} == {"--help"}


def test_flags_in_the_text_exist(monkeypatch):
    """Flags in the pages' running text and tables, which no command line checks."""
    monkeypatch.setenv("COLUMNS", "300")
    known = set().union(*(_flags_of(*program) for programs in TABLES.values() for program in programs))
    for program in (
        ("ns-train", "splatfacto"),
        ("ns-process-data", "images"),
        ("demo",),
        ("benchmarks.evidence",),
        ("benchmarks.faults",),
    ):
        known |= _flags_of(*program)
    for dataparser in ("nerfstudio-data", "colmap"):
        known |= _flags_of("ns-train", "fit3d-splat", dataparser)
    known |= {
        "--nproc-per-node",
        "--find-links",
        "--no-index",
    }
    known |= {flag for command in _shown() for flag in command.words}
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", page.read_text()):
            whole = re.sub(r"--[\w.-]+[.-](?!\w)", "", code)  # without the beginnings of flags
            unknown = _mentioned(whole) - known
            assert not unknown, f"{page.name}: `{code}`"


def _sentences() -> list[str]:
    """Every string of the program, with … in the place of what is put in at run time."""
    found = []
    for package in ("fit3d_ns", "fit3d_rooms", "distill", "probe", "fit3d_loop"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_error_messages_are_those_of_the_program():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^`(.+)`\n\n:   ", text, re.MULTILINE)
    assert len(messages) > 30
    sentences = _sentences()
    for message in messages:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(sentence) for sentence in sentences), message


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"`((?:docs|setup|benchmarks|tests|fit3d_ns)/[\w./-]+)`", text):
        assert Path(ROOT / target).exists(), target
