"""Draw the groups of a run's training examples equally often."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from demem.groups import Groups
from demem.linear import balanced_weights
from demem.removal import SMOOTHING
from demem.run.cure import changed_data
from demem.run.data import RunData
from demem.run.loaders import size_of
from demem.run.sampling import reweight
from demem.run.stage import restart_workers


def rebalance(
    data: RunData, groups: Groups, positions: Tensor, seed: int, first: bool = False, even: bool = False
) -> Callable[[], None] | None:
    """Draw training examples with weights under which all groups count the same, from the next epoch's iterator on.

    Args:
        data: of the run.
        groups: of its training examples.
        positions: ``(S,)`` of these in their data set, ascending; all others keep an average weight.
        seed: of the draw, together with the epoch.
        even: draw all alike, but for those that are kept back.
        first: no epoch of this fit has begun, so the iterator of the epoch may be there already.

    Returns:
        a function that puts the loader's own sampler back; ``None`` with a warning, and nothing changed, if the data
        set is iterable, or the loader has a sampler of the user's own or does not shuffle.

    Raises:
        ValueError: the data set is shorter than the positions say.
    """
    split = data.train
    if not split.has_positions:
        warnings.warn(
            "MemorizationRemover cannot rebalance an iterable data set; rebalance=False silences this.", stacklevel=4
        )
        return None
    if size_of(split.loader) <= int(positions[-1]):
        raise changed_data()
    key = torch.zeros_like(groups.index) if even else groups.index
    weights = balanced_weights(key, SMOOTHING)
    undo = reweight(split.loader, positions, weights, data.trainer, seed, data.kept_back)
    if undo is None:
        warnings.warn(
            "MemorizationRemover does not rebalance: the training DataLoader has a sampler of its own or does not "
            "shuffle. Use shuffle=True, or rebalance=False to silence this.",
            stacklevel=4,
        )
    elif first and split.loader.num_workers > 0:
        restart_workers(data.trainer)
    return undo
