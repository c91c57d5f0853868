"""Accuracy of the worst group, of every group, and averages over groups, during training, validation and testing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from demem.batch import form_of, has_group_part, unpack_batch
from demem.metrics import AccuracyReport, require_groups
from demem.run import (
    TrainingSizes,
    checks_version,
    find_grouper,
    first_held_out_batch,
    first_loader,
    in_extra_pass,
    in_stage,
    names_itself,
    validating_ranks,
    with_version,
)
from demem.sites import PredictionReader


class WorstGroupMonitor(Callback):
    """Log accuracies by group, without running the model a second time.

    For each stage (``train``, ``val``, ``test``) logs ``{stage}/worst_group_acc``, ``{stage}/avg_acc``,
    ``{stage}/adjusted_avg_acc`` (groups weighted by their training sizes), ``{stage}/worst_class_acc`` and
    ``{stage}/group_acc/{group}``; all fractions, over all processes together.  Groups without examples are left out.
    Without groups in the batches it logs average and worst-class accuracy, and says so once; where all examples are of
    one group it warns, as the worst group is then no other than the average.  Of several validation or
    test loaders the first is read.

    Predictions are taken from the step itself, see :class:`demem.sites.PredictionReader`: from ``"logits"`` or
    ``"preds"`` in what it returns, from what ``self(x)`` returned, or from the classification head.  A single output is
    a logit, positive for class 1; a probability is understood only as the sigmoid of a linear head.

    The training sizes are the data module's ``train_group_counts`` if it has them.  Else they are counted over the
    first whole training epoch, or in one pass over the training set where a sampler may draw some examples more often
    than others or a run is resumed in the middle of an epoch.  Where training batches have no groups or cannot be read,
    ``adjusted_avg_acc`` is not logged.

    After a resume in the middle of an epoch, a run on one process goes on counting for its training report; with
    several processes that report covers the rest of the epoch.

    Batches for which a step returns nothing and does not call the network are left out, once predictions have been
    seen.  Predictions that are NaN or infinite count as wrong, with a warning.

    Example:
        ``Trainer(callbacks=[WorstGroupMonitor(), ModelCheckpoint(monitor="val/worst_group_acc", mode="max")])``

    Args:
        train: also report the training batches as the network saw them: augmented, in training mode, while it changes.
        per_group: log the accuracy of each group.
        head: qualified name of the classification head, if it cannot be found automatically.

    Attributes:
        history: one dict for each report: ``stage``, ``epoch`` and the values; kept in checkpoints.

    Raises:
        ValueError: groups have another form than integers ``(B,)``, there are more than half as many groups as
            examples, a group or label is out of range, or ``preds`` are no classes or scores.
        RuntimeError: no predictions were seen in a step.
    """

    def __init__(self, train: bool = False, per_group: bool = True, head: str | None = None) -> None:
        super().__init__()
        self.train = train
        self.per_group = per_group
        self.head = head
        self.history: list[dict[str, float | int | str]] = []
        self._predictions = PredictionReader(head, ignore=in_extra_pass)
        self._reports = {stage: AccuracyReport() for stage in ("train", "val", "test")}
        self._sizes = TrainingSizes()
        self._alone = True
        self._validating: Any = None
        self._told = self._told_lost = self._told_inputs = False
        self._counted = False  # predictions have been seen

    @property
    def train_sizes(self) -> Tensor | None:
        """Training examples of each group ``(G,)``: ``None`` until they are known, empty if they cannot be."""
        return self._sizes.known

    @property
    def state_key(self) -> str:
        return self._generate_state_key(train=self.train, per_group=self.per_group, head=self.head)

    @with_version
    def state_dict(self) -> dict[str, Any]:
        # Rank 0's state is what a checkpoint holds, and that is not what all processes counted.
        counts = dict(self._reports["train"].state_dict()) if self._alone else {}
        return {"history": list(self.history), "train_sizes": self._sizes.known, "train_counts": counts}

    @checks_version
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])
        self._sizes.known = state_dict["train_sizes"]
        if self._alone:
            self._reports["train"].load_state_dict(state_dict["train_counts"], strict=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._alone, self._validating = trainer.world_size == 1, None
        self._counted = False
        if stage == "fit":  # perhaps on other data than the last one; a resumed run gets its state back after this
            self._sizes = TrainingSizes()
            self._reports["train"].reset()
        self._sizes.ask(trainer)

    # Training

    @names_itself
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reports["train"].to(pl_module.device)
        self._sizes.ask(trainer)  # again: those of a checkpoint may be of other data
        ranks = validating_ranks(trainer)
        if 0 < len(ranks) < trainer.world_size:
            self._validating = torch.distributed.new_group(ranks)
        if not trainer.num_sanity_val_steps and trainer.global_rank in ranks and sum(trainer.num_val_batches) > 0:
            self._try(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reports["train"].reset()
        self._sizes.start_epoch()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.train:
            self._predictions.start(pl_module)

    @names_itself
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._sizes.see(trainer, pl_module, batch)
        if self.train:
            self._count(trainer, pl_module, outputs, batch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.train:
            self._report(trainer, pl_module)
        self._sizes.end_epoch(trainer)

    # Validation and test

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reports[_stage(trainer)].to(pl_module.device).reset()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx == 0:
            self._predictions.start(pl_module)

    @names_itself
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
            self._count(trainer, pl_module, outputs, batch)

    @names_itself
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            require_groups(self._reports["val"].group_sizes)  # before an epoch is spent
        else:
            self._report(trainer, pl_module)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._predictions.stop()

    # What all stages share

    def _try(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the first validation batch now rather than after an epoch, where no sanity check has done so."""
        batch = first_held_out_batch(trainer, pl_module)
        if batch is not None:
            with in_stage(trainer, RunningStage.VALIDATING):  # an unpack_batch may ask for the stage
                y, group = self._unpack(trainer, pl_module, "val", batch)
            AccuracyReport().to(y.device).update(y, y, group)

    def _count(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any) -> None:
        stage = _stage(trainer)
        nothing = not outputs and not self._predictions.ran  # a step may return None before it calls the network
        if nothing and (self._counted or (trainer.training and pl_module.automatic_optimization)):
            self._predictions.stop()
            return
        y, group = self._unpack(trainer, pl_module, stage, batch)
        self._tell_of_inputs(pl_module, batch)
        preds = self._predictions.read(outputs, len(y))
        if preds.is_floating_point() and not bool(torch.isfinite(preds).all()):
            preds = self._wrong_where_not_finite(preds, y)
        self._reports[stage].update(preds, y, group)
        self._counted = True
        self._predictions.stop()

    def _tell_of_inputs(self, pl_module: pl.LightningModule, batch: Any) -> None:
        """Batches ``(image, age, label)`` and ``(tokens, label, length)`` look as ``(x, y, group)`` does."""
        own = callable(getattr(pl_module, "unpack_batch", None))
        if own or self._told_inputs or not isinstance(batch, list | tuple):
            return
        for part, place, what in zip(batch[1:3], ("second", "third"), ("labels", "groups"), strict=False):
            if isinstance(part, Tensor) and self._predictions.was_given(part):
                rank_zero_warn(
                    f"WorstGroupMonitor: the network reads the {place} part of the batch, which is taken for the "
                    f"{what}. If these are elsewhere, define `unpack_batch(self, batch)` on your module and return "
                    "(x, y, group or None)."
                )
                self._told_inputs = True

    def _wrong_where_not_finite(self, preds: Tensor, y: Tensor) -> Tensor:
        """Predictions that are NaN or infinite count as wrong, and cost no run."""
        lost = ~torch.isfinite(preds).reshape(len(preds), -1).all(1)
        if not self._told_lost:
            rank_zero_warn(
                "WorstGroupMonitor: predictions are NaN or infinite, and count as wrong: the model diverged or its "
                "inputs are broken."
            )
        self._told_lost = True
        if preds.ndim == 1 or preds.shape[1] == 1:  # classes
            return torch.where(lost.reshape(preds.shape), (y == 0).to(preds).reshape(preds.shape), preds)
        return torch.where(
            lost[:, None], 1 - F.one_hot(y.clamp(max=preds.shape[1] - 1), preds.shape[1]).to(preds), preds
        )

    def _unpack(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str, batch: Any
    ) -> tuple[Tensor, Tensor | None]:
        loaders = {"train": trainer.train_dataloader, "val": trainer.val_dataloaders, "test": trainer.test_dataloaders}
        _, y, group = unpack_batch(batch, pl_module, find_grouper(trainer, first_loader(loaders[stage])))
        if group is None and has_group_part(batch, pl_module):
            raise ValueError(
                f"WorstGroupMonitor needs groups that are integers of shape (B,): each is {form_of(batch)} in the "
                f"{stage} batches. Yield (x, y, group), give the data module a `grouper` for wilds metadata, or define "
                "`unpack_batch(self, batch)` on your module and return (x, y, group or None)."
            )
        return y, group

    def _report(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stage = _stage(trainer)
        processes = self._validating if stage == "val" else None
        report = self._reports[stage]
        report.sum_over(processes)
        values = report.compute(self._sizes.so_far(trainer, processes))
        if not values:
            return
        main = "worst_group_acc" if "worst_group_acc" in values else "worst_class_acc"
        self._tell_once(stage, main, values)
        for name, value in values.items():  # the same on every process; without sync_dist Lightning warns
            if self.per_group or not name.startswith("group_acc/"):
                pl_module.log(
                    f"{stage}/{name}",
                    value.float(),
                    prog_bar=name == main,
                    batch_size=1,
                    sync_dist=True,
                    sync_dist_group=processes,
                )
        record: dict[str, float | int | str] = {"stage": stage, "epoch": int(trainer.current_epoch)}
        self.history.append(record | {name: float(value) for name, value in values.items()})

    def _tell_once(self, stage: str, main: str, values: Mapping[str, Tensor]) -> None:
        tell: Callable[[str], None] = rank_zero_warn
        if main == "worst_class_acc":  # nothing is wrong with that
            tell, found = rank_zero_info, "have no groups, so it reports average and worst-class accuracy only"
        elif not any(name.startswith("group_acc/") for name in values):
            found = "are all of one group, whose accuracy is the average"
        else:
            return
        if not self._told:
            tell(f"WorstGroupMonitor: the {stage} batches {found}. Yield (x, y, group) for more.")
        self._told = True


def _stage(trainer: pl.Trainer) -> str:
    return "train" if trainer.training else "test" if trainer.testing else "val"
