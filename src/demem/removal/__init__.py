"""What is done about memorising units (the cure), as functions of tensors and modules; nothing here knows a Trainer.

With the groups that :mod:`demem.groups` inferred, after training:

1. :func:`remove_in_rounds` scores the units that the head reads, masks those that memorise and refits the head on
   held-out examples, with more units masked every round; :func:`choose_round` says which round to keep, and the network
   as trained is one of them.
2. :func:`fine_tune` trains the whole network for a few passes on the :func:`tuning_subset` of the held-out examples.

:func:`intervene` changes single units (zero, mean, noise, rewind …) and undoes it bit for bit, for experiments that ask
what a unit does.
"""

from demem.removal.fine_tuning import FineTuned, fine_tune, tuning_subset
from demem.removal.interventions import apply, intervene, intervene_weights
from demem.removal.rounds import (
    MASKED_SHARES,
    SMOOTHING,
    TRACED,
    Examples,
    Round,
    RoundRecord,
    check_shares,
    choose_round,
    clearly_better,
    remove_in_rounds,
    worst_group,
)

__all__ = [
    "MASKED_SHARES",
    "SMOOTHING",
    "TRACED",
    "Examples",
    "FineTuned",
    "Round",
    "RoundRecord",
    "apply",
    "check_shares",
    "choose_round",
    "clearly_better",
    "fine_tune",
    "intervene",
    "intervene_weights",
    "remove_in_rounds",
    "tuning_subset",
    "worst_group",
]
