"""Which training examples were memorised: what the kept units say against what the memorising ones say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


def memorization_score(impact: Tensor | Mapping[str, Tensor], memorising: Tensor | Mapping[str, Tensor]) -> Tensor:
    r"""How much an example stands on the kept units and against the memorising ones.

    .. math:: r_s = \frac{K_s - \bar K}{\operatorname{sd}(K)} - \frac{M_s - \bar M}{\operatorname{sd}(M)}

    with :math:`K_s` and :math:`M_s` the summed impact on the margin of example s (see
    :func:`~demem.tracing.linear_impact`) of the kept and of the memorising units.  The units that hold the
    shortcut speak against the examples on which it fails, so these come out on top; no group label is used.

    Args:
        impact: ``(S, N)``, or one such matrix for each site.
        memorising: bool ``(N,)``, or one for each site; sites left out are kept.

    Returns:
        ``(S,)``, high = memorised.

    Raises:
        ValueError: fewer than two examples, or all units or none are memorising.
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
    """The score from the two sums ``(S,)`` themselves, each brought to mean 0 and standard deviation 1."""
    return (_standard(kept.double()) - _standard(masked.double())).float()


class RankedExamples(NamedTuple):
    """Memorised examples, most memorised first: positions in the data set, scores and labels, ``(k,)`` each."""

    position: Tensor
    score: Tensor
    label: Tensor


def rank_examples(
    score: Tensor, y: Tensor, k: int | None = None, index: Tensor | None = None, per_class: bool = False
) -> RankedExamples:
    """The ``k`` highest-scoring examples (all if ``None``), best first.

    Args:
        score: ``(S,)`` from :func:`memorization_score`.
        y: ``(S,)`` labels.
        k: how many.
        index: ``(S,)`` positions in the data set; ``0 … S − 1`` if ``None``.
        per_class: take ``k`` of each class, so that a class with larger scores does not fill the list.

    Raises:
        ValueError: shapes differ or a score is NaN.
    """
    if score.shape != y.shape or score.ndim != 1 or bool(score.isnan().any()):
        raise ValueError("Expected one finite score and one label per example.")
    positions = torch.arange(len(y), device=y.device) if index is None else index.to(y.device)
    order = torch.sort(score, descending=True, stable=True).indices
    if k is not None:
        if per_class:
            keep = torch.zeros_like(y, dtype=torch.bool)
            for c in torch.unique(y).tolist():
                keep[order[y[order] == c][:k]] = True
            order = order[keep[order]]
        else:
            order = order[:k]
    return RankedExamples(positions[order], score[order], y[order])


def average_precision(score: Tensor, positive: Tensor) -> float:
    """Area under precision over recall (step form) of ranking by ``score``; ties break by position.

    Raises:
        ValueError: shapes differ, or no example is positive.
    """
    if score.shape != positive.shape or not bool(positive.any()):
        raise ValueError("Expected one score per example and at least one positive.")
    hits = positive[torch.sort(score, descending=True, stable=True).indices].double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1, device=hits.device)
    return float((precision * hits).sum() / hits.sum())


def _standard(values: Tensor) -> Tensor:
    spread = values.std()
    return (values - values.mean()) / spread if float(spread) > 0 else torch.zeros_like(values)
