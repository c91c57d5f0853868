"""Ours with its unit-level part changed: what every claim about units is measured against.

| arm | units that are masked |
|---|---|
| ``demem_no_units`` | none |
| ``demem_random_units`` | as many, drawn at random |
| ``demem_magnitude_units`` | as many, those with the largest weights in the head |

There is no arm that treats all units alike: a head that is refitted undoes a factor that all its inputs share.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.demem import found_and_done
from benchmarks.baselines.demem_none import KEPT_BACK
from benchmarks.experiment import Experiment, Method, Outcome
from demem.callbacks import MemorizationRemover


class RandomUnits(MemorizationRemover):
    """Masks units drawn at random."""

    def score(self, features: Tensor, weight: Tensor, y: Tensor, atypical: Tensor, *, logits: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(features.shape[1], generator=generator).to(features.device)


class LargestUnits(MemorizationRemover):
    """Masks the units with the largest weights in the head, in units of the logits."""

    def score(self, features: Tensor, weight: Tensor, y: Tensor, atypical: Tensor, *, logits: Tensor) -> Tensor:
        return weight.norm(dim=0) * features.std(0)


ABLATIONS: dict[str, tuple[type[MemorizationRemover], dict[str, Any]]] = {
    "demem_no_units": (MemorizationRemover, {"shares": ()}),
    "demem_random_units": (RandomUnits, {}),
    "demem_magnitude_units": (LargestUnits, {}),
}
"""Arms by name: the callback and the options that make them."""


def _ablated(experiment: Experiment, kind: type[MemorizationRemover], options: dict[str, Any]) -> Outcome:
    held_out = {"held_out": KEPT_BACK} if experiment.held_out == "none" else {}
    remover = kind(seed=experiment.seed, **held_out, **options)
    run = experiment.fit(callbacks=[remover])
    return Outcome(run.logits, found_and_done(remover))


SELECTION = "as trained or refitted by held-out examples"
METHODS = [
    Method(name, "T0", SELECTION, partial(_ablated, kind=kind, options=options), sources)
    for sources in (("val", "iid"), ("none",))
    for name, (kind, options) in ABLATIONS.items()
]
