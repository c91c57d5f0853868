"""Refit a classification head on fixed features: logistic regression by L-BFGS on standardised features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_head(
    z: Tensor, y: Tensor, weights: Tensor | None = None, l2: float = 0.1, num_classes: int = 2
) -> tuple[Tensor, Tensor]:
    """Minimise the weighted mean cross-entropy + l2/2·‖W‖² on standardised features.

    Args:
        z: features ``(S, N)``.
        y: classes ``(S,)``.
        weights: of the examples ``(S,)``; scaled to sum to 1.
        l2: on the weights of standardised features, not on the bias.
        num_classes: rows of the head.

    Returns:
        weight ``(C, N)`` and bias ``(C,)`` for the features as they are.
    """
    mean, std = z.mean(0), z.std(0).clamp_min(1e-6)
    x = (z - mean) / std
    share = torch.ones(len(y)) if weights is None else weights.float()
    share = share / share.sum()
    head = torch.zeros(num_classes, z.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [head], max_iter=100, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ head[:, :-1].T + head[:, -1]
        loss = (F.cross_entropy(logits, y, reduction="none") * share).sum() + l2 / 2 * head[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = head.detach()[:, :-1] / std
    return weight, head.detach()[:, -1] - weight @ mean


def balanced(key: Tensor) -> Tensor:
    """Weights that make every class (or group) count the same: 1 / its frequency."""
    return 1.0 / torch.bincount(key).clamp(min=1).float()[key]


def halves(key: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Positions of two random halves, each class (or group) split evenly."""
    order = torch.randperm(len(key), generator=torch.Generator().manual_seed(seed))
    order = order[key[order].argsort(stable=True)]
    return order[::2], order[1::2]


def worst_accuracy(predicted: Tensor, y: Tensor, key: Tensor) -> float:
    """The lowest accuracy over the values of ``key``: classes (tier T0) or groups."""
    right = predicted == y
    return min(float(right[key == k].float().mean()) for k in key.unique())
