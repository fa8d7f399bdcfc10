"""The demo as a preset of the loop: rooms, the loop over them, and what only the demo's page shows."""

import json
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from demo.config import DemoConfig
from fit3d_loop.commands.steps import Step
from fit3d_loop.commands.worker import Settings
from fit3d_loop.config import LoopConfig
from fit3d_loop.records import Places as LoopPlaces
from fit3d_loop.scenes.machine import num_cores
from fit3d_ns.support.files import atomic_write_text

EVAL_INTERVAL = 5
"""Every fifth view of a room is held out from its splat, its features and the distillation."""
_ROOM_NAME = "room_{:03d}"
_MOST_THREADS = 4
"""Of a room on a CPU: three rooms share two cores best one after the other."""


@dataclass(frozen=True)
class Places:
    """Where things are."""

    root: Path
    """The output folder."""
    num_lifted: int
    """Rooms that are lifted."""

    @property
    def loop(self) -> LoopPlaces:
        """Of the loop."""
        return LoopPlaces(self.root.absolute() / "loop")

    @property
    def lifted_rooms(self) -> list[Path]:
        """Rooms that are lifted and distilled."""
        return [self.root / "rooms" / _ROOM_NAME.format(index) for index in range(self.num_lifted)]

    @property
    def held_out_room(self) -> Path:
        """The room that is only probed on."""
        return self.root / "rooms" / _ROOM_NAME.format(self.num_lifted)

    def run(self, room: Path) -> Path:
        """Returns a room's nerfstudio run.

        Args:
            room: Folder of a room.
        """
        return self.loop.geometry(room.name)

    def evaluation(self, room: Path) -> Path:
        """Returns where ``ns-eval`` puts numbers and pictures of a room.

        Args:
            room: Folder of a room.
        """
        return self.root / "eval" / room.name

    def distilled(self, targets: str) -> Path:
        """Returns the folder of a distillation, by its targets: ``lifted`` or ``control``.

        Args:
            targets: ``lifted`` or ``control``.
        """
        return self.loop.student(1) if targets == "lifted" else self.loop.control("control")

    def probe(self, kind: str) -> Path:
        """Returns the folder of a probe.

        Args:
            kind: ``correspondence``, ``segmentation`` or ``depth``.
        """
        return self.root / "correspondence" if kind == "correspondence" else self.loop.probe(kind)


def places(config: DemoConfig) -> Places:
    """Returns where things of a demo are.

    Args:
        config: The user's choices.
    """
    return Places(config.output_dir, config.rooms)


def write_scene_list(config: DemoConfig) -> Path:
    """Writes the list of scenes for the loop.

    Args:
        config: Of the demo.

    Returns:
        Its path.
    """
    flags = ["--eval-mode", "interval", "--eval-interval", str(EVAL_INTERVAL)]
    entries = [{"data": str(room.absolute()), "flags": flags} for room in places(config).lifted_rooms]
    path = config.output_dir / "scenes.yaml"
    atomic_write_text(path, "".join(f"- {json.dumps(entry)}\n" for entry in entries))
    return path


def loop_config(config: DemoConfig, cuda: bool) -> LoopConfig:
    """Returns the choices for the loop.

    Args:
        config: With all sizes filled in.
        cuda: Whether there is a GPU.
    """
    steps, distill_steps = config.splat_steps or 0, config.distill_steps or 0
    geometry = f"--optimizers.means.scheduler.max-steps {steps} --pipeline.model.background-color black "
    geometry += "--pipeline.model.num-downscales 0"
    if not cuda:  # small photos and few steps: densify early, and not beyond what a CPU renders quickly
        geometry += (
            f" --pipeline.model.sh-degree 1 --pipeline.model.warmup-length {steps * 3 // 8} "
            f"--pipeline.model.stop-split-at {steps * 6 // 10} --pipeline.model.reset-alpha-every 1000000"
        )
    return LoopConfig(
        scenes=config.output_dir / "scenes.yaml",
        output_dir=places(config).loop.root,
        backbone=config.backbone,
        backbone_weights=config.backbone_weights,
        rounds=1,
        geometry_steps=steps,
        geometry_flags=geometry,
        distill_flags=f"--steps {distill_steps} --save-every {max(distill_steps // 5, 1)} --keep-checkpoints 1",
        seed=config.seed,
        probe_data=config.output_dir / "rooms",
        probe_dataset="rooms",
        # Photos are small and features are cached once: processes that read ahead would cost more than they bring.
        probe_flags=(
            f"--assemblies original tuned concat --long-side {max(config.width or 0, config.height or 0)} --workers 0"
        ),
        controls=("control",) if config.control else (),
        engine="processes",
        threads=None if cuda else min(num_cores(), _MOST_THREADS),
    )


def as_typed(config: LoopConfig) -> tuple[str, ...]:
    """Returns the loop as a command line.

    Args:
        config: Choices for the loop.
    """
    words = ["fit3d", str(config.scenes)]
    for field in fields(config):
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if field.name == "scenes" or value == field.default:
            continue
        words += [flag, *value] if isinstance(value, tuple) else [f"{flag}={value}"]
    return tuple(words)


def before_the_loop(config: DemoConfig) -> Step:
    """Returns the step that makes the rooms.

    Args:
        config: With all sizes filled in.
    """
    command = (
        f"fit3d-rooms {_quoted(config.output_dir / 'rooms')} --scenes {config.rooms + 1} --views {config.views} "
        f"--width {config.width} --height {config.height} --seed {config.seed}"
    )
    return _step("rooms", f"Make {config.rooms + 1} rooms", command)


def after_the_loop(config: DemoConfig) -> list[Step]:
    """Returns what only the demo's page shows: pictures of held-out views, and points found again.

    Args:
        config: With all sizes filled in.
    """
    where, steps = places(config), []
    for room in where.lifted_rooms:
        folder = where.evaluation(room)
        command = (
            f"ns-eval --load-config {_quoted(where.run(room) / 'config.yml')} --output-path "
            f"{_quoted(folder / 'eval.json')} --render-output-path {_quoted(folder)}"
        )
        steps.append(_step(f"eval_{room.name}", f"Measure the held-out views of {room.name}", command))
    weights = config.backbone_weights
    backbone = f"--backbone {config.backbone}" + (f" --backbone-weights {_quoted(weights)}" if weights else "")
    control = f" --control {_quoted(where.distilled('control'))}" if config.control else ""
    command = (
        f"fit3d-probe correspondence --data {_quoted(where.held_out_room)} {backbone} "
        f"--tuned {_quoted(where.distilled('lifted'))}{control} --assemblies original tuned concat --pairs-per-bin 8 "
        f"--workers 0 --output-dir {_quoted(where.probe('correspondence'))}"
    )
    return [*steps, _step("correspondence", "Find points again in other views of the held-out room", command)]


def _step(name: str, title: str, command: str) -> Step:
    return Step(name, title, tuple(shlex.split(command)), Settings(num_cores()), key=command)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
