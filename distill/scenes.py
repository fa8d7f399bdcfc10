"""The scenes of a run: bundles made or found, and checked against each other before any long work."""

import logging
import os
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from distill.config import DistillConfig
from distill.sampler import SceneViews
from fit3d_ns.data.photos.bundled import locate
from fit3d_ns.runs.bundle import BundleCameras, BundleInfo, SceneBundle, SceneTensors, find_bundles
from fit3d_ns.support.errors import UserError
from fit3d_ns.support.processes import World
from fit3d_ns.support.samples import evenly_spaced

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scene:
    """A bundle with all that is small enough to stay in memory."""

    bundle: SceneBundle
    """Where geometry and features are."""
    cameras: BundleCameras
    """Of all views, on the CPU."""
    patch_weights: dict[int, Float[Tensor, "h w"]]
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

    def report_views(self, count: int, unseen: bool = False) -> tuple[list[int], bool]:
        """Returns up to ``count`` evenly spaced held-out views, and whether they are held out indeed.

        A scene that was trained on all its views has none; training views are taken then.

        Args:
            count: Most views returned.
            unseen: Whether the student never sees this scene: then all views are held out from it, and so many more
                pairs of them share surface.
        """
        if unseen:
            return evenly_spaced(range(len(self.info.views)), count), True
        held_out = self.info.indices("eval")
        views = held_out or self.info.indices("train")
        return evenly_spaced(views, count), bool(held_out)


def make_all_bundles(config: DistillConfig) -> tuple[list[Path], list[Path]]:
    """Makes the bundles of all scenes named that are missing or stale.

    Args:
        config: The user's choices.

    Returns:
        Folders of the bundles to train on, and of those to validate on; the first lack what is among the second.

    Raises:
        UserError: If there are no scenes to train on, or one cannot be read.
    """
    if not config.runs and not config.bundles:
        raise UserError("There is nothing to distil: name trained runs with --runs, or scene bundles with --bundles.")
    validation = _make_bundles(config.validation_runs, config.validation_bundles, config)
    named = _make_bundles(config.runs, config.bundles, config)
    training = [folder for folder in named if folder not in validation]
    if len(training) < len(named):
        _LOGGER.info(f"{len(named) - len(training)} of {len(named)} scenes are only validated on.")
    if not training:
        raise UserError("All scenes are named by --validation-runs or --validation-bundles: leave some to train on.")
    return training, validation


def _make_bundles(runs_named: Sequence[Path], bundles: Sequence[Path], config: DistillConfig) -> list[Path]:
    folders = find_bundles(list(bundles)) if bundles else []
    if runs_named:
        # Imported here: with --bundles alone nothing of nerfstudio is needed.
        from fit3d_ns.runs.bundling import bundle_run, choose_runs

        runs, notes = choose_runs(list(runs_named), config.all_runs, config.teacher)
        for note in notes:
            _LOGGER.warning(note)
        for number, run in enumerate(runs, start=1):
            folder = None if config.bundle_dir is None else _bundle_folder(config.bundle_dir, run)
            bundle, reused = bundle_run(run, folder, config.data_root)
            _LOGGER.info(
                f"Scene {number}/{len(runs)} {run.name}: bundle {'found' if reused else 'made'} in {bundle.folder}"
            )
            folders.append(bundle.folder)
    return list(dict.fromkeys(folder.absolute() for folder in folders))


def _bundle_folder(bundle_dir: Path, run: Any) -> Path:
    """A folder for a run's bundle, named after scene and run, that is not of another run of the same name."""
    name = run.label
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


def open_scenes(folders: list[Path], data_root: Path | None) -> list[Scene]:
    """Opens bundles and checks that they can be distilled together.

    Args:
        folders: The bundles.
        data_root: Where photos are if they moved; see `fit3d_ns.data.photos.bundled.locate`.

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
            f"{what} ({_short(mine)} and {_short(theirs)}): distil them apart (--teacher), or lift one of them again."
        )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)  # hashes


Placement = Literal["device", "host", "disk"]

_DEVICE_SHARE = 0.55
"""Of the free device memory; the rest is for the student, its activations, renders and photos."""
_HOST_SHARE = 0.5
"""Of the machine's memory, over all its processes."""
_UPLOADS_AT_ONCE = 4
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says how much of the machine's memory a container may use."""


