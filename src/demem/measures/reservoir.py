"""Draw a uniform sample of rows in bounded memory that does not depend on their order."""

from __future__ import annotations

from torch import Tensor


def reservoir_keys(positions: Tensor, seed: int = 0) -> Tensor:
    """Hash positions to pseudo-random keys: the rows with the smallest keys are the sample.

    Keys depend on position and seed only, so batches may come in any order, and the samples of several processes merge
    into the sample of one.

    Args:
        positions: ``(S,)`` integers that identify the rows, e.g. their positions in the data set.
        seed: selects another sample.

    Returns:
        ``(S,)`` int64, distinct for distinct positions.

    Source: the 64-bit finaliser of MurmurHash3, a bijection of the 64-bit integers.

    Example:
        >>> keys = reservoir_keys(torch.arange(1000))
        >>> bool((keys[500:] == reservoir_keys(torch.arange(500, 1000))).all())  # another batch, the same keys
        True
    """
    h = positions.long() + seed * 0x632BE59BD9B4E019 % 2**62
    for multiplier in (-0x00AE502812AA7333, -0x3B314601E57A13AD):
        # torch shifts int64 arithmetically; the mask makes it a logical shift.
        h = (h ^ ((h >> 33) & (2**31 - 1))) * multiplier
    return h ^ ((h >> 33) & (2**31 - 1))


def reservoir_compact(keys: Tensor, rows: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Keep the ``capacity`` rows with the smallest keys, in the order of the keys.

    Args:
        keys: ``(S,)`` from :func:`reservoir_keys`.
        rows: ``(S, N)``.
        capacity: number of rows to keep.  If there are no more, all are kept in their present order.

    Returns:
        The kept keys and rows.

    Example:
        >>> keys, rows = torch.empty(0, dtype=torch.long), torch.empty(0, 1)
        >>> for batch in torch.arange(1000).split(100):  # a stream
        ...     keys, rows = torch.cat([keys, reservoir_keys(batch)]), torch.cat([rows, batch[:, None]])
        ...     keys, rows = reservoir_compact(keys, rows, capacity=200)
        >>> len(rows), abs(float(rows.mean()) - 499.5) < 50
        (200, True)
    """
    if len(keys) <= capacity:
        return keys, rows
    keys, order = keys.sort(stable=True)
    return keys[:capacity], rows[order[:capacity].to(rows.device)]
