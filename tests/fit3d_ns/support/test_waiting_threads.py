"""Threads on a CPU: they wait without spinning, are few where photos are small, and are the user's where he says so."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fit3d_ns.support import threads
from fit3d_ns.support.threads import SMALL_PIXELS, kernel_threads, one_thread_for_small

ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.fixture
def two_threads(monkeypatch):
    """A command of nerfstudio's on a machine of two cores, where the user said nothing."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/ns-train", "fit3d-splat"])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def used(num_pixels: int) -> tuple[int, int]:
    with one_thread_for_small(num_pixels):
        return torch.get_num_threads(), kernel_threads()


@pytest.mark.parametrize("num_pixels, torchs", [(96 * 72, 1), (SMALL_PIXELS - 1, 1), (SMALL_PIXELS, 2), (10**7, 2)])
def test_small_photos_get_one_thread_of_torchs_and_all_of_the_kernels(two_threads, num_pixels, torchs):
    assert used(num_pixels) == (torchs, 2)
    assert (torch.get_num_threads(), kernel_threads()) == (2, 2)


def test_threads_come_back_after_an_error(two_threads):
    with pytest.raises(ValueError), one_thread_for_small(1):
        raise ValueError
    assert torch.get_num_threads() == 2 and threads.kernel_threads() == 2


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_the_users_environment_is_obeyed(two_threads, monkeypatch, name):
    monkeypatch.setenv(name, {"OMP_WAIT_POLICY": "ACTIVE"}.get(name, "2"))
    assert used(1) == (2, 2)


def test_a_program_that_may_have_set_threads_keeps_them(two_threads, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/someone/train_rooms.py"])
    assert used(1) == (2, 2)


@pytest.mark.parametrize(
    "given, policy",
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "100"}, None)],
)
def test_a_command_waits_without_spinning_unless_told_how(given, policy):
    program = """
import json, os, sys
from fit3d_ns.support.command_line import run_command
def work():
    import torch
    torch.ones(10**6).sum()
    print(json.dumps(os.environ.get("OMP_WAIT_POLICY")))
assert "torch" not in sys.modules
run_command(work)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    printed = subprocess.run(
        [sys.executable, "-c", program], env={**environment, **given}, capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(printed) == policy
