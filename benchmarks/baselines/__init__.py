"""The arms of the comparison. Each file says which paper it follows, and where it had to choose."""

from benchmarks.baselines import (
    ablations,
    afr,
    ags,
    demem,
    demem_none,
    dpe,
    erm,
    example_tied_dropout,
    jtt,
    last_layer,
    neuron_tune,
    silent_majority,
    training_groups,
    xrm_dro,
)
from benchmarks.experiment import Method

_FILES = (
    erm,
    last_layer,
    dpe,
    neuron_tune,
    example_tied_dropout,
    ags,
    silent_majority,
    jtt,
    afr,
    xrm_dro,
    training_groups,
    demem,
    demem_none,
    ablations,
)
METHODS: list[Method] = [method for file in _FILES for method in file.METHODS]
