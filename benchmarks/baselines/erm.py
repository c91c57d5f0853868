"""Plain training, and training with a class-balanced loss. Last epoch, nothing tuned."""

from __future__ import annotations

from benchmarks.experiment import HELD_OUT, Experiment, Method, Outcome


def erm(experiment: Experiment) -> Outcome:
    run = experiment.erm()
    return Outcome(run.logits, extras=run.extras())


def class_balanced(experiment: Experiment) -> Outcome:
    run = experiment.fit(module=experiment.module(class_balanced=True))
    return Outcome(run.logits, {"loss": "class_balanced"})


METHODS = [
    Method("erm", "T0", "last epoch", erm, HELD_OUT, uses_erm=True),
    Method("class_balanced", "T0", "last epoch", class_balanced, HELD_OUT),
]
