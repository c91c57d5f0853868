"""Example-tied dropout (Maini et al. 2023; for spurious correlations FairDropout, 2025), at the input of the head.

A share of the units, ``general``, is always on.  Of the others each training example uses only its own share
``own``, drawn once from its index, so that what is particular to an example is stored there.  At test time the
example units are zeroed and the general ones scaled by (general + own) / general.  The paper puts the layer after
every block; here it is at the head's input, where the example's index can reach it for any network.  Both shares
are tuned on the first seed by worst-class accuracy on validation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.indexed import Indexed
from benchmarks.experiment import HELD_OUT, Experiment, Method, Outcome, Run
from demem.metrics import worst_group_accuracy
from demem.module import Classifier
from demem.sites import find_head

GENERAL = (0.2, 0.5)
OWN = (0.1, 0.3)


class ExampleTiedDropout:
    """Hooks on a Classifier: masks what its head reads, by the indices of the training batch."""

    def __init__(self, module: Classifier, examples: int, general: float, own: float, seed: int) -> None:
        head = find_head(module)[1]
        units = head.in_features
        self.fixed = max(1, round(general * units))
        self.scale = (general + own) / general
        generator = torch.Generator().manual_seed(seed)
        self.masks = torch.rand(examples, units, generator=generator) < own / (1 - general)
        self.masks[:, : self.fixed] = True
        self.indices: Tensor | None = None
        self.module = module
        step = module.training_step

        def training_step(batch: Any, batch_idx: int) -> Tensor:
            self.indices = batch["index"]
            try:
                return step(batch, batch_idx)
            finally:
                self.indices = None

        module.training_step = training_step  # type: ignore[method-assign]
        head.register_forward_pre_hook(self._mask)

    def _mask(self, head: nn.Module, args: tuple[Tensor]) -> Tensor:
        z = args[0]
        if self.indices is not None:
            return z * self.masks[self.indices.cpu()].to(z)
        kept = torch.zeros_like(z)
        kept[:, : self.fixed] = z[:, : self.fixed] * self.scale
        return kept


def example_tied_dropout(experiment: Experiment) -> Outcome:
    runs: dict[tuple[float, float], tuple[Run, float]] = {}

    def train(general: float, own: float) -> tuple[Run, float]:
        if (general, own) not in runs:
            data, module = experiment.data(), experiment.module()
            assert data.train_dataset is not None  # set up by the experiment
            data.train_dataset = Indexed(data.train_dataset)
            ExampleTiedDropout(module, len(data.train_dataset), general, own, experiment.seed)
            run = experiment.fit(module, data)
            y = data.val_dataset.y  # type: ignore[union-attr]
            runs[general, own] = (run, float(worst_group_accuracy(run.logits["val"].argmax(1), y, y)))
        return runs[general, own]

    def choose() -> dict[str, Any]:
        grid = [(general, own) for general in GENERAL for own in OWN]
        general, own = max(grid, key=lambda point: train(*point)[1])
        return {"general": general, "own": own}

    tuned = experiment.choose("example_tied_dropout", choose)
    run, _ = train(**tuned)
    return Outcome(run.logits, {"tuned": tuned})


METHODS = [
    Method(
        "example_tied_dropout",
        "T0",
        "shares by worst class on validation, last epoch",
        example_tied_dropout,
        HELD_OUT,
        grid=f"general {GENERAL}, own {OWN}",
    )
]
