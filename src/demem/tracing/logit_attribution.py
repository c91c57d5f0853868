"""Attribute margins to the units that the classification head reads, where the logits are linear in the units.

With the margin m = w_y · a + b_y − (w_o · a + b_o) against class o, setting unit i to c_i lowers m by exactly
(a_i − c_i)(w_{y,i} − w_{o,i}): the direct logit attribution of the unit, here per example.
"""

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
    r"""Compute the margin that each example loses when a unit before the head is ablated.

    .. math:: I_{si} = (a_{si} - c_i)\,(w_{y_s i} - w_{o_s i})

    is exactly the margin lost by example :math:`s` when unit :math:`i` is set to :math:`c_i`, with the margin against
    the class :math:`o_s` that has the largest wrong logit before the ablation.

    Args:
        features: ``(S, N)``, inputs of the head.
        weight: ``(C, N)``, weight of the head; ``(1, N)`` is read as the two rows ``(0, w)``.
        y: ``(S,)`` class indices.
        logits: ``(S, C)``, to find the largest wrong logit; needed with three classes or more unless ``other`` is
            given.
        other: ``(S,)`` the wrong class o.
        centre: the value c: ``"mean"`` over the examples, ``"zero"``, or a tensor ``(N,)``.

    Returns:
        ``(S, N)`` in logits, positive = the unit helps the example.

    Raises:
        ValueError: shapes do not fit, or the wrong class is not known.

    Example:
        >>> features, y = torch.tensor([[1.0, 2.0], [1.0, -2.0]]), torch.tensor([0, 0])
        >>> weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        >>> linear_impact(features, weight, y, centre="zero")  # unit 1 fails the second example
        tensor([[ 1.,  2.],
                [ 1., -2.]])
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
            raise ValueError("With three classes or more give `logits` or `other`, to find the largest wrong logit.")
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
    """Score units before the head: minus their mean impact on the atypical examples, averaged over the classes.

    Args:
        features: ``(S, N)``, inputs of the head for held-out examples.
        weight: ``(C, N)``, weight of the head.
        y: ``(S,)`` class indices.
        atypical: bool ``(S,)``, e.g. from :func:`~demem.tracing.choose_atypical`.
        logits, other, centre: see :func:`linear_impact`; the mean is over all examples, not only the atypical ones.

    Returns:
        ``(N,)`` in logits, high = ablating the unit helps the atypical examples.

    Raises:
        ValueError: as :func:`linear_impact`, or nothing is atypical.

    Example:
        >>> core, spurious = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, -1.0])
        >>> weight, y = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.zeros(4, dtype=torch.long)
        >>> atypical = torch.tensor([False, False, False, True])
        >>> linear_score(torch.stack([core, spurious], 1), weight, y, atypical, centre="zero")
        tensor([-2.,  2.])
    """
    if atypical.shape != y.shape or atypical.dtype != torch.bool:
        raise ValueError(f"`atypical` must be a boolean mask of shape {tuple(y.shape)}.")
    # Only the atypical rows: four arrays of the size of all features would be much.
    some = [None if values is None else values[atypical] for values in (logits, other)]
    centre = features.mean(0) if isinstance(centre, str) and centre == "mean" else centre
    impact = linear_impact(features[atypical], weight, y[atypical], logits=some[0], other=some[1], centre=centre)
    return -class_mean(impact, y[atypical], torch.ones_like(y[atypical], dtype=torch.bool))


def head_impact(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    ablate: Ablate = "mean",
    ranks: Ranks = ALONE,
) -> dict[str, Tensor]:
    """Compute :func:`linear_impact` of the units that the head of a model reads, in one pass.

    Args:
        model: any module; left as it was.
        sites: inputs of the linear layer that computes the logits, e.g. ``"fc:input"``.
        batches: examples.
        ablate: set the unit to its mean over the examples, or to zero.
        ranks: processes of a distributed run, for the mean.

    Returns:
        ``{site: (S, N)}`` in logits, positive = the unit helps the example.

    Raises:
        ValueError: a site is not the input of a linear layer with as many outputs as there are logits.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x, y = torch.randn(8, 4), torch.arange(8) % 2
        >>> impact = head_impact(model, find_sites(model, "2:input"), [Batch(x, y)], ablate="zero")["2:input"]
        >>> logits = model(x)  # the impacts add up to the margin, but for the bias
        >>> bias = model[2].bias[y] - model[2].bias[1 - y]
        >>> margin = logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0]
        >>> torch.allclose(impact.sum(1) + bias, margin, atol=1e-5)
        True
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
