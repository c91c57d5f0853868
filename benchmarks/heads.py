"""Refit a classification head on fixed features, and the splits that go with it."""

from __future__ import annotations

import torch
from torch import Tensor

from demem.linear import LinearHead, fit_linear


def fit_head(z: Tensor, y: Tensor, weights: Tensor | None = None, l2: float = 0.1, num_classes: int = 2) -> LinearHead:
    """:func:`demem.linear.fit_linear` with the penalty l2/2·‖W‖² whatever the width, as the baselines state it."""
    return fit_linear(z, y, weights, l2 / z.shape[1], num_classes)


def halves(key: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of two random halves, each class (or group) split evenly."""
    order = torch.randperm(len(key), generator=torch.Generator().manual_seed(seed))
    order = order[key[order].argsort(stable=True)]
    return order[::2], order[1::2]
