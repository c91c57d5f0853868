"""What is done about memorising units (the cure), as functions of tensors and modules; nothing here knows a Trainer.

While the network trains, :class:`Forgetting` penalises the units that know the inferred attribute best within the
class; :func:`harm_scores` and :func:`rewind` take back learned changes that hurt unseen minority examples.

With the groups that :mod:`demem.groups` inferred, after training:

1. :func:`remove_in_rounds` scores the units that the head reads, masks those that memorise and refits the head on
   held-out examples, with more units masked every round; :func:`choose_round` says which round to keep, and the network
   as trained is one of them.  :func:`purify` makes the inferred groups purer, so that training examples can take part.
   Where none is kept, :func:`ordinary_refit` undoes what balanced training cost.
2. :func:`fine_tune` trains the whole network for a few passes on the :func:`tuning_subset` of the held-out examples.

:func:`intervene` changes single units (zero, mean, noise, rewind …) and undoes it bit for bit, for experiments that ask
what a unit does.
"""

from demem.removal.budget import ROWS, Plan, plan_fits
from demem.removal.fine_tuning import FineTuned, fine_tune, tuning_subset
from demem.removal.forget import (
    Choose,
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
from demem.removal.joint import Examples, memorization_weight, purify
from demem.removal.ordinary import UNDONE, gives_back, ordinary_refit
from demem.removal.rewind import Harm, balanced_losses, harm_scores, rewind, rewindable_sites
from demem.removal.rounds import (
    ATYPICAL_WEIGHTS,
    MASKED_SHARES,
    SMOOTHING,
    TRACED,
    Round,
    RoundRecord,
    as_trained,
    check_shares,
    choose_round,
    clearly_better,
    explain_round,
    masked_units,
    remove_in_rounds,
    worst_group,
    worth_its_cost,
)

__all__ = [
    "ATYPICAL_WEIGHTS",
    "MASKED_SHARES",
    "ROWS",
    "SMOOTHING",
    "TRACED",
    "UNDONE",
    "Choose",
    "Examples",
    "FineTuned",
    "Forgetting",
    "Forgotten",
    "ForgottenUnit",
    "FrozenProbe",
    "Harm",
    "Plan",
    "Probe",
    "Round",
    "RoundRecord",
    "apply",
    "as_trained",
    "at_random",
    "attribute_information",
    "balanced_losses",
    "check_shares",
    "choose_round",
    "clearly_better",
    "explain_round",
    "fine_tune",
    "gives_back",
    "group_moments",
    "harm_scores",
    "information_gradient",
    "intervene",
    "intervene_weights",
    "masked_units",
    "memorization_weight",
    "most_informed",
    "ordinary_refit",
    "plan_fits",
    "purify",
    "remove_in_rounds",
    "rewind",
    "rewindable_sites",
    "tuning_subset",
    "worst_group",
    "worth_its_cost",
]
