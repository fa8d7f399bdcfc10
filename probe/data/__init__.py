"""Data sets of the probes, each in the layout that its users download."""

from probe.data.base import IGNORE, DataSummary, Kind, LabelRule, ProbeData, Sample, check_data, read_image, read_sample
from probe.data.loading import DATASETS, DataChoice, load_data

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
