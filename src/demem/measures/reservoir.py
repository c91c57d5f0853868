"""Draw a uniform sample of rows in bounded memory that does not depend on their order."""

from __future__ import annotations

import torch
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


class Reservoir:
    """A uniform sample of at most ``capacity`` of the rows that came, in the order in which they came.

    It holds ``capacity`` rows of N numbers, :math:`4N` bytes each for float32, and no more: a row that enters the
    sample is written over one that leaves it, and all others are not touched.

    Args:
        capacity: most rows of the sample.
        seed: of the draw, see :func:`reservoir_keys`.

    Example:
        >>> reservoir = Reservoir(capacity=200)
        >>> for positions in torch.arange(1000).split(100):  # a stream
        ...     reservoir.add(positions, positions[:, None].float())
        >>> positions, rows = reservoir.sample()
        >>> len(rows), abs(float(rows.mean()) - 499.5) < 50
        (200, True)
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity = capacity
        self.seed = seed
        self._seen = 0
        # One column for each row of the sample, on the CPU: its position, its key, and the number of rows before it.
        self._held = torch.empty(3, 0, dtype=torch.long)
        self._slots = torch.empty(0, dtype=torch.long)  # where it lies
        self._rows: Tensor | None = None

    def add(self, positions: Tensor, rows: Tensor) -> None:
        """Take in rows ``(B, N)`` with the integers ``(B,)`` that name them, e.g. positions in the data set."""
        if self._rows is None:
            self._rows = rows.new_empty(self.capacity, *rows.shape[1:])
        positions = positions.cpu().long()
        came = torch.arange(self._seen, self._seen + len(positions))
        self._seen += len(positions)
        held = torch.cat([self._held, torch.stack([positions, reservoir_keys(positions, self.seed), came])], 1)
        kept = held[1].sort(stable=True).indices[: self.capacity].sort().values  # in the order in which they came
        old, new = kept[kept < len(self._slots)], kept[kept >= len(self._slots)]
        free = torch.ones(self.capacity, dtype=torch.bool)
        free[self._slots[old]] = False
        into = free.nonzero()[: len(new), 0]
        self._rows[into.to(rows.device)] = rows[(new - len(self._slots)).to(rows.device)]
        self._held, self._slots = held[:, kept], torch.cat([self._slots[old], into])

    def sample(self) -> tuple[Tensor, Tensor]:
        """Positions ``(S,)`` and rows ``(S, N)``, with S at most ``capacity``.

        Raises:
            RuntimeError: nothing came.
        """
        if self._rows is None:
            raise RuntimeError("The reservoir has no rows yet: call add() first.")
        return self._held[0], self._rows[self._slots.to(self._rows.device)]
