"""Scene bundles from trained or lifted ``fit3d-splat`` runs."""

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fit3d_ns.backbones import backbone_identity
from fit3d_ns.backbones.students.result_folder import original_of
from fit3d_ns.compat import nerfstudio_needed
from fit3d_ns.data.photos.bundled import DATA_ROOT_FLAG, BundledPhoto, hash_file, locate
from fit3d_ns.features.grid import FEATURE_GRIDS, FeatureGrid
from fit3d_ns.features.rendering import Geometry, viewmats_of
from fit3d_ns.runs.bundle import (
    BundleCameras,
    BundleInfo,
    BundleView,
    SceneBundle,
    SceneTensors,
    write_bundle,
)
from fit3d_ns.runs.checkpoints import find_checkpoint, read_checkpoint
from fit3d_ns.runs.config_reader import find_runs, read_config
from fit3d_ns.runs.coordinates import Coordinates, read_coordinates
from fit3d_ns.runs.names import (
    CONFIG,
    COORDINATES,
    DECODER_WEIGHT,
    EXTRA_STATE,
    FEATURES,
    GAUSSIANS,
    LIFTS,
    METHOD,
    POSE_ADJUSTMENT,
    RECORD,
)
from fit3d_ns.runs.teachers import RunTeacher, different_teachers, named_teacher
from fit3d_ns.support.errors import UserError, flags_are

_LOGGER = logging.getLogger(__name__)
BUNDLE_FOLDER = "bundle"
"""Name of a run's bundle, below the run."""
_METHOD_LINE = re.compile(r"^method_name: ['\"]?([^'\"\s]+)", re.MULTILINE)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of this project's method."""

    config_path: Path
    """Its ``config.yml``."""
    checkpoint: Path
    """Its newest checkpoint."""
    data: Path
    """The scene it was trained on, as its configuration says."""

    @property
    def name(self) -> str:
        """The scene's name for humans."""
        return self.data.parent.name if self.data.suffix else self.data.name

    @property
    def label(self) -> str:
        """Scene and run, and of a lift its own name too."""
        folder = self.config_path.parent
        inside = folder.parents[1].name == LIFTS
        return "-".join([self.name, *([folder.parents[2].name] if inside else []), folder.name])


def choose_runs(
    paths: list[Path], all_runs: bool = False, teacher: str | None = None
) -> tuple[list[FinishedRun], list[str]]:
    """Finds finished ``fit3d-splat`` runs, trained or lifted.

    Args:
        paths: Run folders, ``config.yml`` files, or folders that hold runs at any depth.
        all_runs: Whether to take every run of a scene instead of the newest (by the time of its checkpoint).
        teacher: Take only features of this backbone: a name; or of a fine-tuned one the folder that fit3d-distill
            wrote, or the beginning of the weights' hash.

    Returns:
        The runs, sorted by scene; and one sentence for each run that was left out.

    Raises:
        UserError: If a path does not exist, a configuration is refused, no finished run is left, or several teachers
            are and none is named.
    """
    with nerfstudio_needed("Trained runs (--runs)"):
        import nerfstudio  # noqa: F401

    runs: dict[Path, FinishedRun] = {}
    teachers: list[RunTeacher] = []
    notes: list[str] = []
    wanted = None if teacher is None else named_teacher(teacher)
    for config_path in _config_paths(paths):
        try:
            method = _METHOD_LINE.search(config_path.read_text(errors="replace"))
        except OSError as error:
            raise UserError(
                f"The configuration {config_path} cannot be read ({error.strerror or error}): make it readable, or "
                "leave its run out of --runs."
            ) from error
        if method is None or method[1] != METHOD:
            found = method[1] if method else "an unknown method"
            notes.append(f"{config_path} is a run of {found}, not of {METHOD}: left out.")
            continue
        config = read_config(config_path)
        checkpoint = find_checkpoint(config_path)
        steps = int(checkpoint.stem.removeprefix("step-")) + 1
        lifted = (config_path.parent / RECORD).is_file()
        if steps < config.max_num_iterations and not lifted:
            notes.append(f"{config_path} stopped after {steps} of {config.max_num_iterations} steps: left out.")
            continue
        data = config.pipeline.datamanager.data
        if data is None:
            raise UserError(f"The configuration {config_path} names no scene (its data is null): restore it.")
        of_run = RunTeacher.of(config.pipeline.datamanager, checkpoint)
        if wanted is not None and not wanted(of_run):
            notes.append(f"{config_path} has features of {of_run.label}: left out (--teacher {teacher}).")
            continue
        teachers.append(of_run)
        runs[config_path] = FinishedRun(config_path, checkpoint, Path(data))
    if not runs:
        listed = " ".join(str(path) for path in paths)
        reason = f" ({notes[0].removesuffix('.')})" if notes else ""
        raise UserError(
            f"No finished run of {METHOD} below {listed}{reason}: train one with ns-train {METHOD}, or lift features "
            "into a splatfacto run with fit3d-lift."
        )
    different = different_teachers(teachers)
    if len(different) > 1:
        raise UserError(
            f"The runs have features of several teachers ({', '.join(different)}): pick one with --teacher."
        )
    found = sorted(runs.values(), key=lambda run: (str(run.data), run.checkpoint.stat().st_mtime_ns))
    if not all_runs:
        newest = {run.data: run for run in found}
        for run in found:
            if newest[run.data] is not run:
                notes.append(f"{run.config_path} is older than another run of {run.name}: left out (--all-runs).")
        found = list(newest.values())
    return found, notes


