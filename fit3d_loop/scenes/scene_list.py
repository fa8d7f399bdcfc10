"""The scenes that a user names: found, recognised by what lies there, and told apart."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fit3d_ns.data.folders import is_leftover, is_photo
from fit3d_ns.data.layouts import find_model
from fit3d_ns.runs.config_reader import find_runs
from fit3d_ns.runs.names import CHECKPOINTS, CONFIG, METHOD
from fit3d_ns.support.errors import UserError, first_line

_DATAPARSERS = ("nerfstudio-data", "colmap", "blender-data", "scannetpp-data")
_YAML_KEYS = ("data", "name", "dataparser", "flags", "run", "ply")
_METHOD_LINE = re.compile(r"^method_name: ['\"]?([^'\"\s]+)", re.MULTILINE)
_BACKBONE_LINE = re.compile(r"^ +backbone: ['\"]?([^'\"\s]+)", re.MULTILINE)
_LIFTED_ONTO = ("splatfacto", "splatfacto-big", METHOD)


@dataclass(frozen=True)
class SceneSource:
    """A scene as it was named."""

    name: str
    """Unique; names its files."""
    kind: Literal["photos", "run", "ply"]
    """``photos`` are trained; a ``run`` or ``ply`` brings its geometry."""
    path: Path
    """Absolute: the scene's folder or file, the run's folder, or the PLY file."""
    said: str
    """What it was recognised as, for humans."""
    parser: tuple[str, ...] = ()
    """Of ``photos``: dataparser and flags, as at the end of ``ns-train``."""
    data: Path | None = None
    """Of ``ply``: photos and poses."""
    backbone: str | None = None
    """Of a ``run`` of this project's method: the backbone whose features it has."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its geometry, as JSON values."""
        data = None if self.data is None else str(self.data)
        return {"kind": self.kind, "path": str(self.path), "parser": list(self.parser), "data": data}

    def photo_folder(self) -> Path | None:
        """Returns the folder below which the photos lie; None where only the run's configuration knows."""
        return self.data if self.kind == "ply" else self.path if self.kind == "photos" else None


def read_scenes(path: Path) -> tuple[list[SceneSource], list[str]]:
    """Reads the scenes that a user names.

    Args:
        path: A folder of scene folders, a text file with one scene a line, or a YAML file.

    Returns:
        The scenes, in the order of the list, or of their names in a folder; and one sentence for each thing that was
        left out.

    Raises:
        UserError: If nothing is there, an entry is none, or two scenes have one name.
    """
    path = path.expanduser().absolute()
    notes: list[str] = []
    if path.is_dir():
        scenes, notes = _scenes_below(path)
    elif path.is_file():
        text = _read(path)
        entries = _yaml_entries(text, path) if path.suffix.lower() in (".yaml", ".yml") else _lines(text, path)
        scenes = [_entry(entry, path) for entry in entries]
    else:
        raise UserError(f"There is no file or folder {path}: name a folder of scenes, or a list of them.")
    if not scenes:
        reason = f" ({notes[0].removesuffix('.')})" if notes else ""
        raise UserError(
            f"{path} holds no scene{reason}: a scene has transforms.json, COLMAP's sparse/0, transforms_train.json, "
            "ScanNet++'s dslr, or is a trained run."
        )
    for name, count in Counter(scene.name for scene in scenes).items():
        if count > 1:
            places = ", ".join(str(scene.path) for scene in scenes if scene.name == name)
            raise UserError(f"{count} scenes are called {name} ({places}): list them in a YAML file, each with a name.")
    return scenes, notes


def backbone_of(scenes: Iterable[SceneSource], named: str | None) -> str:
    """Returns the backbone to use.

    Args:
        scenes: Of `read_scenes`.
        named: What the user chose, if anything.

    Raises:
        UserError: If nothing was chosen and the runs among the scenes have features of different backbones.
    """
    if named is not None:
        return named
    known = {scene.backbone: scene for scene in scenes if scene.backbone is not None}
    if len(known) > 1:
        listed = " and ".join(f"{name} ({scene.path})" for name, scene in list(known.items())[:2])
        raise UserError(f"The runs among the scenes have features of {listed}: choose one with --backbone.")
    return next(iter(known), "dinov2_small")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"The list {path} cannot be read ({first_line(error)}): check the file.") from error


