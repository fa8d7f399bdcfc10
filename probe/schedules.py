"""Learning rate and first beta as functions of the step."""

import math

from probe.recipes import Optimization

_COSINE_END = 1e-8
_BETA1_HIGH, _BETA1_LOW, _BETA1_TURN = 0.95, 0.85, 0.3


def learning_rate_factor(optimization: Optimization, step: int) -> float:
    """Returns what a head's learning rate is multiplied with.

    Args:
        optimization: The recipe's.
        step: From 0; ``optimization.iterations - 1`` is the last.

    Returns:
        In (0, 1].
    """
    share = step / optimization.iterations
    if optimization.schedule == "poly":
        factor = 1.0 - share
    else:
        factor = _cosine(1.0, _COSINE_END, share)
    warmup = optimization.warmup_share * optimization.iterations
    if step < warmup:
        factor *= 1.0 - (1.0 - step / warmup) * (1.0 - optimization.warmup_ratio)
    return factor


def first_beta(optimization: Optimization, step: int) -> float:
    """Returns Adam's first beta at a step: .9, or one cycle with cosines, as mmcv's OneCycle hook for momentum."""
    if not optimization.beta1_cycle:
        return 0.9
    turn = _BETA1_TURN * optimization.iterations - 1
    end = optimization.iterations - 1
    if step <= turn:
        return _cosine(_BETA1_HIGH, _BETA1_LOW, step / max(turn, 1e-9))
    return _cosine(_BETA1_LOW, _BETA1_HIGH, (step - turn) / max(end - turn, 1e-9))


def _cosine(start: float, end: float, share: float) -> float:
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * min(max(share, 0.0), 1.0)))
