"""How soon a command begins its work: `ns-train fit3d-splat` beside `ns-train splatfacto`, and our own commands.

    python benchmarks/start.py --data SCENE [--repeats 5]

Each start is a process of its own, the two methods in turn. Seconds of processor time are what the program costs, also
where other work shares the machine; seconds of the clock stand beside them. Training starts with the first call of the
trainer's `train`: the scene is read, the Gaussians are there. Splatfacto's LPIPS, which would fetch a network, is left
out of both.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

_METHODS = ("splatfacto", "fit3d-splat")
_TO_TRAINING = """
import sys
import torch, torchmetrics.image.lpip
torchmetrics.image.lpip._NoTrainLpips = lambda **_: torch.nn.Identity()
from nerfstudio.engine.trainer import Trainer
if not torch.cuda.is_available():
    torch.Tensor.cuda = lambda tensor, *_: tensor  # splatfacto asks for it by name
def end(*_):
    import os; os._exit(0)
Trainer.train = end
import nerfstudio.configs.method_configs as table
table.all_methods["fit3d-splat"]._target.train = end
from nerfstudio.scripts.train import entrypoint
sys.argv = ["ns-train", *sys.argv[1:]]
entrypoint()
"""
_HELP = "import sys; from {module} import main; sys.argv = ['command', *{words!r}]; main()"
_COMMANDS = {
    "fit3d --help": ("fit3d_loop.cli", ["--help"]),
    "fit3d-distill --help": ("distill.cli", ["--help"]),
    "fit3d-probe --help": ("probe.cli", ["--help"]),
    "fit3d-lift --help": ("fit3d_ns.commands.lift.cli", ["--help"]),
    "fit3d-export --help": ("fit3d_ns.commands.export.cli", ["--help"]),
}


@dataclass
class StartConfig:
    """Measures how soon commands begin."""

    data: Path
    """A scene in nerfstudio's format."""
    repeats: int = 5
    """Starts of each; the median counts."""
    output: Path = Path("outputs/start.json")
    """Raw numbers."""


def _run(program: str, words: list[str]) -> tuple[float, float]:
    """Returns seconds of processor time and of the clock."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.DEVNULL, stderr=-1, text=True)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(errors)
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start


def main(config: StartConfig) -> None:
    """Prints a line for each command, and writes all numbers.

    Args:
        config: What is measured.
    """
    starts: dict[str, list[tuple[float, float]]] = {}
    train = ["--data", str(config.data), "--vis", "tensorboard", "--machine.device-type", "cpu"]
    for _ in range(config.repeats):
        for method in _METHODS:
            output = ["--output-dir", str(config.output.parent / "start")]
            starts.setdefault(f"ns-train {method}", []).append(_run(_TO_TRAINING, [method, *train, *output]))
        for name, (module, words) in _COMMANDS.items():
            starts.setdefault(name, []).append(_run(_HELP.format(module=module, words=words), []))
    for name, times in starts.items():
        processor, clock = (statistics.median(column) for column in zip(*times))
        print(f"{name:24} {processor:6.2f} s of processor, {clock:6.2f} s")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(starts, indent=1))


if __name__ == "__main__":
    main(tyro.cli(StartConfig))
