"""Plug-in Shannon entropy of binned activations (Bansal et al. 2022, equation 1, as in the released code)."""

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
    r"""Entropy of every unit, :math:`H_i = -\sum_b p_b \ln p_b`, in nats.

    Args:
        activations: ``(S, N)``, or ``{site: (S, N)}`` (S may differ between sites).
        bins: number of equal-width bins B (the paper: 100; 10 to 20 for the circles).
        binning: which units share one range, see :func:`demem.measures.unit_ranges`; the paper's is ``"global"``.
        value_range: fixed range instead of the data's smallest and largest value; values outside go to the end bins.
        correction: ``"miller_madow"`` adds (occupied bins − 1) / 2S against the downward bias of small samples.

    Returns:
        ``(N,)`` float64, or ``{site: (N,)}``.

    Raises:
        ValueError: wrong shape, NaN or infinity (names the site), bins out of range, unknown choice.
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
    """How often each unit's activation falls into each of ``bins`` equal-width bins.

    Counts of several batches or processes add up to the counts of all samples.

    Args:
        x: ``(S, N)``.
        low, high: ``(N,)`` float64, the same for every batch.

    Returns:
        ``(N, bins)`` int64.
    """
    check_bins(bins)
    size, units = x.shape
    counts = torch.zeros(units, bins, dtype=torch.int64, device=x.device)
    # Few units at a time keep the table of counts in the cache; on an accelerator one call does all.
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
    """Plug-in entropy of histograms, ``(..., B)`` counts to ``(...)`` nats (0 where a histogram is empty)."""
    total = counts.sum(-1, keepdim=True).double().clamp(min=1)
    value: Tensor = torch.special.entr(counts / total).sum(-1)
    if correction == "miller_madow":
        value = value + ((counts > 0).sum(-1) - 1).clamp(min=0) / (2 * total[..., 0])
    elif correction != "none":
        raise ValueError(f"Unknown correction {correction!r}; use 'none' or 'miller_madow'.")
    return value
