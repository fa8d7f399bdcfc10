"""The command lines of the demo, in order."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from demo.config import DemoConfig
from fit3d_ns.runs.names import METHOD

EVAL_INTERVAL = 5
"""Every fifth view of a room is held out from its splat, its features and the distillation."""
_RUN = "demo"
_ROOM_NAME = "room_{:03d}"


@dataclass(frozen=True)
class Stage:
    """One command."""

    name: str
    """Names its record."""
    title: str
    """For humans."""
    command: tuple[str, ...]
    """As typed in a shell."""
    seconds: float
    """About how long it takes on two cores, for the estimate of the time that is left."""


@dataclass(frozen=True)
class Places:
    """Where things are."""

    root: Path
    """The output folder."""
    num_lifted: int
    """Rooms that are lifted."""

    @property
    def lifted_rooms(self) -> list[Path]:
        """Rooms that are lifted and distilled."""
        return [self.root / "rooms" / _ROOM_NAME.format(index) for index in range(self.num_lifted)]

    @property
    def held_out_room(self) -> Path:
        """The room that is only probed on."""
        return self.root / "rooms" / _ROOM_NAME.format(self.num_lifted)

    def run(self, room: Path) -> Path:
        """Returns a room's nerfstudio run."""
        return self.root / "runs" / room.name / METHOD / _RUN

    def distilled(self, targets: str) -> Path:
        """Returns the folder of a distillation, by its targets: ``lifted`` or ``control``."""
        return self.root / ("tuned" if targets == "lifted" else "control")

    def probe(self, kind: str) -> Path:
        """Returns the folder of a probe."""
        return self.root / "probes" / kind


def places(config: DemoConfig) -> Places:
    """Returns where things of a demo are."""
    return Places(config.output_dir, config.rooms)


def stages(config: DemoConfig, cuda: bool) -> list[Stage]:
    """Returns all commands of the demo.

    Args:
        config: With all sizes filled in.
        cuda: Whether there is a GPU.
    """
    where = places(config)
    found = [_rooms(config, where)]
    for room in where.lifted_rooms:
        found += [_train(config, where, room, cuda), _evaluate(where, room)]
    found.append(_distill(config, where, "lifted", "Distil the lifted features into the backbone"))
    if config.control:
        found.append(_distill(config, where, "control", "Distil the control, which has no 3D in it"))
    return [
        *found,
        _correspondence(config, where),
        *(_probe(config, where, kind) for kind in ("segmentation", "depth")),
    ]


def _rooms(config: DemoConfig, where: Places) -> Stage:
    command = (
        f"fit3d-rooms {_quoted(where.root / 'rooms')} --scenes {config.rooms + 1} --views {config.views} "
        f"--width {config.width} --height {config.height} --seed {config.seed}"
    )
    return _stage("rooms", f"Make {config.rooms + 1} rooms", command, 45)


def _train(config: DemoConfig, where: Places, room: Path, cuda: bool) -> Stage:
    steps = config.splat_steps or 0
    command = (
        f"ns-train fit3d-splat --data {_quoted(room)} --output-dir {_quoted(where.root / 'runs')} --timestamp {_RUN} "
        f"--vis tensorboard --viewer.quit-on-train-completion True --machine.seed {config.seed} "
        f"--max-num-iterations {steps} --steps-per-save {max(steps // 4, 1)} "
        f"--optimizers.means.scheduler.max-steps {steps} {_backbone(config, '--pipeline.datamanager.')} "
        "--pipeline.model.features lift --pipeline.model.background-color black --pipeline.model.num-downscales 0 "
    )
    if not cuda:  # small photos and few steps: densify early, and not beyond what a CPU renders quickly
        command += (
            f"--pipeline.model.sh-degree 1 --pipeline.model.warmup-length {steps * 3 // 8} "
            f"--pipeline.model.stop-split-at {steps * 6 // 10} --pipeline.model.reset-alpha-every 1000000 "
        )
    command += f"nerfstudio-data --eval-mode interval --eval-interval {EVAL_INTERVAL}"
    return _stage(f"train_{room.name}", f"Train a splat of {room.name} and lift features onto it", command, 45)


def _evaluate(where: Places, room: Path) -> Stage:
    run = where.run(room)
    command = (
        f"ns-eval --load-config {_quoted(run / 'config.yml')} --output-path {_quoted(run / 'eval.json')} "
        f"--render-output-path {_quoted(run / 'eval')}"
    )
    return _stage(f"eval_{room.name}", f"Measure the held-out views of {room.name}", command, 2)


def _distill(config: DemoConfig, where: Places, targets: str, title: str) -> Stage:
    steps = config.distill_steps or 0
    folder = where.distilled(targets)
    command = (
        f"fit3d-distill --runs {_quoted(where.root / 'runs')} --output-dir {_quoted(folder)} --resume "
        f"--targets {targets} --steps {steps} --seed {config.seed} --save-every {max(steps // 5, 1)} "
        f"--keep-checkpoints 1 --cache-dir {_quoted(where.root / 'photos')}"
    )
    return _stage(folder.name, title, command, 95)


def _correspondence(config: DemoConfig, where: Places) -> Stage:
    command = (
        f"fit3d-probe correspondence --data {_quoted(where.held_out_room)} {_backbone(config)} "
        f"{_distilled(config, where)} --assemblies original tuned concat --pairs-per-bin 8 "
        f"--output-dir {_quoted(where.probe('correspondence'))}"
    )
    return _stage("correspondence", "Find points again in other views of the held-out room", command, 20)


def _probe(config: DemoConfig, where: Places, kind: str) -> Stage:
    # Photos are small and features are cached once: processes that read ahead would cost more than they bring.
    command = (
        f"fit3d-probe {kind} --dataset rooms --data {_quoted(where.root / 'rooms')} {_backbone(config)} "
        f"{_distilled(config, where)} --assemblies original tuned concat "
        f"--long-side {max(config.width or 0, config.height or 0)} --workers 0 "
        f"--output-dir {_quoted(where.probe(kind))}"
    )
    return _stage(kind, f"Probe {kind} on the held-out room", command, 60)


def _stage(name: str, title: str, command: str, seconds: float) -> Stage:
    return Stage(name, title, tuple(shlex.split(command)), seconds)


def _backbone(config: DemoConfig, prefix: str = "--") -> str:
    """The flags that choose the backbone."""
    weights = config.backbone_weights
    return f"{prefix}backbone {config.backbone}" + (f" {prefix}backbone-weights {_quoted(weights)}" if weights else "")


def _distilled(config: DemoConfig, where: Places) -> str:
    """The flags that name the distilled backbones."""
    control = f" --control {_quoted(where.distilled('control'))}" if config.control else ""
    return f"--tuned {_quoted(where.distilled('lifted'))}{control}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
