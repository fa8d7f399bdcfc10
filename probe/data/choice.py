"""What a user chooses about data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["segmentation", "depth", "normals"]
DatasetName = Literal["scannetpp", "nyuv2", "scannet", "ade20k", "voc", "kitti", "folder", "rooms"]


@dataclass(frozen=True)
class DataChoice:
    """A data set on disk and how to read it."""

    dataset: DatasetName
    """Layout of the folder."""
    data: Path
    """The folder."""
    kind: Kind
    """Which truth is wanted."""
    split_file: tuple[Path, Path] | None = None
    """Own lists of training and test samples."""
    depth_scale: float | None = None
    """PNG units in a metre, where the data set does not fix it."""
    max_depth: float | None = None
    """Cap in metres, where the data set does not fix it."""
    classes: Literal["paper", "scannet20"] = "paper"
    """Class list, where the data set has several."""
    scannetpp_labels: Literal["shifted", "toolkit"] = "shifted"
    """Whether 0 means no class, as in FiT3D's release, or 255 does, as the toolkit writes it."""
    class_names: Path | None = None
    """Text file with one class name per line, for `folder`."""
