"""Configurations of other people's runs: read whole, and never executed."""

import os
from pathlib import Path

import pytest
import yaml

from fit3d_ns.runs.config_reader import read_config
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


def test_equals_what_nerfstudio_reads(saved):
    path = saved()
    assert yaml.dump(read_config(path)) == yaml.dump(yaml.load(path.read_text(), Loader=yaml.Loader))


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
