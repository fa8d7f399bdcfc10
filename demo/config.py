"""What can be chosen about the demo, and the sizes that fit the machine."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fit3d_ns.backbones import BackboneSpec, describe_backbone
from fit3d_ns.support.errors import UserError, flags_are
from fit3d_rooms.cli import MINIMUM_SIZE, check_size

_MOST_ROOMS = 4
"""`fit3d-probe` holds out a quarter of the rooms: exactly one of up to five."""


@dataclass
class DemoConfig:
    """Lifts rooms, distils them, probes the result on a further room, and writes OUTPUT_DIR/report.html.

    Stopped at any moment and started again, it goes on where it was. Sizes that are not given suit the machine:
    about 900 seconds of processor time on a CPU.
    """

    output_dir: Path = Path("outputs/demo")
    """Where everything goes."""
    backbone: str | None = None
    """Teacher and student; by default dinov2_small if its weights can be had, else dinov2_small_focus."""
    backbone_weights: Path | None = None
    """Local weights of the backbone."""
    rooms: int = 3
    """Rooms that are lifted and distilled, 1 to 4; one more is made, and only probed on."""
    views: int | None = None
    """Photos of each room."""
    width: int | None = None
    """Of the photos, pixels."""
    height: int | None = None
    """Of the photos, pixels."""
    splat_steps: int | None = None
    """Training steps of each splat."""
    distill_steps: int | None = None
    """Training steps of the backbone."""
    control: bool = True
    """Whether a control is distilled without 3D, which tells what fine-tuning alone brings."""
    seed: int = 1
    """Of rooms, splats and distillation."""


def check(config: DemoConfig) -> None:
    """Checks what can be checked without torch.

    Args:
        config: The user's choices.

    Raises:
        UserError: If a number is out of range, or a file is missing.
    """
    for name, least in (("rooms", 1), ("views", 6), ("splat_steps", 10), ("distill_steps", 1)):
        if (value := getattr(config, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} is too small: at least {least}.")
    if config.rooms > _MOST_ROOMS:
        raise UserError(f"--rooms {config.rooms} is too large: at most {_MOST_ROOMS}, so that one is held out.")
    check_size(*(MINIMUM_SIZE if side is None else side for side in (config.width, config.height)))
    if config.backbone_weights is not None and not config.backbone_weights.expanduser().is_file():
        raise UserError(f"There is no file {config.backbone_weights}: check --backbone-weights.")


def complete(config: DemoConfig, cuda: bool) -> DemoConfig:
    """Fills in the sizes that were not given, and checks everything before a folder remembers it.

    Args:
        config: The user's choices.
        cuda: Whether there is a GPU.

    Returns:
        All sizes filled in.

    Raises:
        UserError: As `check`, or if the backbone is none.
    """
    check(config)
    sizes = _GPU_SIZES if cuda else _CPU_SIZES
    config = replace(config, **{name: size for name, size in sizes.items() if getattr(config, name) is None})
    if config.backbone is not None:
        with flags_are(backbone="--backbone", backbone_weights="--backbone-weights", backbone_layer="--layer"):
            describe_backbone(BackboneSpec(config.backbone))
    return config


def settings(config: DemoConfig) -> dict[str, Any]:
    """Returns everything that decides the outcome, as JSON values.

    Args:
        config: Of `complete`.
    """
    values = {name: value for name, value in asdict(config).items() if name != "output_dir"}
    weights = config.backbone_weights
    values["backbone_weights"] = None if weights is None else str(weights.expanduser().absolute())
    return values


# Chosen so that two idle cores need about nine minutes (docs/benchmarks.md).
_CPU_SIZES = {
    "views": 30,
    "width": 280,
    "height": 210,
    "splat_steps": 400,
    "distill_steps": 140,
}
_GPU_SIZES = {
    "views": 40,
    "width": 400,
    "height": 300,
    "splat_steps": 1000,
    "distill_steps": 400,
}
