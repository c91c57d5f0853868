"""Measure the diversity of activations: entropy of units, mutual information of pairs (Bansal et al. 2022).

Activations are ``(S, N)``, one row per example and one column per unit, or ``{site: (S, N)}``.  All values are in nats.
"""

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
from demem.measures.ksg import TiesWarning, UnitTies, inspect_units, ksg_mutual_information
from demem.measures.mutual_information import (
    activation_codes,
    mutual_information,
    mutual_information_from_codes,
)
from demem.measures.plots import plot_diversity, plot_entropy, plot_history, plot_mutual_information
from demem.measures.reservoir import Reservoir, reservoir_compact, reservoir_keys
from demem.measures.streaming import (
    ActivationEntropy,
    ActivationRange,
    HistogramEntropy,
    KSGMutualInformation,
    MutualInformation,
)

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
    "UnitTies",
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
    "plot_diversity",
    "plot_entropy",
    "plot_history",
    "plot_mutual_information",
    "reservoir_compact",
    "reservoir_keys",
    "share_ranges",
    "summarize",
    "unit_ranges",
]
