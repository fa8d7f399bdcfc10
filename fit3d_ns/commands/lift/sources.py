"""Splats to lift features onto: nerfstudio runs and PLY files, as configurations of the run to be written."""

import json
from copy import deepcopy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.models.splatfacto import SplatfactoModelConfig
from torch import Tensor

from fit3d_ns.commands.lift.run_writer import finished_request
from fit3d_ns.config import fit3d_splat
from fit3d_ns.data.ply import read_ply, sh_degree, splatfacto_parameters
from fit3d_ns.runs.checkpoints import find_checkpoint
from fit3d_ns.runs.config_reader import find_runs, read_config
from fit3d_ns.runs.names import CONFIG, METHOD, RECORD
from fit3d_ns.support.errors import UserError
from fit3d_ns.trainer import Fit3DTrainerConfig


@dataclass(frozen=True)
class LiftSource:
    """A splat, and the run that its features go to.

    Attributes:
        name: For humans.
        configs: Configurations of the run to be written. More than one if it is not known which coordinates the
            splat is in: the one whose renders resemble the photos is right.
        step: Training steps that the geometry has behind it, less one.
        identity: What decides the geometry, as plain JSON values.
        run: Checkpoint of the geometry, or None.
        gaussians: The geometry itself, where it comes from no run.
    """

    name: str
    configs: list[Fit3DTrainerConfig]
    step: int
    identity: dict[str, Any]
    run: Path | None = None
    gaussians: dict[str, Tensor] | None = None

    @property
    def target(self) -> Path:
        """Folder of the run to be written."""
        return self.configs[0].get_base_dir()


def runs_below(root: Path, with_lifted: bool = False) -> tuple[list[Path], list[str]]:
    """Finds the finished splatfacto and fit3d-splat runs below a folder.

    Args:
        root: Folder of runs.
        with_lifted: Whether to take trained runs that have lifted features already, to lift another teacher's; runs
            that this command wrote hold the same geometry once more, and are never taken.

    Returns:
        Their ``config.yml``, and one sentence for each run that is left out.

    Raises:
        UserError: If there is none.
    """
    chosen, notes = [], []
    for path in find_runs(root):
        if (path.parent / RECORD).is_file() and not (with_lifted and _was_trained(path.parent)):
            continue  # lifted already, by this command or while training
        try:
            config = read_config(path)
        except UserError as error:
            notes.append(str(error))
            continue
        steps = int(find_checkpoint(path).stem.removeprefix("step-")) + 1
        if not isinstance(config.pipeline.model, SplatfactoModelConfig):
            notes.append(f"{path} is a run of {config.method_name}, which has no Gaussians: left out.")
        elif steps < config.max_num_iterations:
            notes.append(
                f"{path} stopped after {steps} of {config.max_num_iterations} steps: left out (--load-config)."
            )
        else:
            chosen.append(path)
    if not chosen:
        reason = f" ({notes[0]})" if notes else ""
        raise UserError(f"No finished run of splatfacto or fit3d-splat below {root}{reason}: train one with ns-train.")
    return chosen, notes


def _was_trained(run: Path) -> bool:
    """Returns whether a run with lifted features was trained itself, and is no copy of another one's geometry."""
    try:
        return "request" not in json.loads((run / RECORD).read_text())
    except (OSError, ValueError, TypeError):
        return False


def source_from_run(path: Path, suffix: str, output_dir: Path | None, data: Path | None) -> LiftSource:
    """Prepares a run of splatfacto or fit3d-splat.

    Args:
        path: Its ``config.yml``, or its folder.
        suffix: Appended to the name of the run, to name the new one; where a run of that name in another method's
            folder was lifted already, after the method's name.
        output_dir: Where the new run goes instead of beside the old one.
        data: Where the scene is now, if it moved.

    Raises:
        UserError: If it is no such run, cannot be read, or the new one's folder holds a run that was not lifted.
    """
    config = read_config(path)
    run = (path.parent if path.name == CONFIG else path).absolute()
    old = config.pipeline
    if not isinstance(old.model, SplatfactoModelConfig) or not isinstance(old.datamanager, FullImageDatamanagerConfig):
        raise UserError(
            f"{path} is a run of {config.method_name}: features are lifted onto splatfacto and {METHOD} runs."
        )
    checkpoint = find_checkpoint(run)
    new = _empty_config()
    skipped = {
        "_target",
        "optimizers",
        "pipeline",
        "method_name",
        "machine",
        "load_dir",
        "load_checkpoint",
        "load_step",
    }
    _copy_fields(config, new, skipped)
    new.machine.seed = config.machine.seed
    _copy_fields(old.datamanager, new.pipeline.datamanager, {"_target"})
    _copy_fields(old.model, new.pipeline.model, {"_target", "features", "lift", "init_from"})
    if data is not None:
        _set_data(new, data)
    if not Path(new.pipeline.datamanager.data or "").exists():  # type: ignore[attr-defined]
        raise UserError(
            f"The scene {new.pipeline.datamanager.data} of the run {run} does not exist (moved?): name its new place "  # type: ignore[attr-defined]
            "with --data."
        )
    status = checkpoint.stat()
    step = int(checkpoint.stem.removeprefix("step-"))
    new.max_num_iterations = min(new.max_num_iterations, step + 1)
    experiment = run.parents[1].name if len(run.parents) > 2 else config.experiment_name
    outputs = output_dir or (run.parents[2] if len(run.parents) > 2 else run.parent)
    _place(new, outputs, experiment, f"{run.name}-{suffix}")
    existing = finished_request(new.get_base_dir())
    method = run.parent.name
    if existing is not None and Path(existing.get("source", run)).parent.name != method:
        # Runs of two methods that were given the same timestamp.
        _place(new, outputs, experiment, f"{run.name}-{method}-{suffix}")
    identity = {
        "source": str(run),
        "checkpoint": checkpoint.name,
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
    }
    return LiftSource(str(run), [new], step, identity, run=checkpoint)


