"""Find the units that memorise: who is atypical, unit scores, critical units, the examples that were memorised."""

from demem.tracing.atypical import (
    atypical_by_error,
    atypical_by_group,
    atypical_by_margin,
    atypical_by_score,
    choose_atypical,
    class_mean,
    example_losses,
    margins,
)
from demem.tracing.linear import linear_impact, linear_score

__all__ = [
    "atypical_by_error",
    "atypical_by_group",
    "atypical_by_margin",
    "atypical_by_score",
    "choose_atypical",
    "class_mean",
    "example_losses",
    "linear_impact",
    "linear_score",
    "margins",
]
