"""Accuracy of the worst group, of every group, and averages over groups, during training, validation and testing."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from demem.batch import as_logits, form_of, unpack_batch
from demem.metrics import (
    adjusted_average_accuracy_compute,
    average_accuracy_compute,
    group_accuracy_compute,
    group_accuracy_update,
    worst_group_accuracy_compute,
)
from demem.run import draws_evenly, examples, find_grouper, first_loader, in_extra_pass, isolated_rng
from demem.sites import find_head


class WorstGroupMonitor(Callback):
    """Log accuracies by group, without running the model a second time.

    For each stage (``train``, ``val``, ``test``) logs ``{stage}/worst_group_acc``, ``{stage}/avg_acc``,
    ``{stage}/adjusted_avg_acc`` (groups weighted by their training sizes), ``{stage}/worst_class_acc`` (needs no group
    labels) and ``{stage}/group_acc/{group}``; all fractions, over all processes together.  Groups without examples are
    left out.  Of several validation or test loaders the first is read.

    Predictions are taken from the step itself: from ``"logits"`` or ``"preds"`` in what it returns, else from what
    ``self(x)`` returned, else from what the classification head returned (where ``head`` is named, the head's first).
    If ``self(x)`` runs more than once in a step, the last output with a row for each example counts.  A single output
    is a logit, positive for class 1; a probability is understood only as the sigmoid of a linear head.

    The training sizes are the data module's ``train_group_counts`` if it has them, else they are counted over the first
    training epoch, or in one pass over the training set where a sampler may draw some examples more often than others
    (without them, or where training batches cannot be read, ``adjusted_avg_acc`` is not logged).

    Args:
        train: also report the training batches as the network saw them: augmented, in training mode, while it changes.
        per_group: log each group's accuracy.
        head: qualified name of the classification head, should it not be found.

    Attributes:
        history: one dict for each report: ``stage``, ``epoch`` and the values logged.

    Raises:
        ValueError: a batch has no groups, a group or label is out of range, or ``preds`` are no classes or scores.
        RuntimeError: no predictions were seen in a step.
    """

    def __init__(self, train: bool = False, per_group: bool = True, head: str | None = None) -> None:
        super().__init__()
        self.train = train
        self.per_group = per_group
        self.head = head
        self.history: list[dict[str, float | int | str]] = []
        self._train_sizes: Tensor | None = None
        self._sizes_known = False
        self._counts: dict[str, Tensor] = {}
        self._seen: dict[str, list[Any]] = {"module": [], "head": []}
        self._handles: list[RemovableHandle] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(train=self.train, per_group=self.per_group, head=self.head)

    def state_dict(self) -> dict[str, Any]:
        return {"history": list(self.history), "train_sizes": self._train_sizes, "sizes_known": self._sizes_known}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])
        self._train_sizes = state_dict["train_sizes"]
        self._sizes_known = bool(state_dict["sizes_known"])

    # Training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        counts = getattr(getattr(trainer, "datamodule", None), "train_group_counts", None)
        if counts is not None:
            self._train_sizes, self._sizes_known = torch.as_tensor(counts).long().cpu(), True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.train:
            self._start("train", pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._forget()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._sizes_known:
            loader: Any = first_loader(trainer.train_dataloader)
            try:
                group = unpack_batch(batch, pl_module, find_grouper(trainer, loader)).group
            except (TypeError, ValueError):
                self._miss_sizes()
                group = None
            if group is not None and "sizes" not in self._counts and not draws_evenly(loader):
                self._count_data_set(trainer, pl_module, loader)
            elif group is not None:
                self._add("sizes", torch.bincount(group))
        skipped = pl_module.automatic_optimization and not outputs and not any(self._seen.values())
        if self.train and not skipped:  # training_step may return None before it calls the network
            self._count("train", trainer, pl_module, outputs, batch, trainer.train_dataloader)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.train:
            self._report("train", trainer, pl_module)
            self._stop()
        if "sizes" in self._counts:
            self._finish_sizes(trainer, pl_module)

    # Validation and test

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start("val", pl_module)

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._forget()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx == 0:
            self._count("val", trainer, pl_module, outputs, batch, trainer.val_dataloaders)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if "sizes" in self._counts:
            self._learn_sizes(trainer, pl_module)  # of what was seen so far; the whole epoch when it ends
        if not trainer.sanity_checking:
            self._report("val", trainer, pl_module)
        self._resume_training_hooks(pl_module, trainer)

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start("test", pl_module)
        counts = getattr(getattr(trainer, "datamodule", None), "train_group_counts", None)
        if counts is not None:
            self._train_sizes, self._sizes_known = torch.as_tensor(counts).long().cpu(), True

    def on_test_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._forget()

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if dataloader_idx == 0:
            self._count("test", trainer, pl_module, outputs, batch, trainer.test_dataloaders)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report("test", trainer, pl_module)
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    # Where predictions are seen

    def _start(self, stage: str, pl_module: pl.LightningModule) -> None:
        for name in ("correct", "total", "class_correct", "class_total"):
            self._counts.pop(f"{stage}/{name}", None)
        self._stop()
        self._handles.append(pl_module.register_forward_hook(self._hook("module")))
        try:
            _, head = find_head(pl_module, self.head)
        except ValueError:
            if self.head is not None:
                raise
        else:
            self._handles.append(head.register_forward_hook(self._hook("head")))

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _resume_training_hooks(self, pl_module: pl.LightningModule, trainer: pl.Trainer) -> None:
        counts = {key: value for key, value in self._counts.items() if key.startswith("train/")}
        if self.train and counts:  # validation ran in the middle of a training epoch
            self._start("train", pl_module)
            self._counts.update(counts)
        else:
            self._stop()

    def _forget(self) -> None:
        for outputs in self._seen.values():
            outputs.clear()

    def _hook(self, place: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if not in_extra_pass():
                self._seen[place].append(output)

        return keep

    def _predictions(self, outputs: Any, size: int) -> Tensor:
        """Logits ``(B, C)`` or classes ``(B,)``."""
        if isinstance(outputs, dict):
            if isinstance(outputs.get("logits"), Tensor):
                return as_logits(outputs["logits"]).detach()
            if isinstance(outputs.get("preds"), Tensor):
                return _classes_or_scores(outputs["preds"].detach())
        module, head = self._logits("module", size), self._logits("head", size)
        # What forward returns may be an embedding, which looks like logits; who names the head knows better.
        if head is not None and (self.head is not None or module is None or _is_sigmoid(module, head)):
            return head
        if module is not None:
            return module
        raise RuntimeError(
            "WorstGroupMonitor saw no predictions in this step. Call self(x) in it and let it return the logits "
            "(B, C), return {'loss': …, 'logits': …} (or 'preds') from the step, or name the layer with head='…'."
        )

    def _logits(self, place: str, size: int) -> Tensor | None:
        for output in reversed(self._seen[place]):
            try:
                logits = as_logits(output)
            except (TypeError, ValueError):
                continue  # e.g. the loss, when DDP sends the whole step through forward
            if len(logits) == size:
                return logits.detach()
        return None

    # Counting

    def _count(
        self, stage: str, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, loader: Any
    ) -> None:
        loader = first_loader(loader)
        _, y, group = unpack_batch(batch, pl_module, find_grouper(trainer, loader))
        if group is None:
            raise ValueError(
                f"WorstGroupMonitor needs groups, and the {stage} batches have none that are integers of shape "
                f"(B,): each is {form_of(batch)}. Yield (x, y, group), give the data module a `grouper` for wilds "
                "metadata, or return the groups from `unpack_batch` of your module."
            )
        predictions = self._predictions(outputs, len(y))
        groups = int(group.max()) + 1 if group.numel() else 1
        correct, total = group_accuracy_update(predictions, y, group, groups)
        self._add(f"{stage}/correct", correct)
        self._add(f"{stage}/total", total)
        classes = predictions.shape[1] if predictions.ndim == 2 else int(y.max()) + 1
        correct, total = group_accuracy_update(predictions, y, y, classes)
        self._add(f"{stage}/class_correct", correct)
        self._add(f"{stage}/class_total", total)
        self._forget()

    def _add(self, name: str, counts: Tensor) -> None:
        before = self._counts.get(name, counts.new_zeros(0)).to(counts.device)
        size = max(len(before), len(counts))
        self._counts[name] = _pad(before, size) + _pad(counts, size)

    def _summed(self, name: str, trainer: pl.Trainer, device: torch.device) -> Tensor:
        """The counts of all processes; every process calls this the same number of times."""
        counts = self._counts.get(name, torch.zeros(0, dtype=torch.long)).to(device, copy=True)
        if trainer.world_size == 1:
            return counts
        longest = trainer.strategy.reduce(torch.tensor(len(counts), device=device), reduce_op="max")
        summed: Tensor = trainer.strategy.reduce(_pad(counts, int(longest)), reduce_op="sum")
        return summed

    def _learn_sizes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sizes, missed = (self._summed(name, trainer, pl_module.device).cpu() for name in ("sizes", "missed"))
        self._train_sizes = None if len(missed) else sizes

    def _finish_sizes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._learn_sizes(trainer, pl_module)
        self._sizes_known = True
        self._counts.pop("sizes", None)
        self._counts.pop("missed", None)

    def _miss_sizes(self) -> None:
        self._add("sizes", torch.zeros(0, dtype=torch.long))  # all must sum them, also who could read its batches
        self._add("missed", torch.ones(1, dtype=torch.long))

    def _count_data_set(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loader: DataLoader[Any]) -> None:
        try:
            with isolated_rng():
                for _, batch in examples(trainer, pl_module, loader):
                    if batch.group is not None:
                        self._add("sizes", torch.bincount(batch.group))
        except (TypeError, ValueError):
            self._miss_sizes()
        self._finish_sizes(trainer, pl_module)

    def _report(self, stage: str, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        device = pl_module.device
        correct, total = (self._summed(f"{stage}/{name}", trainer, device) for name in ("correct", "total"))
        by_class = [self._summed(f"{stage}/{name}", trainer, device) for name in ("class_correct", "class_total")]
        if not int(total.sum()):
            return
        values = {
            "worst_group_acc": worst_group_accuracy_compute(correct, total),
            "avg_acc": average_accuracy_compute(correct, total),
            "worst_class_acc": worst_group_accuracy_compute(by_class[0], by_class[1]),
        }
        if self._train_sizes is not None:
            size = max(len(total), len(self._train_sizes))
            correct, total, weights = _pad(correct, size), _pad(total, size), _pad(self._train_sizes.to(device), size)
            if bool(((weights > 0) & (total > 0)).any()):
                values["adjusted_avg_acc"] = adjusted_average_accuracy_compute(correct, total, weights)
        accuracy = group_accuracy_compute(correct, total)
        present = {f"group_acc/{g}": a for g, a in enumerate(accuracy) if int(total[g])}
        if self.per_group:
            values.update(present)
        for name, value in values.items():  # the same on every process; without sync_dist Lightning warns
            shown = name == "worst_group_acc"
            pl_module.log(f"{stage}/{name}", value.float(), prog_bar=shown, batch_size=1, sync_dist=True)
        record: dict[str, float | int | str] = {"stage": stage, "epoch": int(trainer.current_epoch)}
        record.update({name: float(value) for name, value in (values | present).items()})
        self.history.append(record)


def _classes_or_scores(preds: Tensor) -> Tensor:
    preds = preds[:, 0] if preds.ndim == 2 and preds.shape[1] == 1 else preds
    if preds.ndim == 1 and preds.is_floating_point() and not bool((preds == preds.round()).all()):
        raise ValueError("'preds' must be class indices (B,) or scores (B, C), got fractional numbers (B,).")
    return preds


def _is_sigmoid(output: Tensor, logits: Tensor) -> bool:
    """Whether a single output, beside a column of zeros as in :func:`as_logits`, is the sigmoid of a single logit."""
    if output.shape != logits.shape or output.shape[1] != 2 or bool(output[:, 0].any() or logits[:, 0].any()):
        return False
    return torch.allclose(output[:, 1].float(), logits[:, 1].float().sigmoid(), atol=0.005)


def _pad(counts: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(counts, (0, size - len(counts)))
