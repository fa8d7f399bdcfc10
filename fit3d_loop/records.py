"""What the loop leaves about itself: settings, one state file a scene, one record a step, locks. No database."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fit3d_ns.support.errors import DamagedFile, UserError
from fit3d_ns.support.json_files import UNREADABLE, build, read_record, write_record

_LOGGER = logging.getLogger(__name__)
SETTINGS = "loop.json"
ORIGINAL = "original"
"""Key of the teacher of the first round."""


@dataclass(frozen=True)
class Places:
    """Where things are below the output folder."""

    root: Path
    """The output folder, absolute."""

    def state(self, scene: str) -> Path:
        """Returns a scene's state file.

        Args:
            scene: Name of the scene.
        """
        return self.root / "scenes" / f"{scene}.json"

    def geometry(self, scene: str) -> Path:
        """Returns the run of a scene that is trained here.

        Args:
            scene: Name of the scene.
        """
        return self.root / "geometry" / scene / "fit3d-splat" / "geometry"

    def lifts(self, scene: str) -> Path:
        """Returns the folder of the lifts onto geometry that a user brought.

        Args:
            scene: Name of the scene.
        """
        return self.root / "lifts" / scene

    def bundles(self, number: int, scene: str) -> Path:
        """Returns the folder that holds a scene's bundle of a round.

        Args:
            number: Of the round, from 1.
            scene: Name of the scene.
        """
        return self.root / "bundles" / f"round{number}" / scene

    def teacher_maps(self, scene: str) -> Path:
        """Returns where the teacher's maps of a scene are kept while features are lifted.

        Args:
            scene: Name of the scene.
        """
        return self.root / "teacher_maps" / scene

    def student(self, number: int) -> Path:
        """Returns the folder of a round's student.

        Args:
            number: Of the round, from 1.
        """
        return self.root / "rounds" / str(number)

    def control(self, kind: str) -> Path:
        """Returns the folder of a control.

        Args:
            kind: What its targets are, such as ``control-blur``.
        """
        return self.root / "controls" / kind

    def probe(self, task: str) -> Path:
        """Returns the folder of a probe.

        Args:
            task: ``segmentation``, ``depth`` and the like.
        """
        return self.root / "probes" / task

    def step(self, name: str) -> Path:
        """Returns the record of a step.

        Args:
            name: Unique in the loop.
        """
        return self.root / "steps" / f"{name}.json"

    def log(self, name: str) -> Path:
        """Returns where the output of a command goes.

        Args:
            name: Of a step, or of a scene.
        """
        return self.root / "logs" / f"{name}.log"

    def progress(self, name: str) -> Path:
        """Returns where a running scene says how far it is.

        Args:
            name: Of the scene.
        """
        return self.root / "running" / f"{name}.json"

    def lock(self, name: str) -> Path:
        """Returns a lock file.

        Args:
            name: Of what is locked.
        """
        return self.root / ".locks" / name


@dataclass
class SceneState:
    """All that is known of a scene; written after what it vouches for."""

    name: str
    """Of the scene, fit for a file name."""
    source: dict[str, Any]
    """`SceneSource.identity`."""
    geometry: dict[str, Any] | None = None
    """Of a finished one: ``config`` (of the run), ``seconds``, ``made``, and ``psnr``, ``gaussians`` where trained."""
    rounds: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By number: ``teacher`` (its key), ``bundle``, ``seconds`` and ``metrics`` of the lift."""
    failure: dict[str, Any] | None = None
    """``round``, ``teacher``, ``stage``, ``sentence`` of the last attempt; None where it did not fail."""

    def __post_init__(self) -> None:
        """Checks what others rely on.

        Raises:
            ValueError: Naming the first field that is missing or of another kind.
        """
        _check_entries("geometry", self.geometry, config=str, made=int, seconds=float)
        for number, lift in self.rounds.items():
            if not number.isdecimal():
                raise ValueError(f"rounds has {number[:20]!r}")
            _check_entries(f"rounds.{number}", lift, teacher=str, run=str, seconds=float, metrics=dict)
            if not isinstance(lift.get("bundle"), (str, type(None))):
                raise ValueError(f"rounds.{number}.bundle is no path")
        _check_entries("failure", self.failure, round=int, teacher=str, stage=str, sentence=str)

    def lifted(self, number: int, teacher: str) -> bool:
        """Returns whether the features of a teacher were lifted in a round.

        Args:
            number: Of the round, from 1.
            teacher: Key of its teacher.
        """
        return self.geometry is not None and self.rounds.get(str(number), {}).get("teacher") == teacher

    def failed(self, number: int, teacher: str) -> bool:
        """Returns whether the last attempt at a round with this teacher, or at one before, failed.

        Args:
            number: Of the round, from 1.
            teacher: Key of its teacher.
        """
        if self.failure is None:
            return False
        before = self.failure["round"] < number
        return before or (self.failure["round"] == number and self.failure["teacher"] == teacher)

    def bundle(self, number: int) -> Path | None:
        """Returns the bundle of a round, where it is still there.

        Args:
            number: Of the round, from 1.
        """
        path = self.rounds.get(str(number), {}).get("bundle")
        return Path(path) if path and (Path(path) / "scene.json").is_file() else None


