"""Just Train Twice (Liu et al. 2021): upweight the training examples that a briefly trained network gets wrong.

The identification network is trained by plain ERM for T epochs; training starts again from scratch with its errors
drawn λ times as often.  T, λ and the epoch are chosen by worst-group accuracy on validation, as in the paper (its
grid is larger: T 40–60, λ 20–100 for 300 epochs).  Tuned on the first seed.  On ``none`` no held-out group takes part:
T 1 and λ 50, the paper's values for CelebA, are fixed, and the epoch is chosen by worst class (tier T0).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.baselines.keep_best import KeepBest, fit_best
from benchmarks.experiment import Experiment, Method, Outcome, Run

EPOCHS = (1, 2)
UPWEIGHT = (20, 50)
FIXED = (1, 50)


def early_logits(experiment: Experiment, epochs: int) -> tuple[Tensor, Tensor]:
    """Logits ``(S, C)`` of the training examples after so many epochs, and their labels ``(S,)``."""
    run = experiment.fit(epochs=min(epochs, experiment.epochs))
    train_set = run.data.train_eval_dataset
    assert train_set is not None  # set up by fit
    return run.logits["train"], train_set.y


def _errors(experiment: Experiment, epochs: int) -> Tensor:
    """Which training examples it gets wrong: bool ``(S,)``."""
    logits, y = early_logits(experiment, epochs)
    return logits.argmax(1) != y


def _again(experiment: Experiment, wrong: Tensor, upweight: int, monitor: str) -> tuple[Run, KeepBest]:
    """The second training, with those examples upweighted."""
    data = experiment.data()
    data.example_weights = 1.0 + (upweight - 1.0) * wrong.float()
    return fit_best(experiment, monitor, data=data)


def jtt_fixed(experiment: Experiment) -> Outcome:
    epochs, upweight = FIXED
    wrong = _errors(experiment, epochs)
    run, best = _again(experiment, wrong, upweight, "val/worst_class_acc")
    config = {"identification_epochs": epochs, "upweight": upweight, "epoch": best.epoch, "errors": int(wrong.sum())}
    return Outcome(run.logits, config)


def jtt(experiment: Experiment) -> Outcome:
    runs: dict[tuple[int, int], tuple[Run, KeepBest, int]] = {}
    wrong: dict[int, Tensor] = {}

    def train(epochs: int, upweight: int) -> tuple[Run, KeepBest, int]:
        if epochs not in wrong:
            wrong[epochs] = _errors(experiment, epochs)
        if (epochs, upweight) not in runs:
            run, best = _again(experiment, wrong[epochs], upweight, "val/worst_group_acc")
            runs[epochs, upweight] = (run, best, int(wrong[epochs].sum()))
        return runs[epochs, upweight]

    def choose() -> dict[str, Any]:
        grid = [(epochs, upweight) for epochs in EPOCHS for upweight in UPWEIGHT]
        epochs, upweight = max(grid, key=lambda point: train(*point)[1].best)
        return {"identification_epochs": epochs, "upweight": upweight}

    tuned = experiment.choose("jtt", choose)
    run, best, errors = train(tuned["identification_epochs"], tuned["upweight"])
    return Outcome(run.logits, {"tuned": tuned, "epoch": best.epoch, "errors": errors})


METHODS = [
    Method("jtt", "T0", "T 1 and λ 50 fixed, epoch by worst class on validation", jtt_fixed, ("none",)),
    Method("jtt", "T1", "T, λ and epoch by worst group on validation", jtt, grid=f"T {EPOCHS}, λ {UPWEIGHT}"),
]
