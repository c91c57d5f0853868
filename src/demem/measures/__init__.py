"""Diversity of activations: entropy of units, mutual information of pairs (Bansal et al. 2022)."""

from demem.measures.binning import Activations, Binning, share_ranges, unit_ranges
from demem.measures.collect import collect_activations
from demem.measures.diversity import (
    Diversity,
    Summary,
    Verdict,
    choose_units,
    compare,
    compare_runs,
    mean_mi,
    measure_diversity,
    mixture_density,
    summarize,
)
from demem.measures.entropy import entropy, entropy_from_counts, histogram
from demem.measures.ksg import TiesWarning, UnitReport, inspect_units, ksg_mutual_information
from demem.measures.metrics import (
    ActivationEntropy,
    ActivationRange,
    HistogramEntropy,
    KSGMutualInformation,
    MutualInformation,
)
from demem.measures.mutual_information import (
    activation_codes,
    mutual_information,
    mutual_information_from_codes,
)
from demem.measures.reservoir import Reservoir, reservoir_compact, reservoir_keys

__all__ = [
    "ActivationEntropy",
    "ActivationRange",
    "Activations",
    "Binning",
    "Diversity",
    "HistogramEntropy",
    "KSGMutualInformation",
    "MutualInformation",
    "Reservoir",
    "Summary",
    "TiesWarning",
    "UnitReport",
    "Verdict",
    "activation_codes",
    "choose_units",
    "collect_activations",
    "compare",
    "compare_runs",
    "entropy",
    "entropy_from_counts",
    "histogram",
    "inspect_units",
    "ksg_mutual_information",
    "mean_mi",
    "measure_diversity",
    "mixture_density",
    "mutual_information",
    "mutual_information_from_codes",
    "reservoir_compact",
    "reservoir_keys",
    "share_ranges",
    "summarize",
    "unit_ranges",
]
