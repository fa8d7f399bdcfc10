"""One round after the other: every scene lifted, a student distilled, the next round taught by it; then the probes."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.config import DistillConfig
from distill.recipes import choose_recipe
from fit3d_loop.commands.steps import Distributed, Step, StepRecord, is_done, read_step, run_step
from fit3d_loop.commands.worker import Settings
from fit3d_loop.comparison_pictures import picture_words
from fit3d_loop.config import LoopConfig
from fit3d_loop.records import ORIGINAL, Places, SceneState, read_state, try_lock
from fit3d_loop.scenes.runner import Engine
from fit3d_loop.scenes.scene_list import SceneSource
from fit3d_loop.scenes.stages import Job, is_ready
from fit3d_loop.scenes.table import Table
from fit3d_ns.backbones.students.fine_tuned import student_spec
from fit3d_ns.backbones.students.result_folder import CARD_NAME, WEIGHTS_NAME, read_card
from fit3d_ns.support.errors import DamagedFile, UserError, first_line
from fit3d_ns.support.files import atomic_path
from fit3d_ns.support.json_files import UNREADABLE, build, read_record

_LOGGER = logging.getLogger(__name__)
_STEPS_LOCK = "steps"


@dataclass(frozen=True)
class Begun:
    """A loop with everything settled."""

    config: LoopConfig
    """The user's choices, output folder absolute."""
    settings: dict[str, Any]
    """Those in force, of `keep_settings`."""
    scenes: list[SceneSource]
    """All scenes, in order."""
    backbone: str
    """The original."""
    num_photos: int
    """Of all scenes."""

    @property
    def places(self) -> Places:
        """Where things are."""
        return Places(self.config.output_dir)

    @property
    def own(self) -> list[SceneSource]:
        """The scenes of this process."""
        index, count = self.config.part()
        return self.scenes[index::count]

    def state(self, scene: SceneSource) -> SceneState:
        """Reads a scene's state.

        Args:
            scene: One of `scenes`.

        Returns:
            What is known of it by now.
        """
        return read_state(self.places, scene.name, scene.identity)


@dataclass(frozen=True)
class Ending:
    """How far a start came."""

    complete: bool
    """Whether the last step is done."""
    missing: str | None = None
    """What others have to do first, where it is not."""


def run_rounds(loop: Begun, engine: Engine, table: Table) -> Ending:
    """Does all that can be done.

    Args:
        loop: As it was begun: choices, folders and scenes.
        engine: Runs the scenes.
        table: Shows how far they are.

    Returns:
        How far it came.

    Raises:
        UserError: If a step failed, or no scene is left.
    """
    for number in range(1, loop.config.rounds + 1):
        teacher = ORIGINAL if number == 1 else read_card(loop.places.student(number - 1))["weights_sha256"]
        _lift_scenes(loop, engine, table, number, teacher)
        included, missing = _included(loop, number, teacher)
        if missing:
            return Ending(False, f"round {number} waits for {_listed(missing)}")
        if not included:
            raise UserError(f"No scene is left for round {number}: {_first_failure(loop)}")
        with try_lock(loop.places.lock(_STEPS_LOCK)) as had:
            if not had:
                return Ending(False, f"another job distils round {number}")
            for step in round_steps(loop, included, number, teacher):
                _distil(loop, engine, step)
            if number == loop.config.rounds and all(is_ready(loop.state(scene), number, teacher) for scene in included):
                run_step(loop.places, _picture_step(loop, included), engine)
            if not loop.config.keep_checkpoints:
                shutil.rmtree(loop.places.root / "bundles" / f"round{number}", ignore_errors=True)
    with try_lock(loop.places.lock(_STEPS_LOCK)) as had:
        if not had:
            return Ending(False, "another job does the last steps")
        _copy_result(loop)
        for step in probe_steps(loop):
            run_step(loop.places, step, engine)
    return Ending(True)


def _lift_scenes(loop: Begun, engine: Engine, table: Table, number: int, teacher: str) -> None:
    """Works on the scenes of this process that a round still needs."""
    failed: set[str] = set()
    # First what was never lifted; only if that changed what the student learns from, bundles that are gone, too.
    for _ in range(2):
        jobs = []
        current = _students_are_current(loop, number, teacher)
        for scene in loop.own:
            state = loop.state(scene)
            gone = number > 1 and not state.lifted(number - 1, _teacher(loop, number - 1))
            done = state.lifted(number, teacher) and (current or is_ready(state, number, teacher))
            if not gone and not done and scene.name not in failed:
                jobs.append(_job(loop, scene, number, teacher))
        if not jobs:
            return
        with table.round(number, loop.config.rounds, [job.source.name for job in jobs]) as show:
            outcomes = engine.run(jobs, show)
        failed |= {outcome.job.source.name for outcome in outcomes if outcome.result != "done"}


