"""The measures as torchmetrics: updated batch by batch, reduced over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from demem.measures.binning import Activations, Binning, as_sites, side_by_side
from demem.measures.entropy import Correction, entropy, entropy_from_counts, histogram
from demem.measures.ksg import ksg_mutual_information
from demem.measures.mutual_information import MICorrection, mutual_information
from demem.measures.reservoir import reservoir_keys


class _Reservoir(Metric):
    """Keep a uniform sample of at most ``capacity`` of the rows seen; exact as long as there are no more."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = True

    keys: list[Tensor]
    rows: list[Tensor]
    seen: Tensor
    limit: Tensor

    def __init__(self, capacity: int, seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2, got {capacity}.")
        self.capacity = capacity
        self.seed = seed
        self.widths: dict[str, int] | None = None
        self._single = False
        self.add_state("keys", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.add_state("seen", default=torch.tensor(0), dist_reduce_fx="sum")
        # A MetricCollection merges metrics whose states agree after the first batch: `limit` keeps metrics of different
        # capacity apart, and the keys those of different seeds.
        self.add_state("limit", default=torch.tensor(capacity), dist_reduce_fx="max")

    def update(self, activations: Activations, positions: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            activations: ``(B, N)`` or ``{site: (B, N)}``, the same sites in every batch.
            positions: ``(B,)`` integers that identify the examples, e.g. positions in the data set.  They make the
                result independent of the order and of the distribution over processes; without them rows are numbered
                in their order.

        Raises:
            ValueError: the sites changed between batches, or as :func:`demem.measures.entropy`.
        """
        sites = as_sites(activations)
        widths = {name: x.shape[1] for name, x in sites.items()}
        if self.widths is None:
            self.widths, self._single = widths, isinstance(activations, Tensor)
        elif self.widths != widths:
            raise ValueError(f"The sites changed between batches: {self.widths} before, {widths} now.")
        rows = side_by_side(sites)
        if positions is None:
            rank = torch.distributed.get_rank() if _is_distributed() else 0
            positions = torch.arange(len(rows), device=rows.device) + self.seen.to(rows.device) + (rank << 40)
        elif positions.shape != (len(rows),):
            raise ValueError(f"positions must have the shape ({len(rows)},), got {tuple(positions.shape)}.")
        self.seen += len(rows)
        self.keys.append(reservoir_keys(positions.to(rows.device), self.seed))
        self.rows.append(rows)
        sizes = [len(keys) for keys in self.keys]
        if sum(sizes) >= 2 * self.capacity:
            kept = torch.zeros(sum(sizes), dtype=torch.bool, device=rows.device)
            kept[torch.cat(self.keys).sort(stable=True).indices[: self.capacity]] = True
            for i, part in enumerate(torch.split(kept, sizes)):  # no second copy of everything
                self.keys[i], self.rows[i] = self.keys[i][part], self.rows[i][part]

    def activations(self) -> Activations:
        """Return the sample of rows, as a tensor or by site like the batches.

        Raises:
            RuntimeError: there was no batch.
        """
        if self.widths is None:
            raise RuntimeError(f"{type(self).__name__} has no activations yet: call update() first.")
        keys, rows = dim_zero_cat(self.keys), dim_zero_cat(self.rows)
        if int(self.seen) > self.capacity:  # in the order of the keys, whatever the batches and processes were
            rows = rows[keys.sort(stable=True).indices[: self.capacity]]
        if self._single:
            return rows
        parts = torch.split(rows, list(self.widths.values()), 1)
        return dict(zip(self.widths, parts, strict=True))


class ActivationEntropy(_Reservoir):
    """:func:`demem.measures.entropy` over batches: ``(N,)`` or ``{site: (N,)}`` nats.

    Args:
        bins, binning, value_range, correction: see there.
        capacity: keep at most this many rows (the paper's 10,000), a random sample of those seen; memory is
            capacity × N values.  :class:`ActivationRange` and then :class:`HistogramEntropy` use every row instead.
        seed: seed of the sample.

    Example:
        >>> metric = ActivationEntropy(bins=4)
        >>> for batch in torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]]).split(2):
        ...     metric.update(batch)
        >>> metric.compute()
        tensor([0.0000, 1.3863], dtype=torch.float64)
    """

    def __init__(
        self,
        bins: int = 100,
        binning: Binning = "global",
        value_range: tuple[float, float] | None = None,
        correction: Correction = "none",
        capacity: int = 10_000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(capacity, seed, **kwargs)
        self.options: dict[str, Any] = dict(bins=bins, binning=binning, value_range=value_range, correction=correction)

    def compute(self) -> Any:
        """Compute the entropy of every unit, nats."""
        return entropy(self.activations(), **self.options)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw notched boxes, one per site; returns matplotlib's figure and axes."""
        from demem.measures.plots import plot_entropy

        return plot_entropy(self.compute() if val is None else val, ax=ax)


class MutualInformation(_Reservoir):
    """:func:`demem.measures.mutual_information` over batches: ``(N, N)`` nats.

    Args:
        bins, binning, value_range, correction: see there.
        capacity, seed: see :class:`ActivationEntropy`.
    """

    def __init__(
        self,
        bins: int = 100,
        binning: Binning = "global",
        value_range: tuple[float, float] | None = None,
        correction: MICorrection = "none",
        capacity: int = 10_000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(capacity, seed, **kwargs)
        self.options: dict[str, Any] = dict(bins=bins, binning=binning, value_range=value_range, correction=correction)

    def compute(self) -> Tensor:
        """Compute the mutual information of all pairs, nats."""
        return mutual_information(self.activations(), **self.options, seed=self.seed)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the density of the pairs' values; returns matplotlib's figure and axes."""
        from demem.measures.plots import plot_mutual_information

        return plot_mutual_information(self.compute() if val is None else val, ax=ax)


class KSGMutualInformation(_Reservoir):
    """:func:`demem.measures.ksg_mutual_information` over batches: ``(N, N)`` nats.

    Args:
        k, clip: see there.
        capacity: keep at most this many rows; the time grows with capacity and with N².
        seed: seed of the sample.
    """

    def __init__(self, k: int = 3, clip: bool = True, capacity: int = 2_500, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(capacity, seed, **kwargs)
        self.k = k
        self.clip = clip

    def compute(self) -> Tensor:
        """Compute the mutual information of all pairs, nats."""
        return ksg_mutual_information(self.activations(), self.k, self.clip)

    plot = MutualInformation.plot


class ActivationRange(Metric):
    """Smallest and largest activation of every unit: the first of two passes, see :class:`HistogramEntropy`.

    Args:
        num_units: number of units N.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    low: Tensor
    high: Tensor

    def __init__(self, num_units: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        full = torch.full((num_units,), float("inf"), dtype=torch.float64)
        self.add_state("low", default=full, dist_reduce_fx="min")
        self.add_state("high", default=-full, dist_reduce_fx="max")

    def update(self, activations: Tensor) -> None:
        """Add a batch ``(B, N)``."""
        x = _units(activations, len(self.low))
        self.low = torch.minimum(self.low, x.amin(0).double())
        self.high = torch.maximum(self.high, x.amax(0).double())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return ``(low, high)``, each ``(N,)`` float64."""
        return self.low, self.high


class HistogramEntropy(Metric):
    """Entropy from histograms over known ranges, which uses every row in a memory of N × bins counts.

    Args:
        low, high: ``(N,)`` ranges; values outside fall into the end bins.
        bins: number of bins B.
        correction: see :func:`demem.measures.entropy`.

    Raises:
        ValueError: ``low`` and ``high`` differ in shape, or ``low`` exceeds ``high``.

    Example:
        >>> x, ends = torch.randn(1000, 3), ActivationRange(num_units=3)
        >>> for batch in x.split(100):
        ...     ends.update(batch)
        >>> metric = HistogramEntropy(*ends.compute(), bins=20)
        >>> for batch in x.split(100):
        ...     metric.update(batch)
        >>> torch.equal(metric.compute(), entropy(x, bins=20, binning="per_unit"))
        True
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    counts: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self, low: Tensor, high: Tensor, bins: int = 100, correction: Correction = "none", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if low.ndim != 1 or low.shape != high.shape or not bool((low <= high).all()):
            raise ValueError("low and high must be (N,) with low ≤ high for every unit.")
        self.bins = bins
        self.correction: Correction = correction
        self.register_buffer("low", low.double())
        self.register_buffer("high", high.double())
        self.add_state("counts", default=torch.zeros(len(low), bins, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, activations: Tensor) -> None:
        """Add a batch ``(B, N)``."""
        x = _units(activations, len(self.counts))
        self.counts += histogram(x, self.low, self.high, self.bins)

    def compute(self) -> Tensor:
        """Compute the entropy of every unit, ``(N,)`` nats."""
        return entropy_from_counts(self.counts, self.correction)


def _units(activations: Tensor, number: int) -> Tensor:
    (x,) = as_sites(activations).values()
    if x.shape[1] != number:  # a single unit would broadcast to all
        raise ValueError(f"The activations must be of {number} units, got {x.shape[1]}.")
    return x


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