def source_from_ply(path: Path, data: Path | None, suffix: str, output_dir: Path | None) -> LiftSource:
    """Prepares a PLY file of Gaussians and the scene that it was trained on.

    Its coordinates may be those of the scene's files (3DGS and most other programs) or those to which nerfstudio turns
    and scales a scene (``ns-export``); both are prepared.

    Args:
        path: The PLY file.
        data: The scene, in nerfstudio's or COLMAP's format.
        suffix: Appended to the file's name, to name the run.
        output_dir: Where the run goes, ``outputs`` if None.

    Raises:
        UserError: If file or scene cannot be used.
    """
    if data is None or not data.expanduser().exists():
        raise UserError(f"The scene {data} does not exist: --ply needs the photos and poses of the splat with --data.")
    path, data = path.expanduser().absolute(), data.expanduser().absolute()
    gaussians = splatfacto_parameters(read_ply(path))
    configs = []
    for parser in _dataparsers(data):
        config = _empty_config()
        config.pipeline.datamanager.dataparser = parser  # type: ignore[attr-defined]
        config.pipeline.model.sh_degree = sh_degree(gaussians)  # type: ignore[attr-defined]
        _set_data(config, data)
        config.max_num_iterations = 1
        name = data.name if data.is_dir() else data.stem
        _place(config, output_dir or Path("outputs"), name, f"{path.stem}-{suffix}")
        configs.append(config)
    status = path.stat()
    identity = {"source": str(path), "data": str(data), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    return LiftSource(str(path), configs, 0, identity, gaussians=gaussians)


def _dataparsers(data: Path) -> list[Any]:
    """Ways of reading a scene, each in nerfstudio's coordinates and in those of its files."""
    as_stored: Any = {"orientation_method": "none", "center_method": "none", "auto_scale_poses": False}
    # The splat is there already, so nobody needs the scene's points.
    parsers: list[Any] = []
    if data.suffix == ".json" or (data / "transforms.json").is_file():
        parsers += [
            NerfstudioDataParserConfig(load_3D_points=False),
            NerfstudioDataParserConfig(load_3D_points=False, **as_stored),
        ]
    for folder in ("colmap/sparse/0", "sparse/0", "sparse"):
        if any((data / folder / f"cameras{kind}").is_file() for kind in (".bin", ".txt")):
            as_colmap = ColmapDataParserConfig(assume_colmap_world_coordinate_convention=False, **as_stored)
            for parser in (as_colmap, ColmapDataParserConfig()):
                parser.colmap_path, parser.load_3D_points = Path(folder), False
                # nerfstudio would ask whether it may write smaller photos into the scene.
                parser.downscale_factor = 1
                parsers.append(parser)
            break
    if not parsers:
        raise UserError(
            f"The scene {data} holds neither transforms.json nor COLMAP's sparse/0: --data needs photos with poses."
        )
    return parsers


def _empty_config() -> Fit3DTrainerConfig:
    config = deepcopy(fit3d_splat.config)
    assert isinstance(config, Fit3DTrainerConfig)
    config.machine.device_type = "cuda" if torch.cuda.is_available() else "cpu"
    config.pipeline.model.features = "lift"  # type: ignore[attr-defined]
    return config


def _copy_fields(old: Any, new: Any, skipped: set[str]) -> None:
    for field in fields(new):
        if field.name not in skipped and hasattr(old, field.name):
            setattr(new, field.name, deepcopy(getattr(old, field.name)))


def _set_data(config: Fit3DTrainerConfig, data: Path) -> None:
    datamanager: Any = config.pipeline.datamanager
    config.data = datamanager.data = datamanager.dataparser.data = data.expanduser().absolute()


def _place(config: Fit3DTrainerConfig, output_dir: Path, experiment: str | None, timestamp: str) -> None:
    config.output_dir = output_dir.expanduser().absolute()
    config.experiment_name, config.method_name, config.timestamp = experiment, METHOD, timestamp
