"""NeuronTune (Zheng et al. 2025): zero the units that are more active on wrong than on right held-out examples.

A unit of the head's input is ranked by its median activation on misclassified minus its median on correctly
classified held-out examples of a class, over its standard deviation, and the largest such value over the classes;
the top share is zeroed and the last layer retrained, classes balanced, on the rest.  The paper zeroes all units
above 0; where nearly all are (a class's errors have a colour of their own), nothing would be left, so the share is
chosen.  Units are ranked on one half of the held-out set, the share is chosen by worst-class accuracy on the other.
``neuron_tune`` retrains on the training set, ``neuron_tune_held_out`` on the first half.  Retraining is a convex
fit (L-BFGS) instead of the paper's epochs of SGD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.experiment import Experiment, Method, Outcome
from benchmarks.heads import fit_head, halves
from demem.linear import balanced_weights
from demem.metrics import worst_group_accuracy

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)


def wrong_minus_right(z: Tensor, y: Tensor, predicted: Tensor) -> Tensor:
    """Median on wrong minus median on right examples, over the standard deviation; largest over classes: ``(N,)``."""
    scores = torch.full((z.shape[1],), -torch.inf)
    for label in y.unique():
        wrong = (y == label) & (predicted != y)
        right = (y == label) & (predicted == y)
        if wrong.any() and right.any():
            scores = torch.maximum(scores, z[wrong].median(0).values - z[right].median(0).values)
    return scores / z.std(0).clamp_min(1e-6)


def _neuron_tune(experiment: Experiment, tune_on: str) -> Outcome:
    features = experiment.erm().features
    z, y = features.z["val"], features.y["val"]
    first, second = halves(y, experiment.seed)
    predicted = (z @ features.weight.T + features.bias).argmax(1)
    scores = wrong_minus_right(z[first], y[first], predicted[first])
    tune_z, tune_y = (features.z["train"], features.y["train"]) if tune_on == "train" else (z[first], y[first])

    best: tuple[float, tuple[Tensor, Tensor], float] = (-1.0, (features.weight, features.bias), 0.0)
    for share in SHARES if bool(torch.isfinite(scores).any()) else ():
        kept = scores.argsort(descending=True, stable=True)[round(share * len(scores)) :]
        head = fit_head(tune_z[:, kept], tune_y, balanced_weights(tune_y), num_classes=len(features.weight))
        weight = torch.zeros_like(features.weight).index_copy(1, kept, head.weight)
        worst = float(worst_group_accuracy((z[second] @ weight.T + head.bias).argmax(1), y[second], y[second]))
        if worst > best[0]:
            best = (worst, (weight, head.bias), share)
    return features.outcome(best[1], {"share": best[2], "tune_on": tune_on})


def neuron_tune(experiment: Experiment) -> Outcome:
    return _neuron_tune(experiment, "train")


def neuron_tune_held_out(experiment: Experiment) -> Outcome:
    return _neuron_tune(experiment, "held_out")


_RULE = "share by worst class on half the held-out set"
METHODS = [
    Method("neuron_tune", "T0", _RULE, neuron_tune, uses_erm=True, grid=f"share {SHARES}"),
    Method("neuron_tune_held_out", "T0", _RULE, neuron_tune_held_out, uses_erm=True, grid=f"share {SHARES}"),
]
