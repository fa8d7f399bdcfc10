"""What lies in a folder that was named as a scene, and with which words of the command it is read.

Advice follows from what is there, not from what a dataparser stumbled over.
"""

from collections.abc import Iterator
from pathlib import Path

from fit3d_ns.data.folders import is_leftover, is_photo
from fit3d_ns.data.points.ply_file import OTHER_SPLATS

_MODEL_FOLDERS = ("colmap/sparse/0", "sparse/0", "sparse", "colmap", "")
_VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")
_FILES = (
    ("transforms_train.json", "blender-data"),
    ("dslr/nerfstudio/transforms.json", "scannetpp-data"),
    ("meta_data.json", "sdfstudio-data"),
    ("dataset.json", "nerfies-data"),
    ("cameras.xml", None),  # Metashape
)
"""Files by which a layout is known, and nerfstudio's dataparser for it."""


def find_model(scene: Path) -> str | None:
    """Returns where below a scene's folder a COLMAP model lies; None if it lies in no usual place.

    Args:
        scene: The folder.
    """
    for folder in _MODEL_FOLDERS:
        if any((scene / folder / f"cameras{kind}").is_file() for kind in (".bin", ".txt")):
            return folder or "."
    return None


def layout_advice(data: Path) -> str | None:
    """Says what a folder or file holds and how it is read, for a scene that could not be.

    Args:
        data: What was named with ``--data``.

    Returns:
        The end of a sentence whose subject is ``data``: "holds ...: do ..."; None if nothing is known of it.
    """
    if data.is_file():
        return _advice_for_file(data)
    if (data / "transforms.json").is_file():
        return f"holds transforms.json: end the command with `{_reader_of(data / 'transforms.json')}`"
    for name, parser in _FILES:
        if (data / name).is_file() and parser is not None:
            return f"holds {name}: end the command with `{parser}`"
    if (model := find_model(data)) is not None:
        photos = _photo_folder(data)
        flags = "" if model in ("colmap/sparse/0", "sparse/0") else f" --colmap-path {model}"
        flags += "" if photos in (None, "images") else f" --images-path {photos}"
        return f"holds a COLMAP model in {model}: end the command with `colmap{flags}`"
    if (data / "cameras.xml").is_file():
        return (
            f"holds Metashape's cameras.xml: run `ns-process-data metashape --data {_photo_folder(data) or '.'} --xml "
            "cameras.xml --output-dir SCENE`"
        )
    if (data / "poses_bounds.npy").is_file():
        return "holds LLFF's poses_bounds.npy: run `ns-process-data images` on its photos, which COLMAP poses anew"
    renamed = next(
        (one.name for one in _entries(data, "transforms*.json") if "(" in one.name or "copy" in one.name), None
    )
    if renamed is not None:
        return f"holds {renamed}: rename it to transforms.json"
    inner = [one for one in _entries(data) if one.is_dir() and _is_scene(one)]
    if inner:
        others = f" (or {len(inner) - 1} other folders)" if len(inner) > 1 else ""
        return f"holds no scene itself, but {inner[0].name}{others} below it does: name {inner[0]} with --data"
    if any(_entries(data, "*/config.yml")) or (data / "config.yml").is_file():
        return "is the output of ns-train: name the scene with --data, and a run with --load-config or --runs"
    return _advice_for_files(data)


def _advice_for_files(data: Path) -> str | None:
    """Advice for a folder of photos, videos or splats without poses."""
    suffixes = {one.suffix.lower() for one in _entries(data) if one.is_file()}
    photos = _photo_folder(data)
    if photos is not None:
        return (
            "holds photos without poses: run `ns-process-data images --data "
            f"{data if photos == '.' else data / photos} --output-dir SCENE`, and name SCENE"
        )
    if any(suffix in _VIDEOS for suffix in suffixes):
        return "holds videos: run `ns-process-data video --data VIDEO --output-dir SCENE`, and name SCENE"
    if any(suffix in (".ply", *OTHER_SPLATS) for suffix in suffixes):
        return "holds splats and no photos: --data names the photos' scene, and `fit3d-lift --ply` takes a splat"
    return None if any(True for _ in _entries(data)) else "is empty: name the folder that holds the scene"


def _advice_for_file(data: Path) -> str | None:
    suffix = data.suffix.lower()
    if suffix in _VIDEOS:
        return f"is a video: run `ns-process-data video --data {data} --output-dir SCENE`, and name SCENE"
    if suffix in (".ply", *OTHER_SPLATS):
        return "is a splat or a point cloud: --data names the photos' scene, and `fit3d-lift --ply` takes a splat"
    if suffix in (".zip", ".tar", ".gz", ".7z", ".rar"):
        return "is an archive: unpack it, and name the folder"
    if is_photo(data):
        return "is a photo: name the folder of its scene"
    return None


def _reader_of(path: Path) -> str:
    """The dataparser of a transforms.json: instant-ngp's files have angles of view and no focal lengths."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return "nerfstudio-data"
    return "instant-ngp-data" if '"camera_angle_x"' in text and '"fl_x"' not in text else "nerfstudio-data"


def _is_scene(folder: Path) -> bool:
    known = ("transforms.json", *(name for name, _ in _FILES))
    return any((folder / name).is_file() for name in known) or find_model(folder) is not None


def _photo_folder(data: Path) -> str | None:
    """Where below a folder photos lie: ``.``, ``images``, or the first folder that holds some."""
    if any(is_photo(one) for one in _entries(data) if one.is_file()):
        return "."
    folders = [one for one in _entries(data) if one.is_dir()]
    folders.sort(key=lambda one: (one.name != "images", one.name))
    return next((one.name for one in folders if any(is_photo(photo) for photo in _entries(one))), None)


def _entries(folder: Path, pattern: str = "*") -> Iterator[Path]:
    try:
        yield from (one for one in sorted(folder.glob(pattern)) if not is_leftover(one))
    except OSError:
        return
