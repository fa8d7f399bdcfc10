"""What can be chosen about the loop."""

import re
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fit3d_ns.support.errors import UserError, flags_are

MOST_ROUNDS = 5
"""Three were measured; a student of students drifts from what the original knew."""
Control = Literal["control", "control-blur", "control-shift"]
Task = Literal["segmentation", "depth", "normals"]
MPS = Literal["auto", "on", "off"]


@dataclass
class LoopConfig:
    """Photos of many scenes in, a better backbone out.

    Trains a splat of every scene, lifts the backbone's features onto it, distils them back into the backbone, averages
    it with the original, and begins anew with that as the teacher. Stopped or killed at any moment and started again,
    it goes on where it was. The result is OUTPUT_DIR/backbone.safetensors with card.json, report.html, metrics.json.
    """

    scenes: Annotated[Path, tyro.conf.Positional]
    """A folder of scene folders, a text file with one scene a line, or a YAML file (docs/fit3d.md). Recognised are
    nerfstudio's transforms.json, COLMAP as 3DGS lays it out, Blender, ScanNet++, trained runs and PLY files."""
    output_dir: Path = Path("outputs/fit3d")
    """Where everything goes."""
    backbone: str | None = None
    """Teacher of the first round and what every student starts from; by default that of the existing runs among the
    scenes, else dinov2_small."""
    backbone_weights: Path | None = None
    """Local weights of the backbone."""
    rounds: int = 3
    """Rounds of lifting and distilling; more can be added later."""
    geometry_steps: int = 5000
    """Training steps of each splat; enough for lifting, and few for pictures."""
    geometry_flags: str = ""
    """Further flags of `ns-train fit3d-splat` for all scenes, in quotes after an equals sign."""
    lift_flags: str = ""
    """Further flags of `fit3d-lift`, likewise."""
    distill_flags: str = ""
    """Further flags of `fit3d-distill`, likewise."""
    seed: int = 42
    """Of splats and distillation."""

    probe_data: Path | None = None
    """Data with truth, on which original, student and controls are probed at the end."""
    probe_dataset: str = "folder"
    """Its layout, one of those that fit3d-probe knows."""
    probe_tasks: tuple[Task, ...] = ("segmentation", "depth")
    """What is probed."""
    probe_flags: str = ""
    """Further flags of `fit3d-probe`, likewise."""
    controls: tuple[Control, ...] | None = None
    """Students of targets without 3D, trained alike in one round, for comparison; control-shift, which measured as the
    best of them, if something is probed, else none."""

    plan: bool = False
    """Print steps, expected minutes and disk for this machine, and do nothing."""
    allow_failures: int = 0
    """So many scenes may fail without the command ending as failed."""
    scenes_at_once: int | None = None
    """Scenes that are worked on at the same time; what memory and cores allow if not given."""
    threads: int | None = None
    """Processor threads of each scene; kept from the first start, since sums on a CPU depend on it."""
    keep_checkpoints: bool = False
    """Keep the optimizers' state of trained splats, and the scene bundles of rounds that are done."""
    mps: MPS = "auto"
    """NVIDIA's MPS, with which scenes use a GPU side by side instead of in turns; `auto` uses it where it works. The
    nodes of a Ray cluster need their own."""
    engine: Literal["auto", "ray", "processes"] = "auto"
    """Who runs the scenes: Ray, or processes of this machine; Ray where it is installed."""
    ray_address: str | None = None
    """A Ray cluster to use, HOST:PORT or auto; a Ray of this machine alone if not given."""
    shard: Annotated[str | None, tyro.conf.arg(metavar="I/N")] = None
    """Do the I-th of N parts of the scenes, I from 1, as one of N array jobs, and leave the others to theirs."""

    def given_flags(self, name: str) -> list[str]:
        """Returns the words of one of the ``*_flags``.

        Args:
            name: Of the field, such as ``train_flags``.

        Raises:
            UserError: If a quote in it is never closed.
        """
        try:
            return shlex.split(getattr(self, name))
        except ValueError as error:
            flag = f"--{name.replace('_', '-')}={getattr(self, name)}"
            raise UserError(f"{flag} cannot be split into words ({error}): close the quote.") from error

    @property
    def chosen_controls(self) -> tuple[Control, ...]:
        """Controls to train."""
        if self.controls is not None:
            return self.controls
        return ("control-shift",) if self.probe_data is not None else ()

    def part(self) -> tuple[int, int]:
        """Returns which part of the scenes this process does, from 0, and of how many.

        Raises:
            UserError: If --shard is none.
        """
        if self.shard is None:
            return 0, 1
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if match is None:
            raise UserError(f"--shard {self.shard}: give I/N, such as 1/8 for the first of eight parts.")
        index, count = int(match[1]), int(match[2])
        if not 1 <= index <= count:
            raise UserError(f"--shard {self.shard} is out of range: the first of {count} parts is 1, the last {count}.")
        return index - 1, count

    def check(self) -> None:
        """Checks what needs no scene to be checked.

        Raises:
            UserError: If a number is out of range, a file is missing, or the backbone is none.
        """
        if not 1 <= self.rounds <= MOST_ROUNDS:
            raise UserError(
                f"--rounds {self.rounds} is out of range: 1 to {MOST_ROUNDS}, since students of students drift away "
                "from what the original knew, and up to 3 were measured."
            )
        at_least = {"geometry_steps": 10, "allow_failures": 0, "scenes_at_once": 1, "threads": 1, "seed": 0}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} is too small: at least {least}.")
        for name in ("geometry_flags", "lift_flags", "distill_flags", "probe_flags"):
            self.given_flags(name)
        self.part()
        if self.ray_address is not None and self.engine == "processes":
            raise UserError("--ray-address needs Ray: leave out --engine processes.")
        if self.ray_address is not None and self.mps == "on":
            raise UserError(
                "--mps on is of this machine, and --ray-address leads to others: leave it out; a daemon that was "
                "started on a node before Ray is used there."
            )
        if self.ray_address is not None and self.shard is not None:
            raise UserError("--ray-address and --shard exclude each other: a Ray cluster does all parts by itself.")
        if self.probe_data is not None and not self.probe_data.expanduser().is_dir():
            raise UserError(f"There is no folder {self.probe_data}: check --probe-data.")
        if self.backbone_weights is not None and not self.backbone_weights.expanduser().is_file():
            raise UserError(f"There is no file {self.backbone_weights}: check --backbone-weights.")
        if self.backbone is not None:
            from fit3d_ns.backbones import BackboneSpec, describe_backbone  # torch comes with them

            with flags_are(backbone="--backbone", backbone_weights="--backbone-weights", backbone_layer="--layer"):
                describe_backbone(BackboneSpec(self.backbone))

    def decisive(self) -> dict[str, Any]:
        """Returns what decides the result and may not change between starts, as JSON values."""
        names = (
            "backbone backbone_weights geometry_steps geometry_flags lift_flags distill_flags seed threads"
        ).split()
        values = {name: value for name, value in asdict(self).items() if name in names}
        values["distill_threads"] = None
        if self.backbone_weights is not None:
            values["backbone_weights"] = str(self.backbone_weights.expanduser().absolute())
        return values
