"""What a full disk leaves behind, whoever writes."""

import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from fit3d_ns.support.errors import UserError
from fit3d_ns.support.files import atomic_folder, atomic_path

WRITERS = {
    "torch": lambda path: torch.save({"values": torch.zeros(100_000)}, path),
    "safetensors": lambda path: save_file({"values": torch.zeros(100_000)}, path),
    "bytes": lambda path: path.write_bytes(bytes(400_000)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path, writer):
    """The system's limit on the size of a file stops a writer as a full disk does."""
    path = tmp_path / "file"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=f"Cannot write {path}.*free space"), atomic_path(path) as temporary:
            WRITERS[writer](temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old" and [found.name for found in tmp_path.iterdir()] == ["file"]


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), atomic_path(tmp_path / "file"):
        raise RuntimeError("CUDA out of memory")


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, sync):
    """The power may fail at any moment: first the data, then the name, then the folder that holds the name."""
    happened = []
    monkeypatch.setattr(os, "fsync", lambda handle: happened.append(os.readlink(f"/proc/self/fd/{handle}")))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (happened.append("renamed"), replace(old, new)))
    with atomic_path(tmp_path / "file", sync=sync) as temporary:
        temporary.write_text("new")
    assert happened == ([str(temporary), "renamed", str(tmp_path)] if sync else ["renamed"])


def test_a_folder_is_written_where_a_killed_process_left_its_own(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / f".bundle.{dead.pid}-0123abcd.tmp"
    alive = tmp_path / f".bundle.{os.getpid()}-0123abcd.tmp"
    other = tmp_path / f".another.{dead.pid}-0123abcd.tmp"
    for folder in (left, alive, other):
        folder.mkdir()
        (folder / "part").write_text("half")
    with atomic_folder(tmp_path / "bundle") as temporary:
        (temporary / "whole").write_text("all")
    assert not left.exists() and alive.exists() and other.exists()
    assert (tmp_path / "bundle" / "whole").read_text() == "all"
