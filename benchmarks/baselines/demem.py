"""Ours: :class:`demem.callbacks.MemorizationRemover` with its defaults, in the same fit as every other arm.

T0 sees no group label; T2 may use those of the held-out examples (``use_groups=True``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from benchmarks.experiment import Experiment, Features, Method, Outcome, Run
from benchmarks.heads import fit_head
from demem.callbacks import MemorizationRemover
from demem.groups import Groups
from demem.linear import LinearHead, balanced_weights
from demem.metrics import worst_group_accuracy
from demem.removal import Examples, Round
from demem.tracing import atypical_by_margin, linear_impact, margins


class _BeforeRemoval(pl.Callback):
    """Keeps the weights after the last step; must come before the remover in the list of callbacks."""

    state: dict[str, Tensor]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs:
            self.state = copy.deepcopy(pl_module.state_dict())


class _KeepsRounds(MemorizationRemover):
    """Keeps the rounds that it chose from last, heads and all, for the figure."""

    judged: Sequence[Round] = ()

    def choose(self, rounds: Sequence[Round], held_out: Examples, groups: Groups) -> int:
        self.judged = rounds
        return super().choose(rounds, held_out, groups)


def _run(experiment: Experiment, use_groups: bool) -> Outcome:
    kind = _KeepsRounds if experiment.watched else MemorizationRemover
    remover, before = kind(use_groups=use_groups, seed=experiment.seed), _BeforeRemoval()
    run = experiment.fit(callbacks=[before, remover, *experiment.watch()])
    outcome = Outcome(run.logits, {"use_groups": use_groups, **found_and_done(remover)}, run.extras())
    if experiment.watched:
        after = run.features
        run.module.load_state_dict(before.state)
        trained = Run(run.module, run.data, 0).features
        outcome.extras["units"] = unit_map(trained, after)
        assert isinstance(remover, _KeepsRounds)
        outcome.extras["rounds"] = rounds_on_test(trained, remover)
    return outcome


def found_and_done(remover: MemorizationRemover) -> dict[str, Any]:
    """What a remover found and did, for the row's ``config``.

    Raises:
        RuntimeError: it has not seen the start of training.
    """
    groups = remover.groups
    if groups is None:
        raise RuntimeError("The remover has not seen the start of training.")
    chosen = next(r for r in remover.rounds if r.chosen)
    probe = {name: getattr(groups, name) for name in ("epoch", "site", "error", "sure", "shortcut", "kind", "why")}
    return {
        "masked_share": chosen.share,
        "weight": chosen.weight,
        "refit": chosen.refitted,
        "fine_tuned_on": remover.fine_tuned_on,
        "probe": {**probe, "groups": groups.sizes},
    }


def rounds_on_test(trained: Features, remover: _KeepsRounds) -> list[dict[str, Any]]:
    """What the remover noted of its rounds, and the test accuracy on the worst true group had it kept each of them and
    not fine-tuned.

    For the figure only: test data decides nothing.
    """
    z, y, group = trained.z["test"], trained.y["test"], trained.group["test"]
    heads = [LinearHead(*(part.cpu() for part in round_.head)) for round_ in remover.judged]
    return [
        {**asdict(record), "test_worst": float(worst_group_accuracy(head(z).argmax(1), y, group))}
        for record, head in zip(remover.rounds, heads, strict=True)
    ]


def unit_map(trained: Features, after: Features) -> list[dict[str, Any]]:
    """For each unit that the head reads: mean impact on typical and on atypical held-out examples (logits), and whether
    it is gated.

    *Before*: under a class-balanced head fitted on the training set, where the spurious pattern is at work; *after*:
    in the network that the remover left.  Atypical are the 20% of each class with the lowest margin under the former.
    """
    y = trained.y["val"]
    head = fit_head(
        trained.z["train"],
        trained.y["train"],
        balanced_weights(trained.y["train"]),
        num_classes=len(trained.weight),
    )
    atypical = atypical_by_margin(margins(head(trained.z["val"]), y), y)
    columns = []
    for z, (weight, bias) in ((trained.z["val"], head), (after.z["val"], (after.weight, after.bias))):
        impact = linear_impact(z, weight, y, logits=z @ weight.T + bias)
        columns += [impact[~atypical].mean(0).tolist(), impact[atypical].mean(0).tolist()]
    gated = (after.weight == 0).all(0).tolist()  # the refitted head has the weight 0 at masked units
    names = ("typical", "atypical", "typical_after", "atypical_after", "gated")
    return [
        {"unit": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(zip(*columns, gated, strict=True))
    ]


METHODS = [
    Method("demem", "T0", "share by worst inferred group on held-out examples", partial(_run, use_groups=False)),
    Method("demem", "T2", "share by worst group on held-out examples", partial(_run, use_groups=True)),
]
