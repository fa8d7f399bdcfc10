"""Public data sets for semantic segmentation."""

from collections import Counter
from pathlib import Path

from fit3d_ns.support.errors import UserError
from probe.data.base import LabelRule, ProbeData, Sample
from probe.data.choice import DataChoice
from probe.data.pairing import left_out_note, pair_folders, read_lines, samples_from_pairs

_MMSEG = "DATA/{images,annotations}/{training,validation}"
_LAYOUTS = {
    "ade20k": f"{_MMSEG} with .jpg photos and .png labels, DATA being ADEChallengeData2016",
    "voc": "DATA/{JPEGImages,SegmentationClass,ImageSets/Segmentation}, DATA being VOCdevkit/VOC2012 or above it",
    "nyuv2": f"{_MMSEG}, or DATA/{{train,test}}_rgb and DATA/{{train,test}}_seg13",
    "scannet": f"{_MMSEG}, or DATA/<scene>/{{color,label}} with DATA/scannetv2_{{train,val}}.txt",
    "scannetpp": f"{_MMSEG} with .JPG photos and .png labels",
}


def ade20k(choice: DataChoice) -> ProbeData:
    """Finds ADE20K scene parsing: 150 classes, 20,210 / 2,000 photos.

    Args:
        choice: The folder and how to read it.

    Returns:
        Training and test samples.
    """
    root = _below(choice.data, "ADEChallengeData2016")
    rule = LabelRule(150, zero_is_ignored=True)
    return _mmseg(choice, root, "ADE20K", ADE20K_CLASSES, rule)


def voc(choice: DataChoice) -> ProbeData:
    """Finds Pascal VOC 2012: 20 classes and the background, 1,464 / 1,449 photos (not the augmented list).

    Args:
        choice: The folder and how to read it.

    Returns:
        Training and test samples.

    Raises:
        UserError: If the layout is another one.
    """
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
    return ProbeData("Pascal VOC 2012", "segmentation", *splits, classes=VOC_CLASSES, labels=LabelRule(21))


def nyuv2(choice: DataChoice) -> ProbeData:
    """Finds NYUv2 with 13 classes, 795 / 654 photos.

    Args:
        choice: The folder and how to read it.

    Returns:
        Training and test samples.
    """
    rule = LabelRule(13, zero_is_ignored=True)
    root = choice.data
    if choice.split_file is None and (root / "train_rgb").is_dir():
        left_out, prefixes = Counter[str](), ("nyu_rgb_", "new_nyu_class13_")
        train, test = (
            pair_folders(root / f"{name}_rgb", root / f"{name}_seg13", _LAYOUTS["nyuv2"], left_out, *prefixes)
            for name in ("train", "test")
        )
        notes = left_out_note(left_out)
        return ProbeData("NYUv2", "segmentation", train, test, classes=NYU13_CLASSES, labels=rule, notes=notes)
    return _mmseg(choice, root, "NYUv2", NYU13_CLASSES, rule)


def scannet(choice: DataChoice) -> ProbeData:
    """Finds ScanNet with the 40 classes of NYU (as the paper), or with its own benchmark's 20.

    Args:
        choice: The folder and how to read it.

    Returns:
        Training and test samples.
    """
    names, rule = NYU40_CLASSES, LabelRule(40, zero_is_ignored=True)
    if choice.classes == "scannet20":
        names = tuple(names[value - 1] for value in SCANNET20_IDS)
        rule = LabelRule(20, ids=SCANNET20_IDS)
    root = _below(choice.data, "scannet_frames_25k")
    if (root / "images").is_dir():
        return _mmseg(choice, root, "ScanNet", names, rule)
    train, test, notes = scannet_frames(choice, root, "label", _LAYOUTS["scannet"])
    # The photos of the 25k release have 1296x968 pixels, all truth 640x480.
    fit = "image_to_target"
    return ProbeData("ScanNet", "segmentation", train, test, classes=names, labels=rule, fit=fit, notes=notes)


def scannetpp(choice: DataChoice) -> ProbeData:
    """Finds ScanNet++ with 100 classes.

    Args:
        choice: The folder and how to read it.

    Returns:
        Training and test samples.
    """
    shifted = choice.scannetpp_labels == "shifted"
    rule = LabelRule(100, zero_is_ignored=shifted)
    return _mmseg(choice, choice.data, "ScanNet++", SCANNETPP_CLASSES, rule)


def scannet_frames(
    choice: DataChoice, root: Path, target: str, layout: str
) -> tuple[list[Sample], list[Sample], tuple[str, ...]]:
    """Lists the frames of ScanNet's 25k release, split by scene.

    Args:
        choice: What the user chose.
        root: Folder of the scenes.
        target: Folder of the truth in each scene: ``label`` or ``depth``.
        layout: The layout expected, for errors.

    Returns:
        Training samples, test samples, and what the report says of entries that were left out.

    Raises:
        UserError: If a list of scenes, or a scene that it names, is missing.
    """
    splits, left_out = [], Counter[str]()
    for position, name in enumerate(("train", "val")):
        path = choice.split_file[position] if choice.split_file else root / f"scannetv2_{name}.txt"
        if not path.is_file() and not choice.split_file:
            path = root.parent / path.name
        samples = []
        for scene in read_lines(path, "--data or --split-file"):
            folder = root / scene
            frames = pair_folders(folder / "color", folder / target, layout, left_out)
            samples += [Sample(frame.image, frame.target, f"{scene}_{frame.name}") for frame in frames]
        splits.append(samples)
    return splits[0], splits[1], left_out_note(left_out)


