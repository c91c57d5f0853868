"""Estimate the Shannon entropy of binned activations (Bansal et al. 2022, equation 1, as in the released code).

The plug-in estimate puts the observed frequencies p̂_b = n_b / S in place of the probabilities.  Its bias follows from
the expansion of −p ln p to second order around the true p_b: the first-order terms vanish in the mean, the variance
p_b (1 − p_b) / S of p̂_b leaves −(1 − p_b) / 2S for every bin, and the sum over the K occupied bins is −(K − 1) / 2S.
Miller and Madow (1955) add that term back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch import Tensor

from demem.measures._parallel import for_each
from demem.measures.binning import (
    Activations,
    Binning,
    as_sites,
    bin_codes,
    check_bins,
    fixed_range,
    ranges_of,
)

Correction = Literal["none", "miller_madow"]

_UNITS_PER_BLOCK = 64


@overload
def entropy(
    activations: Tensor,
    bins: int = ...,
    binning: Binning = ...,
    value_range: tuple[float, float] | None = ...,
    correction: Correction = ...,
) -> Tensor: ...
@overload
def entropy(
    activations: Mapping[str, Tensor],
    bins: int = ...,
    binning: Binning = ...,
    value_range: tuple[float, float] | None = ...,
    correction: Correction = ...,
) -> dict[str, Tensor]: ...
@overload
def entropy(
    activations: Activations,
    bins: int = ...,
    binning: Binning = ...,
    value_range: tuple[float, float] | None = ...,
    correction: Correction = ...,
) -> Tensor | dict[str, Tensor]: ...
def entropy(
    activations: Activations,
    bins: int = 100,
    binning: Binning = "global",
    value_range: tuple[float, float] | None = None,
    correction: Correction = "none",
) -> Tensor | dict[str, Tensor]:
    r"""Estimate the entropy of every unit, :math:`H_i = -\sum_b p_b \ln p_b`, in nats.

    Args:
        activations: ``(S, N)``, or ``{site: (S, N)}`` (S may differ between sites).
        bins: number of equal-width bins B (the paper: 100; 10 to 20 for the circles).
        binning: which units have one range in common, see :func:`demem.measures.unit_ranges`; the paper's is
            ``"global"``.
        value_range: fixed range instead of the smallest and largest activation; values outside fall into the end bins.
        correction: ``"miller_madow"`` adds (occupied bins − 1) / 2S against the downward bias of small samples.

    Returns:
        ``(N,)`` float64, or ``{site: (N,)}``.

    Raises:
        ValueError: wrong shape, NaN or infinity (names the site), bins out of range, unknown choice.

    Source: Bansal et al. 2022, equation 1.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])  # a dead unit and a diverse one
        >>> entropy(x, bins=4)  # 0 and ln 4
        tensor([0.0000, 1.3863], dtype=torch.float64)
    """
    sites = as_sites(activations)
    if value_range is None:
        ranges = ranges_of(sites, binning)
    else:
        ranges = {name: fixed_range(value_range, x) for name, x in sites.items()}
    values = {
        name: entropy_from_counts(histogram(x, *ranges[name], bins=bins), correction) for name, x in sites.items()
    }
    return values["activations"] if isinstance(activations, Tensor) else values


def histogram(x: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Count how often each unit's activation falls into each of ``bins`` equal-width bins.

    The counts of several batches or processes add up to those of all examples.

    Args:
        x: ``(S, N)``.
        low, high: ``(N,)`` float64, the same for every batch; values outside fall into the end bins.
        bins: number of bins B.

    Returns:
        ``(N, B)`` int64.

    Raises:
        ValueError: bins out of range.

    Example:
        >>> low, high = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        >>> histogram(torch.tensor([[0.1], [0.4], [0.9], [1.7]]), low, high, bins=2)
        tensor([[2, 2]])
    """
    check_bins(bins)
    size, units = x.shape
    counts = torch.zeros(units, bins, dtype=torch.int64, device=x.device)
    # Few units at a time keep the table of counts in the cache; an accelerator counts all units in one call.
    width = _UNITS_PER_BLOCK if x.device.type == "cpu" else units
    rows = 2048 if x.device.type == "cpu" else size

    def count(start: int) -> None:
        stop = min(start + width, units)
        offset = torch.arange(stop - start, dtype=torch.int32, device=x.device) * bins
        for first in range(0, size, rows):
            part = x[first : first + rows, start:stop]
            codes = bin_codes(part, low[start:stop], high[start:stop], bins).add_(offset)
            table = torch.bincount(codes.flatten(), minlength=(stop - start) * bins)
            counts[start:stop] += table.view(-1, bins)

    for_each(count, range(0, units, width))
    return counts


def entropy_from_counts(counts: Tensor, correction: Correction = "none") -> Tensor:
    """Estimate the entropy of histograms: counts ``(..., B)`` → ``(...)`` nats (0 where a histogram is empty).

    Args:
        counts: ``(..., B)`` from :func:`histogram`.
        correction: see :func:`entropy`.

    Raises:
        ValueError: unknown correction.

    Example:
        >>> entropy_from_counts(torch.tensor([[4, 0], [2, 2]]))
        tensor([0.0000, 0.6931], dtype=torch.float64)
        >>> entropy_from_counts(torch.tensor([2, 2]), "miller_madow")  # + (2 − 1) / (2 · 4)
        tensor(0.8181, dtype=torch.float64)
    """
    total = counts.sum(-1, keepdim=True).double().clamp(min=1)
    value: Tensor = torch.special.entr(counts / total).sum(-1)
    if correction == "miller_madow":
        value = value + ((counts > 0).sum(-1) - 1).clamp(min=0) / (2 * total[..., 0])
    elif correction != "none":
        raise ValueError(f"Unknown correction {correction!r}; use 'none' or 'miller_madow'.")
    return value
