"""Configurations of other people's runs: read whole, and never executed."""

import os
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from fit3d_ns.runs import config_reader
from fit3d_ns.runs.config_reader import parse_configuration, read_config
from fit3d_ns.support.errors import UserError


@pytest.fixture
def saved(scene, make_config, monkeypatch, tmp_path):
    """A configuration saved by nerfstudio itself, with the paths given to it."""

    def save(**fields):
        config = make_config(scene)
        config.timestamp, config.experiment_name = "run", "scene"
        for name, value in fields.items():
            setattr(config, name, value)
        folder = tmp_path / "outputs" / "scene" / "fit3d-splat" / "run"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yml").write_text(yaml.dump(config))
        return folder / "config.yml"

    return save


class _OfPaths(yaml.Dumper):
    """Writes paths as text: from Python 3.13 on they remember the pieces that they were made of."""


_OfPaths.add_multi_representer(Path, lambda dumper, path: dumper.represent_str(str(path)))


def test_equals_what_nerfstudio_reads(saved):
    path = saved()
    read, loaded = read_config(path), yaml.load(path.read_text(), Loader=yaml.Loader)
    assert read == loaded and yaml.dump(read, Dumper=_OfPaths) == yaml.dump(loaded, Dumper=_OfPaths)


def test_every_field_is_there_in_a_file_of_an_older_version(saved):
    path = saved()
    lines = path.read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if "LiftSettings" in line)
    indent = len(lines[start]) - len(lines[start].lstrip())
    end = next(i for i in range(start + 1, len(lines)) if len(lines[i]) - len(lines[i].lstrip()) <= indent)
    path.write_text("\n".join(lines[:start] + lines[end:]))
    assert read_config(path).pipeline.model.lift.select == "fixed"


def test_relative_paths_are_those_of_the_folder_it_was_started_in(saved, tmp_path, monkeypatch):
    path = saved(output_dir=Path("outputs"), data=Path("scene"))
    monkeypatch.chdir("/")
    config = read_config(path)
    assert config.data == tmp_path / "scene"
    assert config.output_dir == tmp_path / "outputs" and config.get_base_dir() == path.parent
    moved = tmp_path / "moved"
    (tmp_path / "outputs").rename(moved)
    assert read_config(moved / "scene" / "fit3d-splat" / "run").get_base_dir() == moved / "scene/fit3d-splat/run"


ATTACKS = {
    "object/apply": "!!python/object/apply:os.system ['touch {mark}']",
    "object/apply with arguments by name": "!!python/object/apply:os.system {{args: ['touch {mark}']}}",
    "object/new": "!!python/object/new:os.system ['touch {mark}']",
    "name": "!!python/name:os.system ''",
    "module": "!!python/module:os ''",
    "function of nerfstudio": "!!python/object/apply:nerfstudio.utils.scripts.run_command ['touch {mark}']",
    "name of a function": "!!python/name:nerfstudio.utils.scripts.run_command ''",
    "class that a module of nerfstudio imported": "!!python/name:nerfstudio.utils.scripts.subprocess.Popen ''",
    "class called": "!!python/object/apply:nerfstudio.engine.trainer.TrainerConfig []",
    "object that is no configuration": "!!python/object:nerfstudio.engine.trainer.Trainer {{}}",
    "path of an object": "!!python/object/apply:pathlib.PosixPath [!!python/object/apply:os.system ['touch {mark}']]",
    "optimizer called": "!!python/object/apply:torch.optim.adam.Adam []",
    "extended state": "!!python/object/new:type {{args: ['z', !!python/tuple [], {{'extend': 1}}], listitems: 'x'}}",
}