class SceneCache:
    """Hands out scenes on the device.

    With ``device`` placement all scenes are uploaded once. Otherwise at most ``budget`` bytes of them are on the
    device, the ones used last; `prefetch` starts an upload in the background, from page-locked memory on a stream of
    its own, so that training goes on meanwhile.

    Args:
        scenes: As opened; a scene's number is its place in this list.
        world: Whose device they are needed on; all its processes must make their caches together, and choose alike.
        placement: Where they wait; ``auto`` chooses the fastest that fits.
        budget_gigabytes: Device memory for scenes; 55 % of what is free if None.

    Raises:
        UserError: If the placement asked for does not fit, or one scene alone exceeds the budget.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        world: World,
        placement: str = "auto",
        budget_gigabytes: float | None = None,
    ):
        self._scenes = scenes
        self._device = device = world.device
        self._bytes = [scene.bundle.num_bytes() for scene in scenes]
        self.total_bytes = sum(self._bytes)
        budget = int(budget_gigabytes * 1e9) if budget_gigabytes is not None else _free_bytes(device)
        # Where they wait, and the size of a block, decide the order of the views: all processes must see the same.
        self.budget, host_bytes = world.smallest(budget, int(_HOST_SHARE * _host_bytes() / world.local_size))
        self.placement: Placement = self._choose(placement, host_bytes)
        self._resident: OrderedDict[int, SceneTensors] = OrderedDict()
        self._uploads: dict[int, Future] = {}
        self._host: dict[int, SceneTensors] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._uploader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scene-upload")
        if self.placement == "host":
            self._host = {index: self._read(index) for index in range(len(scenes))}
        if self.placement == "device":
            # Several at a time: reading and page-locking take longer than the copy to the device.
            with ThreadPoolExecutor(max_workers=_UPLOADS_AT_ONCE) as threads:
                self._resident.update(enumerate(threads.map(self._upload, range(len(scenes)))))

    @property
    def block_bytes(self) -> int | None:
        """Memory of a block of scenes among which views are shuffled; None where all scenes are one block.

        Half the budget, so that the next block can arrive while this one is in use.
        """
        return None if self.placement == "device" else self.budget // 2

    def describe(self) -> str:
        """Returns one line for the user."""
        place = {
            "device": f"all resident on the {'GPU' if self._device.type == 'cuda' else 'CPU'}",
            "host": "in host memory, uploaded in blocks ahead of their use",
            "disk": "memory-mapped from disk, uploaded in blocks ahead of their use",
        }[self.placement]
        return (
            f"Scenes: {len(self._scenes)}, {self.total_bytes / 1e9:.2f} GB, {place} (device budget "
            f"{self.budget / 1e9:.1f} GB; --scene-placement, --scene-memory)"
        )

    def get(self, index: int) -> SceneTensors:
        """Returns a scene on the device, waiting for its upload if need be.

        Args:
            index: Position of the scene.
        """
        if index in self._uploads:
            self._resident[index] = self._uploads.pop(index).result()
        elif index not in self._resident:
            self._make_room(self._bytes[index], keep=())
            self._resident[index] = self._upload(index)
        self._resident.move_to_end(index)
        return self._resident[index]

    def prefetch(self, indices: Sequence[int], in_use: Sequence[int] = ()) -> None:
        """Starts the upload of scenes that are not on the device, as far as they fit the budget; returns at once.

        Scenes used longest ago make room for them.

        Args:
            indices: Positions of the scenes.
            in_use: Positions of scenes that stay.
        """
        for index in indices:
            if index not in self._resident and index not in self._uploads:
                if not self._make_room(self._bytes[index], keep=(*indices, *in_use)):
                    return
                self._uploads[index] = self._uploader.submit(self._upload, index)

    def check_block(self, block_bytes: int | None) -> None:
        """Refuses to go on with blocks of scenes that were cut for more memory.

        Args:
            block_bytes: `block_bytes` of the cache that they were cut for.

        Raises:
            UserError: If the scenes of one block exceed the budget.
        """
        needed = self.total_bytes if block_bytes is None else min(block_bytes, self.total_bytes)
        if self.placement != "device" and needed > self.budget:
            raise UserError(
                f"The checkpoint's training takes {needed / 1e9:.2f} GB of scenes at a time, but only "
                f"{self.budget / 1e9:.2f} GB are for them: raise --scene-memory, or start anew in another --output-dir."
            )

    def close(self) -> None:
        """Frees all memory."""
        self._uploader.shutdown(wait=True, cancel_futures=True)
        self._uploads.clear()
        self._resident.clear()
        self._host.clear()

    def _choose(self, placement: str, host_bytes: int) -> Placement:
        largest = max(self._bytes)
        if placement == "device" and self.total_bytes > self.budget:
            raise UserError(
                f"--scene-placement device: the scenes take {self.total_bytes / 1e9:.1f} GB, but only "
                f"{self.budget / 1e9:.1f} GB are for them: raise --scene-memory, or use another placement."
            )
        if placement == "auto" and self.total_bytes <= self.budget:
            return "device"
        cuda = self._device.type == "cuda"
        pinned = sum(map(_pinned_bytes, self._scenes)) if cuda and placement != "disk" else self.total_bytes
        if placement == "host" and pinned > host_bytes:
            raise UserError(
                f"--scene-placement host: the scenes take {pinned / 1e9:.1f} GB of host memory, but only "
                f"{host_bytes / 1e9:.1f} GB are for them: use --scene-placement disk."
            )
        if placement == "auto":
            placement = "host" if pinned <= host_bytes and cuda else "disk"
        if placement != "device" and largest > self.budget // 2:
            raise UserError(
                f"One scene takes {largest / 1e9:.2f} GB, more than half of the {self.budget / 1e9:.2f} GB for scenes: "
                "raise --scene-memory, or use a GPU with more memory."
            )
        return placement  # type: ignore[return-value]

    def _read(self, index: int) -> SceneTensors:
        scene = self._scenes[index].bundle.read_scene()
        return scene.each(Tensor.pin_memory) if self._device.type == "cuda" else scene

    def _upload(self, index: int) -> SceneTensors:
        if self._stream is None:
            source = self._host.get(index) or self._read(index)
            # A copy, so that no page is read from disk while rendering.
            return source.each(Tensor.clone)
        with torch.cuda.stream(self._stream):  # around the reading too: it tells this thread which GPU is meant
            source = self._host.get(index) or self._read(index)
            scene = source.each(lambda tensor: tensor.to(self._device, non_blocking=True))
        # The page-locked source must outlive the copy, and whoever gets the scene need not wait again.
        self._stream.synchronize()
        return scene

    def _make_room(self, needed: int, keep: Collection[int]) -> bool:
        """Evicts scenes that are not to be kept, used longest ago first; returns whether that suffices."""
        if self.placement == "device":
            return True
        for index in [index for index, upload in self._uploads.items() if upload.done()]:
            self._resident[index] = self._uploads.pop(index).result()
        used = needed + sum(self._bytes[index] for index in (*self._resident, *self._uploads))
        for oldest in [index for index in self._resident if index not in keep]:
            if used <= self.budget:
                break
            scene = self._resident.pop(oldest)
            used -= self._bytes[oldest]
            if self._stream is not None:
                # Renders that read it may still be queued.
                for tensor in scene.tensors().values():
                    tensor.record_stream(torch.cuda.current_stream(self._device))
        return used <= self.budget


def _pinned_bytes(scene: Scene) -> int:
    """Host memory that a scene takes page-locked: torch rounds every tensor up to a power of two."""
    return sum(1 << (tensor.nbytes - 1).bit_length() for tensor in scene.bundle.read_scene().tensors().values())


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(_DEVICE_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(_HOST_SHARE * _host_bytes())


def _host_bytes() -> int:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _MEMORY_LIMITS:
        try:
            return min(machine, int(path.read_text()))
        except (OSError, ValueError):  # another kind of system, or no limit
            continue
    return machine
