"""Score units by their weights and by the gradients of their weights (You et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from demem.batch import Batch, apply_model
from demem.sites import Site, own_weight
from demem.tracing.capture import ALONE, Ranks, evaluating, predict, select_rows
from demem.tracing.weights import unit_norms


def magnitude_score(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch] | None = None, **_: object
) -> dict[str, Tensor]:
    """Score units by the norm of their weights, ``‖W[c]‖₂``; no data is read.

    Args:
        model: not used; like ``batches`` it is part of the signature that all scores have.
        sites: convolution, linear or norm layers.
        batches: not used.

    Returns:
        ``{site: (N,)}``.

    Raises:
        ValueError: as :func:`demem.sites.own_weight`.

    Source: You et al. 2025, tracing by magnitude.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model[0].weight.data = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> magnitude_score(model, find_sites(model, "0"))
        {'0': tensor([5., 1.])}
    """
    return {site.name: unit_norms(site, own_weight(site)) for site in sites}


def gradient_score(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    atypical: Tensor | None = None,
    worst: int | None = 200,
    ranks: Ranks = ALONE,
    **_: object,
) -> dict[str, Tensor]:
    """Score units by the norm of their weights' gradient, ``‖∂L/∂W[c]‖₂``, on the worst-fitted atypical examples.

    Args:
        model: any module; left as it was, including stored ``.grad``.
        sites: convolution, linear or norm layers.
        batches: examples; read twice.
        atypical: bool ``(S,)``; all examples if ``None``.  To score one group g, pass ``group == g``.
        worst: use only this many examples, those with the lowest probability of the label (the paper's 200); all if
            ``None``.
        ranks: processes of a distributed run.

    Returns:
        ``{site: (N,)}`` with L the mean cross-entropy of the chosen examples.

    Raises:
        ValueError: nothing is atypical, or as :func:`demem.sites.own_weight`.

    Source: You et al. 2025, tracing by gradient.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> model[0].weight.data.zero_(), model[0].bias.data.zero_()  # so that ∂L/∂W = (½, −½) xᵀ
        (...)
        >>> batch = Batch(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> gradient_score(model, find_sites(model, "0:input"), [batch], atypical=torch.tensor([False, True]))
        {'0:input': tensor([0.0000, 0.7071])}
    """
    batches = batches if isinstance(batches, Sequence) else list(batches)
    logits, y, _group = predict(model, batches)
    chosen = torch.ones_like(y, dtype=torch.bool) if atypical is None else atypical.to(y.device)
    if worst is not None:
        probability = logits.softmax(1).gather(1, y[:, None])[:, 0].masked_fill(~chosen, torch.inf)
        everywhere = ranks.gather(probability)
        among_them = torch.zeros_like(everywhere, dtype=torch.bool)
        among_them[torch.argsort(everywhere, stable=True)[:worst]] = True  # exactly so many, also among equal ones
        chosen = chosen & among_them[ranks.gather(torch.full_like(y, ranks.rank)) == ranks.rank].to(y.device)
    number = ranks.total(chosen.sum())
    if not int(number):
        raise ValueError("No atypical example was given.")
    parameters = [own_weight(site) for site in sites]
    unique = list({id(p): p for p in parameters}.values())
    total = {id(p): torch.zeros_like(p, dtype=torch.float) for p in unique}
    with evaluating(model), torch.enable_grad():
        for p in unique:
            p.requires_grad_(True)
        start = 0
        for batch in batches:
            here = chosen[start : start + len(batch.y)]
            start += len(batch.y)
            if not bool(here.any()):
                continue
            batch = select_rows(batch, here)
            loss = F.cross_entropy(apply_model(model, batch.x).float(), batch.y, reduction="sum")
            for p, gradient in zip(unique, torch.autograd.grad(loss, unique, allow_unused=True), strict=True):
                if gradient is not None:
                    total[id(p)] += gradient.float()
    total = {key: ranks.total(value) / number for key, value in total.items()}
    return {site.name: unit_norms(site, total[id(p)]) for site, p in zip(sites, parameters, strict=True)}
