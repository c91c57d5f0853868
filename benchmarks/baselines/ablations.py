"""Ours with its unit-level part changed: what every claim about units is measured against.

| arm | units |
|---|---|
| ``demem_no_units`` | none: the remover with nothing to mask |
| ``demem_random_units`` | as many, drawn at random |
| ``demem_magnitude_units`` | as many, the largest by magnitude |
| ``demem_all_units`` | all alike |

Only the first one differs from ``demem`` with the options that the remover has today.  The others go into
:data:`ABLATIONS`, an entry each, as soon as it has the options; until then ``--methods`` does not know them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.experiment import Experiment, Method, Outcome
from demem.callbacks import MemorizationRemover

ABLATIONS: dict[str, dict[str, Any]] = {
    "demem_no_units": {"shares": ()},
}
"""Arms by name: the options of the remover that make them."""


def _ablated(experiment: Experiment, options: dict[str, Any]) -> Outcome:
    remover = MemorizationRemover(seed=experiment.seed, **options)
    run = experiment.fit(callbacks=[remover])
    chosen = next(r for r in remover.rounds if r.chosen)
    config = {"masked_share": chosen.share, "refit": chosen.refitted, "fine_tuned_on": remover.fine_tuned_on}
    return Outcome(run.logits, config)


METHODS = [
    Method(name, "T0", "as trained or refitted by held-out examples", partial(_ablated, options=options))
    for name, options in ABLATIONS.items()
]
