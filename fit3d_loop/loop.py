"""The loop from beginning to end, as the command runs it."""

import logging
import time
from dataclasses import replace

import torch

from fit3d_loop.commands.mps import mps, offers_mps
from fit3d_loop.commands.worker import end_all
from fit3d_loop.config import MPS, LoopConfig
from fit3d_loop.plan import check_disk, format_plan, make_plan
from fit3d_loop.records import (
    Places,
    check_folder,
    driver_lock,
    keep_settings,
    remove_leftovers,
    stored_settings,
    try_lock,
)
from fit3d_loop.rounds import Begun, Ending, failures, run_rounds
from fit3d_loop.scenes.machine import PhotoCounts, choose_packing, default_threads, free_disk, look_at_photos, num_cores
from fit3d_loop.scenes.runner import open_engine
from fit3d_loop.scenes.scene_list import backbone_of, read_scenes
from fit3d_loop.scenes.table import Table
from fit3d_ns.support.console import CONSOLE
from fit3d_ns.support.errors import UserError

_LOGGER = logging.getLogger(__name__)


def run_loop(config: LoopConfig) -> Ending:
    """Runs the loop from beginning to end, or from where it was stopped.

    Args:
        config: The user's choices.

    Returns:
        How far it came: with --shard, others may have to go first.

    Raises:
        UserError: Whatever is wrong with scenes, choices or machine; at the end, if more scenes failed than may.
    """
    config = replace(config, output_dir=config.output_dir.expanduser().absolute())
    config.check()
    scenes, notes = read_scenes(config.scenes)
    begun = stored_settings(config.output_dir)
    config = replace(config, backbone=backbone_of(scenes, config.backbone or begun.get("backbone")))
    config.check()  # the backbone of a run, too
    photos, cuda = look_at_photos(scenes), torch.cuda.is_available()
    free = {"threads": default_threads(len(scenes), cuda), "distill_threads": num_cores()}
    decisive = config.decisive()
    if config.plan:
        chosen = {name: begun.get(name) or value for name, value in free.items() if not decisive[name]}
        loop = Begun(config, {**decisive, **chosen}, scenes, str(config.backbone), photos.total)
        packing = choose_packing(photos, loop.settings["threads"], config.scenes_at_once)
        _say_scenes(loop, notes)
        print(
            format_plan(
                make_plan(loop, photos, packing, offers_mps(_own_mps(config))),
                loop,
                packing,
                free_disk(config.output_dir),
            )
        )
        return Ending(False, "only a plan was asked for")
    own = driver_lock(Places(config.output_dir), config.part())
    busy = f"Another fit3d is at work in {config.output_dir}: wait for it, or choose another --output-dir."
    check_folder(config.output_dir)
    with try_lock(own) as had:
        if not had:
            raise UserError(busy)
        loop = Begun(
            config, keep_settings(config.output_dir, decisive, free), scenes, str(config.backbone), photos.total
        )
        for scene in scenes:
            loop.state(scene)  # one that was something else before is said at once
        if config.shard is None:
            remove_leftovers(loop.places, own)
        _say_scenes(loop, notes)
        packing = choose_packing(photos, loop.settings["threads"], config.scenes_at_once)
        plan = make_plan(loop, photos, packing, offers_mps(_own_mps(config)))
        check_disk(plan, free_disk(config.output_dir), str(config.output_dir))
        _LOGGER.info(
            f"About {plan.minutes:.0f} minutes and {plan.disk_gigabytes:.1f} GB, {plan.scene_gigabytes:.2f} a scene."
        )
        return _run(loop, photos)


def _run(loop: Begun, photos: PhotoCounts) -> Ending:
    start = time.time()
    table = Table(loop.places)
    try:
        with mps(_own_mps(loop.config)) as shared, open_engine(loop.config, photos, loop.settings["threads"]) as engine:
            by_mps = " They use it side by side, by NVIDIA's MPS." if shared else ""
            _LOGGER.info(f"Scenes run on {engine.name}. {engine.packing.sentence}{by_mps}")
            ending = run_rounds(loop, engine, table)
    finally:
        end_all()
    failed = failures(loop)
    if ending.complete:
        from fit3d_loop.report import write_report  # torchmetrics and matplotlib come with it

        path = write_report(loop)
        CONSOLE.print(f"Backbone: {loop.places.root / 'backbone.safetensors'}", highlight=False, soft_wrap=True)
        CONSOLE.print(f"Report:   {path}  ({time.time() - start:.0f} s)", highlight=False, soft_wrap=True)
    else:
        CONSOLE.print(
            f"This part is done; {ending.missing}: start again when they are done.", highlight=False, soft_wrap=True
        )
    own = {scene.name for scene in loop.own}
    failed = {name: failure for name, failure in failed.items() if name in own}
    if len(failed) > loop.config.allow_failures:
        listed = " | ".join(f"{name} ({failure['stage']}): {failure['sentence']}" for name, failure in failed.items())
        raise UserError(
            f"{len(failed)} of {len(own)} scenes failed (--allow-failures {loop.config.allow_failures}): {listed}"
        )
    return ending


def _own_mps(config: LoopConfig) -> MPS:
    return config.mps if config.ray_address is None else "off"  # a daemon here serves no other machine


def _say_scenes(loop: Begun, notes: list[str]) -> None:
    for note in notes:
        _LOGGER.warning(note)
    kinds: dict[str, list[str]] = {}
    for scene in loop.scenes:
        kinds.setdefault(scene.said, []).append(scene.name)
    for said, names in kinds.items():
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        _LOGGER.info(f"{said}: {shown}")
