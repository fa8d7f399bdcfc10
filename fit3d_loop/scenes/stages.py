"""What is done to one scene in one round: geometry, features, bundle. Each stage is a command that can be typed."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fit3d_loop.commands.worker import CommandFailed, CommandLost, Settings, Taken, run_words
from fit3d_loop.records import Places, SceneState, read_state, write_state
from fit3d_loop.scenes.scene_list import SceneSource
from fit3d_ns.runs.names import CONFIG, GEOMETRY_RECORD, RECORD
from fit3d_ns.support.errors import UserError, first_line
from fit3d_ns.support.json_files import UNREADABLE, build, read_json

Result = Literal["done", "failed", "lost"]
_RUN = "geometry"
_KEPT_METRICS = ("feature_cosine", "feature_l1", "view_match_lifted", "view_match_teacher", "view_match_split")


@dataclass(frozen=True)
class Job:
    """Everything that a process on any machine needs to work on a scene."""

    source: SceneSource
    """The scene."""
    root: Path
    """The output folder."""
    number: int
    """The round, from 1."""
    teacher: str
    """Key of its teacher: `ORIGINAL`, or the hash of the student that teaches."""
    backbone: tuple[str, Path | None]
    """Name and local weights of the original."""
    steps: int
    """Of geometry."""
    flags: tuple[tuple[str, ...], tuple[str, ...]]
    """Further ones, of ``ns-train`` and of ``fit3d-lift``."""
    seed: int
    """Of geometry."""
    settings: Settings
    """How commands are run."""
    keep: bool = False
    """Whether what later rounds do not need stays: optimizers' states, the teacher's maps."""

    @property
    def places(self) -> Places:
        """Where things are."""
        return Places(self.root)


def work_on_scene(job: Job) -> tuple[Result, str | None]:
    """Does what is left to do for a scene in a round.

    Args:
        job: What to do.

    Returns:
        ``done``; ``failed`` and why, which is recorded; ``lost`` and why, where another attempt may help.
    """
    stage = "state"
    try:
        state = read_state(job.places, job.source.name, job.source.identity)
        for stage, work in (("geometry", _geometry), ("lift", _lift), ("bundle", _bundle)):
            work(job, state)
    except CommandLost as error:
        return "lost", str(error)
    except (CommandFailed, UserError) as error:
        record_failure(job, stage, str(error))
        return "failed", str(error)
    except OSError as error:
        record_failure(job, stage, f"{stage} of {job.source.name} could not be finished ({first_line(error)}).")
        return "failed", str(error)
    if not job.keep:
        shutil.rmtree(job.places.teacher_maps(job.source.name), ignore_errors=True)
    if state.failure is not None:
        state.failure = None
        write_state(job.places, state)
    return "done", None


def record_failure(job: Job, stage: str, sentence: str) -> None:
    """Writes down why a scene cannot be had.

    Args:
        job: What was tried.
        stage: Where it failed.
        sentence: Why.
    """
    try:
        state = read_state(job.places, job.source.name, job.source.identity)
    except UserError:
        state = SceneState(job.source.name, job.source.identity)
    state.failure = {"round": job.number, "teacher": job.teacher, "stage": stage, "sentence": sentence}
    write_state(job.places, state)


def _read(path: Path, run: Path) -> dict[str, Any]:
    try:
        return build(dict[str, Any], read_json(path))
    except UNREADABLE as error:
        raise UserError(
            f"{path} is missing or damaged ({first_line(error)}): delete {run} to begin it anew."
        ) from error


def is_ready(state: SceneState, number: int, teacher: str) -> bool:
    """Returns whether a scene can be distilled in a round.

    Args:
        state: Of the scene.
        number: The round.
        teacher: Key of its teacher.
    """
    return state.lifted(number, teacher) and state.bundle(number) is not None


def _run(job: Job, stage: str, words: list[str | Path]) -> Taken:
    places, name = job.places, job.source.name
    log, progress, lock = places.log(f"{name}-{stage}"), places.progress(name), places.lock(name)
    return run_words([str(word) for word in words], log, progress, lock, job.settings)


def _geometry(job: Job, state: SceneState) -> None:
    """Trains a splat, or takes the one that is there."""
    if state.geometry is not None:
        return
    source, made = job.source, time.time_ns()
    if source.kind != "photos":
        state.geometry = {"config": str(source.path), "seconds": 0.0, "made": made}
        write_state(job.places, state)
        return
    run = job.places.geometry(source.name)
    taken = _run(job, "geometry", train_words(job))
    found = _read(run / GEOMETRY_RECORD, run)
    state.geometry = {"config": str(run / CONFIG), "made": made, **vars(taken), **found}
    write_state(job.places, state)


def train_words(job: Job) -> list[str | Path]:
    """Returns the command that trains a scene and lifts the original's features onto it.

    Args:
        job: What to do; its source is ``photos``.
    """
    never = str(job.steps + 1)
    words: list[str | Path] = ["ns-train", "fit3d-splat", "--data", job.source.path]
    words += ["--output-dir", job.root / "geometry", "--experiment-name", job.source.name, "--timestamp", _RUN]
    words += ["--vis", "tensorboard", "--viewer.quit-on-train-completion", "True", "--machine.seed", str(job.seed)]
    words += ["--max-num-iterations", str(job.steps), "--steps-per-save", str(max(job.steps // 4, 1))]
    for name in ("image", "batch", "all-images"):
        words += [f"--steps-per-eval-{name}", never]
    words += ["--pipeline.model.features", "lift", *_backbone(job, "--pipeline.datamanager.")]
    words += ["--pipeline.datamanager.feature-cache-dir", job.places.teacher_maps(job.source.name)]
    return [*words, *job.flags[0], *job.source.parser]


def _lift(job: Job, state: SceneState) -> None:
    """Lifts the features of the round's teacher."""
    if state.lifted(job.number, job.teacher):
        return
    assert state.geometry is not None
    if job.number == 1 and job.source.kind == "photos":
        run, seconds = Path(state.geometry["config"]).parent, 0.0  # the training ended with it
    else:
        seconds = _run(job, f"lift{job.number}", lift_words(job, state)).seconds
        run = _lift_folder(job, state)
    metrics = _read(run / RECORD, run).get("metrics", {})
    state.rounds[str(job.number)] = {
        "teacher": job.teacher,
        "run": str(run),
        "bundle": None,
        "seconds": seconds,
        "metrics": {name: metrics[name] for name in _KEPT_METRICS if name in metrics},
    }
    write_state(job.places, state)


