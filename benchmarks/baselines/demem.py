"""Ours: :class:`demem.callbacks.MemorizationRemover` with its defaults, in the same fit as every other arm.

T0 sees no group label; T2 may use those of the held-out examples (``use_groups=True``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.experiment import Experiment, Method, Outcome, Run
from benchmarks.heads import fit_head, worst_accuracy
from demem.callbacks import MemorizationRemover
from demem.linear import balanced_weights
from demem.removal import Examples, remove_in_rounds
from demem.tracing import atypical_by_margin, linear_impact, margins


def _run(experiment: Experiment, use_groups: bool) -> Outcome:
    remover = MemorizationRemover(use_groups=use_groups, seed=experiment.seed)
    run = experiment.fit(callbacks=[remover, *experiment.watch()])
    chosen = next(r for r in remover.rounds if r["chosen"])
    config = {"use_groups": use_groups, "masked_share": chosen["share"], "probe": remover.probe}
    extras = run.extras()
    if experiment.watched:
        extras["units"] = unit_map(run)
        extras["rounds"] = rounds_on_test(run, remover)
    return Outcome(run.logits, config, extras)


def rounds_on_test(run: Run, remover: MemorizationRemover) -> list[dict[str, Any]]:
    """What the remover noted of its rounds, and the test accuracy on the worst true group had it kept each of them.

    For the figure only: test data decides nothing.
    """
    features, groups = run.features, remover.state_dict()
    sets = [
        Examples(features.z[split], features.y[split], groups[key])
        for split, key in (("train", "train_groups"), ("val", "held_out_groups"))
    ]
    rounds = remove_in_rounds(*sets, num_classes=len(features.weight), shares=remover.shares, l2=remover.l2)
    z, y, group = features.z["test"], features.y["test"], features.group["test"]
    return [
        {**noted, "test_worst": worst_accuracy(r.head(z).argmax(1), y, group)}
        for noted, r in zip(remover.rounds, rounds, strict=True)
    ]


def unit_map(run: Run) -> list[dict[str, Any]]:
    """For each unit that the head reads: mean impact on typical and on atypical held-out examples (logits), and whether
    it is gated.

    *Before*: under a class-balanced head fitted on the training set, where the spurious pattern is at work; *after*:
    under the head that the remover left.  Atypical are the 20% of each class with the lowest margin under the former.
    """
    features = run.features
    z, y = features.z["val"], features.y["val"]
    before, bias = fit_head(
        features.z["train"],
        features.y["train"],
        balanced_weights(features.y["train"]),
        num_classes=len(features.weight),
    )
    atypical = atypical_by_margin(margins(z @ before.T + bias, y), y)
    columns = []
    for weight, shift in ((before, bias), (features.weight, features.bias)):
        impact = linear_impact(z, weight, y, logits=z @ weight.T + shift)
        columns += [impact[~atypical].mean(0).tolist(), impact[atypical].mean(0).tolist()]
    gated = (features.weight == 0).all(0).tolist()  # the refitted head has the weight 0 at masked units
    names = ("typical", "atypical", "typical_after", "atypical_after", "gated")
    return [
        {"unit": i, **dict(zip(names, row, strict=True))} for i, row in enumerate(zip(*columns, gated, strict=True))
    ]


METHODS = [
    Method("demem", "T0", "share by worst inferred group on held-out examples", partial(_run, use_groups=False)),
    Method("demem", "T2", "share by worst group on held-out examples", partial(_run, use_groups=True)),
]