@pytest.mark.parametrize("attack", ATTACKS, ids=list(ATTACKS))
def test_nothing_is_executed(tmp_path, saved, attack):
    mark = tmp_path / "executed"
    path = saved()
    text = path.read_text()
    path.write_text(f"{text.rstrip()}\nplanted: {ATTACKS[attack].format(mark=mark)}\n")
    with pytest.raises(UserError, match="config.yml") as caught:
        read_config(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def _nerfstudio_commands():
    """Every way of nerfstudio's own commands to a run's config.yml."""
    from nerfstudio.configs.method_configs import all_methods
    from nerfstudio.scripts import eval as evaluation
    from nerfstudio.scripts import exporter, render, train
    from nerfstudio.scripts.viewer import run_viewer

    def training(path):
        config = deepcopy(all_methods["fit3d-splat"])
        config.load_config = path
        train.main(config)

    out = Path("out")
    return {
        "ns-eval": lambda path: evaluation.ComputePSNR(path).main(),
        "ns-viewer": lambda path: run_viewer.RunViewer(path).main(),
        "ns-render": lambda path: render.DatasetRender(path).main(),
        "ns-export": lambda path: exporter.ExportGaussianSplat(path, out).main(),
        "ns-train": training,
    }


@pytest.mark.parametrize("command", ["ns-eval", "ns-viewer", "ns-render", "ns-export", "ns-train"])
@pytest.mark.parametrize("attack", ATTACKS, ids=list(ATTACKS))
def test_nerfstudios_own_commands_execute_nothing(tmp_path, saved, monkeypatch, command, attack):
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "executed"
    path = saved()
    text = path.read_text()
    path.write_text(f"{text.rstrip()}\nplanted: {ATTACKS[attack].format(mark=mark)}\n")
    with pytest.raises(UserError, match="config.yml asks for|config.yml is damaged") as caught:
        _nerfstudio_commands()[command](path)
    assert "\n" not in str(caught.value)
    assert not mark.exists() and not any(Path("out").glob("*"))


@pytest.mark.parametrize("what", ["missing", "a folder", "no UTF-8"])
@pytest.mark.parametrize("command", ["ns-eval", "ns-viewer", "ns-render", "ns-export", "ns-train"])
def test_nerfstudios_own_commands_say_what_cannot_be_read(tmp_path, capsys, command, what):
    path = tmp_path / "config.yml"
    if what == "a folder":
        path.mkdir()
    elif what == "no UTF-8":
        path.write_bytes(b"\xff\xfe\xc3\x28")
    with pytest.raises((OSError, UnicodeDecodeError)) as caught:
        _nerfstudio_commands()[command](path)
    sys.excepthook(caught.type, caught.value, caught.tb)
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"Error: The configuration {path} cannot be read (") and said.endswith(
        ": check --load-config."
    )
    with pytest.raises(OSError) as other:
        (tmp_path / "other").read_text()
    sys.excepthook(other.type, other.value, other.tb)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["hello", "", "[1, 2]", "{a: 1}", "!!python/tuple [1]"])
def test_nerfstudios_own_commands_say_what_is_no_configuration(tmp_path, content):
    path = tmp_path / "config.yml"
    path.write_text(content)
    with pytest.raises(UserError, match="config.yml is not the configuration of a nerfstudio run"):
        _nerfstudio_commands()["ns-eval"](path)


@pytest.mark.parametrize("content", ["[1, 2", "\0", "[" * 100_000], ids=["cut", "binary", "deep"])
def test_nerfstudios_own_commands_say_what_is_damaged(tmp_path, content):
    path = tmp_path / "config.yml"
    path.write_text(content)
    with pytest.raises(UserError, match="config.yml is damaged"):
        _nerfstudio_commands()["ns-eval"](path)


class _Touch:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_nerfstudio_reads_checkpoints_restricted(tmp_path, monkeypatch):
    """Whatever the environment asks of torch, and from nerfstudio's files only."""
    from nerfstudio.utils import eval_utils

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark, folder = tmp_path / "executed", tmp_path / "nerfstudio_models"
    folder.mkdir()
    torch.save({"step": 1, "pipeline": {"planted": _Touch(mark)}}, folder / "step-000000001.ckpt")
    config = SimpleNamespace(load_dir=folder, load_step=None)
    with pytest.raises(UserError, match="step-000000001.ckpt cannot be read .*was not loaded"):
        eval_utils.eval_load_checkpoint(config, None)  # type: ignore[arg-type]
    assert not mark.exists()
    torch.load(folder / "step-000000001.ckpt", weights_only=False)
    assert mark.exists(), "or this would prove nothing"


@pytest.mark.parametrize("what", ["empty", "another file", "a file in its place", "a link to itself"])
def test_a_run_without_checkpoint_is_said(tmp_path, capsys, what):
    """As `ns-eval`, `ns-viewer`, `ns-render` and `ns-export` open it."""
    from nerfstudio.utils import eval_utils

    folder = tmp_path / "nerfstudio_models"
    folder.touch() if what == "a file in its place" else folder.mkdir()
    if what == "another file":
        (folder / ".DS_Store").touch()
    if what == "a link to itself":
        (folder / "step-000000001.ckpt").symlink_to(folder / "step-000000001.ckpt")
    config = SimpleNamespace(load_dir=folder, load_step=None)
    with pytest.raises((LookupError, ValueError, OSError, AssertionError)) as caught:
        eval_utils.eval_load_checkpoint(config, None)  # type: ignore[arg-type]
    sys.excepthook(caught.type, caught.value, caught.tb)
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"Error: {folder} holds no checkpoint, or") and said.endswith("with --load-config.")


def test_every_registered_method_is_read():
    """As nerfstudio's own loader would: generic data managers and collate functions among them."""
    from nerfstudio.configs.method_configs import all_methods

    assert len(all_methods) > 20
    for config in all_methods.values():
        text = yaml.dump(config)
        assert yaml.dump(parse_configuration(text, None)) == text


