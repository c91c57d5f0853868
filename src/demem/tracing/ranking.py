"""Rank training examples by memorization: the impact of the kept units against that of the memorising ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from demem.tracing.atypical import members_of


def memorization_score(impact: Tensor | Mapping[str, Tensor], memorising: Tensor | Mapping[str, Tensor]) -> Tensor:
    r"""Score examples by how much the kept units help them and the memorising units fail them.

    .. math:: r_s = \frac{K_s - \bar K}{\operatorname{sd}(K)} - \frac{M_s - \bar M}{\operatorname{sd}(M)}

    with :math:`K_s` and :math:`M_s` the summed impact on the margin of example s (see
    :func:`~demem.tracing.linear_impact`) of the kept and of the memorising units.  The units that hold the shortcut
    lower the margin of the examples on which it fails, so these score highest; no group label is used.

    Args:
        impact: ``(S, N)``, or ``{site: (S, N)}``.
        memorising: bool ``(N,)``, or ``{site: bool (N,)}``; all units of a site that is left out are kept.

    Returns:
        ``(S,)`` in standard deviations, high = memorised.

    Raises:
        ValueError: fewer than two examples, or all units or none are memorising.

    Example:
        >>> impact = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, -2.0]])  # unit 1 fails the last example
        >>> int(memorization_score(impact, torch.tensor([False, True])).argmax())
        3
    """
    if isinstance(impact, Tensor):
        if not isinstance(memorising, Tensor):
            raise ValueError("One impact matrix needs one mask of memorising units.")
        matrix, mask = impact, memorising
    else:
        if isinstance(memorising, Tensor):
            raise ValueError("Impact by site needs a mask of memorising units by site.")
        none = {n: torch.zeros(v.shape[1], dtype=torch.bool) for n, v in impact.items() if n not in memorising}
        matrix = torch.cat(list(impact.values()), 1)
        mask = torch.cat([none[n] if n in none else memorising[n].cpu() for n in impact])
    mask = mask.to(matrix.device)
    if mask.dtype != torch.bool or mask.shape != matrix.shape[1:]:
        raise ValueError(f"The mask of memorising units must be boolean of shape {tuple(matrix.shape[1:])}.")
    if len(matrix) < 2 or not bool(mask.any()) or bool(mask.all()):
        raise ValueError("At least two examples, one memorising and one kept unit are needed.")
    kept, masked = matrix[:, ~mask].double().sum(1), matrix[:, mask].double().sum(1)
    return contrast(kept, masked)


def contrast(kept: Tensor, masked: Tensor) -> Tensor:
    """Compute :func:`memorization_score` from the two sums K and M, each ``(S,)``.

    Example:
        >>> contrast(kept=torch.tensor([1.0, 1.0, 1.0]), masked=torch.tensor([2.0, 2.0, -2.0]))
        tensor([-0.5774, -0.5774,  1.1547])
    """
    return (_standard(kept.double()) - _standard(masked.double())).float()


class RankedExamples(NamedTuple):
    """Examples in the order of their score, highest first: positions in the data set, scores, labels; ``(k,)`` each."""

    position: Tensor
    score: Tensor
    label: Tensor


def rank_examples(
    score: Tensor, y: Tensor, k: int | None = None, index: Tensor | None = None, per_class: bool = False
) -> RankedExamples:
    """Rank examples by score, highest first.

    Args:
        score: ``(S,)`` from :func:`memorization_score`.
        y: ``(S,)`` labels.
        k: number of examples to keep; all if ``None``.
        index: ``(S,)`` positions in the data set; ``0 … S − 1`` if ``None``.
        per_class: keep ``k`` of each class, so that a class with larger scores does not fill the list.

    Raises:
        ValueError: shapes differ or a score is NaN.

    Example:
        >>> score, y = torch.tensor([0.2, 3.0, 2.0, 0.1]), torch.tensor([0, 1, 1, 0])
        >>> rank_examples(score, y, k=1, per_class=True).position
        tensor([1, 0])
    """
    if score.shape != y.shape or score.ndim != 1 or bool(score.isnan().any()):
        raise ValueError("Expected one finite score and one label per example.")
    positions = torch.arange(len(y), device=y.device) if index is None else index.to(y.device)
    order = torch.sort(score, descending=True, stable=True).indices
    if k is not None:
        if per_class:
            keep = torch.zeros_like(y, dtype=torch.bool)
            for _, members in members_of(y[order]):
                keep[order[members[:k]]] = True
            order = order[keep[order]]
        else:
            order = order[:k]
    return RankedExamples(positions[order], score[order], y[order])


def average_precision(score: Tensor, positive: Tensor) -> float:
    """Compute the average precision of ranking by ``score``: the mean of the precision at each positive.

    Args:
        score: ``(S,)``, high = positive; ties break by position.
        positive: bool ``(S,)``.

    Returns:
        A fraction; the base rate of the positives on average for a random score.

    Raises:
        ValueError: shapes differ, or no example is positive.

    Example:
        >>> average_precision(torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([True, False, False, True]))
        0.75
    """
    if score.shape != positive.shape or not bool(positive.any()):
        raise ValueError("Expected one score per example and at least one positive.")
    hits = positive[torch.sort(score, descending=True, stable=True).indices].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device)
    return float((precision * hits).sum() / hits.sum())


def _standard(values: Tensor) -> Tensor:
    spread = values.std()
    return (values - values.mean()) / spread if float(spread) > 0 else torch.zeros_like(values)
