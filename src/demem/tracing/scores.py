"""Score units by the name of a method, with one signature for all scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from demem.batch import Batch, batch_size
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
"""Impact of each unit on each example by name: ``(model, sites, batches, **options)`` → ``{site: (S, N)}``."""


def impact_score(
    impact: Mapping[str, Tensor], y: Tensor, atypical: Tensor, ranks: Ranks = ALONE, direction: Direction = "hurts"
) -> dict[str, Tensor]:
    """Score units by their mean impact on the atypical examples of each class, averaged over the classes.

    Args:
        impact: ``{site: (S, N)}``, positive = the unit helps the example.
        y: ``(S,)`` class indices.
        atypical: bool ``(S,)``.
        ranks: processes of a distributed run.
        direction: ``"hurts"`` (for held-out examples) takes minus the mean: the unit holds the shortcut that fails the
            atypical examples.  ``"helps"`` (for training examples) takes the mean: the unit fits them.

    Returns:
        ``{site: (N,)}``, high = memorises.

    Raises:
        ValueError: unknown direction, or nothing is atypical.

    Example:
        >>> impact = {"fc:input": torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, -2.0]])}
        >>> impact_score(impact, torch.tensor([0, 0, 0]), atypical=torch.tensor([False, False, True]))
        {'fc:input': tensor([-1.,  2.])}
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
    """Score all units by :func:`~demem.tracing.taylor_impact`, and the highest ones again by exact ablation.

    Only the atypical examples are run.

    Args:
        model: any module; left as it was.
        sites: from :func:`demem.sites.find_sites`.
        batches: examples.
        atypical: bool ``(S,)``; all examples if ``None``.
        shortlist: number (``int``) or fraction (``float``) of the units to ablate.  With the default the score takes
            less time than five training passes over the examples on a ResNet-18.
        ablate, effect: see :func:`~demem.tracing.ablation_impact`.
        direction: see :func:`impact_score`.
        ranks: processes of a distributed run.

    Returns:
        ``{site: (N,)}``.  Scores of units outside of the shortlist are limited to just below the lowest exact one, so
        that the top of the ranking is exact.

    Raises:
        ValueError: as the two scores.

    Example:
        >>> from demem.sites import find_sites
        >>> from demem.tracing import top_units
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sites, data = find_sites(model, "1"), [Batch(torch.randn(20, 4), torch.arange(20) % 2)]
        >>> score = two_step_score(model, sites, data, shortlist=4)
        >>> exact = score_units("ablation", model, sites, data)
        >>> torch.equal(top_units(score, 1)["1"], top_units(exact, 1)["1"])
        True
    """
    batches = batches if isinstance(batches, Sequence) else list(batches)
    _, chosen = labels_and_chosen(batches, atypical)
    kept, masks, start = [], [], 0
    for batch in batches:
        here = chosen[start : start + len(batch.y)]
        start += len(batch.y)
        if bool(here.any()):
            try:
                kept.append(select_rows(batch, here))
                masks.append(torch.ones(batch_size(kept[-1]), dtype=torch.bool))
            except ValueError:  # the whole batch is run
                kept.append(batch)
                masks.append(here.cpu())
    y, everything = labels_and_chosen(kept, torch.cat(masks) if masks else None)
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
    """Score units by the method of that name in :data:`SCORES`.

    Args:
        name: ``"magnitude"``, ``"gradient"``, ``"activation_difference"``, ``"taylor"``, ``"ablation"``, ``"linear"``
            or ``"two_step"``.
        model, sites, batches, options: arguments of the score.

    Returns:
        ``{site: (N,)}``, high = memorises.

    Raises:
        ValueError: there is no such score (the message lists them), or as the score.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
        >>> model[0].weight.data = torch.eye(2)
        >>> data = [Batch(torch.tensor([[3.0, 0.0], [1.0, 2.0]]), torch.tensor([0, 0]))]
        >>> atypical = torch.tensor([False, True])  # unit 1 holds what misleads the second example
        >>> score_units("ablation", model, find_sites(model, "0"), data, atypical=atypical, effect="margin")
        {'0': tensor([-1.,  2.])}
    """
    if name not in SCORES:
        raise ValueError(f"Unknown score {name!r}; there are {sorted(SCORES)}.")
    return SCORES[name](model, sites, batches, **options)


def labels_and_chosen(batches: Sequence[Batch], atypical: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the labels ``(S,)`` of all batches, and the mask on their device (all ``True`` if ``None``).

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
