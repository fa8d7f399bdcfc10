"""Differences between rows with the interval that other test photos would leave them in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Scores = Callable[[Tensor], dict[str, Tensor]]
"""Computes scores [...] by name from sums over photos [..., S]."""


@dataclass(frozen=True)
class Interval:
    """A number on the test photos, and the middle 95 % of what draws of as many of them give.

    Attributes:
        value: On the test photos themselves.
        low: 2.5 % of the draws lie below.
        high: 2.5 % lie above.
    """

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if all of the interval lies above or below 0, else 0."""
        return (self.low > 0) - (self.high < 0)


class Bootstrap:
    """Scores of rows on draws of test photos, the same draws for all rows, so that differences are paired."""

    def __init__(self, sums: Mapping[str, Sequence[Tensor]], scores: Scores, metric: str, draws: int) -> None:
        """Scores every row on every draw.

        Args:
            sums: Of each row's students, [photos, S]; a row's score is the mean over its students.
            scores: How scores follow from sums.
            metric: The score to look at.
            draws: Number of draws.
        """
        count = len(next(iter(sums.values()))[0])
        times = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), draws)
        weights = torch.cat([torch.ones(1, count), torch.from_numpy(times)]).double()  # the photos themselves first
        self._values = {
            name: torch.stack([scores(weights @ one)[metric] for one in students]).mean(0)  # [1 + draws]
            for name, students in sums.items()
        }

    def score(self, row: str) -> Interval:
        """Returns a row's score.

        Args:
            row: Name of a row.
        """
        return _interval(self._values[row])

    def difference(self, row: str, baseline: str) -> Interval:
        """Returns by how much a row's score is above another's.

        Args:
            row: Name of a row.
            baseline: Name of the row to compare with.
        """
        return _interval(self._values[row] - self._values[baseline])


def _interval(values: Tensor) -> Interval:
    draws = values[1:][torch.isfinite(values[1:])]
    if not len(draws):
        return Interval(float(values[0]), float("nan"), float("nan"))
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return Interval(float(values[0]), low, high)
