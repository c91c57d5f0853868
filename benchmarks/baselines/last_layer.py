"""Retrain the last layer of the ERM network on held-out data: CB-LLR (no groups) and DFR (held-out groups).

CB-LLR: LaBonte et al. 2023, class-balanced last-layer retraining.  DFR: Kirichenko et al. 2023, the validation
form: L1 logistic regression on standardised features, strength tuned on one half of the held-out set and judged by
worst-group accuracy on the other, then refitted on 20 random group-balanced subsets of the whole, whose weights are
averaged. ``dfr_l2`` replaces subsets and L1 by group weights and L2 (L-BFGS).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.experiment import Experiment, Features, Method, Outcome
from benchmarks.heads import fit_head, halves
from demem.linear import balanced_weights
from demem.metrics import worst_group_accuracy

L2 = (0.03, 0.1, 0.3, 1.0, 3.0)
C = (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)
SUBSETS = 20


def cb_llr(experiment: Experiment) -> Outcome:
    features = experiment.erm().features
    return _weighted(experiment, features, features.y["val"])


def dfr_l2(experiment: Experiment) -> Outcome:
    features = experiment.erm().features
    return _weighted(experiment, features, features.group["val"])


def _weighted(experiment: Experiment, features: Features, key: Tensor) -> Outcome:
    """Head on the whole held-out set, each value of ``key`` (class or group) with the same weight; L2 by halves."""
    z, y = features.z["val"], features.y["val"]
    classes = len(features.weight)
    first, second = halves(key, experiment.seed)

    def score(l2: float) -> float:
        weight, bias = fit_head(z[first], y[first], balanced_weights(key[first]), l2, classes)
        return float(worst_group_accuracy((z[second] @ weight.T + bias).argmax(1), y[second], key[second]))

    l2 = max(L2, key=score)
    return features.outcome(
        fit_head(z, y, balanced_weights(key), l2, classes), {"l2": l2, "head_on": experiment.held_out}
    )


def dfr(experiment: Experiment) -> Outcome:
    features = experiment.erm().features
    z, y, group = (part["val"] for part in (features.z, features.y, features.group))
    rng = np.random.default_rng(experiment.seed)
    first, second = halves(group, experiment.seed)
    subset = first[_as_many_of_each(group[first], rng)]

    def score(c: float) -> float:
        weight, bias = _l1_head(z[subset], y[subset], c)
        return float(worst_group_accuracy((z[second] @ weight.T + bias).argmax(1), y[second], group[second]))

    c = max(C, key=score)
    heads = []
    for _ in range(SUBSETS):
        chosen = _as_many_of_each(group, rng)
        heads.append(_l1_head(z[chosen], y[chosen], c))
    mean = tuple(torch.stack(parts).mean(0) for parts in zip(*heads, strict=True))
    config = {"penalty": "l1", "c": c, "subsets": SUBSETS, "head_on": experiment.held_out}
    return features.outcome((mean[0], mean[1]), config)


def _as_many_of_each(group: Tensor, rng: np.random.Generator) -> Tensor:
    """Positions of as many random examples of each group as the smallest group has."""
    members: Sequence[np.ndarray] = [np.flatnonzero(group.numpy() == g) for g in group.unique().tolist()]
    smallest = min(len(m) for m in members)
    return torch.from_numpy(np.concatenate([rng.permutation(m)[:smallest] for m in members]))


def _l1_head(z: Tensor, y: Tensor, c: float) -> tuple[Tensor, Tensor]:
    import sklearn
    from packaging.version import Version
    from sklearn.linear_model import LogisticRegression

    mean, std = z.mean(0), z.std(0).clamp_min(1e-6)
    # Before 1.8 l1_ratio alone is ignored; from then on penalty is deprecated.
    l1 = {"l1_ratio": 1.0} if Version(sklearn.__version__) >= Version("1.8") else {"penalty": "l1"}
    model = LogisticRegression(C=c, solver="liblinear", random_state=0, **l1)
    model.fit(((z - mean) / std).numpy(), y.numpy())
    weight = torch.from_numpy(model.coef_).float() / std
    bias = torch.from_numpy(model.intercept_).float() - weight @ mean
    if len(weight) == 1:  # two classes: one row for class 1
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    return weight, bias


METHODS = [
    Method("cb_llr", "T0", "worst class on half the held-out set", cb_llr, uses_erm=True, grid=f"L2 {L2}"),
    Method("dfr", "T2", "worst group on half the held-out set", dfr, uses_erm=True, grid=f"L1 C {C}"),
    Method("dfr_l2", "T2", "worst group on half the held-out set", dfr_l2, uses_erm=True, grid=f"L2 {L2}"),
]
