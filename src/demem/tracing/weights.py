"""Which weights belong to which unit; single weights as units (the unstructured form of You et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from demem.sites import Site, own_weight


def unit_of_weight(site: Site) -> Tensor:
    """For every element of the site's weight the index of the unit it belongs to.

    Output side: the filter, row or scale that makes the unit.  Input side: the columns that read it.

    Returns:
        int64, expanded to the shape of ``site.module.weight``.

    Raises:
        ValueError: as :func:`demem.sites.own_weight`.
    """
    weight = own_weight(site)
    channels = _channel_of_weight(site.module, weight, site.side)
    return (channels // site.channels_per_unit).expand(weight.shape)


def _channel_of_weight(module: nn.Module, weight: Tensor, side: str) -> Tensor:
    def steps(n: int) -> Tensor:
        return torch.arange(n, device=weight.device)

    tail = [1] * (weight.ndim - 2)
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = module.groups
        first, second = weight.shape[:2]
        # The first axis runs over the groups; the second within one group.
        across = steps(first).view(-1, 1, *tail)
        within = steps(second).view(1, -1, *tail) + across // (first // groups) * second
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        return across if transposed == (side == "input") else within
    if isinstance(module, nn.Linear):
        return steps(weight.shape[0])[:, None] if side == "output" else steps(weight.shape[1])
    if weight.ndim == 1:
        return steps(weight.shape[0])
    return steps(weight.shape[-1])  # layer norm, embedding: the last axis holds the features


def unit_norms(site: Site, values: Tensor) -> Tensor:
    """Euclidean norm, ``(N,)``, over each unit's elements of a tensor shaped like the site's weight."""
    units = unit_of_weight(site)
    squares = values.detach().float().square()
    total = squares.new_zeros(site.require_num_units())
    return total.index_add_(0, units.reshape(-1), squares.reshape(-1)).sqrt()


def prunable_weights(model: nn.Module, head: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Weights of all convolutions and linear layers except ``head``, by parameter name (norms and biases stay)."""
    chosen = {}
    for name, module in model.named_modules():
        kind = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        if kind and module is not head and isinstance(module.weight, nn.Parameter):
            chosen[f"{name}.weight"] = module.weight
    return chosen


def top_weights(
    scores: Mapping[str, Tensor], fraction: float, which: Literal["largest", "smallest"] = "largest"
) -> dict[str, Tensor]:
    """Mask of the fraction of all single weights with the largest or smallest score, over all tensors together.

    Args:
        scores: ``{parameter name: score}``, e.g. absolute weights or absolute gradients.
        fraction: in (0, 1]; at least one weight.
        which: end of the ranking.

    Returns:
        ``{parameter name: bool mask}`` with exactly ``max(1, round(fraction · total))`` entries set; ties break by
        position.

    Raises:
        ValueError: no scores, or ``fraction`` is out of range.
    """
    if not scores or not 0 < fraction <= 1:
        raise ValueError(f"Give at least one tensor of scores and a fraction in (0, 1], got {fraction}.")
    flat = torch.cat([s.detach().float().reshape(-1) for s in scores.values()])
    count = max(1, round(fraction * flat.numel()))
    order = torch.sort(flat, descending=which == "largest", stable=True).indices
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[order[:count]] = True
    sizes: Sequence[int] = [s.numel() for s in scores.values()]
    parts = torch.split(mask, list(sizes))
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}
