"""What is left to do, how long it takes about, and what it takes of the disk."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from distill.config import DistillConfig
from distill.recipes import choose_recipe
from fit3d_loop.rounds import Begun, distillation
from fit3d_loop.scenes.machine import Packing, PhotoCounts
from fit3d_loop.scenes.scene_list import scenes_in_words
from fit3d_ns.backbones import BackboneSpec, describe_backbone
from fit3d_ns.support.errors import UserError

_START = 12.0
"""Seconds until a scene's photos are read and its teacher's maps are there."""
_GPU_STEP_ALONE, _GPU_STEP_SHARED = 0.0105, 0.0075
"""Seconds of a step of geometry: at least, and times the scenes that take turns on a GPU (eight take 60 ms)."""
_MPS_STEP_ALONE, _MPS_STEP_SHARED = 0.0155, 0.0019
"""Likewise, of scenes that use it side by side (eight take 15 ms, in which each keeps a core busy)."""
_CPU_STEP = 1.3
"""Core seconds of a step, for each megapixel."""
_GPU_VIEWS, _CPU_VIEWS = 300.0, 5.0
"""Views a second of distillation, of a small backbone; a larger one's is in proportion to its width squared."""
_LIFT_GPU, _LIFT_CPU = 0.045, 0.25
"""Seconds a photo of lifting and bundling, beside seven other scenes on a GPU."""
_PROBE_GPU, _PROBE_CPU = 2.0, 10.0
"""Minutes of a probe on some hundred photos."""
_GAUSSIANS_A_STEP, _MOST_GAUSSIANS = 100, 600_000
"""Gaussians for each step of geometry, about, up to where they stop growing."""
_GEOMETRY_BYTES, _MOMENTS, _FEATURE_BYTES, _BUNDLE_BYTES = 236, 2, 4, 44
"""Of a Gaussian: splatfacto's parameters; the optimizer's, times those; a channel; geometry in a bundle."""
_DIM = 64
_STUDENT_BYTES = 4 * 5
"""Of a student's weight: result, student, and a checkpoint with moving average and moments while it trains."""
_TEACHER_SIDE = 868
_SMALL_WIDTH = 384


@dataclass(frozen=True)
class Plan:
    """What a loop takes."""

    lines: list[tuple[str, float]]
    """What, and minutes."""
    disk_gigabytes: float
    """At most, of what is still to be written."""
    scene_gigabytes: float
    """Of a scene, when it is done."""

    @property
    def minutes(self) -> float:
        """All together."""
        return sum(minutes for _, minutes in self.lines)


def make_plan(loop: Begun, photos: PhotoCounts, packing: Packing, by_mps: bool = False) -> Plan:
    """Plans what is left.

    Args:
        loop: As it was begun: choices, folders and scenes.
        photos: Of the scenes.
        packing: How they share the machine.
        by_mps: Whether they use a GPU side by side, by NVIDIA's MPS.

    Returns:
        Steps with their minutes, and gigabytes of disk.
    """
    config, states = loop.config, [loop.state(scene) for scene in loop.scenes]
    untrained = [
        state for scene, state in zip(loop.scenes, states) if state.geometry is None and scene.kind == "photos"
    ]
    shared = packing.at_once / max(packing.gpus, 1)
    info = describe_backbone(BackboneSpec(loop.backbone))
    mean_photos = photos.total / max(len(states), 1)
    lines: list[tuple[str, float]] = []
    if untrained:
        seconds = _measured([state.geometry for state in states])
        if seconds is None and packing.gpus:
            alone, among = (_MPS_STEP_ALONE, _MPS_STEP_SHARED) if by_mps else (_GPU_STEP_ALONE, _GPU_STEP_SHARED)
            seconds = _START + config.geometry_steps * max(alone, among * shared)
        elif seconds is None:
            seconds = _START + config.geometry_steps * _CPU_STEP * photos.megapixels / packing.threads
        waves = math.ceil(len(untrained) / packing.at_once)
        what = f"geometry of {scenes_in_words(len(untrained))}, {config.geometry_steps} steps each"
        lines.append((what, waves * seconds / 60))
    each = mean_photos * (_LIFT_GPU if packing.gpus else _LIFT_CPU * max(photos.megapixels, 0.05)) + _START / 3
    for number in range(1, config.rounds + 1):
        missing = [state for state in states if str(number) not in state.rounds]
        if missing:
            seconds = _measured([state.rounds.get(str(number)) for state in states]) or each
            waves = math.ceil(len(missing) / packing.at_once)
            what = f"round {number}: lift features onto {scenes_in_words(len(missing))}"
            lines.append((what, waves * seconds / 60))
        if not missing and loop.places.step(f"student{number}").is_file():
            continue
        recipe = choose_recipe(DistillConfig(), round(photos.total * 0.9), 1)
        views = (recipe.steps or 1) * recipe.batch_size * (1 + (len(config.chosen_controls) if number == 1 else 0))
        gpus = distillation(loop).num_processes(packing.gpus)
        pace = (_GPU_VIEWS * gpus if packing.gpus else _CPU_VIEWS) * (_SMALL_WIDTH / info.width) ** 2
        lines.append((f"round {number}: distil {recipe.steps} steps of {recipe.batch_size}", (20 + views / pace) / 60))
    if config.probe_data is not None:
        minutes = _PROBE_GPU if packing.gpus else _PROBE_CPU
        lines.append((f"probe {', '.join(config.probe_tasks)}", len(config.probe_tasks) * minutes))
    gaussians = min(_GAUSSIANS_A_STEP * config.geometry_steps, _MOST_GAUSSIANS)
    scene, extra = _scene_bytes(loop, gaussians, info.width, mean_photos, info.patch_size)
    unfinished = sum(not state.rounds for state in states)
    weights = 12 * info.num_layers * info.width**2  # a transformer's, about
    disk = unfinished * scene + min(packing.at_once, unfinished) * extra
    disk += sum(not loop.places.step(f"student{number}").is_file() for number in range(1, config.rounds + 1)) * (
        weights * _STUDENT_BYTES
    )
    return Plan(lines, disk / 1e9, scene / 1e9)