def _mmseg(choice: DataChoice, root: Path, name: str, classes: tuple[str, ...], rule: LabelRule) -> ProbeData:
    """Reads the layout of mmsegmentation, or the user's own lists of ``photo label`` lines."""
    layout, left_out = _LAYOUTS[choice.dataset], Counter[str]()
    if choice.split_file is not None:
        train, test = (
            samples_from_pairs(read_lines(path, "--split-file"), root, [""], [""], str(path), layout)
            for path in choice.split_file
        )
    else:
        train, test = (
            pair_folders(root / "images" / split, root / "annotations" / split, layout, left_out)
            for split in ("training", "validation")
        )
    notes = left_out_note(left_out)
    return ProbeData(name, "segmentation", train, test, classes=classes, labels=rule, notes=notes)


def _below(root: Path, *names: str) -> Path:
    """Returns the first of some folders below ``root`` that is there, else ``root``."""
    return next((root / name for name in names if (root / name).is_dir()), root)


NYU13_CLASSES: tuple[str, ...] = tuple(
    ("bed|books|ceiling|chair|floor|furniture|objects|painting|sofa|table|tv|wall|window").split("|")
)
"""The 13 classes of Couprie et al.; 0 in the label files means none."""

NYU40_CLASSES: tuple[str, ...] = tuple(
    (
        "wall|floor|cabinet|bed|chair|sofa|table|door|window|bookshelf|picture|counter|blinds|desk|"
        "shelves|curtain|dresser|pillow|mirror|floor mat|clothes|ceiling|books|refrigerator|television|"
        "paper|towel|shower curtain|box|whiteboard|person|nightstand|toilet|sink|lamp|bathtub|bag|"
        "otherstructure|otherfurniture|otherprop"
    ).split("|")
)
"""The 40 classes of NYU and ScanNet; 0 in the label files means none."""

SCANNETPP_CLASSES: tuple[str, ...] = tuple(
    (
        "wall|ceiling|floor|table|door|ceiling lamp|cabinet|blinds|curtain|chair|storage cabinet|"
        "office chair|bookshelf|whiteboard|window|box|window frame|monitor|shelf|doorframe|pipe|heater|"
        "kitchen cabinet|sofa|windowsill|bed|shower wall|trash can|book|plant|blanket|tv|computer tower|"
        "kitchen counter|refrigerator|jacket|electrical duct|sink|bag|picture|pillow|towel|suitcase|"
        "backpack|crate|keyboard|rack|toilet|paper|printer|poster|painting|microwave|board|shoes|socket|"
        "bottle|bucket|cushion|basket|shoe rack|telephone|file folder|cloth|blind rail|laptop|plant pot|"
        "exhaust fan|cup|coat hanger|light switch|speaker|table lamp|air vent|clothes hanger|kettle|"
        "smoke detector|container|power strip|slippers|paper bag|mouse|cutting board|toilet paper|"
        "paper towel|pot|clock|pan|tap|jar|soap dispenser|binder|bowl|tissue box|whiteboard eraser|"
        "toilet brush|spray bottle|headphones|stapler|marker"
    ).split("|")
)
"""The 100 benchmark classes of ScanNet++."""

ADE20K_CLASSES: tuple[str, ...] = tuple(
    (
        "wall|building|sky|floor|tree|ceiling|road|bed|windowpane|grass|cabinet|sidewalk|person|earth|"
        "door|table|mountain|plant|curtain|chair|car|water|painting|sofa|shelf|house|sea|mirror|rug|"
        "field|armchair|seat|fence|desk|rock|wardrobe|lamp|bathtub|railing|cushion|base|box|column|"
        "signboard|chest of drawers|counter|sand|sink|skyscraper|fireplace|refrigerator|grandstand|path|"
        "stairs|runway|case|pool table|pillow|screen door|stairway|river|bridge|bookcase|blind|"
        "coffee table|toilet|flower|book|hill|bench|countertop|stove|palm|kitchen island|computer|"
        "swivel chair|boat|bar|arcade machine|hovel|bus|towel|light|truck|tower|chandelier|awning|"
        "streetlight|booth|television receiver|airplane|dirt track|apparel|pole|land|bannister|escalator|"
        "ottoman|bottle|buffet|poster|stage|van|ship|fountain|conveyer belt|canopy|washer|plaything|"
        "swimming pool|stool|barrel|basket|waterfall|tent|bag|minibike|cradle|oven|ball|food|step|tank|"
        "trade name|microwave|pot|animal|bicycle|lake|dishwasher|screen|blanket|sculpture|hood|sconce|"
        "vase|traffic light|tray|ashcan|fan|pier|crt screen|plate|monitor|bulletin board|shower|radiator|"
        "glass|clock|flag"
    ).split("|")
)
"""The 150 classes of the scene parsing benchmark; 0 in the label files means none."""

VOC_CLASSES: tuple[str, ...] = tuple(
    (
        "background|aeroplane|bicycle|bird|boat|bottle|bus|car|cat|chair|cow|dining table|dog|horse|"
        "motorbike|person|potted plant|sheep|sofa|train|tv monitor"
    ).split("|")
)
"""The 20 object classes of Pascal VOC 2012, and the background, which counts."""

SCANNET20_IDS: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 24, 28, 33, 34, 36, 39)
"""Values, in NYU40, of the 20 classes of ScanNet's own benchmark."""
