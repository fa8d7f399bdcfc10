"""Learning-rate schedule whose state holds plain floats."""

from dataclasses import dataclass, field

from nerfstudio.engine.schedulers import ExponentialDecayScheduler, ExponentialDecaySchedulerConfig
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fit3d_ns.compat import float_learning_rates


@dataclass
class FloatExponentialDecaySchedulerConfig(ExponentialDecaySchedulerConfig):
    """nerfstudio's exponential decay, in checkpoints that torch's restricted loader accepts."""

    _target: type = field(default_factory=lambda: FloatExponentialDecayScheduler)
    """target class to instantiate"""


class FloatExponentialDecayScheduler(ExponentialDecayScheduler):
    """nerfstudio's exponential decay, returning Python floats instead of numpy scalars."""

    def get_scheduler(self, optimizer: Optimizer, lr_init: float) -> LRScheduler:
        """Builds the schedule for one parameter group."""
        return float_learning_rates(super().get_scheduler(optimizer, lr_init))  # type: ignore[arg-type]
