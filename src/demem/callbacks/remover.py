"""Find the shortcut, train against it, then mask the units that memorise and refit what reads them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from demem.callbacks.reporting import Reporter, scalars, timed
from demem.groups import Groups, ShortcutProbe, find_shortcut, second_look
from demem.removal import ATYPICAL_WEIGHTS, MASKED_SHARES, Examples, Round, RoundRecord, check_shares, choose_round
from demem.report import ReportOptions, summarise
from demem.run import (
    RunData,
    changed_parameters,
    check_head,
    check_inputs,
    checks_version,
    describe_groups,
    describe_rounds,
    has_learned,
    infer_groups_of_run,
    is_dry_run,
    is_fit_validation,
    is_last_step,
    kept_back_positions,
    kept_checkpoints,
    names_itself,
    on_root_device,
    read_examples,
    read_training_examples,
    rebalance,
    refit_for_now,
    remove_and_refit,
    restored_on_failure,
    resumed_within_epoch,
    swapped_parameters,
    with_version,
    write_head,
    write_parameters,
)
from demem.sites import bake_gates, find_head
from demem.tracing import linear_score

METRIC = "val/worst_inferred_group_acc"
_AFTER_VALIDATION = (
    "after the last validation. Run trainer.validate(model) for accuracies of it as it is now, and save a "
    "checkpoint of it with trainer.save_checkpoint(path)."
)


class MemorizationRemover(Callback):
    """Raise worst-group accuracy without group labels: ``Trainer(callbacks=[MemorizationRemover()])``.

    1. *Before the first step* one pass over the training and the validation data reads pooled activations, and the
       earliest layer that predicts the class well is probed (:func:`demem.groups.find_shortcut`).  Training examples
       that the probe confidently misclassifies are those on which a shortcut fails, or have a wrong label, or are
       hard; a closer look tells (:func:`demem.groups.closer_look`), and :meth:`demem.groups.Groups.judged` decides.  If
       there is a shortcut, class and probe together give every example an inferred group.  If that stays open, the
       first epoch is left alone, and the network is probed again after it, when it leans on a shortcut itself
       (:func:`demem.groups.second_look`); one that is still at chance then is probed after the next epoch.
    2. *During training* examples are drawn so that the inferred groups count the same, unless no shortcut was found.
    3. *After the last step, before its validation* units that the head reads are scored by their impact on atypical
       held-out examples and masked in rounds, and the head is refitted on held-out examples, and on training examples
       where they hold more of the minority, all inferred groups in equal numbers
       (:func:`demem.removal.remove_in_rounds`).  Masking while the layers below still learn is undone by
       them; that is why it comes last.  The network as trained stays where the refit has nothing to go by
       (:func:`demem.removal.choose_round`).
    4. *Unless it stayed as trained* the whole network is fine-tuned on a balanced subset of the held-out examples, if
       there are enough (:func:`demem.removal.fine_tune`).

    *Every validation and every checkpoint* in between sees a cured network, too: before a validation the head is
    refitted as in step 3, without masks, and the next training step puts the trained one back.  A checkpoint keeps what
    training goes on from.  Each validation logs ``val/worst_inferred_group_acc``, the cross-fitted accuracy on the
    worst inferred group, to monitor without group labels.

    Where another callback writes its own weights when training ends (averaged ones, or the best epoch's), steps 3 and 4
    are done again, on those.  The refitted head has the weight 0 at masked units; nothing of demem is in the network.

    The held-out examples are those of the first validation loader.  Their labels take part in steps 3 and 4, so
    accuracy on them is optimistic afterwards.  Without validation data, or with ``held_out``, they are a random part of
    the training examples, which training leaves out where a shortcut was found.

    Each decision is a method that can be overridden: :meth:`detect` (the groups' probe), :meth:`score` (the units) and
    :meth:`choose` (the round).

    Args:
        rebalance: do step 2.  Needs a shuffling ``DataLoader`` without a sampler of your own.
        use_groups: the validation batches carry group labels that may be used: for the inferred groups of the training
            set, the refit and the choice of the round (tier T2 instead of T0).
        probe_layers: patterns (:func:`demem.sites.find_sites`) of the layers to probe, shallow ones first; default the
            input of the first block or layer, and the outputs of blocks, stages or layers.
        shares: fractions of the head's inputs that are masked, one per round, growing; ``()`` masks none.
        fine_tune: passes of step 4; 0 leaves it out, and the features stay those that training gave.
        held_out: fraction of the training examples to keep back as held-out ones; default the validation data, and a
            fifth of the training examples where there are none.
        head: qualified name of the classification head (an ``nn.Linear``), if it cannot be found automatically.
        max_examples: read at most this many training examples, evenly spaced; the others keep an average weight.
        seed: of all draws.
        report: write a report for people to this HTML file, in the run's folder unless the path is absolute; or
            :class:`demem.report.ReportOptions`, with names of classes and attributes.  It takes three passes over at
            most 5,000 training examples and the held-out ones.

    Attributes:
        groups: :class:`~demem.groups.Groups` of the training and the held-out examples; ``None`` before training.
        rounds: one :class:`~demem.removal.RoundRecord` for the head as trained, then one per round.
        units: ``[(unit, score)]``, those that the head reads and that were masked, with the memorization score that
            each had when it was masked, highest first.
        fine_tuned_on: held-out examples that the network was fine-tuned on; 0 if it was not.

    Raises:
        ValueError: before training: no validation data, layers that match nothing or do not give one row per example,
            labels out of range, a class with fewer than two training or validation examples, a head that cannot be
            refitted or does not give the logits by itself, groups asked for but not in the batch, activations that are
            not finite; on resume, and for a stream, data that have changed since or between two passes.  What fails
            after training warns, and leaves the network as it was trained.

    Source: own; related to Bansal et al. 2022 and You et al. 2025 (tracing and masking), and to Kirichenko et al. 2023
    (last-layer refit).
    """

    def __init__(
        self,
        rebalance: bool = True,
        use_groups: bool = False,
        probe_layers: str | Sequence[str] | None = None,
        shares: Sequence[float] = MASKED_SHARES,
        fine_tune: int = 5,
        held_out: float | None = None,
        head: str | None = None,
        max_examples: int = 200_000,
        seed: int = 0,
        report: str | ReportOptions | Path | None = None,  # in this order, for the command line
    ) -> None:
        super().__init__()
        if fine_tune < 0 or max_examples < 1:
            raise ValueError(f"fine_tune must be at least 0 and max_examples 1; got {fine_tune} and {max_examples}.")
        if held_out is not None and not 0 < held_out < 1:
            raise ValueError(f"held_out is a fraction of the training examples, in (0, 1); got {held_out}.")
        self.held_out = held_out
        self.rebalance = rebalance
        self.use_groups = use_groups
        self.probe_layers = probe_layers
        self.shares = check_shares(shares)
        self.fine_tune = fine_tune
        self.head = head
        self.max_examples = max_examples
        self.seed = seed
        self.reporter = Reporter(report)
        self.groups: Groups | None = None
        self.rounds: list[RoundRecord] = []
        self.units: list[tuple[int, float]] = []
        self.fine_tuned_on = 0
        self._train_positions = torch.empty(0, dtype=torch.long)  # of the examples that have a group
        self._kept_back: Tensor | None = None  # positions of training examples that are held out
        self._looks_again = False  # the first probe is a poor one, and the second is still to come
        self._judged_on: Sequence[Tensor] = ()  # features before training; not kept in checkpoints
        self._removed_at_step = -1
        self._trained: dict[str, Tensor] = {}  # what training goes on from, of the parameters that hold the cure
        self._fitted: int | None = None  # the module that the last fit was of
        self._refits = True  # no refit before a validation has failed
        self._weight = 0.0  # of atypical examples in those refits, once it is chosen
        self._worst = math.nan
        self._written: Tensor | None = None  # the head's weight after step 4, on the CPU
        self._fresh = True  # no epoch of this fit has begun
        self._earlier: dict[str, float] = {}  # checkpoint files from before the removal
        self._unseen = False  # no validation has run since the removal
        self._undo: Callable[[], None] | None = None  # puts the training loader's own sampler back

    @property
    def state_key(self) -> str:
        return self._generate_state_key(head=self.head, use_groups=self.use_groups, rebalance=self.rebalance)

    @with_version
    def state_dict(self) -> dict[str, Any]:
        return {
            "groups": None if self.groups is None else self.groups.state_dict(),
            "train_positions": self._train_positions,
            "kept_back": self._kept_back,
            "looks_again": self._looks_again,
            "rounds": [asdict(record) for record in self.rounds],
            "units": self.units,
            "fine_tuned_on": self.fine_tuned_on,
            "removed_at_step": self._removed_at_step,
            "trained": self._trained,
            "weight": self._weight,
        }

    @checks_version
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        groups = state_dict["groups"]
        self.groups = None if groups is None else Groups(**groups)
        self._train_positions = state_dict["train_positions"]
        self._kept_back = state_dict["kept_back"]
        self._looks_again = bool(state_dict["looks_again"])
        self.rounds = [RoundRecord(**record) for record in state_dict["rounds"]]
        self.units = [(int(unit), float(score)) for unit, score in state_dict["units"]]
        self.fine_tuned_on = int(state_dict["fine_tuned_on"])
        self._removed_at_step = int(state_dict["removed_at_step"])
        self._trained = dict(state_dict["trained"])
        self._weight = float(state_dict["weight"])
        self._fitted = None  # perhaps on a new module, which is the one of this state

    def summary(self) -> str:
        """What was found, done and gained, in five lines."""
        path = None if self.reporter.path is None else str(self.reporter.path)
        names = None if self.reporter.options is None else self.reporter.options.class_names
        return summarise(self.groups, self.rounds, self.fine_tuned_on, self.rebalance, path, names)

    def __repr__(self) -> str:
        kept = next((record for record in self.rounds if record.chosen), None)
        return f"{type(self).__name__}({self.groups or 'nothing looked for yet'}{f'; {kept}' if kept else ''})"

    def detect(self, features: Mapping[str, Tensor], y: Tensor, num_classes: int) -> ShortcutProbe:
        """Probe layers ``{site: (S, N)}`` of the training examples, shallow ones first, for the class ``(S,)``.

        One that always probes the same layer returns
        ``probe_shortcut(features[site], y, num_classes, site=site)`` (:func:`demem.groups.probe_shortcut`).
        """
        # After an epoch the layer that predicts the class best speaks for the network.
        progress = {"progress": 1.0} if self._looks_again else {}
        return find_shortcut(features, y, num_classes, **progress)

    def score(self, features: Tensor, weight: Tensor, y: Tensor, atypical: Tensor, *, logits: Tensor) -> Tensor:
        """Memorization score ``(N,)`` of the units that the head reads, see :func:`demem.tracing.linear_score`."""
        return linear_score(features, weight, y, atypical, logits=logits)

    def choose(self, rounds: Sequence[Round], held_out: Examples, groups: Groups) -> int:
        """Index of the round (:class:`demem.removal.Round`) to keep; 0 is the network as trained.

        ``held_out`` are :class:`demem.removal.Examples`: what the head reads, classes and groups.
        """
        return choose_round(rounds, held_out, groups.typical, **groups.trust)

    # When

    @names_itself
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.reporter.start()
        if self._fitted not in (None, id(pl_module)):
            self._trained = {}  # of another module
        self._fitted = id(pl_module)
        find_head(pl_module, self.head)

    @names_itself
    @timed
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        new = trainer.global_step == 0 or self.groups is None  # not resumed
        if new:
            self._kept_back = kept_back_positions(trainer, self.held_out, self.seed)
        data = self._data(trainer, pl_module)
        data.held_out  # noqa: B018 (refused now rather than after training, if there is none)
        if is_dry_run(trainer):
            return
        self._check_order(trainer)
        self.reporter.check(trainer)
        if new:
            self.groups, self._looks_again, self._removed_at_step, self._trained = None, False, -1, {}
            self._refits, self._weight, self._worst = True, 0.0, math.nan
            check_inputs(data)
            check_head(trainer, pl_module, data.head_name, data.head, data.held_out.loader)
            self._look(data)
        if self.groups is not None and (trainer.global_step > 0 or not data.is_stable):  # rather than after training
            read_examples(data, self.groups, self._train_positions, self.seed)
        self._fresh = True
        if resumed_within_epoch(trainer):  # Lightning then leaves the start of the epoch out
            self._rebalance(data)

    @timed
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_dry_run(trainer):
            return
        self._go_on(pl_module)
        data = self._data(trainer, pl_module)
        if self._looks_again and self.groups is not None and trainer.current_epoch > self.groups.epoch:
            with restored_on_failure(pl_module, "keeps to its earlier look", data.head):
                self._look(data)
        late = not self._fresh
        with restored_on_failure(pl_module, "does not rebalance an epoch", data.head) if late else nullcontext():
            self._rebalance(data)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._go_on(pl_module)

    @timed
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not is_fit_validation(trainer) or is_dry_run(trainer) or self.groups is None:
            return
        if self._removed_at_step != trainer.global_step and self._refits:
            with torch.inference_mode(False):
                self._refit_for_now(self._data(trainer, pl_module))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Also where it is unknown, as a callback that monitors it would end the run if it were not there.
        if is_fit_validation(trainer) and not is_dry_run(trainer):
            pl_module.log(METRIC, self._worst, batch_size=1, sync_dist=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.enable_validation:  # and yet there may be checkpoints
            self.on_validation_start(trainer, pl_module)
            self.on_validation_epoch_end(trainer, pl_module)

    @timed
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_last_step(trainer) and not is_dry_run(trainer):
            self._remove(self._data(trainer, pl_module))
            values = scalars(self.rounds, self.use_groups)
            if values:
                pl_module.log_dict(values, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._unseen = False

    @timed
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Stopped early, by time or by a signal: nothing told that the last step was the last.
        if self._removed_at_step != trainer.global_step and not is_dry_run(trainer):
            self._remove(self._data(trainer, pl_module))
        if self._unseen and self._refitted and trainer.enable_validation:
            warnings.warn(
                "MemorizationRemover: as training ended before its last planned step, or without a validation after "
                f"it, the network was refitted {_AFTER_VALIDATION}",
                stacklevel=2,
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_sampler()
        self._keep_cured(trainer, pl_module)
        if self.reporter.options is not None and not is_dry_run(trainer):
            with on_root_device(trainer, pl_module):
                self.reporter.finish(self, self._data(trainer, pl_module), self._train_positions, self._trained)
        rank_zero_info(self.summary())

    @timed
    def _keep_cured(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._written is None:
            return
        # Stochastic and exponential weight averaging, or a callback that takes the best epoch's weights back, write
        # theirs when training ends.
        data = self._data(trainer, pl_module)
        now = data.head.weight.detach().cpu()
        changed = not torch.allclose(now, self._written, rtol=0, atol=0, equal_nan=True)
        if trainer.strategy.reduce_boolean_decision(changed, all=False):
            with on_root_device(trainer, pl_module):
                self._remove(data)
            warnings.warn(
                "MemorizationRemover: another callback changed the weights when training ended, so units were removed "
                f"anew, from the new weights, {_AFTER_VALIDATION}",
                stacklevel=2,
            )
        self._written = None
        stale = [path for path, time in kept_checkpoints(trainer).items() if self._earlier.get(path) == time]
        if stale and self._refitted:
            rank_zero_warn(
                f"MemorizationRemover: the checkpoint {' and '.join(stale)} is from before the removal: it "
                "holds the network of its epoch with a head that was refitted before its validation, and no masks or "
                "fine-tuning. To keep these as well: trainer.save_checkpoint(path) after the fit."
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._go_on(pl_module)
        self._restore_sampler()

    # What

    def _data(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> RunData:
        return RunData(trainer, pl_module, self.head, self.max_examples, self._kept_back)

    @property
    def _acts(self) -> bool:
        """Whether there is something to do: without a shortcut, what was kept back has been trained on."""
        return self.groups is not None and (self._kept_back is None or self.groups.informative)

    @property
    def _refitted(self) -> bool:
        return any(record.chosen and record.refitted for record in self.rounds)

    def _check_order(self, trainer: pl.Trainer) -> None:
        """Without validations the metric is there when an epoch ends, for the callbacks after this one."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        earlier = [c for c in callbacks[: callbacks.index(self)] if getattr(c, "monitor", None) == METRIC]
        if earlier and not trainer.enable_validation:
            name = type(earlier[0]).__name__
            raise ValueError(
                f"Without validation data {METRIC!r} is logged too late for {name}, which comes before "
                f"MemorizationRemover in the Trainer's callbacks. Put {name} after it."
            )

    def _go_on(self, pl_module: pl.LightningModule) -> None:
        """Put back the parameters that training goes on from."""
        write_parameters(pl_module, self._trained)
        self._trained = {}

    def _refit_for_now(self, data: RunData) -> None:
        """Put a refitted head in the network until the next training step."""
        assert self.groups is not None
        self._go_on(data.pl_module)
        weights = [self._weight] if self._weight else ATYPICAL_WEIGHTS
        consequence = "has no refitted head in validations and their checkpoints"
        with restored_on_failure(data.pl_module, consequence, data.head) as before:
            self._refits = False
            head, record = refit_for_now(data, self.groups, self.choose, weights)
            self._weight, self._worst, self._refits = record.weight if head else 0.0, record.worst, True
            if head is not None:
                write_head(data.head, head)
                self._trained = changed_parameters(data.pl_module, before)

    def _look(self, data: RunData) -> None:
        """Step 1, before training and, if the probe is a poor one, once more when the network has learned something."""
        first, again, epoch = self.groups, self._looks_again, data.trainer.current_epoch
        before = self._judged_on if again else ()
        found, positions, self._judged_on = infer_groups_of_run(
            data, self.probe_layers, self.detect, self.use_groups, epoch, before
        )
        self._looks_again = found.open and not again
        if again and first is not None:
            found = second_look(first, found)
            self._looks_again = found.open and not has_learned(data)
            if found is first:
                positions = self._train_positions
        self.groups, self._train_positions = found, positions
        if not self._looks_again:
            self._judged_on = ()
        if found is not first:
            rank_zero_info(describe_groups(found, self._looks_again, self.rebalance))

    def _rebalance(self, data: RunData) -> None:
        """Step 2, anew every epoch, for loaders that are reloaded between epochs."""
        first, self._fresh = self._fresh, False
        waits = self._looks_again and data.trainer.max_epochs != data.trainer.current_epoch + 1
        leaves_alone = not self.rebalance and self._kept_back is None
        if self.groups is None or leaves_alone or not self.groups.informative or waits:
            return
        self._restore_sampler()
        if not first and getattr(data.trainer, "reload_dataloaders_every_n_epochs", 0) > 0:  # perhaps other examples
            read_training_examples(data, self.groups, self._train_positions, self.seed)
        self._undo = rebalance(data, self.groups, self._train_positions, self.seed, first, even=not self.rebalance)

    def _restore_sampler(self) -> None:
        if self._undo is not None:
            self._undo()
        self._undo = None

    def _remove(self, data: RunData) -> None:
        """Steps 3 and 4; what fails then must not cost the run."""
        self.rounds, self.units, self.fine_tuned_on = [], [], 0
        if self.groups is None:  # training was over before it began
            return
        if not self._acts:
            why = "there is no shortcut, and the examples that were held out have been trained on"
            self.rounds = [RoundRecord(refitted=False, share=0.0, worst=math.nan, chosen=True, why=why)]
            return
        self._go_on(data.pl_module)
        with restored_on_failure(data.pl_module) as before:
            self.rounds, self.units, self.fine_tuned_on = remove_and_refit(
                data,
                self.groups,
                self._train_positions,
                self.reporter.watching(self.choose, data),
                self.shares,
                self.fine_tune,
                self.seed,
                self.score,
                balanced=self.rebalance,
            )
            rank_zero_info(describe_rounds(self.groups, self.rounds, self.fine_tuned_on))
            self._trained = changed_parameters(data.pl_module, before)
            self._worst = next(record.worst for record in self.rounds if record.chosen)
        self._removed_at_step = data.trainer.global_step
        self._earlier = kept_checkpoints(data.trainer)
        self._unseen = True
        self._written = data.head.weight.detach().cpu().clone()

    def as_trained(self, pl_module: pl.LightningModule) -> AbstractContextManager[None]:
        """Within this block the network is the one that training gave, before units were removed."""
        return swapped_parameters(pl_module, self._trained)

    def export(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` (the LightningModule or the network in it) that is free of demem."""
        return bake_gates(model)
