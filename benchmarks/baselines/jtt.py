"""Just Train Twice (Liu et al. 2021): upweight the training examples that a briefly trained network gets wrong.

The identification network is trained by plain ERM for T epochs; training starts again from scratch with its errors
drawn λ times as often.  T, λ and the epoch are chosen by worst-group accuracy on validation, as in the paper (its
grid is larger: T 40–60, λ 20–100 for 300 epochs).  Tuned on the first seed.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.baselines.keep_best import KeepBest, fit_best
from benchmarks.experiment import Experiment, Method, Outcome, Run

EPOCHS = (1, 2)
UPWEIGHT = (20, 50)


def jtt(experiment: Experiment) -> Outcome:
    runs: dict[tuple[int, int], tuple[Run, KeepBest, int]] = {}
    wrong: dict[int, torch.Tensor] = {}

    def train(epochs: int, upweight: int) -> tuple[Run, KeepBest, int]:
        if epochs not in wrong:
            first = experiment.fit(epochs=min(epochs, experiment.epochs))
            train_set = first.data.train_eval_dataset
            assert train_set is not None  # set up by fit
            wrong[epochs] = first.logits["train"].argmax(1) != train_set.y
        if (epochs, upweight) not in runs:
            data = experiment.data()
            data.example_weights = 1.0 + (upweight - 1.0) * wrong[epochs].float()
            run, best = fit_best(experiment, "val/worst_group_acc", data=data)
            runs[epochs, upweight] = (run, best, int(wrong[epochs].sum()))
        return runs[epochs, upweight]

    def choose() -> dict[str, Any]:
        grid = [(epochs, upweight) for epochs in EPOCHS for upweight in UPWEIGHT]
        epochs, upweight = max(grid, key=lambda point: train(*point)[1].best)
        return {"identification_epochs": epochs, "upweight": upweight}

    tuned = experiment.choose("jtt", choose)
    run, best, errors = train(tuned["identification_epochs"], tuned["upweight"])
    return Outcome(run.logits, {"tuned": tuned, "epoch": best.epoch, "errors": errors})


METHODS = [Method("jtt", "T1", "T, λ and epoch by worst group on validation", jtt, grid=f"T {EPOCHS}, λ {UPWEIGHT}")]
