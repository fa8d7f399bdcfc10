"""The scenes of a run: bundles made or found, and checked against each other before any long work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from jaxtyping import Float
from torch import Tensor

from distill.config import DistillConfig
from distill.sampler import SceneViews
from fit3d_ns.errors import UserError
from fit3d_ns.photos import locate
from fit3d_ns.scene_bundle import BundleCameras, BundleInfo, SceneBundle, find_bundles


@dataclass(frozen=True)
class Scene:
    """A bundle with all that is small enough to stay in memory."""

    bundle: SceneBundle
    """Where geometry and features are."""
    cameras: BundleCameras
    """Of all views, on the CPU."""
    patch_weights: Dict[int, Float[Tensor, "h w"]]
    """What masks leave valid of each patch, for the views that have a mask, on the CPU."""

    @property
    def info(self) -> BundleInfo:
        """Teacher, grid rule and views."""
        return self.bundle.info

    @property
    def name(self) -> str:
        """For humans."""
        return self.info.scene

    def sampled_views(self) -> SceneViews:
        """Returns the training views, for the sampler."""
        views = self.info.indices("train")
        grids = tuple(self.info.patch_grid(view) for view in views)
        return SceneViews(tuple(views), grids, self.bundle.num_bytes())

    def report_views(self, count: int) -> Tuple[List[int], bool]:
        """Returns up to ``count`` evenly spaced held-out views, and whether they are held out indeed.

        A scene that was trained on all its views has none; training views are taken then.
        """
        held_out = self.info.indices("eval")
        views = held_out or self.info.indices("train")
        if len(views) > count:
            views = [views[(2 * index + 1) * len(views) // (2 * count)] for index in range(count)]
        return views, bool(held_out)


def make_bundles(config: DistillConfig, say: Callable[[str], None]) -> List[Path]:
    """Makes the bundles of ``--runs`` that are missing or stale.

    Args:
        config: The user's choices.
        say: Prints one line.

    Returns:
        Folders of all bundles asked for, of ``--runs`` and ``--bundles``.

    Raises:
        UserError: If there are no runs, or one cannot be read.
    """
    if not config.runs and not config.bundles:
        raise UserError("There is nothing to distil: name trained runs with --runs, or scene bundles with --bundles.")
    folders = find_bundles(list(config.bundles)) if config.bundles else []
    if config.runs:
        # Imported here: with --bundles alone nothing of nerfstudio is needed.
        from fit3d_ns.bundle_runs import bundle_run, choose_runs

        runs, notes = choose_runs(list(config.runs), config.all_runs)
        for note in notes:
            say(note)
        for number, run in enumerate(runs, start=1):
            folder = None if config.bundle_dir is None else _bundle_folder(config.bundle_dir, run)
            bundle, reused = bundle_run(run, folder, config.data_root)
            say(f"Scene {number}/{len(runs)} {run.name}: bundle {'found' if reused else 'made'} in {bundle.folder}")
            folders.append(bundle.folder)
    return list(dict.fromkeys(folder.absolute() for folder in folders))


def _bundle_folder(bundle_dir: Path, run: Any) -> Path:
    """A folder for a run's bundle, named after scene and run, that is not of another run of the same name."""
    name = f"{run.name}-{run.config_path.parent.name}"
    folder, number = bundle_dir / name, 1
    while _is_of_another_run(folder, run):
        number += 1
        folder = bundle_dir / f"{name}-{number}"
    return folder


def _is_of_another_run(folder: Path, run: Any) -> bool:
    try:
        config = Path(SceneBundle(folder).info.source.get("config", ""))
    except UserError:
        return False
    # Where that run is gone, it has moved, most likely to where this one is.
    return config != run.config_path and config.is_file()


def open_scenes(folders: List[Path], data_root: Optional[Path]) -> List[Scene]:
    """Opens bundles and checks that they can be distilled together.

    Args:
        folders: The bundles.
        data_root: Where photos are if they moved; see `fit3d_ns.photos.locate`.

    Returns:
        The scenes, in the given order.

    Raises:
        UserError: If a bundle cannot be read, the scenes differ in teacher or grid rule, one has no training view, or
            a photo is missing.
    """
    scenes = []
    for folder in folders:
        bundle = SceneBundle(folder)
        scenes.append(Scene(bundle, bundle.read_cameras(), bundle.read_patch_weights()))
    for scene in scenes:
        _check_agreement(scenes[0], scene)
        if not scene.info.indices("train"):
            raise UserError(f"The bundle {scene.bundle.folder} has no training view: bundle a run with training views.")
        for view in scene.info.views:
            locate(Path(view.photo.path), data_root)
    return scenes


def _check_agreement(first: Scene, other: Scene) -> None:
    for what, key in (
        ("teacher", "name"),
        ("teacher's architecture", "timm_id"),
        ("teacher's layer", "layer"),
        ("teacher's final norm", "norm"),
        ("teacher's weights", "weights_sha256"),
        ("teacher's input mean", "mean"),
        ("teacher's input deviation", "std"),
    ):
        _compare(first, other, what, first.info.teacher.get(key), other.info.teacher.get(key))
    _compare(
        first, other, "largest photo size of the teacher", first.info.teacher_max_size, other.info.teacher_max_size
    )
    _compare(first, other, "feature grid", first.info.feature_grid.to_dict(), other.info.feature_grid.to_dict())


def _compare(first: Scene, other: Scene, what: str, mine: Any, theirs: Any) -> None:
    if mine != theirs:
        raise UserError(
            f"The scenes {first.name} ({first.bundle.folder}) and {other.name} ({other.bundle.folder}) differ in the "
            f"{what} ({_short(mine)} and {_short(theirs)}): distil them apart, or lift one of them again."
        )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)  # hashes
