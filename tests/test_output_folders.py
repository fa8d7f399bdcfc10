"""One process at a time writes to an output folder, what killed ones left goes, and results come all at once."""

import os
import signal
import subprocess
import sys

import pytest
from paths import ROOT

from fit3d_ns.support import output_folders
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.output_folders import held_folder, staged_folder

HOLD = """
import sys, time
from pathlib import Path
from fit3d_ns.support.output_folders import hold_folder
hold_folder(Path(sys.argv[1]), "--output-dir")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that writes to a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_the_second_of_two_is_refused_and_a_killed_one_holds_nothing(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(output_folders, "_PATIENCE_SECONDS", 0.3)
    being_written = tmp_path / "out" / "checkpoints" / ".step.pt.1-2.tmp"
    being_written.parent.mkdir()
    being_written.touch()
    with pytest.raises(UserError, match="Another process is writing to .*out.*choose another --output-dir"):
        with held_folder(tmp_path / "out", "--output-dir"):
            pass
    assert being_written.exists(), "it is the other's"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with held_folder(tmp_path / "out", "--output-dir"):
        assert not being_written.exists()
        with held_folder(tmp_path / "out", "--output-dir"):
            pass  # of the same process


def test_a_folder_that_nothing_came_to_goes(tmp_path):
    with pytest.raises(KeyError), held_folder(tmp_path / "out", "--output-dir"):
        raise KeyError
    assert not (tmp_path / "out").exists()


def test_staged_files_come_all_at_once_or_not_at_all(tmp_path):
    folder = tmp_path / "out"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "old").touch()
    (folder / "theirs").write_text("kept")
    with pytest.raises(KeyError), staged_folder(folder) as staged:
        (staged / "a").write_text("new")
        raise KeyError
    assert sorted(path.name for path in folder.iterdir()) == ["b", "theirs"]
    with staged_folder(folder) as staged:
        (staged / "a").write_text("new")
        (staged / "b").mkdir()
        (staged / "b" / "new").touch()
        assert not (folder / "a").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "theirs"]
    assert [path.name for path in (folder / "b").iterdir()] == ["new"] and (folder / "theirs").read_text() == "kept"
