"""``fit3d-lift``: features onto trained splats, in seconds a scene."""

import gc
import json
import logging
import random
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from fit3d_ns.backbones import BackboneSpec
from fit3d_ns.lifting.settings import LiftSettings
from fit3d_ns.runs.names import CONFIG, REPORT
from fit3d_ns.support.command_line import run_command
from fit3d_ns.support.errors import FLAGS, UserError, flags_are

_LOGGER = logging.getLogger("fit3d_ns.commands.lift.cli")  # not __main__, which `python -m` makes of __name__
DISAGREEMENT = 0.9
"""From this `photo_check.photo_mismatch` on, a splat is taken not to show its photos."""


@dataclass
class LiftCommand:
    """Lifts a backbone's features onto trained splats: splatfacto runs, fit3d-splat runs or PLY files.

    Lifts stand in the run that they were lifted onto, one for each teacher, each with a config.yml that ns-viewer,
    ns-eval, ns-render, ns-export and fit3d-distill open; the geometry is stored once. What is done already is skipped,
    so a command that was stopped goes on where it was.
    """

    load_config: Path | None = None
    """config.yml of one run."""
    runs: Path | None = None
    """Folder of runs: every finished splatfacto or fit3d-splat run below it is lifted."""
    ply: Path | None = None
    """PLY file of Gaussians (3DGS, gsplat, ns-export); needs --data."""
    data: Path | None = None
    """Photos and poses: of the --ply file, or the new place of a run's scene that moved."""
    output_dir: Path | None = None
    """Where lifts go, as ns-train's --output-dir, instead of into the runs, which they still need for their geometry;
    for a PLY file, where its geometry goes too (`outputs` without it)."""
    name: str | None = None
    """Of the lift among those onto the same geometry; without it that of its teacher, and for a teacher that
    fit3d-distill wrote, also the beginning of its hash."""
    overwrite: bool = False
    """Lift again what was lifted with other settings."""
    backbone: str | None = None
    """Teacher; without it the run's own, or dinov2_small."""
    backbone_weights: Path | None = None
    """Local weights of the teacher, or a folder that fit3d-distill wrote, whose card says all the rest."""
    backbone_layer: int | None = None
    """Block whose output is lifted; negative counts from the end."""
    backbone_norm: bool | None = None
    """Whether the backbone's final norm is applied to that layer."""
    backbone_normalization: Literal["own", "imagenet"] | None = None
    """Mean and standard deviation of the input."""
    backbone_max_size: int | None = None
    """Longest side, in pixels, at which the teacher sees a photo; 0 for no limit."""
    feature_cache_dir: Path | None = None
    """Where the teacher's maps are kept."""
    feature_dim: int | None = None
    """Channels on every Gaussian, up to the teacher's width; without it the run's own, or 64."""
    feature_grid: Literal["paper", "fast"] | None = None
    """How features are rendered for the teacher's patches; without it the run's own, or fast."""
    lift: tyro.conf.OmitArgPrefixes[LiftSettings] = field(default_factory=LiftSettings)
    """How features are solved for."""


def main(args: list[str] | None = None) -> None:
    """Command line of ``fit3d-lift``.

    Args:
        args: Words of the command line; None for those of this process.
    """

    def command() -> None:
        run_lift(tyro.cli(LiftCommand, prog="fit3d-lift", args=args))

    run_command(command)


def run_lift(command: LiftCommand) -> list[Path]:
    """Lifts features onto all splats that a command names.

    Args:
        command: The user's choices.

    Returns:
        The ``config.yml`` of every lifted run, those that were there already included.

    Raises:
        UserError: If nothing can be lifted, or, after all other scenes are done, if any failed.
    """
    command.lift.check_ranges()  # a setting out of range is said before anything is loaded
    named = [name for name in ("load_config", "runs", "ply") if getattr(command, name) is not None]
    if len(named) != 1:
        raise UserError("Name what to lift onto with one of --load-config, --runs and --ply.")
    _LOGGER.info(f"Lifting onto {getattr(command, named[0])}")
    from fit3d_ns.backbones import student_spec  # needs torch, which --help does without

    student = None if command.backbone_weights is None else student_spec(command.backbone_weights, "--backbone-weights")
    command = _as_its_card_says(command, student)
    if command.runs is None:
        return [_lift(command, command.load_config)]
    if command.data is not None:
        raise UserError("--data names one scene, and --runs many: use --load-config for a run whose scene moved.")
    import torch

    from fit3d_ns.commands.lift.sources import runs_below

    paths, notes = runs_below(command.runs, command.backbone, student is not None)
    for note in notes:
        _LOGGER.info(note)
    done, failures = [], {}
    for number, path in enumerate(paths, start=1):
        _LOGGER.info(f"[{number}/{len(paths)}] {path.parent}")
        try:
            done.append(_lift(command, path))
        except Exception as error:  # other scenes go on, whatever one of them holds
            reason = str(error).strip().splitlines()
            prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            failures[path.parent] = prefix + (reason[0] if reason else "no reason given")
            _LOGGER.info(f"Failed: {failures[path.parent]}")
        # Pipelines refer to themselves: without this, the next scene would find the memory of this one taken.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    _LOGGER.info(f"{len(done)} of {len(paths)} runs are lifted.")
    if failures:
        listed = " | ".join(f"{run}: {reason}" for run, reason in failures.items())
        raise UserError(f"{len(failures)} of {len(paths)} runs could not be lifted: {listed}")
    return done


