"""The arms of the comparison. Each file says which paper it follows, and where it had to choose."""

from benchmarks.baselines import (
    afr,
    demem,
    erm,
    example_tied_dropout,
    jtt,
    last_layer,
    neuron_tune,
    silent_majority,
    training_groups,
)
from benchmarks.experiment import Method

_FILES = (erm, last_layer, neuron_tune, example_tied_dropout, silent_majority, jtt, afr, training_groups, demem)
METHODS: list[Method] = [method for file in _FILES for method in file.METHODS]
