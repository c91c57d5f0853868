"""The functions of :mod:`demem.metrics` as torchmetrics, which sum the counts over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from demem.metrics.functional import (
    adjusted_average_accuracy_compute,
    average_accuracy_compute,
    group_accuracy_compute,
    group_accuracy_update,
    worst_group_accuracy_compute,
)


class GroupAccuracy(Metric):
    """Accuracy of each group ``(G,)``, NaN for groups without examples.

    Processes sum their counts and divide once, because a mean of per-process accuracies would weight groups wrongly.

    Args:
        num_groups: number of groups G.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``num_groups`` is below 1; on update, see :func:`~demem.metrics.group_accuracy_update`.

    Example:
        >>> metric = GroupAccuracy(num_groups=2)
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0, 1]))
        >>> metric.update(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor([1.0000, 0.5000])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    correct: Tensor
    total: Tensor

    def __init__(self, num_groups: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}.")
        self.num_groups = num_groups
        self.add_state("correct", torch.zeros(num_groups, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_groups, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, group: Tensor) -> None:
        """Count a batch: ``preds`` ``(B, C)`` or ``(B,)``, ``target`` and ``group`` ``(B,)``."""
        correct, total = group_accuracy_update(preds, target, group, self.num_groups)
        self.correct += correct
        self.total += total

    def compute(self) -> Tensor:
        """Compute the metric over all batches since the last reset, and over all processes."""
        return group_accuracy_compute(self.correct, self.total)


class WorstGroupAccuracy(GroupAccuracy):
    """Accuracy of the worst group that has examples (a scalar); see :class:`GroupAccuracy`.

    Example:
        >>> metric = WorstGroupAccuracy(num_groups=3)  # no example of group 2
        >>> metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(0.5000)
    """

    def compute(self) -> Tensor:
        return worst_group_accuracy_compute(self.correct, self.total)


class AverageAccuracy(GroupAccuracy):
    """Accuracy over all examples (a scalar), from the same counts as :class:`GroupAccuracy`."""

    def compute(self) -> Tensor:
        return average_accuracy_compute(self.correct, self.total)


class AdjustedAverageAccuracy(GroupAccuracy):
    """Mean of the groups' accuracies weighted by ``weights``, usually the groups' training sizes (a scalar).

    See :func:`~demem.metrics.adjusted_average_accuracy_compute` (Sagawa et al. 2020).
    """

    weights: Tensor

    def __init__(self, weights: Sequence[float] | Tensor, **kwargs: Any) -> None:
        super().__init__(num_groups=len(weights), **kwargs)
        self.register_buffer("weights", torch.as_tensor(weights, dtype=torch.float), persistent=False)

    def compute(self) -> Tensor:
        return adjusted_average_accuracy_compute(self.correct, self.total, self.weights)
