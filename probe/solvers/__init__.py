"""Linear probes that are solved instead of trained.

Logistic regression by L-BFGS, ridge regression in closed form.

Both problems are convex, and both are stated so that the width of the features plays no part: tokens are standardised
with the mean and standard deviation of the training patches and divided by the square root of their channels, so that
a token's mean squared norm is one. Features beside themselves are then the same problem as the features alone, and
what is left between their scores is what the solver has not reached.

Nothing here keeps features. Ridge regression needs one pass over them, whose sums (`GramSums`) hold for every decay;
logistic regression needs one pass an evaluation, in batches that may come from memory or from disk. Under
torch.distributed every process passes over its own share, and sums are taken over all.
"""

from probe.solvers.logistic import LOGISTIC_DECAYS, Batches, LogisticFit, choose_logistic, fit_logistic
from probe.solvers.ridge import (
    RIDGE_DECAYS,
    Choice,
    GramSums,
    LinearMap,
    choose_ridge,
    fit_ridge,
    mean_squared_error,
)

__all__ = [
    "LOGISTIC_DECAYS",
    "RIDGE_DECAYS",
    "Batches",
    "Choice",
    "GramSums",
    "LinearMap",
    "LogisticFit",
    "choose_logistic",
    "choose_ridge",
    "fit_logistic",
    "fit_ridge",
    "mean_squared_error",
]
