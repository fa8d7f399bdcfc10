"""Data sets of the probes, each in the layout that its users download."""

from probe.datasets.checks import DataSummary, check_data
from probe.datasets.loading import DATASETS, DataChoice, load_data
from probe.datasets.samples import IGNORE, Kind, LabelRule, ProbeData, Sample, read_image, read_sample

__all__ = [
    "DATASETS",
    "IGNORE",
    "DataChoice",
    "DataSummary",
    "Kind",
    "LabelRule",
    "ProbeData",
    "Sample",
    "check_data",
    "load_data",
    "read_image",
    "read_sample",
]
