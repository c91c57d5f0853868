"""Find the shortcut, train against it, then mask the units that memorise and refit what reads them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader

from demem.batch import apply_model
from demem.callbacks._head import check_head, read_head, write_head
from demem.callbacks._passes import (
    examples,
    gather_rows,
    has_positions,
    held_out_loader,
    network,
    train_loader,
    undisturbed,
)
from demem.callbacks._sampling import reweight
from demem.callbacks._tuning import fine_tune
from demem.linear import balanced_subset, balanced_weights, few_of_each_group, fit_linear
from demem.removal import MASKED_SHARES, Examples, choose_round, largest_groups, remove_in_rounds
from demem.removal.rounds import SMOOTHING, check_shares
from demem.sites import ActivationReader, Gates, Site, bake_gates, check_finite, default_sites, find_head, find_sites
from demem.tracing.shortcut import MIN_SURE, PROGRESS, ShortcutProbe, class_error, find_shortcut

MAX_ERRORS = (0.25, 0.15)  # a minority is small; once trained, a network soon knows the class itself
LEARNED_ON, AT_CHANCE = 2_000, 0.8  # training examples that tell, and their share of chance's error from which on
CHOSEN_ON = 20_000  # training examples that the probed layer is chosen on: those of all layers are in memory at once
TRACED = 500  # training examples of each inferred group: what units and heads are traced on
TUNED_ON = 64  # held-out examples of each class; fewer do not say how the features should change
_NOTHING = torch.empty(0, dtype=torch.long)
_AFTER_VALIDATION = (
    "after the last validation. Run trainer.validate(model) for accuracies of it as it is now, and save a "
    "checkpoint of it with trainer.save_checkpoint(path)."
)


class MemorizationRemover(Callback):
    """Raise worst-group accuracy without group labels: ``Trainer(callbacks=[MemorizationRemover()])``.

    1. *Before the first step* one pass over the training and the validation data reads pooled activations.  The
       earliest layer that tells the class well is probed, cross-fitted (:mod:`demem.tracing.shortcut`): the examples
       that the probe gets wrong go against the shortcut.  Class and probe together give every example an inferred
       group.  Where the probe is mostly unsure of its mistakes, they are merely hard: no shortcut was found, and the
       groups are the classes.  Where it makes many, it follows no shortcut; then the first epoch is left alone, and the
       network is probed again after it, when it leans on one itself.  A second probe with few mistakes counts instead;
       if it makes at most half as many as the first, yet not few, those were merely hard, too.  (A network that is
       still at chance then leans on nothing: unless its probe already says so, it is probed after the next epoch.)
    2. *During training* examples are drawn so that the inferred groups of all classes count the same, unless no
       shortcut was found.
    3. *After the last step, before its validation* the units that the head reads are scored by their impact on atypical
       held-out examples and masked in rounds.  In each, the head is refitted on the held-out examples, all inferred
       groups in equal numbers, with the layers below at rest (:func:`demem.removal.remove_in_rounds`).  Of the rounds
       that cannot be told from the best on the worst inferred group, the one that masks least stays; it may mask
       nothing.  Masking while the layers below still learn is undone by them; that is why it comes last.  Where no
       shortcut was found, or a class has less than two atypical held-out examples or several inferred minority groups
       with a handful each, the network is left as trained unless the refit is clearly better
       (:func:`demem.removal.choose_round`).
    4. *Else* the whole gated network is fine-tuned for a few passes over one subset of the held-out examples with
       equally many of every inferred group, where these are enough to say how the features should change (64 of each
       class).  One subset, not a new one each pass: an example seen more often than others is fitted more closely.

    Where another callback writes its own weights when training ends (averaged ones, or the best epoch's), steps 3 and 4
    are done again, on those.

    From then on validation, testing, checkpoints and prediction see the gated model.  The refitted head has the weight
    0 at masked units, so a checkpoint gives the same outputs without demem.

    The held-out examples are those of the first validation loader.  Their labels take part in the refit (as in deep
    feature reweighting) and the fine-tuning, so accuracy on them is optimistic afterwards.

    Args:
        rebalance: do step 2.  Needs a shuffling ``DataLoader`` without a sampler of your own.
        use_groups: the validation batches carry group labels that may be used: for the inferred groups of the training
            set, the refit and the choice of the round (tier T2 instead of T0).
        probe_layers: patterns (:func:`demem.sites.find_sites`) of the layers to probe, shallow ones first; default what
            the first block or layer reads, and the outputs of blocks, stages or layers.
        min_sure: least share of sure ones among the probe's mistakes for a shortcut
            (:func:`demem.tracing.shortcut.probe_shortcut`); 0 always takes them for one.
        max_errors: of a probe that follows a shortcut, before training and after the first epoch, as shares of chance's
            error (C − 1)/C.  With a larger one than the first, the network is probed again; the second tells what few
            mistakes are then.  ``(1, 0)`` never looks again.
        shares: of the head's inputs that are masked, one a round, growing.
        atypical: the held-out examples that units are traced on: ``"group"``, those of inferred (with ``use_groups``,
            true) minority groups, or ``"margin"``, those with the lowest margins in each class.
        atypical_share: of each class, for ``"margin"``.
        tolerance: in standard errors: how much worse than the best round one that masks less may be; 0 keeps the best.
        l2: of the refit, see :func:`demem.linear.fit_linear`.
        fine_tune: passes of step 4; 0 leaves it out, and the features stay those that training gave.
        fine_tune_lr: Adam's learning rate in step 4, falling to 0.
        head: qualified name of the classification head (an ``nn.Linear``), should it not be found.
        max_examples: of the training set at most so many are read, evenly spaced (20,000 to choose the probed layer);
            the others keep an average weight.
        seed: of the draw of training examples.

    Attributes:
        rounds: one dict for the head as trained (``refit`` is False), then one for each round: ``refit``, ``share``
            masked, ``worst`` inferred-group accuracy on held-out examples, ``chosen``.
        probe: of the shortcut probe: ``epoch``, how many went before; ``site``, its layer; ``error``, cross-fitted;
            ``sure``, the share of its mistakes that it is sure of; ``shortcut``, whether they are taken for those of
            one (step 1); ``groups``, how many training examples each inferred group ``class · C + attribute`` has.
        fine_tuned_on: how many held-out examples the network was fine-tuned on; 0 if it was not.

    Raises:
        ValueError: before training: no validation data, layers that match nothing or do not give a row for each
            example, labels out of range, a class with fewer than two training or validation examples, a head that does
            not give the logits by itself or is no plain linear layer, groups asked for but not in the batch,
            activations that are not finite, a callback that averages weights listed before this one where that would
            mix up buffers.  Later: the data is not what it was (a stream that gives another order each time).

    Source: own; the parts are related to Bansal et al. 2022 and You et al. 2025 (tracing and masking), and to
    Kirichenko et al. 2023 (last-layer refit).
    """

    def __init__(
        self,
        rebalance: bool = True,
        use_groups: bool = False,
        probe_layers: str | Sequence[str] | None = None,
        min_sure: float = MIN_SURE,
        max_errors: tuple[float, float] = MAX_ERRORS,
        shares: Sequence[float] = MASKED_SHARES,
        atypical: Literal["group", "margin"] = "group",
        atypical_share: float = 0.2,
        tolerance: float = 1.0,
        l2: float = 1e-3,
        fine_tune: int = 5,
        fine_tune_lr: float = 1e-4,
        head: str | None = None,
        max_examples: int = 200_000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < atypical_share <= 1 or not tolerance >= 0 or fine_tune < 0:
            raise ValueError(
                "atypical_share must be in (0, 1], tolerance and fine_tune at least 0; "
                f"got {atypical_share}, {tolerance} and {fine_tune}."
            )
        if not (l2 > 0 and fine_tune_lr > 0 and max_examples >= 1):
            raise ValueError(
                "l2 and fine_tune_lr must be above 0 and max_examples at least 1; "
                f"got {l2}, {fine_tune_lr} and {max_examples}."
            )
        if len(max_errors) != 2 or not all(0 <= share <= 1 for share in (min_sure, *max_errors)):
            raise ValueError(f"min_sure and the two max_errors are shares, in [0, 1]; got {min_sure} and {max_errors}.")
        if atypical not in ("group", "margin"):
            raise ValueError(f"atypical must be 'group' or 'margin', got {atypical!r}.")
        self.rebalance = rebalance
        self.use_groups = use_groups
        self.probe_layers = probe_layers
        self.min_sure = min_sure
        self.max_errors = max_errors
        self.shares = check_shares(shares)
        self.atypical = atypical
        self.atypical_share = atypical_share
        self.tolerance = tolerance
        self.l2 = l2
        self.fine_tune = fine_tune
        self.fine_tune_lr = fine_tune_lr
        self.head = head
        self.max_examples = max_examples
        self.seed = seed
        self.rounds: list[dict[str, float | bool]] = []
        self.probe: dict[str, Any] = {}
        self.fine_tuned_on = 0
        self._gates: Gates | None = None
        self._site: Site
        # Inferred (or, held out and with use_groups, true) groups of the examples that were read, in data set order.
        self._train_groups, self._held_out_groups, self._train_positions = _NOTHING, _NOTHING, _NOTHING
        self._train_labels, self._held_out_labels = _NOTHING, _NOTHING  # to tell other data by
        self._looks_again = False  # the first probe is a poor one, and the second is still to come
        self._typical = _NOTHING  # (C,) the largest group of each class in the training set
        self._removed_at_step = -1
        self._loaded_gate: Tensor | None = None
        self._written: Tensor | None = None  # the head's weight after step 4, on the CPU
        self._fresh = True  # no epoch of this fit has begun
        self._unseen = False  # no validation has run since the removal
        self._undo: Callable[[], None] | None = None  # puts the training loader's own sampler back

    @property
    def state_key(self) -> str:
        return self._generate_state_key(head=self.head, use_groups=self.use_groups, rebalance=self.rebalance)

    def state_dict(self) -> dict[str, Any]:
        return {
            "rounds": list(self.rounds),
            "probe": dict(self.probe),
            "gate": None if self._gates is None else next(iter(self._gates.state_dict().values())),
            "train_groups": self._train_groups,
            "train_positions": self._train_positions,
            "train_labels": self._train_labels,
            "held_out_groups": self._held_out_groups,
            "held_out_labels": self._held_out_labels,
            "looks_again": self._looks_again,
            "typical": self._typical,
            "removed_at_step": self._removed_at_step,
            "fine_tuned_on": self.fine_tuned_on,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rounds = list(state_dict["rounds"])
        self.probe = dict(state_dict["probe"])
        self._loaded_gate = state_dict["gate"]
        self._train_groups = state_dict["train_groups"]
        self._train_positions = state_dict["train_positions"]
        self._train_labels = state_dict["train_labels"]
        self._held_out_groups = state_dict["held_out_groups"]
        self._held_out_labels = state_dict["held_out_labels"]
        self._looks_again = bool(state_dict["looks_again"])
        self._typical = state_dict["typical"]
        self._removed_at_step = int(state_dict["removed_at_step"])
        self.fine_tuned_on = int(state_dict["fine_tuned_on"])

    def export(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` (the LightningModule or the network in it) with the gates baked into plain weights."""
        return bake_gates(model)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Buffers must exist before DistributedDataParallel wraps the module; a model that is only built in
        # configure_model gets them in on_fit_start, where demem keeps the processes equal by broadcasting itself.
        if stage == "fit" and any(isinstance(module, nn.Linear) for module in pl_module.modules()):
            self._make_gates(pl_module)
            _check_order(trainer, pl_module, self, self._gates)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._make_gates(pl_module)
        self._set_gate(self._loaded_gate)
        self._loaded_gate = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        held_out_loader(trainer)  # refused now rather than after training, if there is none
        self._fresh = True
        if trainer.global_step == 0:  # not resumed
            self._removed_at_step = -1
        if (trainer.global_step == 0 or len(self._train_groups) == 0) and not _is_dry_run(trainer):
            self._looks_again = False
            check_head(trainer, pl_module, *find_head(pl_module, self.head))
            self._infer_groups(trainer, pl_module)
            self._tell()
        if getattr(trainer.fit_loop, "restarted_mid_epoch", False):  # Lightning then leaves the epoch's start out
            self._rebalance(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._looks_again and trainer.current_epoch > self.probe["epoch"] and not _is_dry_run(trainer):
            self._infer_groups(trainer, pl_module)
            self._tell()
        self._rebalance(trainer)

    def _rebalance(self, trainer: pl.Trainer) -> None:
        """Step 2, anew every epoch, for loaders that are reloaded between epochs."""
        first, self._fresh = self._fresh, False
        waits = self._looks_again and trainer.max_epochs != trainer.current_epoch + 1
        if _is_dry_run(trainer) or not self.rebalance or not self._knows_groups or waits:
            return
        self._restore_sampler()
        loader, weights = train_loader(trainer), balanced_weights(self._train_groups, SMOOTHING)
        if has_positions(loader) and len(loader.dataset) <= int(self._train_positions[-1]):  # type: ignore[arg-type]
            raise _other_data()
        self._undo = reweight(loader, self._train_positions, weights, trainer, self.seed)
        if not has_positions(loader):
            warnings.warn(
                "MemorizationRemover cannot rebalance an iterable data set; rebalance=False silences this.",
                stacklevel=3,
            )
        elif self._undo is None:
            warnings.warn(
                "MemorizationRemover does not rebalance: the training DataLoader has a sampler of its own or does not "
                "shuffle. Use shuffle=True, or rebalance=False to silence this.",
                stacklevel=3,
            )
        elif first and loader.num_workers > 0:
            # The first epoch's iterator was made before, and its workers have drawn from the loader's own sampler.
            iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if _is_last_step(trainer) and not _is_dry_run(trainer):
            self._remove(trainer, pl_module)
            chosen = next(r for r in self.rounds if r["chosen"])
            values = {"removal/masked_share": chosen["share"], "removal/worst_inferred_group_acc": chosen["worst"]}
            pl_module.log_dict({k: float(v) for k, v in values.items()}, on_step=False, on_epoch=True, sync_dist=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._unseen = False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Stopped early, by time or by a signal: nothing told that the last step was the last.
        if self._removed_at_step != trainer.global_step and not _is_dry_run(trainer):
            self._remove(trainer, pl_module)
        if self._refitted and self._unseen:
            warnings.warn(
                "As training ended before its last planned step, or without a validation after it, the network was "
                f"refitted {_AFTER_VALIDATION}",
                stacklevel=2,
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore_sampler()
        if self._gates is None or self._written is None:
            return
        # Stochastic and exponential weight averaging, or a callback that takes the best epoch's weights back, write
        # theirs when training ends.
        weight: Tensor = self._site.module.weight  # type: ignore[assignment]
        changed = not torch.equal(weight.detach().cpu(), self._written)
        if trainer.strategy.reduce_boolean_decision(changed, all=False):
            self._set_gate()
            # Lightning has taken the module off the device by now.
            device = pl_module.device
            pl_module.to(trainer.strategy.root_device)
            self._remove(trainer, pl_module)
            pl_module.to(device)
            warnings.warn(
                "Another callback changed the weights when training ended, so units were removed anew, from the new "
                f"weights, {_AFTER_VALIDATION}",
                stacklevel=2,
            )
        self._written = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_sampler()

    def _restore_sampler(self) -> None:
        if self._undo is not None:
            self._undo()
        self._undo = None

    def _make_gates(self, pl_module: pl.LightningModule) -> None:
        if self._gates is None or all(m is not self._site.module for m in pl_module.modules()):
            name, head = find_head(pl_module, self.head)
            if head.bias is None:
                raise ValueError(f"The head {name!r} has no bias; MemorizationRemover refits weight and bias.")
            if "weight" not in head._parameters:
                raise ValueError(
                    f"The weight of the head {name!r} is computed from others (weight or spectral normalisation), so "
                    "it cannot be refitted. Use a plain linear layer."
                )
            self._site = Site(f"{name}:input", head, "input", head.in_features)
            self._gates = Gates([self._site])
            head.register_load_state_dict_post_hook(_open_when_loaded)  # type: ignore[no-untyped-call]

    def _set_gate(self, gate: Tensor | None = None) -> None:
        """By default it is open: a mask belongs to the weights that it was chosen for, and they are 0 where it is."""
        if self._gates is not None:
            self._gates[self._site.name] = torch.ones(self._site.require_num_units()) if gate is None else gate

    def _infer_groups(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Step 1; after an epoch the layer that tells the class best is probed, which speaks for the network."""
        what, classes, sites = "finding the shortcut", self._num_classes(), self._probe_sites(pl_module)
        again = self._looks_again
        probe, train, y, positions = self._probe(trainer, pl_module, sites, 1.0 if again else PROGRESS, what)
        sites = [site for site in sites if site.name == probe.site]
        held_out, held_y, held_group, _ = self._read(trainer, pl_module, held_out_loader(trainer), sites, what)
        _check_labels(held_y, classes, "validation")
        _check_present(held_y, classes, "validation")
        # What follows from it must be the same on all processes.
        found: dict[str, Any] = trainer.strategy.broadcast(
            {
                "epoch": trainer.current_epoch,
                "site": probe.site,
                "error": probe.error,
                "sure": probe.sure,
                "shortcut": probe.found,
            }
        )
        large = found["error"] > self.max_errors[int(again)] * (1 - 1 / classes)
        self._looks_again = large and not again
        if large and again:
            if found["error"] > self.probe["error"] / 2:
                self._looks_again = not self._has_learned(trainer, pl_module)
                return
            found["shortcut"] = False
        probe = probe._replace(found=found["shortcut"])
        if self.use_groups:
            if held_group is None:
                raise ValueError(
                    "use_groups=True, but the validation batches carry no groups. Yield (x, y, group), or set "
                    "use_groups=False."
                )
            held_out_groups = _within_classes(held_y, held_group)
            train_groups = _groups_like(held_out_groups, train, y, held_out[probe.site], held_y)
        else:
            train_groups = probe.groups(y)
            held_out_groups = probe.groups(held_y, held_out[probe.site])
        self._train_groups = trainer.strategy.broadcast(train_groups.cpu())
        self._held_out_groups = trainer.strategy.broadcast(held_out_groups.cpu())
        self._train_positions = positions.cpu()
        self._train_labels, self._held_out_labels = y.cpu(), held_y.cpu()
        self._typical = largest_groups(y.cpu(), self._train_groups, classes)
        self.probe = {**found, "groups": torch.bincount(self._train_groups).tolist()}

    def _has_learned(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Whether the network does better than chance on what it is trained on; else it leans on nothing yet."""
        rows, y, _, _ = self._read(trainer, pl_module, train_loader(trainer), [self._site], "probing", limit=LEARNED_ON)
        error = class_error(read_head(self._site.module)(rows[self._site.name]), y)
        learned: bool = trainer.strategy.broadcast(error < AT_CHANCE * (1 - 1 / self._num_classes()))
        return learned

    def _tell(self) -> None:
        if self._looks_again:
            found = "makes too many mistakes to follow a shortcut; the network is probed again after an epoch"
        elif self.probe["shortcut"]:
            found = "follows a shortcut"
            found += ", so that training draws the inferred groups equally often" * self.rebalance
        elif self.use_groups:
            found = "follows no shortcut"
        else:
            found = "follows no shortcut, so that the network is trained as it would be without demem"
        rank_zero_info(f"demem: the probe of {self.probe['site']!r} (error {self.probe['error']:.2f}) {found}.")

    def _probe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, sites: Sequence[Site], progress: float, what: str
    ) -> tuple[ShortcutProbe, Tensor, Tensor, Tensor]:
        """The shortcut's probe, the activations ``(S, N)`` it reads, labels, and positions of the training examples."""
        loader, classes = train_loader(trainer), self._num_classes()
        rows, y, _, positions = self._read(trainer, pl_module, loader, sites, what, limit=CHOSEN_ON)
        _check_labels(y, classes, "training")
        whole = len(y) < CHOSEN_ON
        if whole or int(torch.bincount(y, minlength=classes).min()) > 1:
            _check_present(y, classes, "training")
            probe = find_shortcut(rows, y, classes, progress, min_sure=self.min_sure)
            chosen = trainer.strategy.broadcast(probe.site)
            sites = [site for site in sites if site.name == chosen]
            if chosen != probe.site:  # rounding differs between devices
                probe = find_shortcut({chosen: rows[chosen]}, y, classes, min_sure=self.min_sure)
        if not whole:
            rows, y, _, positions = self._read(trainer, pl_module, loader, sites, what)
            _check_labels(y, classes, "training")
            _check_present(y, classes, "training")
            probe = find_shortcut(rows, y, classes, progress, min_sure=self.min_sure)
        return probe, rows[probe.site], y, positions

    @property
    def _refitted(self) -> bool:
        return any(r["chosen"] and r["refit"] for r in self.rounds)

    @property
    def _knows_groups(self) -> bool:
        return self.use_groups or bool(self.probe["shortcut"])

    def _probe_sites(self, pl_module: pl.LightningModule) -> list[Site]:
        if self.probe_layers is not None:
            return find_sites(pl_module, self.probe_layers)
        sites = [site for site in default_sites(pl_module, self.head) if site.module is not self._site.module]
        if not sites:  # a linear model: the head's input is all there is
            return [self._site]
        return [Site(f"{sites[0].name}:input", sites[0].module, "input"), *sites]

    def _remove(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gates, site = self._gates, self._site
        if gates is None:
            raise RuntimeError("MemorizationRemover was not set up; use it as a callback of a Trainer.")
        with torch.no_grad():  # in training that was resumed under a mask, momentum moves the weights behind it
            site.module.weight.mul_(gates[site.name].to(site.module.weight))  # type: ignore[operator, arg-type]
        self._set_gate()
        train, held_out, positions = self._examples(trainer, pl_module)
        rounds = remove_in_rounds(
            train,
            held_out,
            read_head(site.module),
            num_classes=self._num_classes(),
            shares=self.shares,
            typical=self._typical if self.atypical == "group" else None,
            atypical_share=self.atypical_share,
            l2=self.l2,
        )
        chosen = choose_round(rounds, held_out, self._typical, self.tolerance, self._knows_groups)
        chosen = trainer.strategy.broadcast(chosen)
        self.rounds = [
            {"refit": i > 0, "share": r.share, "worst": r.worst, "chosen": i == chosen} for i, r in enumerate(rounds)
        ]
        self.fine_tuned_on = 0
        if chosen > 0:
            gates[site.name] = trainer.strategy.broadcast(rounds[chosen].gate)
            write_head(site.module, trainer.strategy.broadcast(rounds[chosen].head))
            self.fine_tuned_on = self._fine_tune(trainer, pl_module, held_out, positions)
        self._removed_at_step = trainer.global_step
        self._unseen = True
        self._written = self._site.module.weight.detach().cpu().clone()  # type: ignore[operator]

    def _examples(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[Examples, Examples, Tensor]:
        """What the head reads of some training examples and of the held-out ones, and the latter's positions."""
        loader, name = train_loader(trainer), self._site.name
        known = self._train_positions
        few = few_of_each_group(self._train_groups, TRACED, torch.Generator().manual_seed(self.seed)).sort().values
        train, y, _, read = self._read(trainer, pl_module, loader, [self._site], "tracing", known[few])
        held_out, held_y, _, positions = self._read(
            trainer, pl_module, held_out_loader(trainer), [self._site], "tracing"
        )
        if not torch.equal(held_y.cpu(), self._held_out_labels) or not bool(torch.isin(read.cpu(), known).all()):
            raise _other_data()
        where = torch.searchsorted(known, read.cpu())
        if not torch.equal(y.cpu(), self._train_labels[where]):
            raise _other_data()
        train_group = self._train_groups[where]
        return (
            Examples(train[name].float(), y, train_group.to(y.device)),
            Examples(held_out[name].float(), held_y, self._held_out_groups.to(held_y.device)),
            positions.cpu(),
        )

    def _fine_tune(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, held_out: Examples, positions: Tensor
    ) -> int:
        """Step 4.  Returns how many examples it used."""
        loader = held_out_loader(trainer)
        subset = balanced_subset(held_out.group, torch.Generator().manual_seed(self.seed))
        fewest = int(torch.bincount(held_out.y[subset], minlength=self._num_classes()).min())
        if self.fine_tune == 0 or fewest < TUNED_ON or not has_positions(loader):
            return 0
        done = fine_tune(
            trainer,
            pl_module,
            network(pl_module, self._site.module),
            loader,
            positions[subset.cpu()],
            epochs=self.fine_tune,
            lr=self.fine_tune_lr,
            batch_size=train_loader(trainer).batch_size or 64,
            seed=self.seed,
        )
        return len(subset) if done else 0

    def _num_classes(self) -> int:
        return max(2, int(self._site.module.out_features))  # type: ignore[arg-type]

    def _read(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        loader: DataLoader[Any],
        sites: Sequence[Site],
        description: str,
        only: Tensor | None = None,
        limit: int | None = None,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor | None, Tensor]:
        """Pooled, ungated activations ``{site: (S, N)}``, labels, groups and positions of all processes' examples, in
        the order of the data set."""
        model = network(pl_module, self._site.module)
        if loader is train_loader(trainer):
            limit = min(self.max_examples, limit or self.max_examples)
        reader = ActivationReader(sites, "mean", ungated=True, optional=self.probe_layers is None)
        rows: dict[str, list[Tensor]] = {}
        index, labels, groups = [], [], []
        with undisturbed(trainer, pl_module), reader:
            for positions, batch in examples(trainer, pl_module, loader, description, limit, only):
                apply_model(model, batch.x)
                for name, values in reader.pop().items():
                    rows.setdefault(name, []).append(check_finite(values.float(), f"layer {name!r}"))
                index.append(positions)
                labels.append(batch.y)
                if batch.group is not None:
                    groups.append(batch.group)
        sizes = [len(y) for y in labels]
        uneven = [name for name, values in rows.items() if [len(v) for v in values] != sizes]
        if uneven and (self.probe_layers is not None or len(uneven) == len(rows)):
            raise ValueError(
                f"The layers {', '.join(uneven)} do not give one row per example: they run several times, or the first "
                "axis is not the batch (batch_first=False). Name others as probe_layers."
            )
        where = torch.cat(index)
        features = {n: gather_rows(trainer, where, torch.cat(rows[n])) for n in rows if n not in uneven}
        group = gather_rows(trainer, where, torch.cat(groups)) if len(groups) == len(labels) else None
        return features, gather_rows(trainer, where, torch.cat(labels)), group, gather_rows(trainer, where, where)


def _check_order(trainer: pl.Trainer, pl_module: pl.LightningModule, remover: Callback, gates: Gates | None) -> None:
    """Lightning's weight averaging pairs the buffers of the module with those of a copy from its own ``setup``, in
    order."""
    buffers = list(pl_module.buffers())
    if gates is None or not buffers or buffers[-1] is gates.buffers()[-1]:
        return
    for callback in trainer.callbacks[: trainer.callbacks.index(remover)]:  # type: ignore[attr-defined]
        if any(c.__name__ == "WeightAveraging" for c in type(callback).__mro__):
            raise ValueError(f"List MemorizationRemover before {type(callback).__name__} in the Trainer's callbacks.")


def _open_when_loaded(head: nn.Module, _: Any) -> None:
    gate = head._buffers.get("input_gate")
    if gate is not None:
        gate.fill_(1.0)


def _other_data() -> ValueError:
    return ValueError(
        "The training or validation data is not what was there when training began. Use a new MemorizationRemover for "
        "other data, and a data set that gives its examples in the same order each time."
    )


def _check_labels(y: Tensor, classes: int, where: str) -> None:
    if int(y.max()) >= classes:
        raise ValueError(f"Label {int(y.max())} in the {where} data is out of range: the head has {classes}.")


def _check_present(y: Tensor, classes: int, where: str) -> None:
    few = [c for c, n in enumerate(torch.bincount(y, minlength=classes).tolist()) if n < 2]
    if few:
        raise ValueError(
            f"Of class {few} there are fewer than two among the {len(y)} {where} examples, so its units cannot be "
            f"traced. Use a {where} set with every class (are the batches limited, or the set sorted by class?)."
        )


def _within_classes(y: Tensor, group: Tensor) -> Tensor:
    """Groups that do not span classes: those given, or, where they tell an attribute only, class and attribute."""
    groups = int(group.max()) + 1
    crossed = y * groups + group
    return group if len(set(crossed.tolist())) == len(set(group.tolist())) else crossed


def _groups_like(group: Tensor, features: Tensor, y: Tensor, held_out: Tensor, held_y: Tensor) -> Tensor:
    """Groups of the training examples, by a probe that was fitted on the held-out ones' true groups; an example can
    only be of a group that its class has."""
    probe = fit_linear(held_out, group, balanced_weights(group), 1e-2)
    logits = probe(features)
    possible = torch.zeros(int(max(y.max(), held_y.max())) + 1, logits.shape[1], dtype=torch.bool, device=y.device)
    possible[held_y, group] = True
    return logits.masked_fill(~possible[y], -torch.inf).argmax(1)


def _is_dry_run(trainer: pl.Trainer) -> bool:
    # A handful of batches cannot be traced: a class may be absent.
    return bool(getattr(trainer, "fast_dev_run", False))


def _is_last_step(trainer: pl.Trainer) -> bool:
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if steps is not None and steps != -1 and trainer.global_step >= steps:
        return True
    last_epoch = epochs is not None and epochs != -1 and trainer.current_epoch + 1 >= epochs
    return bool(last_epoch and trainer.is_last_batch)
