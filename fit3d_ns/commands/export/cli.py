"""``fit3d-export``: a run in formats that other tools read."""

import logging
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro

from fit3d_ns.support.command_line import run_command
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.json_files import UNREADABLE, read_json

_LOGGER = logging.getLogger("fit3d_ns.commands.export.cli")  # not __main__, which `python -m` makes of __name__
INDEX = "export.json"


@dataclass
class ExportCommand:
    """Exports a fit3d-splat run: splats, point clouds, the scene bundle, a video, feature maps.

    docs/export.md describes every file, its units and its coordinates.
    """

    load_config: Path
    """config.yml of the run, or its folder."""
    output_dir: Path
    """Where the files go."""
    splat: bool = True
    """splat.ply: Gaussians in the layout of 3DGS, with their features as columns feat_0, feat_1, ..."""
    pca_splat: bool = True
    """splat_pca.ply: the same Gaussians in the colours of their features, for any splat viewer."""
    point_cloud: bool = True
    """points.ply and points_pca.ply: the centres of the Gaussians, in both colours, for Open3D and the like."""
    bundle: bool = True
    """bundle/: the scene as fit3d-distill reads it."""
    video: bool = True
    """feature_pca.mp4: rgb beside the colours of the features, along --camera-path."""
    feature_maps: bool = False
    """feature_maps/: decoded features of every view of --camera-path as .npz, about 1 MB each."""
    camera_path: str = "orbit"
    """orbit (through the space that the photos were taken from), train or eval (the views of the photos), or a
    camera_path.json of nerfstudio's viewer."""
    frames: int = 120
    """Views of the orbit."""
    fps: float = 24.0
    """Frames per second of the video; a camera_path.json that says how long it lasts decides by itself."""
    video_size: int = 640
    """Longest side, in pixels, of each half of the video."""
    data_root: Path | None = None
    """Where the photos are now, if they moved. Only bundle, orbit, train and eval need them."""
    overwrite: bool = False
    """Replace files of an earlier export."""

    def targets(self) -> dict[str, list[str]]:
        """Returns the names of the files and folders that each flag chosen writes."""
        named = {
            "splat": ["splat.ply"],
            "pca_splat": ["splat_pca.ply"],
            "point_cloud": ["points.ply", "points_pca.ply"],
            "bundle": ["bundle"],
            "video": ["feature_pca.mp4"],
            "feature_maps": ["feature_maps"],
        }
        return {flag: names for flag, names in named.items() if getattr(self, flag)}


def main(args: list[str] | None = None) -> None:
    """Command line of ``fit3d-export``.

    Args:
        args: Words of the command line; None for those of this process.
    """

    def command() -> None:
        run_export(tyro.cli(ExportCommand, prog="fit3d-export", args=args))

    run_command(command)


def run_export(command: ExportCommand) -> list[Path]:
    """Writes what a command asks for, all of it or nothing.

    Args:
        command: The user's choices.

    Returns:
        The files and folders written.

    Raises:
        UserError: If a choice, the run, its photos or the output folder cannot be used.
    """
    folder, targets = command.output_dir.expanduser(), command.targets()
    _check(command, folder, targets)
    _LOGGER.info("Exporting %s to %s", command.load_config, folder)
    import torch  # not before the choices are checked: --help and a wrong flag need none of it

    from fit3d_ns.commands.export.trained_run import open_run
    from fit3d_ns.support.output_folders import held_folder, staged_folder

    trained = open_run(command.load_config)
    _check_same_run(command, trained, folder)
    with torch.no_grad(), held_folder(folder, "--output-dir"), staged_folder(folder) as staged:
        _export(command, trained, staged)
    written = [folder / name for names in targets.values() for name in names] + [folder / INDEX]
    for path in written:
        _LOGGER.info("Wrote %s", path)
    return written


def _export(command: ExportCommand, trained: Any, folder: Path) -> None:
    path = _read_path(command, trained, folder)  # first, since photos that moved are what fails most
    say_frame = f"Frame and features: {INDEX}"
    rgb: Any = None
    if command.splat:
        from fit3d_ns.data.points.splat_ply import write_splat_ply

        write_splat_ply(folder / "splat.ply", trained.gaussians, trained.features, [say_frame])
    if command.pca_splat or command.point_cloud:
        rgb = trained.colors.of_gaussians(trained.features)
    if command.pca_splat:
        from fit3d_ns.data.points.splat_ply import write_colored_splat_ply

        write_colored_splat_ply(folder / "splat_pca.ply", trained.gaussians, rgb, [say_frame])
    if command.point_cloud:
        from fit3d_ns.data.points.splat_ply import sh_to_rgb, write_point_cloud

        photographic = sh_to_rgb(trained.gaussians["features_dc"])
        for name, color in (("points.ply", photographic), ("points_pca.ply", rgb)):
            write_point_cloud(folder / name, trained.gaussians, color, [say_frame])
    if command.video or command.feature_maps:
        _render(command, trained, path, folder)
    _write_index(trained, folder)


