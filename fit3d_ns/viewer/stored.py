"""What ``fit3d-lift`` leaves in a run for looking at."""

from pathlib import Path
from typing import Optional

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fit3d_ns.errors import UserError
from fit3d_ns.lifting.scene import VARIANCE


def read_disagreement(run: Path) -> Optional[tuple[Tensor, Tensor]]:
    """Returns variance and coverage of every Gaussian, [N] each; None if the run was not lifted.

    Args:
        run: The run's folder.

    Raises:
        UserError: If the file is damaged.
    """
    path = run / VARIANCE
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        return tensors["fit3d_variance"], tensors["fit3d_coverage"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}): lift the run again to see where views disagree.") from error
