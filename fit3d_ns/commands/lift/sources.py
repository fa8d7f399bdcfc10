"""Splats to lift features onto: nerfstudio runs and PLY files, as configurations of the lift to be written."""

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

from fit3d_ns.config import fit3d_splat
from fit3d_ns.data.points.splat_ply import read_ply, sh_degree, splatfacto_parameters
from fit3d_ns.runs.checkpoints import find_checkpoint, geometry_of, run_folder
from fit3d_ns.runs.config_reader import find_runs, read_config
from fit3d_ns.runs.names import CONFIG, LIFTS, METHOD, RECORD
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.json_files import UNREADABLE, read_json
from fit3d_ns.trainer import Fit3DTrainerConfig


@dataclass(frozen=True)
class LiftSource:
    """A splat, and where what is lifted onto it goes.

    Attributes:
        name: For humans.
        folder: In which the lifts stand: of the run, or of all that was lifted onto a file.
        configs: Configurations of the lift to be written. More than one if it is not known which coordinates the
            splat is in: the one whose renders resemble the photos is right.
        step: Training steps that the geometry has behind it, less one.
        identity: What decides the geometry, as plain JSON values.
        file: What holds the geometry: a checkpoint, what a lift onto a file refers to, or a PLY file.
        checkpoint: To start from: of the run, or of a lift onto it.
        gaussians: The geometry itself, where it comes from no run.
    """

    name: str
    folder: Path
    configs: list[Fit3DTrainerConfig]
    step: int
    identity: dict[str, Any]
    file: Path
    checkpoint: Path | None = None
    gaussians: dict[str, Tensor] | None = None

    def place(self, name: str) -> Path:
        """Gives the lift its name.

        Args:
            name: Of the lift.

        Returns:
            The folder that it goes to.
        """
        for config in self.configs:
            config.output_dir, config.experiment_name = self.folder, LIFTS
            config.method_name, config.timestamp = METHOD, name
        return self.configs[0].get_base_dir()


def runs_below(root: Path, backbone: str | None = None, student: bool = False) -> tuple[list[Path], list[str]]:
    """Finds the finished splatfacto and fit3d-splat runs below a folder.

    Args:
        root: Folder of runs.
        backbone: The teacher, if it is named: runs that were lifted while they trained are left out where it was
            their teacher already.
        student: Whether the teacher is a fine-tuned one, which was no run's teacher while it trained.

    Returns:
        Their ``config.yml``, lifts not among them; and one sentence for each run that is left out, and for the lifts.

    Raises:
        UserError: If there is none.
    """
    chosen, found, lifts = [], find_runs(root), 0
    every = {path for path in root.expanduser().rglob(CONFIG) if ".tmp" not in path.parent.suffixes}
    notes = [f"{path} holds no checkpoint, it stopped before one: left out." for path in sorted(every - {*found})]
    for path in found:
        was_lifted = (path.parent / RECORD).is_file()
        if was_lifted and not _was_trained(path.parent):
            lifts += 1  # what this command wrote
            continue
        try:
            config = read_config(path)
        except UserError as error:
            notes.append(f"Left out: {error}")
            continue
        own = config.pipeline.datamanager
        if was_lifted and not student and backbone in (None, getattr(own, "backbone", None)):
            notes.append(f"{path} has features of its teacher since it was trained: left out (--load-config).")
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
    if lifts:
        notes.append(
            f"{lifts} lift{'s' if lifts > 1 else ''} below {root} {'are' if lifts > 1 else 'is'} no run: left out."
        )
    if not chosen:
        reason = f" ({notes[0]})" if notes else ""
        raise UserError(f"No finished run of splatfacto or fit3d-splat below {root}{reason}: train one with ns-train.")
    return chosen, notes


def _was_trained(run: Path) -> bool:
    """Returns whether a run with lifted features was trained itself, and is no copy of another one's geometry."""
    try:
        return "request" not in read_json(run / RECORD)
    except (*UNREADABLE, TypeError):
        return False


def source_from_run(path: Path, output_dir: Path | None, data: Path | None) -> LiftSource:
    """Prepares a run of splatfacto or fit3d-splat, or one of the lifts onto it.

    Args:
        path: Its ``config.yml``, or its folder.
        output_dir: Where lifts go instead of into the run.
        data: Where the scene is now, if it moved.

    Returns:
        Configuration, geometry and place of the lift.

    Raises:
        UserError: If it is no such run, or cannot be read.
    """
    config = read_config(path)
    run = (path.parent if path.name == CONFIG else path).absolute()
    old = config.pipeline
    if not isinstance(old.model, SplatfactoModelConfig) or not isinstance(old.datamanager, FullImageDatamanagerConfig):
        raise UserError(
            f"{path} is a run of {config.method_name}: features are lifted onto splatfacto and {METHOD} runs."
        )
    checkpoint = find_checkpoint(run)
    geometry = geometry_of(checkpoint)
    if geometry != checkpoint:  # a lift was named: its new neighbour stands where it stands
        run = geometry.parent if geometry.suffix == ".safetensors" else run_folder(geometry)
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
    status = geometry.stat()
    step = int(checkpoint.stem.removeprefix("step-"))
    new.max_num_iterations = min(new.max_num_iterations, step + 1)
    folder = run
    if output_dir is not None:
        folder = output_dir.expanduser().absolute() / Path(*run.parts[1:][-3:])  # EXPERIMENT/METHOD/RUN
    identity = {
        "source": str(run),
        "checkpoint": geometry.name,
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
    }
    return LiftSource(str(run), folder, [new], step, identity, geometry, checkpoint)


def source_from_ply(path: Path, data: Path | None, output_dir: Path | None) -> LiftSource:
    """Prepares a PLY file of Gaussians and the scene that it was trained on.

    Its coordinates may be those of the scene's files (3DGS and most other programs) or those to which nerfstudio turns
    and scales a scene (``ns-export``); both are prepared.

    Args:
        path: The PLY file.
        data: The scene, in nerfstudio's or COLMAP's format.
        output_dir: Where the file's geometry and lifts go, ``outputs`` if None.

    Returns:
        Configuration, geometry and place of the lift.

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
        configs.append(config)
    scene = data.name if data.is_dir() else data.stem
    folder = (output_dir or Path("outputs")).expanduser().absolute() / scene / METHOD / path.stem
    status = path.stat()
    identity = {"source": str(path), "data": str(data), "bytes": status.st_size, "modified_ns": status.st_mtime_ns}
    return LiftSource(str(path), folder, configs, 0, identity, path, gaussians=gaussians)


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