def _check(command: ExportCommand, folder: Path, targets: dict[str, list[str]]) -> None:
    """Refuses, before anything is read, what cannot end well."""
    if not targets:
        raise UserError("Nothing is left to export: drop some of the --no- flags.")
    for flag, value in (("--frames", command.frames), ("--fps", command.fps), ("--video-size", command.video_size)):
        if not value >= 1 or value == float("inf"):
            raise UserError(f"{flag} {value} is out of range: it must be at least 1.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output-dir {folder} is a file: name a folder.")
    existing = [folder / name for names in targets.values() for name in names if (folder / name).exists()]
    if existing and not command.overwrite:
        raise UserError(f"{existing[0]} exists already: add --overwrite to replace it, or choose another --output-dir.")
    if command.video:
        from fit3d_ns.commands.export.video import check_video

        check_video()


def _check_same_run(command: ExportCommand, trained: Any, folder: Path) -> None:
    """Refuses to mix the exports of two runs in one folder."""
    try:
        stored = read_json(folder / INDEX)
        same = stored["config"] == str(trained.run.config_path) and stored["checkpoint"] == trained.run.checkpoint.name
    except (*UNREADABLE, KeyError, TypeError):
        return
    if not same and not command.overwrite:
        raise UserError(
            f"{folder} holds exports of {stored['config']} ({stored['checkpoint']}): choose another --output-dir, or "
            "add --overwrite."
        )


def _read_path(command: ExportCommand, trained: Any, folder: Path) -> Any:
    """Makes the bundle and reads the camera path, whichever is wanted: both need the scene.

    Returns:
        The path, or None where nothing is rendered.
    """
    from fit3d_ns.commands.export.camera_path import orbit, path_along_views, path_from_file
    from fit3d_ns.runs.bundling import bundle_run, read_views

    renders = command.video or command.feature_maps
    generated = command.camera_path in ("orbit", "train", "eval")
    path = path_from_file(Path(command.camera_path)) if renders and not generated else None
    views = cameras = None
    if command.bundle:
        bundle, _ = bundle_run(trained.run, folder / "bundle", command.data_root)
        views, cameras = bundle.info.views, bundle.read_cameras()
    elif renders and generated:
        views, cameras = read_views(trained.run, trained.config, trained.state, command.data_root)
    if path is not None or not renders:
        return path
    assert views is not None and cameras is not None
    if command.camera_path == "orbit":
        return orbit(views, cameras, command.frames)
    return path_along_views(views, cameras, command.camera_path)


def _render(command: ExportCommand, trained: Any, path: Any, folder: Path) -> None:
    import torch

    from fit3d_ns.support.progress import tracked

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.build_model(device)
    if command.feature_maps:
        from fit3d_ns.commands.export.feature_maps import write_feature_maps

        write_feature_maps(folder / "feature_maps", model, path, tracked(range(len(path)), "Feature maps", len(path)))
    if command.video:
        from fit3d_ns.commands.export.turntable import write_turntable

        rate = len(path) / path.seconds if path.seconds else command.fps
        file, colors = folder / "feature_pca.mp4", trained.colors.to(device)
        write_turntable(
            file, model, colors, path, rate, command.video_size, tracked(range(len(path)), "Video", len(path))
        )


def _write_index(trained: Any, folder: Path) -> None:
    """Notes what the numbers in the files mean."""
    from fit3d_ns.support.files import atomic_write_json

    atomic_write_json(
        folder / INDEX,
        {
            "fit3d_ns": version("fit3d-ns"),
            "config": str(trained.run.config_path),
            "checkpoint": trained.run.checkpoint.name,
            "gaussians": int(trained.visible.sum()),
            "gaussians_left_out": int((~trained.visible).sum()),
            "feature_dim": trained.features.shape[1],
            "teacher": trained.teacher,
            "dataparser": trained.dataparser_transform(),
            "pca": {
                "matrix": trained.colors.kernel.sum((2, 3)).tolist(),
                "offset": trained.colors.bias.tolist(),
            },
        },
    )


if __name__ == "__main__":
    main()
