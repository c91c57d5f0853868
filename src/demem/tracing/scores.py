"""Unit scores by name: one call for every way of asking which units memorise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from demem.batch import Batch
from demem.sites import Site
from demem.tracing.ablation import Effect, ablation_impact
from demem.tracing.activation_difference import activation_difference_score
from demem.tracing.atypical import class_mean
from demem.tracing.capture import ALONE, Ranks, select_rows
from demem.tracing.logit_attribution import head_impact
from demem.tracing.magnitude import gradient_score, magnitude_score
from demem.tracing.taylor import Ablate, taylor_impact
from demem.tracing.topk import top_units

Direction = Literal["hurts", "helps"]
ScoreFunction = Callable[..., dict[str, Tensor]]
ImpactFunction = Callable[..., dict[str, Tensor]]


IMPACTS: dict[str, ImpactFunction] = {
    "taylor": taylor_impact,
    "ablation": ablation_impact,
    "linear": head_impact,
}
"""Effect of each unit on each example: ``(model, sites, batches, **options)`` → ``{site: (S, N)}``."""


def impact_score(
    impact: Mapping[str, Tensor], y: Tensor, atypical: Tensor, ranks: Ranks = ALONE, direction: Direction = "hurts"
) -> dict[str, Tensor]:
    """Mean impact on the atypical examples, averaged over their classes, ``{site: (N,)}``; high = memorises.

    ``"hurts"`` (for held-out examples): minus the mean, so that high = removing the unit should help the atypical ones,
    because it holds the shortcut that fails them.  ``"helps"`` (for training examples): the mean itself, so that high =
    the atypical ones are fitted by this unit.

    Raises:
        ValueError: unknown direction, or nothing is atypical.
    """
    if direction not in ("hurts", "helps"):
        raise ValueError(f"direction must be 'hurts' or 'helps', got {direction!r}.")
    sign = -1 if direction == "hurts" else 1
    labels, chosen = ranks.gather(y), ranks.gather(atypical.to(y.device))
    return {name: sign * class_mean(ranks.gather(rows), labels, chosen) for name, rows in impact.items()}


def _from_impact(name: str) -> ScoreFunction:
    def score(
        model: nn.Module,
        sites: Sequence[Site],
        batches: Iterable[Batch],
        *,
        atypical: Tensor | None = None,
        direction: Direction = "hurts",
        ranks: Ranks = ALONE,
        **options: Any,
    ) -> dict[str, Tensor]:
        batches = batches if isinstance(batches, Sequence) else list(batches)
        y, chosen = labels_and_chosen(batches, atypical)
        impact = IMPACTS[name](model, sites, batches, ranks=ranks, **options)
        return impact_score(impact, y, chosen, ranks, direction)

    score.__doc__ = f":func:`impact_score` of {name!r} on the atypical examples (all if ``None``), ``{{site: (N,)}}``."
    return score


def two_step_score(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    atypical: Tensor | None = None,
    shortlist: int | float = 16,
    ablate: Ablate = "zero",
    effect: Effect = "loss",
    direction: Direction = "hurts",
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Taylor scores for all units, replaced by exact ablation for the shortlist of the highest ones.

    Only the atypical examples are run.

    Args:
        model: any module; left as it was.
        sites: from :func:`demem.sites.find_sites`.
        batches: examples.
        atypical: bool ``(S,)``; all examples if ``None``.
        shortlist: how many units (or what share of them) to confirm.  With the default the whole takes less time than
            five training passes over the examples on a ResNet-18.
        ablate: see :func:`~demem.tracing.ablation.ablation_impact`, as is ``effect``.
        effect: what is measured for the shortlist.
        direction: see :func:`impact_score`.
        ranks: of a distributed run.

    Returns:
        ``{site: (N,)}``.  Units that are not confirmed are held below the lowest confirmed one, so that the top
        of the ranking is exact.

    Raises:
        ValueError: as the two scores.
    """
    batches = batches if isinstance(batches, Sequence) else list(batches)
    _, chosen = labels_and_chosen(batches, atypical)
    kept, start = [], 0
    for batch in batches:
        here = chosen[start : start + len(batch.y)]
        start += len(batch.y)
        if bool(here.any()):
            kept.append(select_rows(batch, here))
    y, everything = labels_and_chosen(kept, None)
    estimate = taylor_impact(model, sites, kept, ablate=ablate, ranks=ranks)
    scores = impact_score(estimate, y, everything, ranks, direction)
    total = sum(len(v) for v in scores.values())
    units = top_units(scores, min(shortlist, total) if isinstance(shortlist, int) else shortlist)
    exact = ablation_impact(model, sites, kept, units=units, ablate=ablate, effect=effect, ranks=ranks)
    confirmed = impact_score(exact, y, everything, ranks, direction)
    floor = torch.stack([v.min() for v in confirmed.values()]).min().double()
    for name, values in scores.items():
        below = torch.nextafter(floor.to(values), torch.full_like(values[0], -torch.inf))
        scores[name] = torch.minimum(values, below)
        if name in units:
            scores[name][units[name]] = confirmed[name].to(values)
    return scores


SCORES: dict[str, ScoreFunction] = {
    "magnitude": magnitude_score,
    "gradient": gradient_score,
    "activation_difference": activation_difference_score,
    "taylor": _from_impact("taylor"),
    "ablation": _from_impact("ablation"),
    "linear": _from_impact("linear"),
    "two_step": two_step_score,
}
"""``(model, sites, batches, *, atypical=None, ranks=ALONE, **options)`` → ``{site: (N,)}``, high = memorises."""


def score_units(
    name: str, model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch], **options: Any
) -> dict[str, Tensor]:
    """The score of that name from :data:`SCORES`.

    Raises:
        ValueError: there is no such score (the message lists them), and as the score.
    """
    if name not in SCORES:
        raise ValueError(f"Unknown score {name!r}; there are {sorted(SCORES)}.")
    return SCORES[name](model, sites, batches, **options)


def labels_and_chosen(batches: Sequence[Batch], atypical: Tensor | None) -> tuple[Tensor, Tensor]:
    """Labels ``(S,)`` of all batches, and the mask on their device (all ``True`` if ``None``).

    Raises:
        ValueError: no examples, or the mask is not a boolean of one entry per example.
    """
    if not batches:
        raise ValueError("There are no examples to trace.")
    y = torch.cat([batch.y for batch in batches])
    if atypical is None:
        return y, torch.ones_like(y, dtype=torch.bool)
    if atypical.shape != y.shape or atypical.dtype != torch.bool:
        raise ValueError(f"`atypical` must be a boolean mask of shape {tuple(y.shape)}, got {tuple(atypical.shape)}.")
    return y, atypical.to(y.device)
