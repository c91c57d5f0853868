"""Scores from weights alone and from their gradients (You et al. 2025, tracing by magnitude and by gradient)."""

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
    """Norm of the weights of each unit, ``‖W[c]‖₂``; no data is read.

    Returns:
        ``{site: (N,)}``.

    Raises:
        ValueError: a site has no weights of its own.
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
    """Norm of the gradient of each unit's weights, ``‖∂L/∂W[c]‖₂``, on the worst-fitted of the atypical examples.

    Args:
        model: any module; left as it was, stored ``.grad`` included.
        sites: convolution, linear or norm layers.
        batches: examples that can be gone through twice.
        atypical: bool ``(S,)``; all examples if ``None``.  To score one group g, pass ``group == g``.
        worst: keep only this many with the lowest correct-class probability (the paper's 200); ``None`` keeps all.
        ranks: of a distributed run.

    Returns:
        ``{site: (N,)}``; L is the mean cross-entropy of the chosen examples.

    Raises:
        ValueError: nothing is atypical; a site has no weights of its own.
    """
    batches = batches if isinstance(batches, Sequence) else list(batches)
    logits, y, _group = predict(model, batches)
    chosen = torch.ones_like(y, dtype=torch.bool) if atypical is None else atypical.to(y.device)
    if worst is not None:
        probability = logits.softmax(1).gather(1, y[:, None])[:, 0].masked_fill(~chosen, torch.inf)
        everywhere = ranks.gather(probability)
        among_them = torch.zeros_like(everywhere, dtype=torch.bool)
        among_them[torch.argsort(everywhere, stable=True)[:worst]] = True  # no more than that, also of equal ones
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