def _measured(records: Sequence[dict | None]) -> float | None:
    """Seconds that scenes took which are done."""
    known = [record["seconds"] for record in records if record and record.get("seconds")]
    return sum(known) / len(known) if known else None


def _scene_bytes(loop: Begun, gaussians: int, width: int, num_photos: float, patch: int) -> tuple[float, float]:
    """What a scene leaves, and what it takes beside that while it is worked on."""
    keep, rounds = loop.config.keep_checkpoints, loop.config.rounds
    parameters = _GEOMETRY_BYTES + _DIM * _FEATURE_BYTES
    moments = _MOMENTS * parameters
    lift = 2 * _DIM + 8  # features in half precision, and two numbers about each
    bundle = _BUNDLE_BYTES + 2 * _DIM
    photos = num_photos * 3 * _TEACHER_SIDE**2 * 0.75  # decoded, for distillation
    maps = num_photos * 2 * width * (_TEACHER_SIDE / patch) ** 2 * 0.75
    stays = gaussians * (parameters + (rounds - 1) * lift + bundle * (rounds if keep else 1)) + photos
    while_working = gaussians * moments + maps
    return (stays + while_working, 0.0) if keep else (stays, while_working)


def check_disk(plan: Plan, free: float, folder: str) -> None:
    """Refuses to start where the disk cannot hold what comes.

    Args:
        plan: What comes.
        free: Gigabytes that are free.
        folder: The output folder, for the sentence.

    Raises:
        UserError: If it does not fit.
    """
    if plan.disk_gigabytes > free:
        raise UserError(
            f"About {plan.disk_gigabytes:.1f} GB are needed ({plan.scene_gigabytes:.2f} a scene) and {free:.1f} are "
            f"free at {folder}: free some space, choose another --output-dir, or begin with fewer scenes."
        )


def format_plan(plan: Plan, loop: Begun, packing: Packing, free: float) -> str:
    """Returns the plan as text.

    Args:
        plan: Of `make_plan`.
        loop: As it was begun: choices, folders and scenes.
        packing: How scenes share the machine.
        free: Gigabytes that are free.
    """
    done = sum(loop.state(scene).geometry is not None for scene in loop.scenes)
    lines = [f"{scenes_in_words(len(loop.scenes))}, geometry of {done} is there. {packing.sentence}"]
    lines += [f"{minutes:8.1f} min  {what}" for what, minutes in plan.lines] or ["Nothing is left to do."]
    lines.append(f"{plan.minutes:8.1f} min  in all, about")
    each, needed = plan.scene_gigabytes, plan.disk_gigabytes
    lines.append(f"{needed:8.1f} GB   of disk, about, {each:.2f} a scene; {free:.1f} are free")
    return "\n".join(lines)
