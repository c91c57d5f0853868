"""How many examples the fits of :func:`demem.removal.remove_in_rounds` may read, so that they end within minutes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ROWS = 20_000  # most examples that one head is fitted on; each takes memory
WORK = 1.5e11  # examples × units × (classes + OVERHEAD), summed over all fits: about five minutes of one CPU core
OVERHEAD = 40  # with few classes a fit waits for memory: as long as this many more classes would take
JUDGED, KEPT = 5, 20  # subsets whose heads are averaged: for each fold of a round that is judged, for the one kept
FOLDS = 5


class Plan(NamedTuple):
    """What the fits of all rounds read.

    Attributes:
        judged: subsets for each of the heads that only judge a round.
        kept: subsets for the head that is kept.
        most: examples of one subset.
        shares: of the units to mask, those that there is time for.
    """

    judged: int
    kept: int
    most: int
    shares: tuple[float, ...]


def plan_fits(rows: int, traced: int, units: int, classes: int, weights: int, shares: Sequence[float]) -> Plan:
    r"""Choose the numbers of heads, examples and rounds with which all fits together stay within :data:`WORK`.

    A fit on :math:`R` examples with :math:`N` units and :math:`C` classes counts as :math:`R N (C + 40)`.  Each of the
    :math:`r` rounds takes 5 folds, and each masked one a head on the traced examples as well.  Where that is too much,
    fewer heads are averaged, down to one; then no units are masked; then each head reads fewer examples.

    Args:
        rows: examples of a balanced subset of the held-out ones.
        traced: training examples.
        units, classes: :math:`N` and :math:`C`.
        weights: number of rounds with nothing masked.
        shares: of the units, one for each of the other rounds.

    Example:
        >>> plan_fits(rows=500, traced=2_000, units=2_048, classes=2, weights=4, shares=(0.2, 0.5))
        Plan(judged=5, kept=20, most=20000, shares=(0.2, 0.5))
        >>> plan_fits(rows=50_000, traced=20_000, units=2_048, classes=1_000, weights=1, shares=(0.2, 0.5))
        Plan(judged=1, kept=1, most=11737, shares=())
    """
    each = units * (classes + OVERHEAD)
    size = min(rows, ROWS)

    def fits(judged: int, kept: int, masked: int) -> int:
        return FOLDS * judged * (weights + masked) + kept

    for judged, kept, some in ((JUDGED, KEPT, shares), (3, 12, shares), (1, 4, shares), (1, 1, shares), (1, 1, ())):
        head = traced * (len(some) + 1) if some else 0
        if each * (head + size * fits(judged, kept, len(some))) <= WORK:
            return Plan(judged, kept, ROWS, tuple(some))
    return Plan(1, 1, max(1, int(WORK / each / fits(1, 1, 0))), ())
