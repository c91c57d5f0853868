"""Everything that a report on one stage says about accuracy, from two pairs of counts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from demem.metrics.group_accuracy import (
    AdjustedAverageAccuracy,
    AverageAccuracy,
    GroupAccuracy,
    GroupSizes,
    WorstGroupAccuracy,
)

_TOO_MANY = 100
"""From so many examples on, something that takes more than half as many values is an index and not a group."""


class AccuracyReport(nn.Module):
    """Accuracies by group and by class; groups are numbered as they come and may be missing.

    The values, all fractions: ``worst_group_acc``, ``adjusted_avg_acc`` (needs ``weights``), ``group_acc/{g}``, and
    without any groups ``avg_acc`` and ``worst_class_acc``.  The metrics of each kind share their counts, which are
    summed over processes before they are divided.

    Example:
        >>> report = AccuracyReport()
        >>> report.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), torch.tensor([0, 3, 1]))
        >>> values = report.compute(weights=torch.tensor([90, 5, 5, 100]))
        >>> {name: round(float(value), 2) for name, value in sorted(values.items())}  # doctest: +NORMALIZE_WHITESPACE
        {'adjusted_avg_acc': 0.97, 'avg_acc': 0.67, 'group_acc/0': 1.0, 'group_acc/1': 0.0, 'group_acc/3': 1.0,
         'worst_class_acc': 0.5, 'worst_group_acc': 0.0}
    """

    def __init__(self) -> None:
        super().__init__()
        # Where one process kept a value and another one sums anew, that one would wait for ever: nobody keeps values.
        options: dict[str, Any] = {"compute_with_cache": False}
        by_group: dict[str, Metric | MetricCollection] = {
            "worst_group_acc": WorstGroupAccuracy(**options),
            "adjusted_avg_acc": AdjustedAverageAccuracy(**options),
            "group_acc": GroupAccuracy(**options),
            "group_size": GroupSizes(**options),
        }
        by_class: dict[str, Metric | MetricCollection] = {
            "worst_class_acc": WorstGroupAccuracy(**options),
            "avg_acc": AverageAccuracy(**options),
        }
        by_group["worst_group_acc"].persistent(True)  # the first of those that share their counts
        by_class["worst_class_acc"].persistent(True)
        self.by_group = MetricCollection(by_group, compute_groups=[list(by_group)])
        self.by_class = MetricCollection(by_class, compute_groups=[list(by_class)])

    def update(self, preds: Tensor, target: Tensor, group: Tensor | None = None) -> None:
        """Count a batch: ``preds`` ``(B, C)`` or ``(B,)``, ``target`` and, if there are groups, ``group`` ``(B,)``."""
        self.by_class.update(preds, target, target)
        if group is not None:
            self.by_group.update(preds, target, group)

    def compute(self, weights: Tensor | None = None) -> dict[str, Tensor]:
        """The values over all batches since the last reset and over all processes; empty without examples.

        Args:
            weights: of the groups in ``adjusted_avg_acc``, usually their training sizes; groups beyond its end have
                none.

        Returns:
            A scalar for each name.  Without groups there are no values by group; where a single group is all there is,
            in ``weights`` too, it is not listed by itself.

        Raises:
            ValueError: there are more than half as many groups as examples.
        """
        weights = torch.zeros(0) if weights is None else weights.cpu()
        self.by_group["adjusted_avg_acc"].weights = weights
        with without_update_warning():
            values: dict[str, Tensor] = {**self.by_group.compute(), **self.by_class.compute()}
        sizes, accuracy = (values.pop(name).flatten() for name in ("group_size", "group_acc"))  # 0-d of one group
        require_groups(sizes)
        present = sizes.nonzero().flatten().tolist()
        values = {name: value for name, value in values.items() if not bool(value.isnan())}
        if len({*present, *weights.nonzero().flatten().tolist()}) > 1:
            values.update({f"group_acc/{g}": accuracy[g] for g in present})
        return values

    @property
    def group_sizes(self) -> Tensor:
        """Examples of each group ``(G,)`` that this process has counted."""
        return self.by_group["group_size"].total  # type: ignore[return-value]

    def reset(self) -> None:
        """Forget all counts."""
        self.by_group.reset()
        self.by_class.reset()

    def sum_over(self, processes: Any) -> None:
        """Sum over the processes of this ``torch.distributed`` group from now on; ``None`` for all."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.process_group = processes


@contextmanager
def without_update_warning() -> Iterator[None]:
    """Compute metrics that have seen no batch without torchmetrics' warning: one of several processes may have none.

    Example:
        >>> with without_update_warning():
        ...     GroupSizes().compute()
        tensor([], dtype=torch.int64)
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was called before the ``update`` method")
        yield


def require_groups(sizes: Tensor) -> None:
    """Refuse what cannot be groups.

    Args:
        sizes: examples of each group ``(G,)``.

    Raises:
        ValueError: there are at least 100 examples, and more than half as many groups.

    Example:
        >>> require_groups(torch.tensor([3498, 184, 56, 1057]))
        >>> require_groups(torch.ones(4795))
        Traceback (most recent call last):
        ValueError: 4795 examples have 4795 groups, so the third part of the batches is an index ...
    """
    examples = int(sizes.sum())
    groups = int((sizes > 0).sum())
    if examples >= _TOO_MANY and groups > examples / 2:
        raise ValueError(
            f"{examples} examples have {groups} groups, so the third part of the batches is an index or an identifier "
            "rather than a group. Yield (x, y) or (x, y, group), or define `unpack_batch(self, batch)` on your module "
            "and return (x, y, None)."
        )
