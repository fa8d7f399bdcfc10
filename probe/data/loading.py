"""From a user's choice of data to samples."""

from collections.abc import Callable
from dataclasses import replace
from typing import get_args

from fit3d_ns.support.errors import UserError
from fit3d_ns.support.samples import hold_out
from probe.data import depth as depth_sets
from probe.data import own as own_data
from probe.data import segmentation as segmentation_sets
from probe.data.base import ProbeData
from probe.data.choice import DataChoice, DatasetName

DATASETS: tuple[str, ...] = get_args(DatasetName)

_LOADERS: dict[tuple[str, str], Callable[[DataChoice], ProbeData]] = {
    ("ade20k", "segmentation"): segmentation_sets.ade20k,
    ("voc", "segmentation"): segmentation_sets.voc,
    ("nyuv2", "segmentation"): segmentation_sets.nyuv2,
    ("scannet", "segmentation"): segmentation_sets.scannet,
    ("scannetpp", "segmentation"): segmentation_sets.scannetpp,
    ("folder", "segmentation"): own_data.folder,
    ("rooms", "segmentation"): own_data.rooms,
    ("nyuv2", "depth"): depth_sets.nyuv2,
    ("scannet", "depth"): depth_sets.scannet,
    ("scannetpp", "depth"): depth_sets.scannetpp,
    ("kitti", "depth"): depth_sets.kitti,
    ("folder", "depth"): own_data.folder,
    ("rooms", "depth"): own_data.rooms,
    ("nyuv2", "normals"): depth_sets.nyuv2,
    ("rooms", "normals"): own_data.rooms,
}


def load_data(choice: DataChoice, validation_share: float = 0.0) -> ProbeData:
    """Lists the samples of a data set.

    Args:
        choice: What the user chose.
        validation_share: Where choices must be made and the data set has no split for it: share of the training
            samples, evenly spaced, that is held out of training for it.

    Returns:
        The data set; its ``validation`` is None if ``validation_share`` is 0.

    Raises:
        UserError: If the data set has no such truth, or files are not where its layout wants them.
    """
    loader = _LOADERS.get((choice.dataset, choice.kind))
    if loader is None:
        able = ", ".join(name for name, kind in _LOADERS if kind == choice.kind)
        raise UserError(f"--dataset {choice.dataset} has no {choice.kind} probe: choose one of {able}.")
    _check_options(choice)
    if not choice.data.is_dir():
        raise UserError(f"There is no folder {choice.data}: check --data.")
    data = loader(choice)
    if not validation_share:
        return replace(data, validation=None)
    if data.validation is not None:
        return data
    train, held_out = hold_out(data.train, validation_share)
    if not train:
        raise UserError(
            f"{len(data.train)} training samples are too few to hold some out: give a single --learning-rates value."
        )
    note = (
        f"The learning rate was chosen on {len(held_out)} of {len(data.train)} training samples, evenly spaced and "
        "held out of training."
    )
    return replace(data, train=train, validation=held_out, notes=(*data.notes, note))


def _check_options(choice: DataChoice) -> None:
    """Refuses options that the data set or the probe would not heed."""
    own, public = ("folder", "rooms"), tuple(name for name in DATASETS if name not in ("folder", "rooms"))
    labels, depths = ("segmentation",), ("depth", "normals")
    for flag, given, datasets, kinds in (
        ("--split-file", choice.split_file is not None, public, (*labels, *depths)),
        ("--depth-scale", choice.depth_scale is not None, own, depths),
        ("--max-depth", choice.max_depth is not None, own, depths),
        ("--classes", choice.classes != "paper", ("scannet",), labels),
        ("--scannetpp-labels", choice.scannetpp_labels != "shifted", ("scannetpp",), labels),
        ("--class-names", choice.class_names is not None, ("folder",), labels),
    ):
        if given and choice.dataset not in datasets:
            raise UserError(f"{flag} is for --dataset {', '.join(datasets)}, not for {choice.dataset}: leave it out.")
        if given and choice.kind not in kinds:
            raise UserError(f"{flag} is for {' and '.join(kinds)}, not for {choice.kind}: leave it out.")
