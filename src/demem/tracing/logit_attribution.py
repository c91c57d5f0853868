"""Exact pruning impact of units that feed the classification head, where the logits are linear in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from demem.batch import Batch
from demem.sites import Site
from demem.tracing.atypical import class_mean, strongest_wrong
from demem.tracing.capture import ALONE, Ranks, read_features
from demem.tracing.taylor import Ablate

Centre = Literal["mean", "zero"]


def linear_impact(
    features: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    logits: Tensor | None = None,
    other: Tensor | None = None,
    centre: Centre | Tensor = "mean",
) -> Tensor:
    r"""What each unit adds to each example's margin, and what pruning it would take away.

    .. math:: I_{si} = (a_{si} - c_i)\,(w_{y_s i} - w_{o_s i})

    is exactly the margin lost by example :math:`s` when unit :math:`i` is set to :math:`c_i`, with the margin taken
    against the class :math:`o_s` that was the strongest wrong one (with two classes there is no other).

    Args:
        features: ``(S, N)``, what the head reads.
        weight: ``(C, N)``, the head's weight; ``(1, N)`` is read as the two rows ``(0, w)``.
        y: ``(S,)`` class indices.
        logits: ``(S, C)``, to tell the strongest wrong class; needed with three classes or more unless
            ``other`` is given.
        other: ``(S,)`` the wrong class to compare with.
        centre: what the unit is set to: its mean over the examples, zero, or a tensor ``(N,)``.

    Returns:
        ``(S, N)`` in logit units.

    Raises:
        ValueError: shapes do not fit, or the wrong class is not known.
    """
    if weight.shape[0] == 1:
        weight = torch.cat([torch.zeros_like(weight), weight])
    if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"Expected features (S, N) and weight (C, N), got {tuple(features.shape)} and {tuple(weight.shape)}."
        )
    if y.shape != features.shape[:1]:
        raise ValueError(f"Expected {features.shape[0]} labels, got {tuple(y.shape)}.")
    if other is None:
        if len(weight) == 2:
            other = 1 - y
        elif logits is None:
            raise ValueError("With three classes or more give `logits` or `other`, to tell the strongest wrong class.")
        else:
            other = strongest_wrong(logits, y)[1]
    if isinstance(centre, Tensor):
        centred = features - centre
    elif centre == "mean":
        centred = features - features.mean(0)
    elif centre == "zero":
        centred = features
    else:
        raise ValueError(f"Unknown centre {centre!r}; use 'mean', 'zero' or a tensor (N,).")
    return centred * (weight[y] - weight[other])


def linear_score(
    features: Tensor,
    weight: Tensor,
    y: Tensor,
    atypical: Tensor,
    *,
    logits: Tensor | None = None,
    other: Tensor | None = None,
    centre: Centre | Tensor = "mean",
) -> Tensor:
    """How much each unit hurts the atypical examples: minus its mean impact on them, averaged over their classes.

    Args:
        features: ``(S, N)``, what the head reads, for held-out examples.
        weight: ``(C, N)``.
        y: ``(S,)`` class indices.
        atypical: bool ``(S,)``, from :mod:`demem.tracing.atypical`.
        logits: see :func:`linear_impact`, as are ``other`` and ``centre`` (the mean is over all the examples given, not
            only the atypical ones).
        other: see :func:`linear_impact`.
        centre: see :func:`linear_impact`.

    Returns:
        ``(N,)``, high = pruning the unit helps the atypical examples.

    Raises:
        ValueError: as :func:`linear_impact`, or nothing is atypical.
    """
    if atypical.shape != y.shape or atypical.dtype != torch.bool:
        raise ValueError(f"`atypical` must be a boolean mask of shape {tuple(y.shape)}.")
    impact = linear_impact(features, weight, y, logits=logits, other=other, centre=centre)
    return -class_mean(impact, y, atypical)


def head_impact(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    ablate: Ablate = "mean",
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """:func:`linear_impact` of the units that a linear head reads, in one pass.

    Args:
        model: any module; left as it was.
        sites: inputs of the linear layer that makes the logits, e.g. ``"fc:input"``.
        batches: examples.
        ablate: what the unit is compared with, its mean over the examples or zero.
        ranks: of a distributed run, for the mean.

    Returns:
        ``{site: (S, N)}`` in logits, positive = the unit helps the example.

    Raises:
        ValueError: a site is not the input of a linear layer with as many outputs as there are logits.
    """
    features, logits, y = read_features(model, sites, batches)
    impact = {}
    for site in sites:
        weight = getattr(site.module, "weight", None)
        rows = features[site.name]
        fits = isinstance(site.module, nn.Linear) and site.side == "input" and len(rows) == len(y)
        if not fits or not isinstance(weight, Tensor) or len(weight) not in (1, logits.shape[1]):
            raise ValueError(
                f"Site {site.name!r} does not feed the classification head directly; the score 'linear' is for the "
                "input of the layer that makes the logits. Use 'taylor' or 'ablation' elsewhere."
            )
        centre = ranks.total(rows.sum(0)) / ranks.total(torch.tensor(float(len(rows)), device=rows.device))
        impact[site.name] = linear_impact(
            rows, weight.detach().float(), y, logits=logits, centre=centre if ablate == "mean" else "zero"
        )
    return impact
