"""How many training examples each group has, seen from inside a Trainer."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import SumMetric

from demem.batch import unpack_batch
from demem.metrics import GroupSizes, require_groups, without_update_warning
from demem.run.loaders import draws_evenly, find_grouper, first_loader, has_positions
from demem.run.passes import examples, isolated_rng


class TrainingSizes:
    """Count the training examples of each group.

    They are the data module's ``train_group_counts`` if it has them.  Else they are counted over the first training
    epoch that runs from its first batch on; or, at once, in one pass over the training set, where a sampler may draw
    some examples more often than others, or the run was resumed in the middle of an epoch.

    Attributes:
        known: examples of each group ``(G,)`` int64, the same on every process; empty where they cannot be had, because
            a training batch has no groups or cannot be read; ``None`` as long as they are not counted.
    """

    def __init__(self) -> None:
        self.known: Tensor | None = None
        self._counts = GroupSizes(compute_with_cache=False)
        self._unread = SumMetric(compute_with_cache=False)
        self._from_the_start = False

    def ask(self, trainer: pl.Trainer) -> None:
        """Take the sizes from the data module, if it knows them."""
        counts = getattr(getattr(trainer, "datamodule", None), "train_group_counts", None)
        if counts is not None:
            self.known = torch.as_tensor(counts).long().cpu()

    def start_epoch(self) -> None:
        """Note that a training epoch starts with its first batch."""
        self._from_the_start = True

    def see(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Count a training batch, if that is needed."""
        if self.known is not None:
            return
        loader = first_loader(trainer.train_dataloader)
        try:
            group = unpack_batch(batch, pl_module, find_grouper(trainer, loader)).group
        except (TypeError, ValueError):
            group = None
        if group is not None and self._needs_a_pass(loader):
            self._count_data_set(trainer, pl_module, loader)
        elif self._from_the_start:
            self._count(group)

    def end_epoch(self, trainer: pl.Trainer) -> None:
        """Sum what a whole training epoch counted; every process must call this."""
        if self.known is None and self._from_the_start:
            self.known = self._sum(trainer)
        self._from_the_start = False

    def so_far(self, trainer: pl.Trainer, processes: Any = None) -> Tensor:
        """Return the sizes, or what was counted so far; each of these processes (default: all) must call this."""
        return self._sum(trainer, processes) if self.known is None else self.known

    def _needs_a_pass(self, loader: Any) -> bool:
        if not isinstance(loader, DataLoader) or not has_positions(loader):
            return False  # what it yields is all there is; it may be endless
        return not self._from_the_start or not draws_evenly(loader)

    def _count_data_set(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: DataLoader[Any]) -> None:
        try:
            with isolated_rng():
                for _, batch in examples(trainer, pl_module, loader):
                    self._count(batch.group)
        except (TypeError, ValueError):
            self._count(None)
        self.known = self._sum(trainer)

    def _count(self, group: Tensor | None) -> None:
        try:
            if group is not None:
                self._counts.to(group.device).update(group, group, group)  # only their numbers are of interest
        except ValueError:
            group = None
        self._unread.update(float(group is None))

    def _sum(self, trainer: pl.Trainer, processes: Any = None) -> Tensor:
        for metric in (self._counts, self._unread):
            metric.to(trainer.strategy.root_device)
            metric.process_group = processes
        with without_update_warning():
            sizes, unread = self._counts.compute().flatten().cpu(), float(self._unread.compute())
        with suppress(ValueError):
            require_groups(sizes)
            return sizes[:0] if unread else sizes
        return sizes[:0]