def bundle_run(run: FinishedRun, folder: Path | None = None, data_root: Path | None = None) -> tuple[SceneBundle, bool]:
    """Makes a run's bundle, or finds it made already.

    Args:
        run: Of `choose_runs`.
        folder: Where the bundle goes; ``bundle`` below the run if None.
        data_root: Folder that holds the scene if it moved; see `fit3d_ns.data.photos.bundled.locate`.

    Returns:
        The bundle, and whether it was there already.

    Raises:
        UserError: If checkpoint or photos cannot be read, the scene's coordinates differ from the run's, or nothing
            was ever lifted.
    """
    folder = folder or run.config_path.parent / BUNDLE_FOLDER
    status = run.checkpoint.stat()
    source = {
        "config": str(run.config_path.absolute()),
        "checkpoint": run.checkpoint.name,
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
    }
    try:
        existing = SceneBundle(folder)
        if existing.info.source == source:
            existing.check()
            return existing, True
    except UserError as error:
        if os.path.lexists(folder):
            _LOGGER.warning("%s It is made anew.", error)
    config = read_config(run.config_path)
    state = read_checkpoint(run.checkpoint)["pipeline"]
    scene = _read_scene(state, run.checkpoint)
    datamanager = _datamanager(config, data_root)
    _check_coordinates(run, datamanager)
    extra = state.get(EXTRA_STATE) or {}
    spec = datamanager.config.backbone_spec()
    identity = extra.get("teacher_identity") or backbone_identity(spec)
    grid = extra.get("feature_grid")
    outputs = datamanager.train_dataparser_outputs
    views, cameras, weights = _read_views(datamanager, config, state, identity["patch_size"])
    info = BundleInfo(
        scene=run.name,
        teacher=identity,
        teacher_max_size=datamanager.config.backbone_max_size or None,
        teacher_weights=None if spec.weights is None else str(Path(spec.weights).expanduser().absolute()),
        feature_grid=FeatureGrid.from_dict(grid) if grid else FEATURE_GRIDS[config.pipeline.model.feature_grid],
        dataparser_transform=outputs.dataparser_transform.tolist(),
        dataparser_scale=float(outputs.dataparser_scale),
        source=source,
        views=views,
        teacher_precision=extra.get("teacher_precision"),
        teacher_original=original_of(spec.weights, identity["weights_sha256"]),
    )
    return write_bundle(folder, info, scene, cameras, weights), False


def read_views(
    run: FinishedRun, config: Any, state: dict[str, Tensor], data_root: Path | None = None
) -> tuple[list[BundleView], BundleCameras]:
    """Reads a run's photos and their cameras, undistorted and with their optimised poses.

    Args:
        run: Of `choose_runs`.
        config: Its configuration.
        state: The ``pipeline`` entry of its checkpoint.
        data_root: Folder that holds the scene if it moved; see `fit3d_ns.data.photos.bundled.locate`.

    Returns:
        All views, training views first, and one camera for each.

    Raises:
        UserError: If photos cannot be read, or the scene's coordinates differ from the run's.
    """
    datamanager = _datamanager(config, data_root)
    _check_coordinates(run, datamanager)
    views, cameras, _ = _read_views(datamanager, config, state, datamanager.teacher_info.patch_size)
    return views, cameras


