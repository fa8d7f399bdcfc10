"""Public data sets for monocular depth."""

import lzma
from dataclasses import replace
from importlib import resources
from pathlib import Path

from fit3d_ns.support.errors import UserError
from probe.data.base import ProbeData
from probe.data.choice import DataChoice
from probe.data.pairing import read_lines, samples_from_pairs
from probe.data.segmentation import scannet_frames

_LAYOUTS = {
    "nyuv2": "the folders of the official lists (kitchen_0028b/rgb_00045.jpg, .../sync_depth_00045.png) below DATA, "
    "DATA/sync, DATA/train, DATA/test or DATA/official_splits/test",
    "scannet": "DATA/scannet_{train,val}.txt with lines of 'photo depth', or DATA/<scene>/{color,depth} with "
    "DATA/scannetv2_{train,val}.txt",
    "scannetpp": "DATA/scannetpp_{train,val}.txt with lines of 'photo depth', paths below DATA",
    "kitti": "DATA/2011_09_26/..._sync/image_02/data/*.png (or below DATA/input) and "
    "..._sync/proj_depth/groundtruth/image_02/*.png below DATA, DATA/gt_depth, DATA/train, DATA/val or "
    "DATA/data_depth_annotated/{train,val}",
}
_NYU_FOLDERS = ("", "sync", "train", "official_splits/train", "test", "official_splits/test")
_KITTI_TRUTH = ("gt_depth", "", "train", "val", "data_depth_annotated/train", "data_depth_annotated/val")
_NYU_INTRINSICS = (518.85790117, 519.46961112, 325.58244941, 253.73616633)
"""fx, fy, cx, cy in pixels: published with the data set."""


def nyuv2(choice: DataChoice) -> ProbeData:
    """Finds NYUv2 depth: 24,231 / 654 photos of 640x480, millimetres, cap 10 m.

    Args:
        choice: The folder and how to read it.

    Returns:
        Training and test samples.
    """
    train, test = (
        samples_from_pairs(lines, choice.data, folders, folders, source, _LAYOUTS["nyuv2"])
        for (source, lines), folders in zip(
            _official(choice, "nyu_train", "nyu_test"), (_NYU_FOLDERS, _NYU_FOLDERS[::-1])
        )
    )
    train, test = ([replace(sample, intrinsics=_NYU_INTRINSICS) for sample in split] for split in (train, test))
    return ProbeData("NYUv2", choice.kind, train, test, depth_scale=1000.0, max_depth=10.0)


def kitti(choice: DataChoice) -> ProbeData:
    """Finds KITTI with Eigen's split: 23,158 / 652 photos, cap 80 m.

    Args:
        choice: The folder and how to read it.

    Returns:
        Training and test samples.
    """
    splits = []
    for source, lines in _official(choice, "kitti_eigen_train", "kitti_eigen_test"):
        splits.append(samples_from_pairs(lines, choice.data, ("", "input"), _KITTI_TRUTH, source, _LAYOUTS["kitti"]))
    return ProbeData("KITTI", "depth", *splits, depth_scale=256.0, max_depth=80.0)


def scannet(choice: DataChoice) -> ProbeData:
    """Finds ScanNet depth: millimetres, cap 10 m.

    Args:
        choice: The folder and how to read it.

    Returns:
        Training and test samples.
    """
    layout = _LAYOUTS["scannet"]
    named = [choice.data / f"scannet_{name}.txt" for name in ("train", "val")]
    if all(path.is_file() for path in named) or (choice.split_file and _lists_pairs(choice.split_file[0])):
        return _listed(choice, "ScanNet", named, layout, 10.0)
    below = choice.data / "scannet_frames_25k"
    train, test, notes = scannet_frames(choice, below if below.is_dir() else choice.data, "depth", layout)
    return ProbeData("ScanNet", "depth", train, test, max_depth=10.0, fit="image_to_target", notes=notes)


def scannetpp(choice: DataChoice) -> ProbeData:
    """Finds ScanNet++ depth rendered from the meshes: millimetres, cap 20 m.

    Args:
        choice: The folder and how to read it.

    Returns:
        Training and test samples.
    """
    named = [choice.data / f"scannetpp_{name}.txt" for name in ("train", "val")]
    return _listed(choice, "ScanNet++", named, _LAYOUTS["scannetpp"], 20.0)


def _listed(choice: DataChoice, name: str, lists: list[Path], layout: str, max_depth: float) -> ProbeData:
    splits = []
    for path in choice.split_file or lists:
        if not path.is_file():
            raise UserError(f"There is no list {path}: give two with --split-file; the layout expected is: {layout}.")
        lines = read_lines(path, "--split-file")
        splits.append(samples_from_pairs(lines, choice.data, [""], [""], str(path), layout))
    return ProbeData(name, "depth", *splits, depth_scale=1000.0, max_depth=max_depth)


def _official(choice: DataChoice, train: str, test: str) -> list[tuple[str, list[str]]]:
    """Returns (source, lines) of the training and the test list: the user's own, or the official ones."""
    if choice.split_file is not None:
        return [(str(path), read_lines(path, "--split-file")) for path in choice.split_file]
    lists = []
    for name in (train, test):
        content = (resources.files("probe.data") / "splits" / f"{name}.txt.xz").read_bytes()
        lists.append((f"the official list {name}", lzma.decompress(content).decode().splitlines()))
    return lists


def _lists_pairs(path: Path) -> bool:
    return len(read_lines(path, "--split-file")[0].split()) >= 2
