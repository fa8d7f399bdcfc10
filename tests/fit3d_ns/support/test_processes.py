import pytest
import torch

from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import average_gradients, join_world


@pytest.fixture
def machine(monkeypatch):
    """A function that pretends a number of GPUs and a place among torchrun's processes; the GPUs that were set."""
    chosen: list[torch.device] = []

    def pretend(num_gpus, local_rank=None, world_size=1):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        if local_rank is not None:
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    return pretend, chosen


@pytest.mark.parametrize(
    ("device", "num_gpus", "found"),
    [
        ("auto", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("cpu:0", 2, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_device_of_a_process_alone(machine, device, num_gpus, found):
    pretend, chosen = machine
    pretend(num_gpus)
    with join_world(device) as world:
        assert world.device == torch.device(found) and world.is_main and world.size == world.local_size == 1
    assert chosen == ([torch.device(found)] if "cuda" in found else [])


@pytest.mark.parametrize(
    ("device", "num_gpus", "local_rank", "message"),
    [
        ("mps", 1, None, "--device mps is not supported: give auto, cpu, cuda or cuda:N"),
        ("gpu", 1, None, "--device gpu is not supported"),
        ("", 1, None, "is not supported"),
        ("cuda:x", 1, None, "--device cuda:x is not supported"),
        ("cuda", 0, None, "--device cuda: torch finds no CUDA device here; use --device cpu"),
        ("cuda:2", 2, None, r"--device cuda:2: this machine has 2 \(cuda:0 is the first\)"),
        ("cuda", 2, 2, "Process 2 of this machine has no GPU of its own, there are 2: lower --nproc-per-node"),
        ("auto", 1, 3, "Process 3 of this machine has no GPU of its own, there are 1: lower --nproc-per-node"),
    ],
)
def test_devices_that_are_not_there_end_in_a_sentence(machine, device, num_gpus, local_rank, message):
    machine[0](num_gpus, local_rank, world_size=4)
    with pytest.raises(UserError, match=message), join_world(device):
        pass


def _average(rank: int, store: str) -> None:
    """One of two processes, with a gradient of its own."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    weights = [
        torch.nn.Parameter(torch.zeros(2, 3)),
        torch.nn.Parameter(torch.zeros(4)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    weights[0].grad = torch.full((2, 3), 1.0 + 2 * rank)
    weights[1].grad = torch.arange(4.0) * (1 - 3 * rank)
    average_gradients(weights)
    assert torch.equal(weights[0].grad, torch.full((2, 3), 2.0))
    assert torch.equal(weights[1].grad, torch.arange(4.0) * -0.5)
    assert weights[2].grad is None
    torch.distributed.destroy_process_group()


def test_gradients_of_two_processes_become_their_mean(tmp_path):
    """Adam, with which heads are trained, would not show a factor."""
    torch.multiprocessing.spawn(_average, (str(tmp_path / "store"),), nprocs=2)
