"""The functions of :mod:`demem.metrics` as torchmetrics, which sum the counts over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

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
        num_groups: number of groups G; ``None`` lets the counts grow with the groups that come, also where processes
            see different ones.
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

    correct: Tensor
    total: Tensor

    def __init__(self, num_groups: int | None = None, **kwargs: Any) -> None:
        if num_groups is None:
            kwargs.setdefault("dist_sync_fn", _gather_padded)
        super().__init__(**kwargs)
        if num_groups is not None and num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}.")
        self.num_groups = num_groups
        self.add_state("correct", torch.zeros(num_groups or 0, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_groups or 0, dtype=torch.long), dist_reduce_fx="sum")

    @property
    def full_state_update(self) -> bool:  # type: ignore[override]
        """Counts of different lengths cannot be merged by a plain sum, which ``forward`` would do."""
        return self.num_groups is None

    def update(self, preds: Tensor, target: Tensor, group: Tensor) -> None:
        """Count a batch: ``preds`` ``(B, C)`` or ``(B,)``, ``target`` and ``group`` ``(B,)``."""
        correct, total = group_accuracy_update(preds, target, group, self.num_groups)
        self.correct, self.total = _add(self.correct, correct), _add(self.total, total)

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


class GroupSizes(GroupAccuracy):
    """Number of examples of each group ``(G,)``, int64, from the same counts as :class:`GroupAccuracy`.

    Example:
        >>> metric = GroupSizes()
        >>> metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 2, 2]))
        >>> metric.compute()
        tensor([1, 0, 2])
    """

    def compute(self) -> Tensor:
        return self.total


class AdjustedAverageAccuracy(GroupAccuracy):
    """Mean of the groups' accuracies weighted by ``weights``, usually the groups' training sizes (a scalar).

    See :func:`~demem.metrics.adjusted_average_accuracy_compute` (Sagawa et al. 2020).  NaN where no group with examples
    has a positive weight.

    Args:
        weights: ``(G,)``; ``None`` if they are not known yet: the counts grow with the groups that come, and the
            attribute ``weights`` can be set at any time before :meth:`compute`.
        kwargs: passed on to :class:`torchmetrics.Metric`.
    """

    weights: Tensor

    def __init__(self, weights: Sequence[float] | Tensor | None = None, **kwargs: Any) -> None:
        if weights is None:
            kwargs.setdefault("compute_with_cache", False)  # a value is out of date once the weights are there
        super().__init__(num_groups=None if weights is None else len(weights), **kwargs)
        known = torch.as_tensor(() if weights is None else weights, dtype=torch.float)
        self.register_buffer("weights", known, persistent=False)

    def compute(self) -> Tensor:
        weights = self.weights.to(self.total.device)
        size = max(len(self.total), len(weights))
        correct, total, weights = (pad(v, (0, size - len(v))) for v in (self.correct, self.total, weights))
        if not bool(((weights > 0) & (total > 0)).any()):
            return weights.new_tensor(torch.nan, dtype=torch.float)
        return adjusted_average_accuracy_compute(correct, total, weights)


def _add(a: Tensor, b: Tensor) -> Tensor:
    size = max(len(a), len(b))
    return pad(a, (0, size - len(a))) + pad(b, (0, size - len(b)))


def _gather_padded(counts: Tensor, group: Any = None) -> list[Tensor]:
    """Gather the counts of all processes, which may have seen different groups, in one length."""
    parts = gather_all_tensors(counts, group)
    size = max(map(len, parts))
    return [pad(part, (0, size - len(part))) for part in parts]
