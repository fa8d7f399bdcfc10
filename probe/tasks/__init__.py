"""The probes with a truth for every pixel: segmentation, depth, normals."""

from probe.tasks.depth import DepthTask
from probe.tasks.normals import NormalsTask
from probe.tasks.segmentation import SegmentationTask
from probe.tasks.task import Task

TASKS: dict[str, type[Task]] = {"segmentation": SegmentationTask, "depth": DepthTask, "normals": NormalsTask}

__all__ = ["TASKS", "Task"]