def lift_source(source: Any, command: LiftCommand) -> Path:
    """Lifts features onto one splat and writes them beside it, unless they are there already.

    Args:
        source: A ``LiftSource``.
        command: The user's choices.

    Returns:
        Path of the lift's ``config.yml``.

    Raises:
        UserError: If scene, teacher or geometry cannot be used, or the lift cannot be written.
    """
    import torch

    from fit3d_ns.commands.lift.lift_writer import finished_request, write_geometry, write_lift
    from fit3d_ns.scenes.lift import lift_report, lift_scene
    from fit3d_ns.scenes.views import streamed_scene

    start = time.perf_counter()
    for config in source.configs:
        _apply(command, config)
    request = _request(source, command)
    target = source.place(command.name or _teacher_name(source.configs[0].pipeline.datamanager.backbone_spec()))
    existing = finished_request(target)
    if existing == request:
        _LOGGER.info(f"Lifted already: {target / CONFIG}")
        return target / CONFIG
    if existing is not None and not command.overwrite:
        changed = ", ".join(sorted(name for name in request if existing.get(name) != request[name]))
        raise UserError(
            f"{target} was lifted with other settings or from another state of the run ({changed}): add --overwrite "
            "to lift it again, or --name to lift beside it."
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    pipeline, config = open_source(source)
    opened = time.perf_counter()
    scene = streamed_scene(pipeline.datamanager, pipeline.fit3d_model)
    teacher_done = time.perf_counter()
    lift = lift_scene(pipeline.fit3d_model, scene, command.lift)
    lift.seconds = {"open": opened - start, "teacher": teacher_done - opened, **lift.seconds}
    provenance = {"request": request, "training_views": len(scene.training), "held_out_views": len(scene.held_out)}
    if cuda:
        provenance["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 2**20
    reporting = time.perf_counter()
    report = lift_report(
        pipeline.fit3d_model, scene, lift, pipeline.datamanager.teacher_info.name, provenance.get("peak_memory_mb")
    )
    lift.seconds["report"] = time.perf_counter() - reporting
    geometry = source.file if source.gaussians is None else write_geometry(source.folder, source.file, source.gaussians)
    path = write_lift(pipeline, config, geometry, source.step, lift, command.lift, report, provenance)
    _summarize(lift, time.perf_counter() - start, path)
    return path


def _as_its_card_says(command: LiftCommand, student: BackboneSpec | None) -> LiftCommand:
    """Returns the command with everything that a teacher's card decides.

    Args:
        command: The user's choices.
        student: The teacher, where fit3d-distill wrote it.

    Raises:
        UserError: If a flag contradicts the card.
    """
    if student is None:
        return command
    from fit3d_ns.backbones import describe_backbone

    fields_ = ("name", "layer", "norm", "normalization")
    flags = ("backbone", "backbone_layer", "backbone_norm", "backbone_normalization")
    for flag, field_name in zip(flags, fields_):
        given, known = getattr(command, flag), getattr(student, field_name)
        if given is None:
            continue
        wanted, found = (describe_backbone(replace(student, **{field_name: value})) for value in (known, given))
        if wanted != found or (flag == "backbone_norm" and given != known):
            flag = f"--{flag.replace('_', '-')}"
            raise UserError(f"{flag} {given}: the card of {command.backbone_weights} says {known}; leave {flag} out.")
    decided = {flag: getattr(student, field_name) for flag, field_name in zip(flags, fields_)}
    return replace(command, backbone_weights=student.weights, **decided)


def _teacher_name(spec: BackboneSpec) -> str:
    """Returns the name of the lifts of a teacher: its own, and of a fine-tuned one the beginning of its hash too."""
    from fit3d_ns.backbones import backbone_identity
    from fit3d_ns.backbones.students.result_folder import original_of
    from fit3d_ns.runs.teachers import teacher_name

    if spec.weights is None:
        return teacher_name(spec.name)
    weights_sha256 = backbone_identity(spec)["weights_sha256"]
    return teacher_name(spec.name, weights_sha256 if original_of(spec.weights, weights_sha256) is not None else None)


def _lift(command: LiftCommand, run: Path | None) -> Path:
    """Lifts one splat; what goes wrong is said with this command's flags, which lack the prefixes of ns-train's."""
    own = {item.name for item in fields(command)}
    with flags_are(**{name: f"--{name.replace('_', '-')}" for name in FLAGS if name in own}):
        return lift_source(_source(command, run), command)


def _source(command: LiftCommand, run: Path | None) -> Any:
    from fit3d_ns.commands.lift.sources import source_from_ply, source_from_run

    if run is not None:
        return source_from_run(run, command.output_dir, command.data)
    assert command.ply is not None
    return source_from_ply(command.ply, command.data, command.output_dir)


def open_source(source: Any) -> tuple[Any, Any]:
    """Builds the pipeline of the lift to be written, with its geometry, in the coordinates that fit the photos.

    Args:
        source: A ``LiftSource``.

    Returns:
        The pipeline, in evaluation mode, and the configuration of the lift.

    Raises:
        UserError: If scene or geometry cannot be used, or do not belong together.
    """
    from fit3d_ns.runs.frozen_geometry import replace_gaussians
    from fit3d_ns.scenes.photo_check import photo_mismatch

    best: Any = None
    for config in source.configs:
        _seed(config.machine.seed)
        building = deepcopy(config)
        building.pipeline.model.features = "joint"
        building.pipeline.model.init_from = source.checkpoint
        pipeline = building.pipeline.setup(device=config.machine.device_type, test_mode="val")
        if source.gaussians is not None:
            replace_gaussians(pipeline.model.gauss_params, source.gaussians, source.name)
        pipeline.model.step = max(source.step, 30000)  # all spherical harmonics, as in any loaded model
        pipeline.eval()
        score = photo_mismatch(pipeline.model, pipeline.datamanager.photo_reader("train"))
        if best is None or score < best[0]:
            best = (score, pipeline, config)
    score, pipeline, config = best
    if score > DISAGREEMENT:
        raise UserError(
            f"The photos of {config.pipeline.datamanager.data} do not look like what {source.name} renders for them: "
            "they were changed, or photos and splat are of different scenes or coordinates."
        )
    return pipeline, config


def _apply(command: LiftCommand, config: Any) -> None:
    """Puts the flags that were given in place of the run's own settings."""
    names = ("backbone", "backbone_layer", "backbone_norm", "backbone_normalization", "backbone_max_size")
    datamanager, model = config.pipeline.datamanager, config.pipeline.model
    if command.backbone is not None and command.backbone != datamanager.backbone:
        datamanager.backbone_weights = None  # those of the run's own teacher
    for name in (*names, "backbone_weights", "feature_cache_dir"):
        if getattr(command, name) is not None:
            setattr(datamanager, name, getattr(command, name))
    for name in ("feature_dim", "feature_grid"):
        if getattr(command, name) is not None:
            setattr(model, name, getattr(command, name))
    model.lift = command.lift


def _request(source: Any, command: LiftCommand) -> dict[str, Any]:
    """What decides the outcome, as JSON gives it back."""
    datamanager, model = source.configs[0].pipeline.datamanager, source.configs[0].pipeline.model
    request = {
        **source.identity,
        "scene": str(datamanager.data),
        "teacher": {
            "backbone": datamanager.backbone,
            "weights": _file_identity(datamanager.backbone_weights),
            "layer": datamanager.backbone_layer,
            "norm": datamanager.backbone_norm,
            "normalization": datamanager.backbone_normalization,
            "max_size": datamanager.backbone_max_size,
        },
        "feature_dim": model.feature_dim,
        "feature_grid": model.feature_grid,
        "lift": {name: value for name, value in asdict(command.lift).items() if name != "views_per_batch"},
    }
    return json.loads(json.dumps(request))  # tuples are lists there


def _file_identity(weights: Path | None) -> dict[str, Any] | None:
    """Tells weights from others that were written to the same place."""
    if weights is None:
        return None
    path = Path(weights).expanduser().absolute()
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"The weights {path} cannot be read ({error.strerror}): check --backbone-weights.") from error
    return {"path": str(path), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}


def _seed(seed: int) -> None:
    """Makes what a checkpoint keeps of random generators the same in every run of the command."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _summarize(lift: Any, seconds: float, path: Path) -> None:
    stages = ", ".join(f"{name} {value:.1f}" for name, value in lift.seconds.items())
    _LOGGER.info(
        f"Lifted {len(lift.values):,} Gaussians in {seconds:.1f} s ({stages}), {lift.refinements} refinement steps."
    )
    names = {
        "feature_cosine": "held-out cosine",
        "feature_l1": "held-out L1",
        "view_match_lifted": f"view match ({lift.metrics.get('view_match_split')} views)",
        "view_match_teacher": "of the teacher",
    }
    numbers = ", ".join(f"{text} {lift.metrics[name]:.3f}" for name, text in names.items() if name in lift.metrics)
    measured = numbers or "Not measured, since no view is held out"
    _LOGGER.info(f"{measured}; views disagree by {lift.disagreement:.0%}, {lift.num_unseen:,} Gaussians unseen.")
    _LOGGER.info(f"Lift: {path}")
    _LOGGER.info(f"Report: {path.parent / REPORT}")


if __name__ == "__main__":
    main()
