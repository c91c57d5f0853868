"""Plain training, and training with class-balanced sampling. Last epoch, nothing tuned."""

from __future__ import annotations

from benchmarks.experiment import Experiment, Method, Outcome


def erm(experiment: Experiment) -> Outcome:
    run = experiment.erm()
    return Outcome(run.logits, extras=run.extras())


def class_balanced(experiment: Experiment) -> Outcome:
    run = experiment.fit(data=experiment.data(sampling="class_balanced"))
    return Outcome(run.logits, {"sampling": "class_balanced"})


METHODS = [
    Method("erm", "T0", "last epoch", erm, uses_erm=True),
    Method("class_balanced", "T0", "last epoch", class_balanced),
]