def lift_words(job: Job, state: SceneState) -> list[str | Path]:
    """Returns the command that lifts features onto a scene's geometry.

    Args:
        job: What to do.
        state: Of the scene, with its geometry.
    """
    words: list[str | Path] = ["fit3d-lift", "--name", _lift_name(job), "--overwrite"]
    words += ["--feature-cache-dir", job.places.teacher_maps(job.source.name)]
    if job.source.kind != "photos":  # nothing is written into what a user brings
        words += ["--output-dir", job.places.lifts(job.source.name)]
    if job.source.kind == "ply":
        words += ["--ply", job.source.path, "--data", job.source.data or ""]
    else:
        assert state.geometry is not None
        words += ["--load-config", state.geometry["config"]]
    if job.number == 1:
        words += _backbone(job, "--")
    else:
        words += ["--backbone-weights", job.places.student(job.number - 1)]
    return [*words, *job.flags[1]]


def _lift_name(job: Job) -> str:
    return f"round{job.number}"


def _lift_folder(job: Job, state: SceneState) -> Path:
    """Where the lift of a round is: in the run that was trained here, or apart from one that a user brought."""
    assert state.geometry is not None
    run = Path(state.geometry["config"]).parent
    above = run if job.source.kind == "photos" else job.places.lifts(job.source.name)
    return next(path.parent for path in above.rglob(RECORD) if path.parent.name == _lift_name(job))


def _bundle(job: Job, state: SceneState) -> None:
    """Makes the scene bundle that distillation reads."""
    if state.bundle(job.number) is not None:
        return
    lift = state.rounds[str(job.number)]
    folder = job.places.bundles(job.number, job.source.name)
    shutil.rmtree(folder, ignore_errors=True)
    _run(job, f"bundle{job.number}", bundle_words(job, Path(lift["run"]), folder))
    lift["bundle"] = str(next(folder.rglob("scene.json")).parent)
    write_state(job.places, state)


def bundle_words(job: Job, run: Path, folder: Path) -> list[str | Path]:
    """Returns the command that makes a bundle.

    Args:
        job: What to do.
        run: Whose features.
        folder: Where it goes.
    """
    return ["fit3d-distill", "--runs", run / CONFIG, "--bundles-only", "--bundle-dir", folder]


def _backbone(job: Job, prefix: str) -> list[str | Path]:
    name, weights = job.backbone
    return [f"{prefix}backbone", name, *([f"{prefix}backbone-weights", weights] if weights is not None else [])]
