"""NeuronTune (Zheng et al. 2025): zero the units that are more active on wrong than on right held-out examples.

For each class a unit of the head's input is biased if its median activation on misclassified examples exceeds the
one on correctly classified examples; units biased for any class are zeroed and the last layer is retrained, classes
balanced, on the rest; then the same again with the new head.  Units are identified on one half of the held-out set;
the round is chosen by worst-class accuracy on the other half.  ``neuron_tune`` retrains on the training set,
``neuron_tune_held_out`` on the held-out set.  The retraining here is a convex fit (L-BFGS) instead of the paper's
epochs of SGD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.experiment import Experiment, Method, Outcome
from benchmarks.heads import balanced, fit_head, halves, worst_accuracy

ROUNDS = 8


def biased_units(z: Tensor, y: Tensor, predicted: Tensor) -> Tensor:
    """Mask ``(N,)`` of the units whose median on wrong minus median on right examples is positive for some class."""
    biased = torch.zeros(z.shape[1], dtype=torch.bool)
    for label in y.unique():
        wrong = (y == label) & (predicted != y)
        right = (y == label) & (predicted == y)
        if wrong.any() and right.any():
            biased |= z[wrong].median(0).values > z[right].median(0).values
    return biased


def _neuron_tune(experiment: Experiment, tune_on: str) -> Outcome:
    features = experiment.erm().features
    z, y = features.z["val"], features.y["val"]
    classes = len(features.weight)
    identify, select = halves(y, experiment.seed)
    head = (features.weight, features.bias)

    def score(head: tuple[Tensor, Tensor]) -> float:
        return worst_accuracy((z[select] @ head[0].T + head[1]).argmax(1), y[select], y[select])

    best, config = head, {"round": 0, "gated": 0, "tune_on": tune_on}
    best_score = score(head)
    tune_z, tune_y = (features.z["train"], features.y["train"]) if tune_on == "train" else (z[identify], y[identify])
    for number in range(1, ROUNDS + 1):
        predicted = (z[identify] @ head[0].T + head[1]).argmax(1)
        mask = biased_units(z[identify], y[identify], predicted)
        if not mask.any() or mask.all():
            break
        keep = (~mask).float()
        weight, bias = fit_head(tune_z * keep, tune_y, balanced(tune_y), num_classes=classes)
        head = (weight * keep, bias)
        if score(head) > best_score:
            best, best_score = head, score(head)
            config = {"round": number, "gated": int(mask.sum()), "tune_on": tune_on}
    return features.outcome(best, config)


def neuron_tune(experiment: Experiment) -> Outcome:
    return _neuron_tune(experiment, "train")


def neuron_tune_held_out(experiment: Experiment) -> Outcome:
    return _neuron_tune(experiment, "held_out")


_RULE = "round by worst class on half the held-out set"
METHODS = [
    Method("neuron_tune", "T0", _RULE, neuron_tune, uses_erm=True, grid=f"rounds 0 … {ROUNDS}"),
    Method("neuron_tune_held_out", "T0", _RULE, neuron_tune_held_out, uses_erm=True, grid=f"rounds 0 … {ROUNDS}"),
]
