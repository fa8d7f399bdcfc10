"""NVIDIA's MPS: used where it works, gone without where it does not, and never left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fit3d_loop.commands import mps as module
from fit3d_ns.support.errors import UserError

DAEMON = """#!/bin/sh
if [ "$1" = -f ]; then
    echo $$ > {folder}/pid
    [ -z "$CUDA_VISIBLE_DEVICES" ] || echo limited > {folder}/limited
    exec sleep 600
fi
kill $(cat {folder}/pid)
"""
"""Stands for ``nvidia-cuda-mps-control``: listens to nobody, and ends when it is told to."""


@pytest.fixture
def daemon(tmp_path, monkeypatch) -> Path:
    """Folder of a daemon's program, on the path of a machine with a GPU."""
    program = tmp_path / "bin" / "nvidia-cuda-mps-control"
    program.parent.mkdir()
    program.write_text(DAEMON.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "_USUAL_PIPES", tmp_path / "nobody's")
    monkeypatch.setattr(module, "_TRY", "import os; assert os.path.isdir(os.environ['CUDA_MPS_PIPE_DIRECTORY'])")
    return tmp_path


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_daemon_is_there_meanwhile_and_ends(daemon, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with module.mps("auto") as shared:
        assert shared
        process, folder = int((daemon / "pid").read_text()), Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
        assert alive(process) and folder.is_dir()
    assert not alive(process) and not folder.exists()
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ and "CUDA_MPS_LOG_DIRECTORY" not in os.environ
    assert not (daemon / "limited").exists()  # each process names its GPUs by the machine's numbers


def test_one_that_does_not_work_is_gone_without(daemon, monkeypatch, caplog):
    monkeypatch.setattr(module, "_TRY", "raise SystemExit('CUDA-capable device(s) is/are busy or unavailable')")
    with module.mps("auto") as shared:
        assert not shared and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    assert "does not work here (CUDA-capable device(s) is/are busy or unavailable): scenes take turns" in caplog.text
    assert not alive(int((daemon / "pid").read_text()))
    with pytest.raises(UserError, match="^NVIDIA's MPS does not work here .*: leave out --mps on.$"), module.mps("on"):
        pass
    assert not alive(int((daemon / "pid").read_text()))


def test_one_that_hangs_is_not_waited_for(daemon, monkeypatch, caplog):
    monkeypatch.setattr(module, "_TRY", "import time; time.sleep(60)")
    monkeypatch.setattr(module, "_SECONDS_TO_TRY", 0.5)
    with module.mps("auto") as shared:
        assert not shared
    assert "did not answer" in caplog.text


def test_the_machines_own_is_used(daemon, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somewhere")
    with module.mps("auto") as shared:
        assert shared and os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/somewhere"
    assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/somewhere" and not (daemon / "pid").exists()


@pytest.mark.parametrize(("gpu", "sentence"), [(True, "is not installed here"), (False, "needs an NVIDIA GPU")])
def test_where_there_is_none(tmp_path, monkeypatch, gpu, sentence):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(module, "_USUAL_PIPES", tmp_path / "nobody's")
    monkeypatch.setenv("PATH", str(tmp_path))
    for choice in ("auto", "off"):
        with module.mps(choice) as shared:
            assert not shared
    with pytest.raises(UserError, match=sentence), module.mps("on"):
        pass


def test_it_ends_with_a_driver_that_is_killed(daemon):
    script = (
        "import time; from fit3d_loop.commands import mps as module; module.torch.cuda.is_available = lambda: True\n"
        "module._TRY = 'pass'\n"
        "with module.mps('on'): print('there', flush=True); time.sleep(600)"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None and driver.stdout.readline() == "there\n"
    process = int((daemon / "pid").read_text())
    assert alive(process)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    end = time.monotonic() + 60
    while alive(process) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(process)
