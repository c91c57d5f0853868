"""Alignment-gated suppression (Dwivedi et al., *Regulating Internal Alignment Flows for Robust Learning Under Spurious
Correlations*, ICLR 2026): while ERM trains, shrink the connections of the last layer that speak for a class most
confidently.

For class c, unit j of the head's input φ, and the examples i of class c in a batch, the alignment energy is the mean
over i of −p_c(x_i)·W_cj·φ_j(x_i), p the softmax; the more negative, the more the connection supports the class.  It is
averaged over batches (EMA, .75; a class missing from a batch keeps its value).  After 5 epochs of warm-up, every step
multiplies by 1 − α, α = .05, the connections of each class whose energy is in the lowest 20%.  No label beyond the
class is used, and nothing is tuned.

Choices of ours: warm-up is at most half of the epochs; the share is taken class by class; the energy is that of the
batch just seen, with the weights after its step.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks.experiment import HELD_OUT, Experiment, Method, Outcome
from demem.batch import unpack_batch
from demem.sites import find_head

ALPHA, SHARE, DECAY, WARM_UP = 0.05, 0.2, 0.75, 5


def alignment_energy(features: Tensor, logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Mean of −p_c·W_cj·φ_j over the examples of each class: ``(C, N)``; NaN for a class without examples.

    Args:
        features: what the head reads ``(B, N)``.
        logits: what it gives ``(B, C)``.
        y: classes ``(B,)``.
        weight: of the head ``(C, N)``.
    """
    confidence = logits.softmax(1).gather(1, y[:, None])
    summed = torch.zeros_like(weight).index_add(0, y, confidence * features)
    counts = torch.bincount(y, minlength=len(weight))[:, None]
    return -weight * summed / counts  # 0 / 0 where a class is absent


def suppressed(weight: Tensor, energy: Tensor, alpha: float = ALPHA, share: float = SHARE) -> Tensor:
    """The head's weight, with the lowest ``share`` of each class's connections by energy times 1 − ``alpha``."""
    count = round(share * weight.shape[1])
    lowest = energy.topk(count, dim=1, largest=False).indices
    return weight.scatter(1, lowest, (1 - alpha) * weight.gather(1, lowest))


class AlignmentGatedSuppression(pl.Callback):
    """Suppresses after each step, from the epoch ``warm_up`` on."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.energy: Tensor | None = None
        self._seen: tuple[Tensor, Tensor] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def see(head: Any, args: tuple[Tensor], logits: Tensor) -> None:
            if head.training:
                self._seen = args[0].detach(), logits.detach()

        self._handle = find_head(pl_module)[1].register_forward_hook(see)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._seen is not None  # the step has just called the head
        head = find_head(pl_module)[1]
        energy = alignment_energy(*self._seen, unpack_batch(batch, pl_module).y, head.weight.detach())
        if self.energy is None:
            self.energy = energy
        blended = DECAY * self.energy + (1 - DECAY) * energy
        # A class that is missing now keeps its value; one that was missing until now starts with its first.
        self.energy = torch.where(energy.isnan(), self.energy, torch.where(self.energy.isnan(), energy, blended))
        if trainer.current_epoch >= self.warm_up:
            with torch.no_grad():
                head.weight.copy_(suppressed(head.weight, self.energy.nan_to_num()))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._handle.remove()


def ags(experiment: Experiment) -> Outcome:
    warm_up = min(WARM_UP, experiment.epochs // 2)
    run = experiment.fit(callbacks=[AlignmentGatedSuppression(warm_up)], validate=False)
    return Outcome(run.logits, {"alpha": ALPHA, "share": SHARE, "warm_up": warm_up})


METHODS = [Method("ags", "T0", "last epoch", ags, HELD_OUT, grid="as published")]
