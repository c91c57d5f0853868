"""Grouped data sets: examples are ``(x, y, group)``, and labels and groups are known without reading an input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

Grouper = Callable[[Tensor], Tensor]


class GroupedDataset(Dataset[tuple[Any, Tensor, Tensor]]):
    """A data set with its labels and groups at hand.

    Args:
        inputs: any data set; the first part of what it yields is the input.
        y: class of each example ``(N,)``.
        group: group of each example ``(N,)``, usually class × number of attributes + attribute.

    Raises:
        ValueError: the lengths differ, or a label or group is negative.
    """

    def __init__(self, inputs: Any, y: Tensor, group: Tensor) -> None:
        self.inputs = inputs
        self.y = _indices(y, "labels")
        self.group = _indices(group, "groups")
        if not len(inputs) == len(self.y) == len(self.group):
            raise ValueError(
                f"{len(inputs)} inputs, {len(self.y)} labels and {len(self.group)} groups: the numbers must agree."
            )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Any, Tensor, Tensor]:
        return self.inputs[index][0], self.y[index], self.group[index]

    def select(self, positions: Tensor) -> GroupedDataset:
        """The examples at these positions, in this order."""
        return GroupedDataset(Subset(self.inputs, positions.tolist()), self.y[positions], self.group[positions])


class GroupedTensors(GroupedDataset):
    """A grouped data set held in one tensor; a batch is one indexing operation when :func:`collate` puts it together.

    Args:
        x: inputs ``(N, ...)``; or a sequence of such tensors, views of the same examples, of which torch's random state
            one is drawn whenever the example is read.  Read as float32.
        y: class of each example read.
        group: group of each example read.
        positions: rows of ``x`` that are read; default all.
    """

    def __init__(self, x: Tensor | Sequence[Tensor], y: Tensor, group: Tensor, positions: Tensor | None = None) -> None:
        self.views = [x] if isinstance(x, Tensor) else list(x)
        self.positions = torch.arange(len(self.views[0])) if positions is None else positions
        super().__init__(self.positions, y, group)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        x, y, group = self.rows(torch.tensor([index]))
        return x[0], y[0], group[0]

    def __getitems__(self, positions: Sequence[int]) -> _Rows:
        return _Rows(self, torch.as_tensor(positions))

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The batch ``(x, y, group)`` of these positions."""
        rows = self.positions[positions]
        if len(self.views) == 1:
            x = self.views[0][rows].float()
        else:
            drawn = torch.randint(len(self.views), rows.shape)
            x = torch.empty(len(rows), *self.views[0].shape[1:])
            for v, view in enumerate(self.views):
                x[drawn == v] = view[rows[drawn == v]].float()
        return x, self.y[positions], self.group[positions]

    def select(self, positions: Tensor) -> GroupedTensors:
        """The examples at these positions, in this order; the tensors are shared."""
        return GroupedTensors(self.views, self.y[positions], self.group[positions], self.positions[positions])


class _Rows(Sequence[Any]):
    """Samples of a :class:`GroupedTensors`, read one by one (any collate function) or all at once (ours)."""

    def __init__(self, dataset: GroupedTensors, positions: Tensor) -> None:
        self.dataset = dataset
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[int(self.positions[index])]

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.dataset.rows(self.positions)


def collate(samples: Any) -> Any:
    """torch's default collate, with one indexing operation instead for :class:`GroupedTensors`."""
    return samples.batch() if isinstance(samples, _Rows) else default_collate(list(samples))


def as_grouped(dataset: Any, grouper: Grouper | None = None) -> GroupedDataset:
    """Give a data set its labels and groups.

    Known without reading an input: ours, wilds subsets, ``TensorDataset`` and ``Subset`` of these.  Anything else is
    read once from end to end.

    Args:
        dataset: yields ``(x, y, group)`` or ``(x, y, metadata)``.
        grouper: turns metadata ``(N, M)`` into groups ``(N,)``.

    Raises:
        ValueError: there are neither groups nor metadata with a grouper.
    """
    if isinstance(dataset, GroupedDataset):
        return dataset
    y, extra = _labels(dataset)
    if extra is None:
        raise ValueError(
            f"{type(dataset).__name__} yields no groups. Yield (x, y, group), or (x, y, metadata) and pass a grouper."
        )
    if extra.ndim == 2:
        if grouper is None:
            raise ValueError(
                f"{type(dataset).__name__} yields metadata of {extra.shape[1]} columns. Pass `grouper`, which turns "
                "metadata (N, M) into groups (N,), e.g. metadata_to_group of a wilds CombinatorialGrouper."
            )
        extra = grouper(extra)
    return GroupedDataset(dataset, y, extra)


def _labels(dataset: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(dataset, GroupedDataset):
        return dataset.y, dataset.group
    if isinstance(dataset, Subset) and not hasattr(dataset, "metadata_array"):
        y, extra = _labels(dataset.dataset)
        positions = torch.as_tensor(dataset.indices)
        return y[positions], None if extra is None else extra[positions]
    if hasattr(dataset, "y_array") and hasattr(dataset, "metadata_array"):
        return torch.as_tensor(dataset.y_array), torch.as_tensor(dataset.metadata_array)
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1], dataset.tensors[2] if len(dataset.tensors) > 2 else None
    samples = [dataset[i] for i in range(len(dataset))]
    if not samples or any(not isinstance(s, tuple | list) or len(s) < 2 for s in samples):
        raise ValueError(f"{type(dataset).__name__} must yield (x, y, group) and hold at least one example.")
    y = torch.stack([torch.as_tensor(s[1]) for s in samples])
    return y, torch.stack([torch.as_tensor(s[2]) for s in samples]) if len(samples[0]) > 2 else None


def _indices(values: Any, what: str) -> Tensor:
    found: Tensor = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    found = found.squeeze(-1) if found.ndim == 2 and found.shape[1] == 1 else found
    if found.ndim != 1:
        raise ValueError(f"{what} must have the shape (N,), got {tuple(found.shape)}.")
    if found.is_floating_point() and not bool((found == found.round()).all()):
        raise ValueError(
            f"{what} must be indices 0, 1, 2 …, got fractional numbers or NaN. Grouped data are for classification; "
            "bin the values of a regression, and drop examples without a label."
        )
    found = found.long()
    if found.numel() and int(found.min()) < 0:
        raise ValueError(f"{what} must be indices from 0 up, got {int(found.min())}.")
    return found