def _teacher(loop: Begun, number: int) -> str:
    return ORIGINAL if number == 1 else read_card(loop.places.student(number - 1))["weights_sha256"]


def _job(loop: Begun, scene: SceneSource, number: int, teacher: str) -> Job:
    config, settings = loop.config, loop.settings
    return Job(
        source=scene,
        root=loop.places.root,
        number=number,
        teacher=teacher,
        backbone=(loop.backbone, _weights(config)),
        steps=config.geometry_steps,
        flags=(tuple(config.given_flags("geometry_flags")), tuple(config.given_flags("lift_flags"))),
        seed=config.seed,
        settings=Settings(settings["threads"], keep_optimizer=config.keep_checkpoints),
        keep=config.keep_checkpoints,
    )


def _weights(config: LoopConfig) -> Path | None:
    return None if config.backbone_weights is None else config.backbone_weights.expanduser().absolute()


def _included(loop: Begun, number: int, teacher: str) -> tuple[list[SceneSource], list[str]]:
    """The scenes that a round has, and the names of those that others still have to do."""
    included, missing = [], []
    current = _students_are_current(loop, number, teacher)
    for scene in loop.scenes:
        state = loop.state(scene)
        if state.lifted(number, teacher) and (current or is_ready(state, number, teacher)):
            included.append(scene)
        elif not state.failed(number, teacher):
            missing.append(scene.name)
    return included, missing


def round_steps(loop: Begun, included: Sequence[SceneSource], number: int, teacher: str) -> list[Step]:
    """Returns the trainings of a round: its student, and in the first the controls.

    Args:
        loop: As it was begun: choices, folders and scenes.
        included: Scenes that are trained on.
        number: The round.
        teacher: Key of its teacher.
    """
    states = [loop.state(scene) for scene in included]
    key = _key([[state.name, (state.geometry or {}).get("made")] for state in states], teacher)
    kinds: list[str] = ["lifted"] + (list(loop.config.chosen_controls) if number == 1 else [])
    steps = []
    for kind in kinds:
        folder = loop.places.student(number) if kind == "lifted" else loop.places.control(kind)
        words: list[str | Path] = ["fit3d-distill", "--output-dir", folder, "--resume", "--targets", kind]
        words += ["--seed", str(loop.config.seed), "--cache-dir", loop.places.root / "photos"]
        if number > 1 and (weights := _weights(loop.config)) is not None:
            words += ["--original-weights", weights]
        words += [*loop.config.given_flags("distill_flags"), "--bundles"]
        words += [state.bundle(number) or loop.places.bundles(number, state.name) for state in states]
        title = f"Distil round {number}" if kind == "lifted" else f"Distil {kind}, which has no 3D in it"
        name = f"student{number}" if kind == "lifted" else kind
        threads = loop.settings["distill_threads"]
        typed = tuple(map(str, words))
        steps.append(Step(name, title, typed, Settings(threads), key, folder, distillation(loop), _is_trained))
    return steps


def distillation(loop: Begun) -> Distributed:
    """Returns how GPUs share a training.

    Args:
        loop: With the flags of `fit3d-distill`, and the number of photos, by which that chooses what is not given.
    """
    typed = " ".join(loop.config.given_flags("distill_flags")).replace("=", " ").replace("_", "-")

    def given(flag: str) -> int | None:
        found = re.search(rf"--{flag} (\d+)", typed)
        return int(found[1]) if found else None

    batch_size = given("batch-size") or choose_recipe(DistillConfig(), loop.num_photos, 1).batch_size
    return Distributed("distill", batch_size, given("gradient-accumulation") or 1)


def _students_are_current(loop: Begun, number: int, teacher: str) -> bool:
    """Whether the trainings of a round are done with exactly the scenes that it has now."""
    lifted = [scene for scene in loop.scenes if loop.state(scene).lifted(number, teacher)]
    return bool(lifted) and all(is_done(loop.places, step) for step in round_steps(loop, lifted, number, teacher))


