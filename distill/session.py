"""One training from opened scenes to the files that it leaves."""

import copy
import logging

import torch

from distill.config import DistillConfig
from distill.control_targets import ControlTargets
from distill.evaluation import Averages, HeldOutViews, SceneResult, Validation, measure_scene
from distill.photo_store import PhotoStore
from distill.prefetcher import Prefetcher
from distill.recipes import choose_recipe, explain
from distill.results.report import Findings, write_metrics, write_report
from distill.results.result import make_card, push_to_hub
from distill.sampler import Sampler
from distill.scenes import Scene, SceneCache
from distill.student import load_original, load_student, load_teacher, plain_state_dict
from distill.targets import LiftedTargets, TargetSource
from distill.trainer import Trainer, TrainingResult, read_resumed
from fit3d_ns.backbones.students.averaging import interpolate
from fit3d_ns.backbones.students.other_formats import check_dinov2, check_onnx
from fit3d_ns.backbones.students.result_folder import METRICS_NAME, PAGE_NAME, write_model_card, write_weights
from fit3d_ns.support.curve_log import CurveLog
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import World, wait_for_all
from fit3d_ns.support.progress import progress
from fit3d_ns.support.samples import evenly_spaced

_LOGGER = logging.getLogger(__name__)


class Session:
    """Everything that one training holds, and frees at its end.

    Args:
        config: The user's choices.
        scenes: The scenes to train on.
        validation: Scenes to measure on while it trains, and at the end.
        world: This process among its fellows.

    Raises:
        UserError: Whatever is wrong with scenes, choices or machine.
    """

    def __init__(self, config: DistillConfig, scenes: list[Scene], validation: list[Scene], world: World):
        self.config = config
        self.scenes = scenes
        self.validation = validation
        self.world = world
        device = world.device
        every = [*scenes, *validation]
        views = [scene.sampled_views() for scene in scenes]
        num_views = sum(len(sampled.views) for sampled in views)
        self.recipe = choose_recipe(config, num_views, world.size * config.gradient_accumulation)
        self.start = load_student(config, scenes, device)
        self.original = load_original(config, scenes, self.start, device)
        self._say_where_it_starts()
        self.resumed = read_resumed(config, self.recipe, scenes, self.start)
        if config.dinov2_layout:
            check_dinov2(self.start.info.timm_id)
        if config.transformers_layout:
            check_dinov2(self.start.info.timm_id, "--transformers-layout")
        if config.onnx:
            check_onnx()
        memory = _photo_memory(config, device)
        self.photos = PhotoStore(
            every,
            self.start.info.patch_size,
            device,
            config.cache_dir,
            config.workers,
            config.data_root,
            resident_bytes=memory,
        )
        self.scene_cache = SceneCache(every, world, config.scene_placement, config.scene_memory)
        _LOGGER.info(self.scene_cache.describe())
        block_bytes = self.scene_cache.block_bytes
        if self.resumed is not None:  # the order of the views depends on it
            block_bytes = self.resumed["block_bytes"]
            self.scene_cache.check_block(block_bytes)
        recipe = self.recipe
        self.lifted = LiftedTargets(every, self.scene_cache, device, recipe.accumulation, config.min_accumulation)
        self.targets: TargetSource = self.lifted
        if config.targets != "lifted":
            self.targets = self._control(every)
        self.sampler = Sampler(views, recipe.batch_size, config.seed, recipe.flip, block_bytes)
        photo_bytes = self.photos.num_bytes
        left = memory - photo_bytes if photo_bytes <= memory else memory
        self.prefetcher = Prefetcher(
            scenes, self.sampler, self.targets, self.scene_cache, self.photos, config, world, kept_bytes=left
        )
        self.curves: CurveLog | None = None

    def run(self) -> None:
        """Decodes photos, trains, and writes everything."""
        config, world = self.config, self.world
        try:
            trainer = Trainer(
                config,
                self.recipe,
                self.scenes,
                copy.deepcopy(self.start),
                self.prefetcher,
                self.sampler,
                world,
                self.resumed,
            )
            decoded = self.photos.fill(world.rank, world.size, show=world.is_main)
            wait_for_all()
            if world.local_size < world.size:  # another machine's share may have gone to a disk of its own
                decoded += self.photos.fill(world.local_rank, world.local_size, show=False)
                wait_for_all()
            if decoded:
                _LOGGER.info(f"Decoded {decoded} photos; the next start finds them.")
            num_views, num_scenes = self.sampler.num_views, len(self.scenes)
            kind = world.device.type.upper()
            _LOGGER.info(explain(self.recipe, config, num_views, num_scenes, trainer.num_steps))
            _LOGGER.info(
                f"{self.start.info.name}, layer {self.start.info.layer}: {trainer.num_parameters:,} weights to train "
                f"on {world.size} {kind} process{'es' if world.size > 1 else ''}. {trainer.how_steps_run}"
            )
            if world.is_main:
                self.curves = CurveLog(config.output_dir, config.vis, "fit3d-distill", trainer.settings, trainer.step)
                trainer.watch(self.curves, self._validation())
            result = trainer.train()
            if world.is_main:
                self._finish(result)
            wait_for_all()  # a process that leaves early takes the others' connection with it
        finally:
            if self.curves is not None:
                self.curves.close()
            self.photos.close()
            self.scene_cache.close()

    def _say_where_it_starts(self) -> None:
        original = self.scenes[0].info.teacher_original
        if original is None or self.config.student is not None:
            return
        what = "that teacher" if self.config.start_from == "teacher" else f"{original['name']} itself"
        _LOGGER.info(
            f"The scenes' teacher is itself a student of {original['name']}: the next one starts from {what} "
            "(--start-from) and is averaged with the original."
        )

    def _control(self, scenes: list[Scene]) -> ControlTargets:
        config, device = self.config, self.world.device
        # Where student and teacher are the same, the file that the user names for one serves for both.
        same = config.student is None and config.student_layer is None
        teacher = load_teacher(scenes, device, config.student_weights if same else None).requires_grad_(False)
        if teacher.info.patch_size != self.start.info.patch_size:
            raise UserError(
                f"--targets {config.targets} needs a student with the teacher's patch size: leave --student out."
            )
        return ControlTargets(config.targets, scenes, self.scene_cache, self.photos, teacher, self.lifted, device)

    def _views(self, index: int) -> HeldOutViews:
        every, num_views = [*self.scenes, *self.validation], self.config.report_views
        unseen = index >= len(self.scenes)
        return HeldOutViews(every, index, self.original, self.targets, self.lifted, self.photos, num_views, unseen)

    def _validation(self) -> Validation | None:
        if not self.validation:
            return None
        first = len(self.scenes)
        held_out = [self._views(first + number) for number in range(len(self.validation))]
        weights = plain_state_dict(self.original.model)
        return Validation(held_out, copy.deepcopy(self.original), weights, self.recipe.interpolate)

    def _finish(self, result: TrainingResult) -> None:
        config, amount = self.config, self.recipe.interpolate
        student, original = plain_state_dict(result.model), plain_state_dict(self.original.model)
        start = self.start.identity["weights_sha256"]
        card = make_card(config, self.recipe, self.scenes, self.validation, self.original.identity, start, result)
        if isinstance(self.targets, ControlTargets) and self.targets.blurs:
            blurs = self.targets.blurs
            card["blur_patches"] = [
                round(blurs[index], 3) if index in blurs else None for index in range(len(self.scenes))
            ]
        averaged = interpolate(student, original, amount)
        files = write_weights(
            config.output_dir,
            student,
            averaged,
            card,
            config.half,
            config.dinov2_layout,
            config.transformers_layout,
            config.onnx,
        )
        _LOGGER.info(f"Weights: {files[0]}")
        averages = Averages(copy.deepcopy(self.original), student, original)
        measured = self._measure(averages)
        findings = Findings(*measured, result.losses, result.validation)
        write_metrics(config.output_dir, card, findings)
        write_report(config.output_dir, card, findings)
        files += [config.output_dir / METRICS_NAME, config.output_dir / PAGE_NAME]
        _LOGGER.info(f"Report:  {files[-1]}")
        files.append(write_model_card(config.output_dir))
        if config.push_to_hub is not None:
            _LOGGER.info(f"Uploaded to {push_to_hub(config.push_to_hub, files)}")

    def _measure(self, averages: Averages) -> tuple[list[SceneResult], list[SceneResult]]:
        """Measures some scenes that were trained on, and some validation scenes."""
        first, count = len(self.scenes), self.config.measured_scenes
        indices = evenly_spaced(range(first), count)
        indices += evenly_spaced(range(first, first + len(self.validation)), count)
        results: tuple[list[SceneResult], list[SceneResult]] = ([], [])
        with progress("Measuring scenes", len(indices)) as advance:
            for index in indices:
                pictures = 2 if len(results[0]) < self.config.report_scenes and index < first else 0
                found = measure_scene(self._views(index), averages, self.recipe.interpolate, pictures)
                results[index >= first].append(found)
                advance()
        return results


def _photo_memory(config: DistillConfig, device: torch.device) -> int:
    if config.photo_memory is not None:
        return int(config.photo_memory * 1e9)
    if device.type == "cuda":
        return int(0.15 * torch.cuda.mem_get_info(device)[0])
    return 2_000_000_000
