"""Ours on the held-out source ``none``: training with the inferred groups in equal numbers, and nothing after it.

:class:`demem.callbacks.MemorizationRemover` cannot run without validation data, so it runs as ever and the weights
before its removal step are judged: no mask, no refit, no fine-tuning.  It reads the held-out labels for its later
steps; what is judged has not been touched by them.
"""

from __future__ import annotations

from benchmarks.baselines.demem import _BeforeRemoval
from benchmarks.experiment import Experiment, Method, Outcome, Run
from demem.callbacks import MemorizationRemover


def as_trained(experiment: Experiment) -> Outcome:
    remover, before = MemorizationRemover(seed=experiment.seed), _BeforeRemoval()
    run = experiment.fit(callbacks=[before, remover, *experiment.watch()])
    run.module.load_state_dict(before.state)
    assert remover.groups is not None  # inferred before the first step
    config = {"shortcut": remover.groups.shortcut, "groups": remover.groups.sizes}
    return Outcome(Run(run.module, run.data, run.seconds).logits, config, run.extras())


METHODS = [
    Method("demem", "T0", "last epoch; balanced training without masks, refit or fine-tuning", as_trained, ("none",))
]