def _lines(text: str, source: Path) -> list[dict[str, Any]]:
    """Entries of a text file: a path, maybe followed by dataparser and flags, or PLY file and ``--data SCENE``."""
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if _place(line, source).exists():  # a path with blanks needs no quotes
            entries.append({"data": line})
            continue
        try:
            first, *words = shlex.split(line)
        except ValueError as error:
            raise UserError(f"Line {number} of {source} cannot be read ({error}): close the quote.") from error
        if words[:1] == ["--data"] and len(words) == 2:
            entries.append({"ply": first, "data": words[1]})
        elif words:
            entries.append({"data": first, "dataparser": words[0], "flags": words[1:]})
        else:
            entries.append({"data": first})
    return entries


def _yaml_entries(text: str, source: Path) -> list[dict[str, Any]]:
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{source} is no YAML ({first_line(error)}): correct it.") from error
    if isinstance(content, dict):
        content = content.get("scenes")
    if not isinstance(content, list):
        raise UserError(f"{source} holds no list of scenes: begin each with a dash (docs/fit3d.md).")
    entries = []
    for number, entry in enumerate(content, start=1):
        if isinstance(entry, str):
            entry = {"data": entry}
        if not isinstance(entry, dict) or not entry:
            raise UserError(f"Scene {number} of {source} is neither a path nor a mapping: correct it.")
        unknown = [str(key) for key in entry if key not in _YAML_KEYS]
        if unknown:
            raise UserError(f"Scene {number} of {source} has {unknown[0]}: known are {', '.join(_YAML_KEYS)}.")
        entries.append(entry)
    return entries


def _entry(entry: Mapping[str, Any], source: Path) -> SceneSource:
    """One scene of a list."""
    texts = {key: str(entry[key]) for key in ("data", "name", "dataparser", "run", "ply") if entry.get(key) is not None}
    main = texts.get("ply") or texts.get("run") or texts.get("data")
    if main is None:
        raise UserError(f"A scene of {source} names none of data, run and ply: add one of them.")
    path = _place(main, source)
    if not path.exists():
        raise UserError(f"{source} names the scene {path}, which does not exist: correct the list.")
    if "ply" in texts or path.suffix.lower() == ".ply":
        if "data" not in texts or _place(texts["data"], source) == path:
            raise UserError(f"{source} names {path} without its photos: add `--data SCENE`, or data in a YAML list.")
        data = _place(texts["data"], source)
        if not data.exists():
            raise UserError(f"{source} names the scene {data}, which does not exist: correct the list.")
        name = texts.get("name") or _clean(data.name if data.is_dir() else data.parent.name)
        return SceneSource(name, "ply", path, "PLY file of Gaussians", data=data)
    flags = _flags(entry.get("flags"), source)
    if "dataparser" in texts:
        name = texts.get("name") or _clean(_name_of(path))
        return SceneSource(name, "photos", path, f"{texts['dataparser']}, as listed", (texts["dataparser"], *flags))
    found = _recognise(path)
    if isinstance(found, str):
        runs = _newest_run(path) if path.is_dir() else None
        if runs is None:
            raise UserError(f"{source} names {path}, {found}: name its dataparser in the list.")
        found = runs
    parser = found.parser + flags if found.kind == "photos" else found.parser
    return SceneSource(
        texts.get("name") or found.name, found.kind, found.path, found.said, parser, found.data, found.backbone
    )


def _flags(flags: Any, source: Path) -> tuple[str, ...]:
    if flags is None:
        return ()
    if isinstance(flags, str):
        return tuple(shlex.split(flags))
    if isinstance(flags, list):
        return tuple(str(flag) for flag in flags)
    raise UserError(f"flags of a scene in {source} are neither a text nor a list: correct them.")


def _place(text: str, source: Path) -> Path:
    """A path of a list: from the folder of the list, or where that has none of this name, from the working folder."""
    path = Path(text).expanduser()
    beside = source.parent / path
    return beside if path.is_absolute() or beside.exists() or not path.exists() else path.absolute()


