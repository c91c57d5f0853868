"""Choose epoch and hyper-parameters on validation data, as the papers' own rules do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from benchmarks.experiment import Experiment, Run
from demem.callbacks import WorstGroupMonitor


class KeepBest(pl.Callback):
    """Remember the weights of the epoch with the highest value of a logged metric."""

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.best, self.epoch = -1.0, -1
        self.weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = float(trainer.callback_metrics[self.monitor])
        if value > self.best:
            self.best, self.epoch = value, trainer.current_epoch
            self.weights = {k: v.detach().cpu().clone() for k, v in pl_module.state_dict().items()}


def fit_best(experiment: Experiment, monitor: str, **options: Any) -> tuple[Run, KeepBest]:
    """``experiment.fit``, then back to the epoch where ``monitor``, e.g. ``val/worst_class_acc``, was highest."""
    keep = KeepBest(monitor)
    run = experiment.fit(callbacks=[WorstGroupMonitor(per_group=False), keep], **options)
    run.module.load_state_dict(keep.weights)
    return run, keep


def fit_tuned(
    experiment: Experiment,
    arm: str,
    grid: Sequence[dict[str, Any]],
    fit: Callable[[dict[str, Any]], tuple[Run, KeepBest]],
) -> tuple[Run, KeepBest, dict[str, Any]]:
    """On the first seed the point of ``grid`` whose best epoch scores highest, the first of equals; on later seeds the
    same point, trained alone."""
    fitted: list[tuple[Run, KeepBest, dict[str, Any]]] = []

    def choose() -> dict[str, Any]:
        for point in grid:
            run, best = fit(point)
            if not fitted or best.best > fitted[0][1].best:
                fitted[:] = [(run, best, point)]  # one network at a time is kept
        return fitted[0][2]

    tuned = experiment.choose(arm, choose)
    if fitted:
        return fitted[0]
    return (*fit(tuned), tuned)
