"""Ours on the held-out source ``none``: no held-out label takes part.

``demem`` keeps a fifth of the training examples back by itself (``held_out=0.2``), as it does for a user without
validation data.  ``demem_as_trained`` is the network that this training leaves, with the inferred groups in equal
numbers, before the refit of its head and the fine-tuning on what was kept back.
"""

from __future__ import annotations

from benchmarks.baselines.demem import _BeforeRemoval, found_and_done
from benchmarks.experiment import Experiment, Method, Outcome, Run
from demem.callbacks import MemorizationRemover

KEPT_BACK = 0.2


def _run(experiment: Experiment, as_trained: bool) -> Outcome:
    remover, before = MemorizationRemover(held_out=KEPT_BACK, seed=experiment.seed), _BeforeRemoval()
    run = experiment.fit(callbacks=[before, remover, *experiment.watch()])
    config = {"kept_back": KEPT_BACK, **found_and_done(remover)}
    if as_trained:
        run.module.load_state_dict(before.state)
        config |= {"masked_share": 0.0, "refit": False, "fine_tuned_on": 0}
    return Outcome(Run(run.module, run.data, run.seconds).logits, config, run.extras())


def cured(experiment: Experiment) -> Outcome:
    return _run(experiment, as_trained=False)


def as_trained(experiment: Experiment) -> Outcome:
    return _run(experiment, as_trained=True)


METHODS = [
    Method("demem", "T0", "a fifth of the training set kept back by the callback", cured, ("none",)),
    Method(
        "demem_as_trained", "T0", "last epoch; balanced training without refit or fine-tuning", as_trained, ("none",)
    ),
]