def _config_paths(paths: list[Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        path = path.expanduser()
        try:
            is_file, is_folder = path.is_file(), path.is_dir()
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): check --runs.") from error
        if is_file and path.name == CONFIG:
            found[path.absolute()] = None
        elif is_folder:
            found.update(dict.fromkeys(match.absolute() for match in find_runs(path)))
        else:
            raise UserError(f"{path} is neither a folder nor a run's config.yml: check --runs.")
    return list(found)


def _read_scene(state: dict[str, Tensor], checkpoint: Path) -> SceneTensors:
    """Geometry, features and decoder of a checkpoint, without splatfacto's parametrisation."""
    names = ("means", "quats", "scales", "opacities", FEATURES)
    parameters = {name: state.get(f"{GAUSSIANS}{name}") for name in names}
    parameters["decoder"] = state.get(DECODER_WEIGHT)
    missing = [name for name, tensor in parameters.items() if tensor is None]
    if missing:
        raise UserError(f"{checkpoint} holds no {missing[0]}: it is no complete {METHOD} checkpoint; train it again.")
    tensors: dict[str, Any] = {name: tensor.float() for name, tensor in parameters.items() if tensor is not None}
    return SceneTensors(
        geometry=Geometry(
            means=tensors["means"],
            quats=tensors["quats"],
            scales=tensors["scales"].exp(),
            opacities=tensors["opacities"].sigmoid().squeeze(-1),
        ),
        features=tensors[FEATURES].half(),
        decoder=tensors["decoder"],
    )


def _datamanager(config: Any, data_root: Path | None) -> Any:
    """The run's own data manager, on the CPU."""
    from fit3d_ns.data.dataparsers import without_seed_points

    settings = config.pipeline.datamanager
    without_seed_points(settings.dataparser)
    settings.data = locate(Path(settings.data), data_root)
    settings.dataparser.data = settings.data
    settings.cache_images, settings.cache_images_type = "gpu", "uint8"
    with flags_are(scene_advice=f"restore what the run was trained on, or check {DATA_ROOT_FLAG}."):
        return settings.setup(device="cpu", test_mode="val", world_size=1, local_rank=0)


def _check_coordinates(run: FinishedRun, datamanager: Any) -> None:
    """Refuses a scene whose poses are no longer those that the run was trained with."""
    stored = read_coordinates(run.config_path.parent)
    if stored is not None and not stored.agrees_with(Coordinates.of(datamanager.train_dataparser_outputs)):
        raise UserError(
            f"The scene {datamanager.config.data} has other coordinates than when {run.config_path} was trained (its "
            f"{COORDINATES} differs): restore the scene, or check {DATA_ROOT_FLAG}."
        )


def _read_views(
    datamanager: Any, config: Any, state: dict[str, Tensor], patch_size: int
) -> tuple[list[BundleView], BundleCameras, dict[int, Tensor]]:
    """Photos, cameras and masks of both splits: training views first."""
    from fit3d_ns.backbones import patch_grid

    views: list[BundleView] = []
    weights: dict[int, Tensor] = {}
    viewmats, intrinsics = [], []
    data = Path(datamanager.config.data)
    root = data if data.is_dir() else data.parent
    for split, dataset in (("train", datamanager.train_dataset), ("eval", datamanager.eval_dataset)):
        if len(dataset) == 0:
            continue
        pinholes = []
        for prepared in datamanager.photo_reader(split):
            height, width = prepared.size
            path = Path(dataset.image_filenames[prepared.index]).absolute()
            photo = BundledPhoto(
                path=str(path),
                sha256=hash_file(path),
                height=height,
                width=width,
                lens=dataset.lenses[prepared.index],
                scale_factor=datamanager.config.camera_res_scale_factor,
                alpha_color=dataset.alpha_color,
            )
            valid = prepared.weights(patch_grid(height, width, patch_size, datamanager.config.backbone_max_size))
            if valid is not None and bool((valid < 1).any()):
                weights[len(views)] = valid
            name = str(path.relative_to(root)) if path.is_relative_to(root) else path.name
            views.append(BundleView(name, split, photo))  # type: ignore[arg-type]
            pinholes.append(prepared.camera.get_intrinsics_matrices())
        poses = dataset.cameras.camera_to_worlds
        if split == "train":
            poses = _optimised_poses(poses, config, state)
        viewmats.append(viewmats_of(poses))
        intrinsics += pinholes
    return views, BundleCameras(torch.cat(viewmats).float(), torch.cat(intrinsics).float()), weights


def _optimised_poses(poses: Tensor, config: Any, state: dict[str, Tensor]) -> Tensor:
    """Training poses as the run's camera optimizer left them (splatfacto's is off by default)."""
    adjustment = state.get(POSE_ADJUSTMENT)
    if adjustment is None:
        return poses
    optimizer = config.pipeline.model.camera_optimizer.setup(num_cameras=len(poses), device="cpu")
    with torch.no_grad():
        optimizer.load_state_dict({"pose_adjustment": adjustment})
        corrections = optimizer(torch.arange(len(poses)))
    # nerfstudio's CameraOptimizer.apply_to_camera, for all views at once.
    rotations = torch.bmm(corrections[:, :3, :3], poses[:, :3, :3])
    return torch.cat([rotations, poses[:, :3, 3:] + corrections[:, :3, 3:]], dim=2)
