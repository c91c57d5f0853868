"""Find the units that memorise: atypical examples, unit scores, critical units, memorised examples.

All scores have the signature ``(model, sites, batches, *, atypical, ranks) → {site: (N,)}``, impacts on single examples
``(model, sites, batches, *, ranks) → {site: (S, N)}``.  The model is left as it was.
"""

from demem.tracing.ablation import ablation_impact, set_unit
from demem.tracing.activation_difference import activation_difference_score, median_difference
from demem.tracing.atypical import (
    atypical_by_error,
    atypical_by_group,
    atypical_by_margin,
    atypical_by_score,
    choose_atypical,
    class_mean,
    example_losses,
    margins,
    members_of,
)
from demem.tracing.capture import ALONE, Ranks, evaluating, predict, read_features, select_rows
from demem.tracing.critical import CriticalUnits, critical_units
from demem.tracing.logit_attribution import head_impact, linear_impact, linear_score
from demem.tracing.magnitude import gradient_score, magnitude_score
from demem.tracing.ranking import RankedExamples, average_precision, contrast, memorization_score, rank_examples
from demem.tracing.report import UnitReport, label_quadrants, picture_grid, trace, write_examples
from demem.tracing.scores import (
    IMPACTS,
    SCORES,
    ScoreFunction,
    impact_score,
    score_units,
    two_step_score,
)
from demem.tracing.taylor import taylor_impact
from demem.tracing.topk import matched_units, random_units, top_units, units_to_masks
from demem.tracing.weights import prunable_weights, top_weights, unit_norms, unit_of_weight

__all__ = [
    "ALONE",
    "IMPACTS",
    "SCORES",
    "CriticalUnits",
    "RankedExamples",
    "Ranks",
    "ScoreFunction",
    "UnitReport",
    "ablation_impact",
    "activation_difference_score",
    "atypical_by_error",
    "atypical_by_group",
    "atypical_by_margin",
    "atypical_by_score",
    "average_precision",
    "choose_atypical",
    "class_mean",
    "contrast",
    "critical_units",
    "evaluating",
    "example_losses",
    "gradient_score",
    "head_impact",
    "impact_score",
    "label_quadrants",
    "linear_impact",
    "linear_score",
    "magnitude_score",
    "margins",
    "matched_units",
    "median_difference",
    "members_of",
    "memorization_score",
    "picture_grid",
    "predict",
    "prunable_weights",
    "random_units",
    "rank_examples",
    "read_features",
    "score_units",
    "select_rows",
    "set_unit",
    "taylor_impact",
    "top_units",
    "top_weights",
    "trace",
    "two_step_score",
    "unit_norms",
    "unit_of_weight",
    "units_to_masks",
    "write_examples",
]
