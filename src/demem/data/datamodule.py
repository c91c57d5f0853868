"""A Lightning data module over grouped data sets."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, WeightedRandomSampler

from demem.data.arrays import GroupedDataset, Grouper, as_grouped, collate
from demem.metrics import MAX_GROUPS

HeldOut = Literal["val", "iid"]
Sampling = Literal["shuffle", "class_balanced", "group_balanced"]


class GroupedDataModule(pl.LightningDataModule):
    """Train, validation and test loaders that yield ``(x, y, group)``.

    Args:
        train_dataset: yields ``(x, y, group)``, or ``(x, y, metadata)`` together with ``grouper``.
        val_dataset: the same; may be missing with ``held_out="iid"``.
        test_dataset: the same, optional.
        train_eval_dataset: the training examples without augmentation, in the same order; what an ``iid`` validation
            slice is drawn from and what :meth:`train_eval_dataloader` reads.  Default: ``train_dataset``.
        grouper: turns metadata ``(N, M)`` into groups ``(N,)``; an object with ``metadata_to_group`` (wilds) will do.
        num_classes: default: one more than the largest label.
        num_groups: default: one more than the largest group.
        held_out: what the validation loader reads: ``"val"``, the validation set; or ``"iid"``, a random slice of the
            training set, drawn by ``seed``, that is then not trained on.
        held_out_share: size of that slice, a fraction of the training set.
        sampling: ``"shuffle"``; or draw with replacement so that classes, or groups (this uses training group labels),
            are equally frequent.
        batch_size: examples per batch, for training; evaluation uses at least 256.
        num_workers: of the loaders.
        seed: of the ``iid`` slice (and, in subclasses, of how the data set is made).

    Attributes:
        num_classes, num_groups: known after ``setup``.
        train_group_counts: training examples per group ``(num_groups,)``, the ``iid`` slice left out.
        example_weights: set to a tensor ``(len(train_dataset),)`` to draw training examples with replacement in
            proportion to it; overrides ``sampling``.
    """

    def __init__(
        self,
        train_dataset: Any = None,
        val_dataset: Any = None,
        test_dataset: Any = None,
        *,
        train_eval_dataset: Any = None,
        grouper: Any = None,
        num_classes: int | None = None,
        num_groups: int | None = None,
        held_out: HeldOut = "val",
        held_out_share: float = 0.2,
        sampling: Sampling = "shuffle",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if held_out not in ("val", "iid"):
            raise ValueError(f"held_out must be 'val' or 'iid', got {held_out!r}.")
        if sampling not in ("shuffle", "class_balanced", "group_balanced"):
            raise ValueError(f"sampling must be 'shuffle', 'class_balanced' or 'group_balanced', got {sampling!r}.")
        if not 0 < held_out_share < 1:
            raise ValueError(f"held_out_share must lie between 0 and 1, got {held_out_share}.")
        self._given = (train_dataset, val_dataset, test_dataset, train_eval_dataset)
        self._num_classes = num_classes
        self._num_groups = num_groups
        self.grouper = grouper
        self.held_out = held_out
        self.held_out_share = held_out_share
        self.sampling = sampling
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.example_weights: Tensor | None = None
        self.train_dataset: GroupedDataset | None = None
        self.train_eval_dataset: GroupedDataset | None = None
        self.val_dataset: GroupedDataset | None = None
        self.test_dataset: GroupedDataset | None = None

    def build(self) -> tuple[Any, Any, Any, Any]:
        """Train, validation, test and plain-view training data sets; subclasses make them here.

        A data set that does not exist is ``None``.
        """
        return self._given

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets once; whatever the stage, the result is the same on every process.

        Raises:
            ValueError: there is no training set, or no validation set with ``held_out="val"``, or no groups.
        """
        if self.train_dataset is not None:
            return
        train, val, test, plain = (None if d is None else as_grouped(d, self._grouper()) for d in self.build())
        if train is None:
            raise ValueError("GroupedDataModule needs a training data set.")
        plain = train if plain is None else plain
        if len(plain) != len(train) or not torch.equal(plain.y, train.y):
            raise ValueError("train_eval_dataset must hold the training examples in the same order.")
        self._count(train, val, test)
        if self.held_out == "iid":
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))
            size = max(1, round(self.held_out_share * len(train)))
            kept, held = order[size:].sort().values, order[:size].sort().values
            train, plain, val = train.select(kept), plain.select(kept), plain.select(held)
        if val is None:
            raise ValueError(
                "There is no validation data set. Pass val_dataset, or hold out a slice of the training set with "
                "held_out='iid'."
            )
        self.train_dataset, self.train_eval_dataset, self.val_dataset, self.test_dataset = train, plain, val, test

    @property
    def num_classes(self) -> int:
        self.setup()
        assert self._num_classes is not None  # set by setup
        return self._num_classes

    @property
    def num_groups(self) -> int:
        self.setup()
        assert self._num_groups is not None  # set by setup
        return self._num_groups

    @property
    def train_group_counts(self) -> Tensor:
        self.setup()
        assert self.train_dataset is not None  # set by setup
        return torch.bincount(self.train_dataset.group, minlength=self.num_groups)

    @property
    def train_class_counts(self) -> Tensor:
        """Training examples per class ``(num_classes,)``."""
        self.setup()
        assert self.train_dataset is not None  # set by setup
        return torch.bincount(self.train_dataset.y, minlength=self.num_classes)

    def train_dataloader(self) -> DataLoader[Any]:
        self.setup()
        assert self.train_dataset is not None  # set by setup
        weights = self._sampling_weights()
        if weights is None:
            return self._loader(self.train_dataset, self.batch_size, shuffle=True)
        if len(weights) != len(self.train_dataset):
            raise ValueError(
                f"example_weights has {len(weights)} entries for {len(self.train_dataset)} training examples."
            )
        sampler = WeightedRandomSampler(weights.tolist(), len(weights), replacement=True)
        return self._loader(self.train_dataset, self.batch_size, sampler=sampler)

    def train_eval_dataloader(self) -> DataLoader[Any]:
        """The training examples in order, without augmentation."""
        self.setup()
        return self._loader(self.train_eval_dataset, max(256, self.batch_size))

    def val_dataloader(self) -> DataLoader[Any]:
        self.setup()
        return self._loader(self.val_dataset, max(256, self.batch_size))

    def test_dataloader(self) -> DataLoader[Any]:
        self.setup()
        if self.test_dataset is None:
            raise ValueError("There is no test data set. Pass test_dataset.")
        return self._loader(self.test_dataset, max(256, self.batch_size))

    def _loader(self, dataset: Any, batch_size: int, **kwargs: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            persistent_workers=self.num_workers > 0,
            **kwargs,
        )

    def _grouper(self) -> Grouper | None:
        grouper: Grouper | None = getattr(self.grouper, "metadata_to_group", self.grouper)
        return grouper

    def _sampling_weights(self) -> Tensor | None:
        assert self.train_dataset is not None  # set by setup
        if self.example_weights is not None:
            return self.example_weights
        if self.sampling == "shuffle":
            return None
        key = self.train_dataset.y if self.sampling == "class_balanced" else self.train_dataset.group
        return 1.0 / torch.bincount(key).clamp(min=1).float()[key]

    def _count(self, *datasets: GroupedDataset | None) -> None:
        present = [d for d in datasets if d is not None and len(d)]
        classes = 1 + max(int(d.y.max()) for d in present)
        groups = 1 + max(int(d.group.max()) for d in present)
        if groups > MAX_GROUPS:
            raise ValueError(
                f"Groups go up to {groups - 1}, so they are identifiers. Number them 0, 1, 2 … "
                "(torch.unique(ids, return_inverse=True))."
            )
        self._num_classes = classes if self._num_classes is None else self._num_classes
        self._num_groups = groups if self._num_groups is None else self._num_groups
        if classes > self._num_classes or groups > self._num_groups:
            raise ValueError(
                f"Labels go up to {classes - 1} and groups up to {groups - 1}, but num_classes={self._num_classes} and "
                f"num_groups={self._num_groups}. Labels and groups count from 0."
            )
