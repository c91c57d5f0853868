"""What is done about memorising units: masks and head refits in rounds, and interventions with exact undo."""

from demem.removal.interventions import apply, intervene, intervene_weights
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
    "Round",
    "apply",
    "choose_round",
    "clearly_better",
    "intervene",
    "intervene_weights",
    "largest_groups",
    "remove_in_rounds",
    "worst_group",
]
