"""The coordinates that a run was trained in, and whether a scene still gives the same."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fit3d_ns.runs.names import COORDINATES
from fit3d_ns.support.errors import UserError, first_line
from fit3d_ns.support.json_files import UNREADABLE, read_json

_LOGGER = logging.getLogger(__name__)
_TOLERANCE = 1e-4
"""Of rotations and relative scale; of positions in the units of the training."""
_ROUNDING = 1e-6
"""Share of a translation that older runs lost to float32."""


@dataclass(frozen=True)
class Coordinates:
    """How a run's world is made of the world of its scene's files: ``scale * (transform @ (x, 1))``."""

    transform: np.ndarray
    """[3, 4] float64, a rotation (with what ns-process-data applied) and a translation."""
    scale: float
    """Positive."""

    @classmethod
    def of(cls, outputs: Any) -> "Coordinates":
        """Returns those that a dataparser gives.

        Args:
            outputs: nerfstudio's ``DataparserOutputs``.
        """
        return cls(outputs.dataparser_transform.double().cpu().numpy(), float(outputs.dataparser_scale))

    def agrees_with(self, other: "Coordinates") -> bool:
        """Returns whether a point of the files comes to the same place, near the origin of the training.

        Args:
            other: Others of the same files.
        """
        if not math.isclose(self.scale, other.scale, rel_tol=_TOLERANCE):
            return False
        axes, others = self.transform[:, :3], other.transform[:, :3]  # [3, 3]
        if not np.allclose(axes, others, rtol=0, atol=_TOLERANCE * max(1.0, float(np.abs(others).max()))):
            return False
        try:
            origin = np.linalg.solve(others, -other.transform[:, 3])  # [3] of the files: what `other` puts at 0
        except np.linalg.LinAlgError:
            return bool(np.allclose(self.transform, other.transform, atol=_TOLERANCE))
        moved = axes @ origin + self.transform[:, 3]
        allowed = _TOLERANCE / self.scale + _ROUNDING * float(np.abs(self.transform[:, 3]).max())
        return bool(np.abs(moved).max() <= allowed)


def read_coordinates(run: Path) -> Coordinates | None:
    """Reads the coordinates of a run.

    Args:
        run: Its folder.

    Returns:
        Its coordinates; None, with a warning, if the file is missing.

    Raises:
        UserError: If the file is damaged.
    """
    path = run / COORDINATES
    try:
        stored = read_json(path)
        transform, scale = np.array(stored["transform"], dtype=np.float64), float(stored["scale"])
        if transform.shape != (3, 4) or not np.isfinite(transform).all() or not 0 < scale < math.inf:
            raise ValueError("no 3x4 matrix and positive scale")
    except FileNotFoundError:
        _LOGGER.warning("%s is missing: how the run's coordinates follow from its scene's is not known.", path)
        return None
    except (*UNREADABLE, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): restore it or train again.") from error
    return Coordinates(transform, scale)