def test_a_plugins_method_is_read(tmp_path, monkeypatch):
    """Its classes are named by entry point or environment variable, as nerfstudio finds them."""
    (tmp_path / "other_plugin.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Config:\n    size: int = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = "!!python/object:other_plugin.Config {}"
    config_reader._plugin_packages.cache_clear()
    with pytest.raises(UserError, match="asks for"):
        parse_configuration(text, None)
    monkeypatch.setenv("NERFSTUDIO_METHOD_CONFIGS", "other=other_plugin:method")
    config_reader._plugin_packages.cache_clear()
    assert parse_configuration(text, None).size == 3
    monkeypatch.undo()
    config_reader._plugin_packages.cache_clear()


def test_the_attack_works_on_the_loader_that_is_not_used(tmp_path):
    """Or the test above would prove nothing."""
    mark = tmp_path / "executed"
    yaml.load(ATTACKS["object/apply"].format(mark=mark), Loader=yaml.UnsafeLoader)
    assert mark.exists()
    os.unlink(mark)


@pytest.mark.parametrize(
    "content, pattern",
    [
        ("[1, 2", "is damaged"),
        ("a: b: c", "is damaged"),
        ("- 1\n- 2", "not the configuration"),
        ("", "not the configuration"),
        ("!!python/object:other_plugin.config.Config {}", "asks for `other_plugin.config.Config`"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, pattern):
    path = tmp_path / "config.yml"
    path.write_text(content)
    with pytest.raises(UserError, match=pattern):
        read_config(path)


@pytest.mark.parametrize(
    "part, content, pattern",
    [
        ("pipeline", "null", "pipeline is NoneType"),
        ("pipeline", "splat", "pipeline is str"),
        ("pipeline", "!!python/object:nerfstudio.configs.base_config.MachineConfig {}", "datamanager is NoneType"),
        ("output_dir", "null", "output_dir is NoneType"),
        ("max_num_iterations", "many", "max_num_iterations is str"),
        ("data", "5", "data is int"),
    ],
)
def test_parts_that_are_something_else(saved, part, content, pattern):
    path = saved()
    path.write_text(f"{path.read_text().rstrip()}\n{part}: {content}\n")  # the last of a name counts
    with pytest.raises(UserError, match=rf"config.yml is damaged \(.*{pattern}\): restore it or train again") as caught:
        read_config(path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read.*check the path"):
        read_config(tmp_path / "config.yml")


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("", "max_num_iterations", "word"),
        ("", "max_num_iterations", None),
        ("", "use_grad_scaler", 3),
        ("", "vis", "nothing"),
        ("pipeline.model", "sh_degree", [3]),
        ("pipeline.model", "ssim_lambda", "much"),
        ("pipeline.datamanager", "cache_images", "moon"),
        ("", "machine", []),
        ("pipeline.model.camera_optimizer", "_target", None),
    ],
)
def test_fields_of_another_kind_are_refused(tmp_path, part, name, value):
    from nerfstudio.configs.method_configs import all_methods

    config = deepcopy(all_methods["fit3d-splat"])
    config.timestamp, config.data = "r", tmp_path
    (tmp_path / "config.yml").write_text(yaml.dump(config))
    read_config(tmp_path / "config.yml")
    holder = config
    for step in filter(None, part.split(".")):
        holder = getattr(holder, step)
    setattr(holder, name, value)
    (tmp_path / "config.yml").write_text(yaml.dump(config))
    with pytest.raises(UserError, match=f"config.yml is damaged .*{name} is "):
        read_config(tmp_path / "config.yml")


def test_the_configuration_of_every_method_is_of_its_kinds():
    from nerfstudio.configs.method_configs import all_methods

    for name, config in all_methods.items():
        config_reader._check_fields(config, Path(name))


def test_a_file_that_was_cut_between_any_two_lines_is_refused(tmp_path, saved):
    """What is left is valid YAML, and would be filled up with defaults."""
    path = saved()
    lines = path.read_text().splitlines(keepends=True)
    for number in range(1, len(lines)):
        path.write_text("".join(lines[:number]))
        with pytest.raises(UserError, match="config.yml"):
            read_config(path)
    path.write_text("".join(lines))
    read_config(path)


@pytest.mark.parametrize("part", ["datamanager", "model"])
def test_a_part_that_its_class_cannot_use_is_refused(tmp_path, saved, part):
    path = saved()
    config = read_config(path)
    other = {"datamanager": "model", "model": "datamanager"}[part]
    foreign = deepcopy(getattr(config.pipeline, other))
    foreign._target = getattr(config.pipeline, part)._target
    setattr(config.pipeline, part, foreign)
    path.write_text(yaml.dump(config))
    with pytest.raises(UserError, match=f"config.yml is damaged .pipeline.{part}"):
        read_config(path)
