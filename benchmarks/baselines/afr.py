"""Automatic Feature Reweighting (Qiu et al. 2023): refit the last layer on held-out training data, hard examples first.

ERM is trained on 80% of the training set.  On the other 20% the last layer is tuned from its ERM weights by
full-batch gradient descent on Σ μ_i CE_i + λ‖w − w_ERM‖², with μ_i ∝ β_y exp(−γ p_i), p_i the ERM network's
probability of the right class and β_y one over the class's frequency.  γ, λ and the step at which to stop are
chosen by worst-group accuracy on the validation set.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.experiment import Experiment, Features, Method, Outcome, Run
from demem.data import GroupedDataModule
from demem.linear import balanced_weights
from demem.metrics import worst_group_accuracy

GAMMA = (0.0, 4.0, 8.0, 12.0, 16.0, 20.0)
PULL = (0.0, 0.1, 0.3)
STEPS, LOOK_EVERY = 500, 10


def afr(experiment: Experiment) -> Outcome:
    run = experiment.erm("iid")
    features = run.features
    held = experiment.data(held_out="val")
    validation = Features(
        {"val": _features(run, held, "val")},
        {"val": held.val_dataset.y},
        {"val": held.val_dataset.group},
        features.weight,
        features.bias,
    )
    best = (-1.0, (features.weight, features.bias), {})
    for gamma in GAMMA:
        for pull in PULL:
            found = _descend(features, validation, gamma, pull)
            if found[0] > best[0]:
                best = (found[0], found[1], {"gamma": gamma, "pull": pull, "step": found[2]})
    outcome = features.outcome(best[1], best[2])
    # The row is judged on the whole training set like every other arm's.
    whole = experiment.data()
    z = _features(run, whole, "train")
    outcome.logits["train"] = z @ best[1][0].T + best[1][1]
    return outcome


def _descend(
    features: Features, validation: Features, gamma: float, pull: float
) -> tuple[float, tuple[Tensor, Tensor], int]:
    z, y = features.z["val"], features.y["val"]  # the slice held out from the training set
    right = torch.softmax(z @ features.weight.T + features.bias, 1).gather(1, y[:, None])[:, 0]
    mu = balanced_weights(y) * torch.exp(-gamma * right)
    mu = mu / mu.sum()
    # The step of gradient descent that no scale of the features can make diverge: 1 / (largest curvature).
    scaled = torch.cat([z, torch.ones(len(z), 1)], 1) * mu.sqrt()[:, None]
    rate = 1.0 / (0.5 * float(torch.linalg.matrix_norm(scaled, 2)) ** 2 + 2 * pull)
    weight, bias = (p.clone().requires_grad_() for p in (features.weight, features.bias))
    best = (-1.0, (features.weight, features.bias), 0)
    for step in range(STEPS + 1):
        if step % LOOK_EVERY == 0:
            with torch.no_grad():
                predicted = (validation.z["val"] @ weight.T + bias).argmax(1)
            score = float(worst_group_accuracy(predicted, validation.y["val"], validation.group["val"]))
            if score > best[0]:
                best = (score, (weight.detach().clone(), bias.detach().clone()), step)
        distance = (weight - features.weight).square().sum() + (bias - features.bias).square().sum()
        loss = (mu * F.cross_entropy(z @ weight.T + bias, y, reduction="none")).sum() + pull * distance
        gradients = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            weight -= rate * gradients[0]
            bias -= rate * gradients[1]
    return best


def _features(run: Run, data: GroupedDataModule, split: str) -> Tensor:
    """Features of another data module's split under this run's network."""
    return Run(run.module, data, 0.0).read(split)[0]


METHODS = [
    Method(
        "afr",
        "T1",
        "γ, λ and step by worst group on validation",
        afr,
        held_out=("val",),
        grid=f"γ {GAMMA}, λ {PULL}",
    )
]
