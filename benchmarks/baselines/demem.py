"""This project's remover with its defaults, the same on every data set: nothing is tuned."""

from __future__ import annotations

from functools import partial

from benchmarks.experiment import Experiment, Method, Outcome
from demem.callbacks import MemorizationRemover


def demem(experiment: Experiment, use_groups: bool) -> Outcome:
    remover = MemorizationRemover(use_groups=use_groups, seed=experiment.seed)
    run = experiment.fit(callbacks=[*experiment.watch(), remover])
    chosen = next(r["share"] for r in remover.rounds if r["chosen"])
    return Outcome(run.logits, {"masked_share": chosen, "probe": remover.probe}, run.extras())


METHODS = [
    Method("demem", "T0", "worst inferred group, held out", partial(demem, use_groups=False)),
    Method("demem", "T2", "worst group, held out", partial(demem, use_groups=True)),
]
