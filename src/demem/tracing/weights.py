"""Assign weights to units, and rank single weights (the unstructured form of You et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from demem.sites import Site, own_weight


def unit_of_weight(site: Site) -> Tensor:
    """Return the index of the unit that every element of a site's weight belongs to.

    On the output side these are the filter, row or scale that computes the unit, on the input side the columns that
    read it.

    Returns:
        int64, expanded to the shape of ``site.module.weight``.

    Raises:
        ValueError: as :func:`demem.sites.own_weight`.

    Example:
        >>> from demem.sites import find_sites
        >>> output, inputs = find_sites(nn.Sequential(nn.Linear(3, 2)), ["0", "0:input"])
        >>> unit_of_weight(output).tolist(), unit_of_weight(inputs).tolist()
        ([[0, 0, 0], [1, 1, 1]], [[0, 1, 2], [0, 1, 2]])
    """
    weight = own_weight(site)
    channels = _channel_of_weight(site.module, weight, site.side)
    return (channels // site.channels_per_unit).expand(weight.shape)


def _channel_of_weight(module: nn.Module, weight: Tensor, side: str) -> Tensor:
    """Return the channel of every element of the weight, broadcastable to its shape.

    A convolution's weight is (C_out, C_in / groups, *kernel), a transposed one's (C_in, C_out / groups, *kernel).  The
    first axis runs over all channels of its side.  The second runs over those of one group of the other side: element
    (i, j) belongs to channel g · second + j with g = i // (first / groups) the group of i.
    """

    def steps(n: int) -> Tensor:
        return torch.arange(n, device=weight.device)

    tail = [1] * (weight.ndim - 2)
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = module.groups
        first, second = weight.shape[:2]
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
    """Compute the Euclidean norm ``(N,)`` over each unit's elements of a tensor shaped like the site's weight.

    Example:
        >>> from demem.sites import find_sites
        >>> site = find_sites(nn.Sequential(nn.Linear(2, 2)), "0")[0]
        >>> unit_norms(site, torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])
    """
    units = unit_of_weight(site)
    squares = values.detach().float().square()
    total = squares.new_zeros(site.require_num_units())
    return total.index_add_(0, units.reshape(-1), squares.reshape(-1)).sqrt()


def prunable_weights(model: nn.Module, head: nn.Module | None = None) -> dict[str, nn.Parameter]:
    """Return the weights of all convolutions and linear layers except ``head``, by parameter name.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
        >>> list(prunable_weights(model, head=model[2]))
        ['0.weight']
    """
    chosen = {}
    for name, module in model.named_modules():
        kind = isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        if kind and module is not head and isinstance(module.weight, nn.Parameter):
            chosen[f"{name}.weight"] = module.weight
    return chosen


def top_weights(
    scores: Mapping[str, Tensor], fraction: float, which: Literal["largest", "smallest"] = "largest"
) -> dict[str, Tensor]:
    """Select the fraction of all single weights with the largest or smallest score, over all tensors together.

    Args:
        scores: ``{parameter name: score}``, e.g. absolute weights or absolute gradients.
        fraction: fraction of the weights in (0, 1]; at least one weight.
        which: ``"largest"`` or ``"smallest"`` scores.

    Returns:
        ``{parameter name: bool mask}`` with exactly ``max(1, round(fraction · total))`` entries set; ties break by
        position.

    Raises:
        ValueError: no scores, or ``fraction`` is out of range.

    Example:
        >>> top_weights({"a": torch.tensor([[0.1, 0.9]]), "b": torch.tensor([0.5, 0.2])}, fraction=0.5)
        {'a': tensor([[False,  True]]), 'b': tensor([ True, False])}
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
