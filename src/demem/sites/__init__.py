"""Where units live: find layers by name, read their activations, gate them, bake gates into weights."""

from demem.sites.find import (
    Site,
    check_finite,
    default_sites,
    find_head,
    find_sites,
    first_tensor,
    named_layers,
    own_weight,
)
from demem.sites.gate import Gates, bake_gates, remove_gates
from demem.sites.predictions import PredictionReader
from demem.sites.read import (
    ActivationReader,
    Reduce,
    deciding_heads,
    eager,
    gives_logits,
    reduce_activation,
    restore_modes,
)

__all__ = [
    "ActivationReader",
    "Gates",
    "PredictionReader",
    "Reduce",
    "Site",
    "bake_gates",
    "check_finite",
    "deciding_heads",
    "default_sites",
    "eager",
    "find_head",
    "find_sites",
    "first_tensor",
    "gives_logits",
    "named_layers",
    "own_weight",
    "reduce_activation",
    "remove_gates",
    "restore_modes",
]
