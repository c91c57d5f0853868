"""Ours: :class:`demem.callbacks.MemorizationRemover` with its defaults, in the same fit as every other arm.

T0 sees no group label; T2 may use those of the held-out examples (``use_groups=True``).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.experiment import Experiment, Method, Outcome, Run
from benchmarks.heads import fit_head
from demem.callbacks import MemorizationRemover
from demem.linear import balanced_weights
from demem.tracing import atypical_by_margin, linear_impact, margins


def _run(experiment: Experiment, use_groups: bool) -> Outcome:
    remover = MemorizationRemover(use_groups=use_groups, seed=experiment.seed)
    run = experiment.fit(callbacks=[remover, *experiment.watch()])
    chosen = next(r for r in remover.rounds if r["chosen"])
    config = {"use_groups": use_groups, "masked_share": chosen["share"], "probe": remover.probe}
    extras = run.extras()
    if experiment.watched:
        extras["units"] = unit_map(run)
        extras["rounds"] = [dict(r) for r in remover.rounds]
    return Outcome(run.logits, config, extras)


def unit_map(run: Run) -> list[dict[str, Any]]:
    """For each unit that the head reads: mean impact on typical and on atypical held-out examples (logits), and whether
    it is gated.

    Impact is measured before any mask, under a class-balanced head fitted on the training set, where the spurious
    pattern is at work; atypical are the 20% of each class with the lowest margin.
    """
    features = run.features
    z, y = features.z["val"], features.y["val"]
    weight, bias = fit_head(
        features.z["train"],
        features.y["train"],
        balanced_weights(features.y["train"]),
        num_classes=len(features.weight),
    )
    logits = z @ weight.T + bias
    impact = linear_impact(z, weight, y, logits=logits)
    atypical = atypical_by_margin(margins(logits, y), y)
    gated = (features.weight == 0).all(0)  # the refitted head has the weight 0 at masked units
    columns = (impact[~atypical].mean(0).tolist(), impact[atypical].mean(0).tolist(), gated.tolist())
    return [
        {"unit": i, "typical": t, "atypical": a, "gated": g} for i, (t, a, g) in enumerate(zip(*columns, strict=True))
    ]


METHODS = [
    Method("demem", "T0", "share by worst inferred group on held-out examples", partial(_run, use_groups=False)),
    Method("demem", "T2", "share by worst group on held-out examples", partial(_run, use_groups=True)),
]
