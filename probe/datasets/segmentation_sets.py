"""Public data sets for semantic segmentation."""

from pathlib import Path

from fit3d_ns.errors import UserError
from probe.datasets import class_lists
from probe.datasets.choice import DataChoice
from probe.datasets.pairing import pair_folders, read_lines, samples_from_pairs
from probe.datasets.samples import LabelRule, ProbeData, Sample

_MMSEG = "DATA/{images,annotations}/{training,validation}"
_LAYOUTS = {
    "ade20k": f"{_MMSEG} with .jpg photos and .png labels, DATA being ADEChallengeData2016",
    "voc": "DATA/{JPEGImages,SegmentationClass,ImageSets/Segmentation}, DATA being VOCdevkit/VOC2012 or above it",
    "nyuv2": f"{_MMSEG}, or DATA/{{train,test}}_rgb and DATA/{{train,test}}_seg13",
    "scannet": f"{_MMSEG}, or DATA/<scene>/{{color,label}} with DATA/scannetv2_{{train,val}}.txt",
    "scannetpp": f"{_MMSEG} with .JPG photos and .png labels",
}


def ade20k(choice: DataChoice) -> ProbeData:
    """ADE20K scene parsing: 150 classes, 20,210 / 2,000 photos."""
    root = _below(choice.data, "ADEChallengeData2016")
    rule = LabelRule(150, zero_is_ignored=True)
    return _mmseg(choice, root, "ADE20K", class_lists.ADE20K_CLASSES, rule)


def voc(choice: DataChoice) -> ProbeData:
    """Pascal VOC 2012: 20 classes and the background, 1,464 / 1,449 photos (not the augmented list)."""
    layout = _LAYOUTS["voc"]
    root = _below(choice.data, "VOCdevkit/VOC2012", "VOC2012")
    lists = root / "ImageSets" / "Segmentation"
    if choice.split_file is None and not lists.is_dir():
        raise UserError(f"There is no folder {lists}; the layout expected is: {layout}.")
    splits = []
    for position, name in enumerate(("train", "val")):
        path = choice.split_file[position] if choice.split_file else lists / f"{name}.txt"
        pairs = [
            f"JPEGImages/{stem}.jpg SegmentationClass/{stem}.png" for stem in read_lines(path, "--data or --split-file")
        ]
        splits.append(samples_from_pairs(pairs, root, [""], [""], str(path), layout))
    return ProbeData("Pascal VOC 2012", "segmentation", *splits, classes=class_lists.VOC_CLASSES, labels=LabelRule(21))


def nyuv2(choice: DataChoice) -> ProbeData:
    """NYUv2 with 13 classes, 795 / 654 photos."""
    rule = LabelRule(13, zero_is_ignored=True)
    root = choice.data
    if choice.split_file is None and (root / "train_rgb").is_dir():
        layout = _LAYOUTS["nyuv2"]
        train, test = (
            pair_folders(root / f"{name}_rgb", root / f"{name}_seg13", layout, "nyu_rgb_", "new_nyu_class13_")
            for name in ("train", "test")
        )
        return ProbeData("NYUv2", "segmentation", train, test, classes=class_lists.NYU13_CLASSES, labels=rule)
    return _mmseg(choice, root, "NYUv2", class_lists.NYU13_CLASSES, rule)


def scannet(choice: DataChoice) -> ProbeData:
    """ScanNet with the 40 classes of NYU (as the paper), or with its own benchmark's 20."""
    names, rule = class_lists.NYU40_CLASSES, LabelRule(40, zero_is_ignored=True)
    if choice.classes == "scannet20":
        names = tuple(names[value - 1] for value in class_lists.SCANNET20_IDS)
        rule = LabelRule(20, ids=class_lists.SCANNET20_IDS)
    root = _below(choice.data, "scannet_frames_25k")
    if (root / "images").is_dir():
        return _mmseg(choice, root, "ScanNet", names, rule)
    train, test = scannet_frames(choice, root, "label", _LAYOUTS["scannet"])
    # The photos of the 25k release have 1296x968 pixels, all truth 640x480.
    return ProbeData("ScanNet", "segmentation", train, test, classes=names, labels=rule, fit="image_to_target")


def scannetpp(choice: DataChoice) -> ProbeData:
    """ScanNet++ with 100 classes."""
    shifted = choice.scannetpp_labels == "shifted"
    rule = LabelRule(100, zero_is_ignored=shifted)
    return _mmseg(choice, choice.data, "ScanNet++", class_lists.SCANNETPP_CLASSES, rule)


def scannet_frames(choice: DataChoice, root: Path, target: str, layout: str) -> tuple[list[Sample], list[Sample]]:
    """Lists the frames of ScanNet's 25k release, split by scene.

    Raises:
        UserError: If a list of scenes, or a scene that it names, is missing.
    """
    splits = []
    for position, name in enumerate(("train", "val")):
        path = choice.split_file[position] if choice.split_file else root / f"scannetv2_{name}.txt"
        if not path.is_file() and not choice.split_file:
            path = root.parent / path.name
        samples = []
        for scene in read_lines(path, "--data or --split-file"):
            folder = root / scene
            frames = pair_folders(folder / "color", folder / target, layout)
            samples += [Sample(frame.image, frame.target, f"{scene}_{frame.name}") for frame in frames]
        splits.append(samples)
    return splits[0], splits[1]


def _mmseg(choice: DataChoice, root: Path, name: str, classes: tuple[str, ...], rule: LabelRule) -> ProbeData:
    """Reads the layout of mmsegmentation, or the user's own lists of ``photo label`` lines."""
    layout = _LAYOUTS[choice.dataset]
    if choice.split_file is not None:
        train, test = (
            samples_from_pairs(read_lines(path, "--split-file"), root, [""], [""], str(path), layout)
            for path in choice.split_file
        )
    else:
        train, test = (
            pair_folders(root / "images" / split, root / "annotations" / split, layout)
            for split in ("training", "validation")
        )
    return ProbeData(name, "segmentation", train, test, classes=classes, labels=rule)


def _below(root: Path, *names: str) -> Path:
    """Returns the first of some folders below ``root`` that is there, else ``root``."""
    return next((root / name for name in names if (root / name).is_dir()), root)
