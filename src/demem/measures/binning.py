"""Assign activations to bins: the first step of the plug-in estimates of entropy and of mutual information."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from demem.sites import check_finite

Binning = Literal["global", "per_site", "per_unit", "quantile"]
Activations = Tensor | Mapping[str, Tensor]

MAX_BINS = 10_000


def as_sites(activations: Activations) -> dict[str, Tensor]:
    """Return activations by site name, checked: ``(S, N)``, floating point and finite.

    Raises:
        TypeError: not a tensor or a mapping of tensors.
        ValueError: not two-dimensional, no samples, no units, or NaN or infinity (the message names the site).
    """
    if isinstance(activations, Tensor):
        activations = {"activations": activations}
    if not isinstance(activations, Mapping) or not activations:
        raise TypeError("Pass a tensor of shape (samples, units) or a non-empty mapping {site: such a tensor}.")
    sites = {}
    for name, x in activations.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"The activations of site {name!r} are a {type(x).__name__}, not a tensor.")
        if x.ndim != 2 or 0 in x.shape:
            raise ValueError(f"The activations of site {name!r} must be (samples, units), got {tuple(x.shape)}.")
        x = x.detach() if x.is_floating_point() else x.detach().float()
        if not all(bool(torch.isfinite(end)) for end in torch.aminmax(x)):  # takes a tenth of the time of isfinite(x)
            check_finite(x, f"site {name!r}")
        sites[name] = x
    return sites


def side_by_side(sites: Mapping[str, Tensor]) -> Tensor:
    """Join the units of all sites into one matrix ``(S, N)``.

    Raises:
        ValueError: sites hold different numbers of samples, so they cannot be paired.
    """
    sizes = {name: len(x) for name, x in sites.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Mutual information pairs samples, but the sites hold different numbers of them: {sizes}.")
    return torch.cat(list(sites.values()), 1)


def unit_ranges(activations: Activations, binning: Binning = "global") -> dict[str, tuple[Tensor, Tensor]]:
    """Find the smallest and largest activation, between which the bins of every unit lie.

    Args:
        activations: ``(S, N)`` or ``{site: (S, N)}``.
        binning: which units have one range in common: ``"global"`` all units of all sites (as in the released code of
            Bansal et al. 2022), ``"per_site"`` those of a site, ``"per_unit"`` none.

    Returns:
        ``{site: (low, high)}``, each ``(N,)`` float64.

    Raises:
        ValueError: wrong shape, NaN or infinity (names the site), unknown binning.

    Example:
        >>> x = torch.tensor([[0.0, 5.0], [1.0, 9.0]])
        >>> unit_ranges({"fc": x}, "per_unit")["fc"]
        (tensor([0., 5.], dtype=torch.float64), tensor([1., 9.], dtype=torch.float64))
        >>> unit_ranges({"fc": x}, "global")["fc"]
        (tensor([0., 0.], dtype=torch.float64), tensor([9., 9.], dtype=torch.float64))
    """
    return ranges_of(as_sites(activations), binning)


def ranges_of(sites: Mapping[str, Tensor], binning: Binning) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute :func:`unit_ranges` of activations that :func:`as_sites` has checked."""
    ranges = {}
    for name, x in sites.items():
        if binning == "per_unit":
            low, high = x.amin(0), x.amax(0)
        else:  # one pass over contiguous memory takes a quarter of the time of the minima of all columns
            low, high = (end.expand(x.shape[1]) for end in torch.aminmax(x))
        ranges[name] = (low.double(), high.double())
    return share_ranges(ranges, binning)


def share_ranges(ranges: Mapping[str, tuple[Tensor, Tensor]], binning: Binning) -> dict[str, tuple[Tensor, Tensor]]:
    """Widen the ranges of single units to those that ``binning`` lets units have in common.

    Args:
        ranges: ``{site: (low, high)}``, each ``(N,)`` float64, e.g. from :class:`~demem.measures.ActivationRange`.
        binning: see :func:`unit_ranges`.

    Raises:
        ValueError: unknown binning.

    Example:
        >>> low, high = torch.tensor([0.0, 5.0]), torch.tensor([1.0, 9.0])
        >>> share_ranges({"fc": (low, high)}, "per_site")["fc"]
        (tensor([0., 0.]), tensor([9., 9.]))
    """
    if binning == "per_unit":
        return dict(ranges)
    if binning == "per_site":
        return {n: (low.min().expand_as(low), high.max().expand_as(high)) for n, (low, high) in ranges.items()}
    if binning == "global":
        least = torch.stack([low.min() for low, _ in ranges.values()]).min()
        most = torch.stack([high.max() for _, high in ranges.values()]).max()
        return {n: (least.expand_as(low), most.expand_as(high)) for n, (low, high) in ranges.items()}
    raise ValueError(f"Unknown binning {binning!r}; use 'global', 'per_site' or 'per_unit'.")


def fixed_range(value_range: tuple[float, float], like: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat a range given by the user for every unit of ``like`` ``(S, N)``."""
    low, high = float(value_range[0]), float(value_range[1])
    if not low < high:
        raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}.")
    full = torch.ones(like.shape[1], dtype=torch.float64, device=like.device)
    return full * low, full * high


def bin_codes(x: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Return the index of the equal-width bin of every activation; values outside of the range fall into the end bins.

    Args:
        x: ``(S, N)``.
        low, high: ``(N,)`` float64; all values of a unit with ``low == high`` fall into bin 0.
        bins: number of bins B.

    Returns:
        ``(S, N)`` int32 in ``[0, B)``.
    """
    width = high - low
    scale = torch.where(width > 0, bins / width.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    # In float64, because in float32 a few values in a million land on the wrong side of an edge.
    return x.to(torch.float64, copy=True).sub_(low).mul_(scale).clamp_(0, bins - 1).to(torch.int32)


def quantile_codes(x: Tensor, bins: int) -> Tensor:
    """Return the index of the equally filled bin of every activation, ``(S, N)`` int32; equal values share a bin.

    The index depends on ranks only, so it is invariant to increasing maps of a unit.
    """
    size = len(x)
    by_unit = x.T.contiguous()
    rank = torch.searchsorted(by_unit.sort(1).values, by_unit)
    return (rank * bins).div_(size, rounding_mode="floor").to(torch.int32).T


def check_bins(bins: int) -> int:
    """Return ``bins``, or raise a :class:`ValueError` if it is out of range."""
    if not 2 <= bins <= MAX_BINS:
        raise ValueError(f"bins must be between 2 and {MAX_BINS}, got {bins}.")
    return bins