def _distil(loop: Begun, engine: Engine, step: Step) -> None:
    if is_done(loop.places, step):
        return
    run_step(loop.places, step, engine)
    assert step.folder is not None
    for checkpoint in step.folder.glob("checkpoint*"):
        shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()


def _picture_step(loop: Begun, included: Sequence[SceneSource]) -> Step:
    """Draws what original, splats and the last student make of some views."""
    number, places = loop.config.rounds, loop.places
    bundles = [path for scene in included if (path := loop.state(scene).bundle(number)) is not None]
    folder = places.root / "pictures"
    words = picture_words(folder, places.student(number), bundles, _weights(loop.config), places.root / "photos")
    key = _key([scene.name for scene in included], read_card(places.student(number))["weights_sha256"])
    return Step("pictures", "Draw pictures", words, Settings(loop.settings["distill_threads"]), key, folder)


def probe_steps(loop: Begun) -> list[Step]:
    """Returns the probes of original, student and controls; none where there is no data.

    Args:
        loop: A loop whose students are done.
    """
    config, steps = loop.config, []
    if config.probe_data is None:
        return []
    folders = [loop.places.student(config.rounds), *map(loop.places.control, config.chosen_controls)]
    key = _key([read_card(folder)["weights_sha256"] for folder in folders], "")
    for task in config.probe_tasks:
        words: list[str | Path] = ["fit3d-probe", task, "--dataset", config.probe_dataset]
        words += ["--data", config.probe_data.expanduser().absolute(), "--backbone", loop.backbone]
        if (weights := _weights(config)) is not None:
            words += ["--backbone-weights", weights]
        words += ["--tuned", folders[0], *(["--control", *folders[1:]] if folders[1:] else [])]
        # Tasks on the same photos share their features.
        words += ["--output-dir", loop.places.probe(task), "--cache-dir", loop.places.probe("features")]
        words += config.given_flags("probe_flags")
        settings = Settings(loop.settings["distill_threads"])
        typed, folder = tuple(map(str, words)), loop.places.probe(task)
        steps.append(Step(f"probe_{task}", f"Probe {task}", typed, settings, key, folder, is_whole=_is_probed))
    return steps


def _is_trained(folder: Path) -> bool:
    try:
        student_spec(folder, "--output-dir")
    except UserError as error:
        _LOGGER.warning("%s is trained anew: %s", folder, error)
        return False
    return _has_metrics(folder, "mean", "loss", "interpolation")


def _is_probed(folder: Path) -> bool:
    return _has_metrics(folder, "rows")


def _has_metrics(folder: Path, *needed: str) -> bool:
    path = folder / "metrics.json"
    try:
        found = build(dict[str, Any], read_record(path))
        if missing := [name for name in needed if not isinstance(found.get(name), dict)]:
            raise DamagedFile(f"{missing[0]} is missing")
    except UNREADABLE as error:
        _LOGGER.warning("%s is damaged (%s): it is made anew.", path, first_line(error))
        return False
    return True


def _copy_result(loop: Begun) -> None:
    """Puts the last student where users look for it; the card comes last."""
    for name in (WEIGHTS_NAME, CARD_NAME):
        with atomic_path(loop.places.root / name) as temporary:
            shutil.copyfile(loop.places.student(loop.config.rounds) / name, temporary)


def failures(loop: Begun) -> dict[str, dict[str, Any]]:
    """Returns what failed, by scene.

    Args:
        loop: As it was begun: choices, folders and scenes.
    """
    found = {scene.name: loop.state(scene).failure for scene in loop.scenes}
    return {name: failure for name, failure in found.items() if failure is not None}


def step_records(loop: Begun) -> list[StepRecord]:
    """Returns the records of all steps that are done.

    Args:
        loop: As it was begun: choices, folders and scenes.
    """
    names = [f"student{number}" for number in range(1, loop.config.rounds + 1)]
    names[1:1] = list(loop.config.chosen_controls)
    if loop.config.probe_data is not None:
        names += [f"probe_{task}" for task in loop.config.probe_tasks]
    return [record for name in names if (record := read_step(loop.places, name)) is not None]


def _first_failure(loop: Begun) -> str:
    found = failures(loop)
    if not found:
        return "all were left out."
    name, failure = next(iter(found.items()))
    more = f" ({len(found) - 1} more failed)" if len(found) > 1 else ""
    return f"{name}: {failure['sentence']}{more}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _key(facts: Any, teacher: str) -> str:
    return hashlib.sha256(json.dumps([facts, teacher]).encode()).hexdigest()[:16]