def _scenes_below(root: Path) -> tuple[list[SceneSource], list[str]]:
    here = _recognise(root)
    if not isinstance(here, str):
        return [here], []
    scenes, notes = [], []
    for path in sorted(root.iterdir()):
        if is_leftover(path) or not path.is_dir():
            continue
        found = _recognise(path)
        if isinstance(found, str):
            found = _newest_run(path) or found
        if isinstance(found, str):
            notes.append(f"{path}, {found}, was left out.")
        else:
            scenes.append(found)
    return scenes, notes


def _recognise(path: Path) -> SceneSource | str:
    """What lies at a path, or why it is no scene."""
    name = _clean(_name_of(path))
    if path.is_file():
        if path.name == CONFIG:
            return _recognise_run(path.parent)
        if path.suffix == ".json":
            return SceneSource(name, "photos", path, "nerfstudio-data", ("nerfstudio-data",))
        return "which is no folder"
    if (path / CONFIG).is_file() and (path / CHECKPOINTS).is_dir():
        return _recognise_run(path)
    if (path / "transforms.json").is_file():
        return SceneSource(name, "photos", path, "nerfstudio-data", ("nerfstudio-data",))
    images = next((folder for folder in ("images", "input") if (path / folder).is_dir()), None)
    sparse = find_model(path) if images is not None else None
    if sparse is not None:
        # nerfstudio would ask whether it may write smaller photos into the scene.
        parser = ("colmap", "--colmap-path", sparse, "--images-path", str(images), "--downscale-factor", "1")
        return SceneSource(name, "photos", path, f"COLMAP, {sparse}", parser)
    if (path / "transforms_train.json").is_file():
        return SceneSource(name, "photos", path, "Blender", ("blender-data",))
    if (path / "dslr" / "nerfstudio" / "transforms.json").is_file():
        return SceneSource(name, "photos", path, "ScanNet++", ("scannetpp-data",))
    if (path / "dslr" / "colmap").is_dir():
        return "which is a ScanNet++ scene without poses for nerfstudio (prepare it, docs/scannetpp.md)"
    return "which is no scene that can be recognised"


def _recognise_run(run: Path) -> SceneSource | str:
    try:
        text = (run / CONFIG).read_text(errors="replace")
    except OSError as error:
        return f"whose {CONFIG} cannot be read ({error.strerror})"
    method = _METHOD_LINE.search(text)
    if method is None or method[1] not in _LIFTED_ONTO:
        return f"which is a run of {method[1] if method else 'an unknown method'}, without Gaussians"
    if not any((run / CHECKPOINTS).glob("step-*.ckpt")):
        return "which is a run without a checkpoint"
    backbone = _BACKBONE_LINE.search(text) if method[1] == METHOD else None
    name = _clean(run.parents[1].name if run.parent.name == method[1] else run.name)
    return SceneSource(name, "run", run, f"{method[1]} run", backbone=backbone[1] if backbone else None)


def _newest_run(folder: Path) -> SceneSource | None:
    """The newest run with Gaussians below a folder."""
    runs = [_recognise(path.parent) for path in find_runs(folder)]
    usable = [run for run in runs if not isinstance(run, str)]
    return max(usable, key=lambda run: (run.path / CONFIG).stat().st_mtime_ns, default=None)


def _name_of(path: Path) -> str:
    return path.name if path.is_dir() else path.parent.name


def _clean(name: str) -> str:
    """A name for files and flags."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._-") or "scene"


def count_photos(scene: SceneSource) -> tuple[int, Path | None]:
    """Counts the photos of a scene, about, without reading what describes them.

    Args:
        scene: Of `read_scenes`.

    Returns:
        Photos in the folder that holds the most of them, and one of them.
    """
    folder = scene.photo_folder()
    if folder is None or not folder.exists():
        return 0, None
    folder = folder if folder.is_dir() else folder.parent
    best: list[Path] = []
    for place in ("images", "input", "train", "rgb", "dslr/resized_images", "."):
        if (folder / place).is_dir():
            photos = [path for path in (folder / place).iterdir() if is_photo(path)]
            best = max(best, photos, key=len)
    return len(best), best[0] if best else None


def scenes_in_words(count: int) -> str:
    """Returns a number of scenes as a sentence has it, such as ``1 scene``.

    Args:
        count: Scenes.
    """
    return f"{count} scene" if count == 1 else f"{count} scenes"
