"""The exact protocol: linear maps that solve a convex problem, from cached features to the report."""

from probe.exact.solver import (
    LOGISTIC_DECAYS,
    RIDGE_DECAYS,
    Batches,
    Choice,
    GramSums,
    LinearMap,
    LogisticFit,
    choose_logistic,
    choose_ridge,
    fit_logistic,
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
