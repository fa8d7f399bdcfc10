"""The command ``fit3d-distill``: scenes in, a fine-tuned backbone out."""

import copy
import sys
from pathlib import Path

import torch
import tyro

from distill.checkpoint import check_writable
from distill.config import DistillConfig, check_choices
from distill.feed import Feed
from distill.photo_store import PhotoStore
from distill.report import SceneResult, measure_scene, write_metrics, write_report
from distill.result import check_hub, make_card, push_to_hub
from distill.sampler import Sampler
from distill.scenes import Scene, SceneBank, make_bundles, open_scenes
from distill.student import load_student, load_teacher, plain_state_dict
from distill.targets import ControlTargets, LiftedTargets, TargetSource
from distill.trainer import Trainer, TrainingResult, advice_for_few_views, read_resumed
from fit3d_ns.backbones import Backbone
from fit3d_ns.backbones.result_folder import check_dinov2, write_weights
from fit3d_ns.support.command_line import run_command
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import World, join_world


def main() -> None:
    """Command line."""
    run_command(lambda: distil(tyro.cli(DistillConfig)))


def distil(config: DistillConfig) -> None:
    """Runs distillation from beginning to end.

    Args:
        config: The user's choices.

    Raises:
        UserError: Whatever is wrong with the scenes, the choices or the machine, before any long work.
        SystemExit: After SIGTERM; a checkpoint was saved.
    """
    with join_world(config.device, "start again with --resume") as world:
        _check(config, world)
        scenes = _scenes(config, world)
        if not config.bundles_only:
            _Session(config, scenes, world).run()


class _Session:
    """Everything that one training holds, and frees at its end."""

    def __init__(self, config: DistillConfig, scenes: list[Scene], world: World):
        self.config = config
        self.scenes = scenes
        self.world = world
        device = world.device
        self.original = load_student(config, scenes, device)
        resumed = read_resumed(config, scenes, self.original)
        if config.dinov2_layout:
            check_dinov2(self.original.info.timm_id)
        memory = _photo_memory(config, device)
        self.photos = PhotoStore(
            scenes,
            self.original.info.patch_size,
            device,
            config.cache_dir,
            config.workers,
            config.data_root,
            resident_bytes=memory,
        )
        self.bank = SceneBank(scenes, world, config.scene_placement, config.scene_memory)
        world.say(self.bank.describe())
        block_bytes = self.bank.block_bytes
        if resumed is not None:  # the order of the views depends on it
            block_bytes = resumed["block_bytes"]
            self.bank.check_block(block_bytes)
        self.lifted = LiftedTargets(scenes, self.bank, device, config.accumulation, config.min_accumulation)
        self.targets: TargetSource = self.lifted
        if config.targets == "control":
            # Where student and teacher are the same, the file that the user names for one serves for both.
            same = config.student is None and config.student_layer is None
            weights = config.student_weights if same else None
            teacher = load_teacher(scenes, device, weights).requires_grad_(False)
            if teacher.info.patch_size != self.original.info.patch_size:
                raise UserError("--targets control needs a student with the teacher's patch size: leave --student out.")
            self.targets = ControlTargets(scenes, self.bank, self.photos, teacher, device)
        self.sampler = Sampler(
            [scene.sampled_views() for scene in scenes],
            config.batch_size,
            config.seed,
            config.flip,
            block_bytes,
        )
        photo_bytes = self.photos.num_bytes
        left = memory - photo_bytes if photo_bytes <= memory else memory
        self.feed = Feed(scenes, self.sampler, self.targets, self.bank, self.photos, config, world, kept_bytes=left)
        self.student = copy.deepcopy(self.original)
        self.trainer = Trainer(config, scenes, self.student, self.feed, self.sampler, world, resumed)

    def run(self) -> None:
        """Decodes photos, trains, and writes everything."""
        config, world = self.config, self.world
        try:
            decoded = self.photos.fill(world.rank, world.size, show=world.is_main)
            world.wait()
            if world.local_size < world.size:  # another machine's share may have gone to a disk of its own
                decoded += self.photos.fill(world.local_rank, world.local_size, show=False)
                world.wait()
            if decoded:
                world.say(f"Decoded {decoded} photos; the next start finds them.")
            num_steps, views, scenes = self.trainer.num_steps, self.sampler.num_views, len(self.scenes)
            kind = world.device.type.upper()
            world.say(
                f"{self.original.info.name}, layer {self.original.info.layer}: {self.trainer.num_parameters:,} weights "
                f"to train, {views} views of {scenes} scene{'s' if scenes > 1 else ''}, {num_steps} steps of "
                f"{config.batch_size} on {world.size} {kind} process{'es' if world.size > 1 else ''}."
            )
            advice = advice_for_few_views(config, views, num_steps)
            if advice:
                world.say(advice)
            result = self.trainer.train()
            if world.is_main:
                self._finish(result)
            world.wait()  # a process that leaves early takes the others' connection with it
        finally:
            self.photos.close()
            self.bank.close()

    def _finish(self, result: TrainingResult) -> None:
        config, world = self.config, self.world
        weights = plain_state_dict(result.model)
        card = make_card(config, self.scenes, self.original.identity, result, weights)
        files = write_weights(config.output_dir, weights, weights, card, config.half, config.dinov2_layout)
        world.say(f"Weights: {files[0]}")
        tuned = copy.deepcopy(self.original)
        tuned.model.load_state_dict(weights, strict=True)
        results = self._measure(tuned)
        write_metrics(config.output_dir, card, results, result.losses)
        write_report(config.output_dir, card, results, result.losses)
        files += [config.output_dir / "metrics.json", config.output_dir / "report.html"]
        world.say(f"Report:  {files[-1]}")
        if config.push_to_hub is not None:
            world.say(f"Uploaded to {push_to_hub(config.push_to_hub, files)}")

    def _measure(self, tuned: Backbone) -> list[SceneResult]:
        shown = self.config.report_scenes
        return [
            measure_scene(
                self.scenes,
                index,
                self.original,
                tuned,
                self.targets,
                self.lifted,
                self.photos,
                self.config.report_views,
                num_pictures=2 if index < shown else 0,
            )
            for index in range(len(self.scenes))
        ]


def _check(config: DistillConfig, world: World) -> None:
    """Refuses what cannot be carried out, as far as that can be known before any scene is opened."""
    check_choices(config, world.size)
    if world.is_main and not config.bundles_only:
        check_writable(config.output_dir)
        if config.push_to_hub is not None:
            check_hub(config.push_to_hub)


def _scenes(config: DistillConfig, world: World) -> list[Scene]:
    """Makes bundles in the first process, opens them in all."""
    folders: list[Path] = []
    if world.is_main:
        folders = make_bundles(config, world.say)
    if world.size > 1:
        shared = [folders]
        torch.distributed.broadcast_object_list(shared, src=0)
        folders = shared[0]
    return open_scenes(folders, config.data_root)


def _photo_memory(config: DistillConfig, device: torch.device) -> int:
    if config.photo_memory is not None:
        return int(config.photo_memory * 1e9)
    if device.type == "cuda":
        return int(0.15 * torch.cuda.mem_get_info(device)[0])
    return 2_000_000_000


if __name__ == "__main__":
    sys.exit(main())
