"""What is done about memorising units: masks and head refits in rounds, and interventions with exact undo.

While the network trains, :class:`Forgetting` penalises the units that know the inferred attribute best within the
class; :func:`harm_scores` and :func:`rewind` take back learned changes that hurt unseen minority examples.
"""

from demem.removal.forget import (
    Forgetting,
    Forgotten,
    ForgottenUnit,
    FrozenProbe,
    Probe,
    at_random,
    most_informed,
)
from demem.removal.information import attribute_information, group_moments, information_gradient
from demem.removal.interventions import apply, intervene, intervene_weights
from demem.removal.rewind import Harm, balanced_losses, harm_scores, rewind, rewindable_sites
from demem.removal.rounds import (
    MASKED_SHARES,
    Examples,
    Round,
    choose_round,
    clearly_better,
    largest_groups,
    remove_in_rounds,
    worst_group,
)

__all__ = [
    "MASKED_SHARES",
    "Examples",
    "Forgetting",
    "Forgotten",
    "ForgottenUnit",
    "FrozenProbe",
    "Harm",
    "Probe",
    "Round",
    "apply",
    "at_random",
    "attribute_information",
    "balanced_losses",
    "choose_round",
    "clearly_better",
    "group_moments",
    "harm_scores",
    "information_gradient",
    "intervene",
    "intervene_weights",
    "largest_groups",
    "most_informed",
    "remove_in_rounds",
    "rewind",
    "rewindable_sites",
    "worst_group",
]
