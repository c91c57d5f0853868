"""A uniform sample of rows in bounded memory that does not depend on the order in which they come."""

from __future__ import annotations

from torch import Tensor


def reservoir_keys(positions: Tensor, seed: int = 0) -> Tensor:
    """A pseudo-random number for each position: the rows with the smallest ones are the sample.

    The keys depend on position and seed only, so batches may come in any order, and samples of several processes
    merge into the sample of one (64-bit finaliser of MurmurHash3).

    Args:
        positions: ``(S,)`` integers that name the rows, e.g. their positions in the data set.

    Returns:
        ``(S,)`` int64, distinct for distinct positions.
    """
    h = positions.long() + seed * 0x632BE59BD9B4E019 % 2**62
    for multiplier in (-0x00AE502812AA7333, -0x3B314601E57A13AD):
        # torch shifts int64 arithmetically; masking makes the shift a logical one.
        h = (h ^ ((h >> 33) & (2**31 - 1))) * multiplier
    return h ^ ((h >> 33) & (2**31 - 1))


def reservoir_compact(keys: Tensor, rows: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Drop all but the ``capacity`` rows with the smallest keys; what is left is in the order of the keys.

    Args:
        keys: ``(S,)`` from :func:`reservoir_keys`.
        rows: ``(S, N)``.
        capacity: most rows to keep.  As long as there are no more, all are kept in the order they came.
    """
    if len(keys) <= capacity:
        return keys, rows
    keys, order = keys.sort(stable=True)
    return keys[:capacity], rows[order[:capacity].to(rows.device)]