def _check_entries(name: str, found: Mapping[str, Any] | None, **kinds: type) -> None:
    if found is None:
        return
    for key, kind in kinds.items():
        value = found.get(key)
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            raise ValueError(f"{name}.{key} is {str(value)[:40]}")


def read_state(places: Places, name: str, source: Mapping[str, Any]) -> SceneState:
    """Reads a scene's state; a new one where there is none, or a damaged one.

    Args:
        places: Of the output folder.
        name: The scene.
        source: `SceneSource.identity`.

    Returns:
        What is known of it.

    Raises:
        UserError: If the scene was something else before.
    """
    path = places.state(name)
    try:
        state = build(SceneState, read_record(path))
    except FileNotFoundError:
        return SceneState(name, dict(source))
    except DamagedFile as error:
        _LOGGER.warning("%s is damaged (%s): it is made anew from what lies there.", path, error)
        return SceneState(name, dict(source))
    if state.source != dict(source):
        raise UserError(
            f"The scene {name} was {_describe(state.source)} before and is {_describe(source)} now: give it another "
            f"name in a YAML list, or delete {path} and what lies under geometry/{name} to begin it anew."
        )
    return state


def read_recorded_state(places: Places, name: str) -> SceneState:
    """Returns the state of a scene that is known to be done.

    Args:
        places: Of the output folder.
        name: The scene.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    path = places.state(name)
    try:
        return build(SceneState, read_record(path))
    except UNREADABLE as error:
        raise UserError(f"{path} is missing or damaged: start again.") from error


def write_state(places: Places, state: SceneState) -> None:
    """Writes a scene's state, as one step.

    Args:
        places: Of the output folder.
        state: Of one scene.
    """
    write_record(places.state(state.name), asdict(state))


def _describe(source: Mapping[str, Any]) -> str:
    return " ".join([str(source.get("path")), *map(str, source.get("parser") or ())])


def keep_settings(
    root: Path, settings: dict[str, Any], free: Mapping[str, Any], name: str = SETTINGS
) -> dict[str, Any]:
    """Writes down what a loop is begun with, or checks that it goes on with the same.

    Args:
        root: The output folder.
        settings: `LoopConfig.decisive`.
        free: Settings that are taken from the first start where the user gives none, with what they are at first.
        name: Of the file.

    Returns:
        The settings in force.

    Raises:
        UserError: If the folder holds a loop of other settings.
    """
    path, lock = root / name, Places(root).lock(name)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):  # the jobs of an array begin together
        return _keep_settings(path, settings, free)


def _keep_settings(path: Path, settings: dict[str, Any], free: Mapping[str, Any]) -> dict[str, Any]:
    try:
        stored = read_record(path)
    except FileNotFoundError:
        stored = None
    except DamagedFile as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or choose another --output-dir.") from error
    if stored is None:
        settings = {**settings, **{key: value for key, value in free.items() if settings[key] is None}}
        write_record(path, settings)
        return settings
    settings = {**settings, **{key: stored.get(key) for key in free if settings[key] is None}}
    for key in settings:
        if stored.get(key) != settings[key]:
            raise UserError(
                f"{path.parent} was begun with --{key.replace('_', '-')} {stored.get(key)} instead of {settings[key]}: "
                "go on with the same, or choose another --output-dir."
            )
    return settings


def check_folder(root: Path) -> None:
    """Refuses an output folder of another command, before anything is put there.

    Args:
        root: The output folder.

    Raises:
        UserError: If it holds anything but a loop.
    """
    if root.is_dir() and not (root / SETTINGS).is_file():
        others = (entry for entry in root.iterdir() if entry.name not in (".locks", SETTINGS))
        # Empty folders are nobody's: a killed start may leave some.
        foreign = sorted(one.name for one in others if not one.is_dir() or any(map(Path.is_file, one.rglob("*"))))
        if foreign:
            raise UserError(f"{root} holds files of another command ({foreign[0]}): choose another --output-dir.")


def stored_settings(root: Path, name: str = SETTINGS) -> dict[str, Any]:
    """Returns the settings that a loop was begun with; none where there is no loop.

    Args:
        root: The output folder.
        name: File of the settings below it.
    """
    try:
        return read_record(root / name)
    except UNREADABLE:
        return {}


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Holds a lock, with which goes whatever this process may write to.

    Args:
        path: The lock file.

    Yields:
        Whether it was had; False if another process has it.

    Raises:
        UserError: If its folder cannot be written to.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    except OSError as error:
        raise UserError(
            f"The folder {path.parents[1]} cannot be used ({error.strerror}): choose another --output-dir."
        ) from error
    try:
        yield True
    finally:
        lock.release()


def driver_lock(places: Places, part: tuple[int, int]) -> Path:
    """Returns the lock that a start holds while it is at work.

    Args:
        places: Of the output folder.
        part: Which part of the scenes it does, from 0, and of how many.
    """
    return places.lock(f"driver-{part[0] + 1}-of-{part[1]}")


def remove_leftovers(places: Places, own: Path) -> None:
    """Removes temporary files of processes that were killed while they wrote, unless other starts are at work.

    Args:
        places: Of the output folder.
        own: The `driver_lock` that this process holds.
    """
    for path in own.parent.glob("driver-*"):
        if path != own:
            with try_lock(path) as had:
                if not had:
                    return
    for pattern in (".*.tmp", ".checkpoint-*"):
        for path in places.root.rglob(pattern):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
