"""Select units by score, and control units to compare them with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def top_units(scores: Mapping[str, Tensor], k: int | float, within: bool = False) -> dict[str, Tensor]:
    """Select the ``k`` highest-scoring units.

    Args:
        scores: ``{site: (N,)}``.
        k: a number of units (``int``), or a fraction of them in (0, 1] (``float``, at least one unit).
        within: select ``k`` of every site (or all of a smaller one) instead of over all sites together.

    Returns:
        ``{site: int64 indices, best first}`` without the sites that have none.  Ties break by position.

    Raises:
        ValueError: ``k`` is not positive or exceeds the number of units; a score is NaN.

    Example:
        >>> scores = {"conv": torch.tensor([0.1, 0.9, 0.3]), "fc": torch.tensor([0.5, 0.2])}
        >>> top_units(scores, k=2)
        {'conv': tensor([1]), 'fc': tensor([0])}
    """
    if isinstance(k, bool) or k <= 0 or (isinstance(k, float) and k > 1):
        raise ValueError(f"k must be a positive number of units or a share in (0, 1], got {k}.")
    for name, values in scores.items():
        if bool(values.isnan().any()):
            raise ValueError(f"Scores of site {name!r} hold NaN.")
    if within:
        chosen = {}
        for name, values in scores.items():
            count = max(1, round(k * len(values))) if isinstance(k, float) else min(k, len(values))
            chosen[name] = torch.sort(values, descending=True, stable=True).indices[:count]
        return chosen
    flat = torch.cat([v.detach().double().cpu() for v in scores.values()])
    count = max(1, round(k * len(flat))) if isinstance(k, float) else k
    if count > len(flat):
        raise ValueError(f"k={count} units were requested, but there are {len(flat)}.")
    best = torch.sort(flat, descending=True, stable=True).indices[:count]
    chosen, start = {}, 0
    for name, values in scores.items():
        here = best[(best >= start) & (best < start + len(values))] - start
        if len(here):
            chosen[name] = here.to(values.device)
        start += len(values)
    return chosen


def random_units(scores: Mapping[str, Tensor], k: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Draw ``k`` units uniformly over all sites: the first control of You et al. 2025.

    Args:
        scores: ``{site: (N,)}``, of which only the sizes matter.
        k: see :func:`top_units`.
        generator: source of the draw; torch's default if ``None``.

    Example:
        >>> units = random_units({"conv": torch.zeros(64), "fc": torch.zeros(16)}, k=0.1)
        >>> sum(len(chosen) for chosen in units.values())
        8
    """
    noise = {name: torch.rand(len(v), generator=generator) for name, v in scores.items()}
    return top_units(noise, k)


def matched_units(
    chosen: Mapping[str, Tensor], magnitude: Mapping[str, Tensor], generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Select as many other units of the same sites, matched in magnitude: the second control of You et al. 2025.

    Every chosen unit is paired, in random order, with the unit of its site that is closest in magnitude and neither
    chosen nor already taken.

    Args:
        chosen: ``{site: int64 indices}`` of the traced units.
        magnitude: ``{site: (N,)}``, e.g. from :func:`~demem.tracing.magnitude_score`.
        generator: source of the order in which units are paired; torch's default if ``None``.

    Returns:
        ``{site: int64 indices}``, as many as in ``chosen``.

    Raises:
        ValueError: more than half of a site is chosen, so that there are not enough other units.

    Example:
        >>> matched_units({"fc": torch.tensor([0])}, {"fc": torch.tensor([1.0, 5.0, 1.1, 0.2])})
        {'fc': tensor([2])}
    """
    matched = {}
    for name, units in chosen.items():
        sizes = magnitude[name].detach().double().cpu()
        if 2 * len(units) > len(sizes):
            raise ValueError(f"{len(units)} of {len(sizes)} units of site {name!r} are chosen; none are left to match.")
        free = torch.ones(len(sizes), dtype=torch.bool)
        free[units.cpu()] = False
        picks = []
        for unit in units.cpu()[torch.randperm(len(units), generator=generator)]:
            distance = (sizes - sizes[unit]).abs().masked_fill(~free, float("inf"))
            pick = int(distance.argmin())
            free[pick] = False
            picks.append(pick)
        matched[name] = torch.tensor(picks, device=units.device)
    return matched


def units_to_masks(units: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Turn ``{site: indices}`` into ``{site: bool mask (N,)}`` for every site in ``sizes`` (``{site: N}``).

    Example:
        >>> units_to_masks({"fc": torch.tensor([1])}, {"conv": 2, "fc": 3})
        {'conv': tensor([False, False]), 'fc': tensor([False,  True, False])}
    """
    masks = {name: torch.zeros(n, dtype=torch.bool) for name, n in sizes.items()}
    for name, indices in units.items():
        masks[name][indices.cpu()] = True
    return masks
