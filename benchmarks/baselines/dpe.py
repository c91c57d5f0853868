"""Diversified prototypical ensembles (To et al., ICML 2025): many prototype heads on the ERM features, kept apart.

The last layer is replaced by 15 members.  A member has one prototype for each class and a scale d, and its logits are
−|d| times the Euclidean distance between the normalised feature and the normalised prototypes.  It is fitted on its own
random subset of the held-out data in which all classes (T0) or groups (T2) are equally frequent, by cross-entropy on 20
times its logits (the IsoMax+ loss) plus λ times the mean squared cosine between its prototypes and those of earlier
members of the same class.  The members' probabilities, without the factor 20, are averaged.

Choices of ours: full-batch Adam (rate .01, 100 steps) instead of epochs of SGD; the similarity is squared and averaged,
so that λ does not depend on width and number of members.  λ is chosen by worst class (T0) or group (T2) on one half
of the held-out data for members fitted on the other; then all are fitted on the whole.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.experiment import SPLITS, Experiment, Method, Outcome
from benchmarks.heads import halves
from demem.linear import few_of_each_group
from demem.metrics import worst_group_accuracy

MEMBERS, SHARPNESS, STEPS, RATE = 15, 20.0, 100, 0.01
DIVERSITY = (0.1, 1.0, 10.0)


class Member(NamedTuple):
    """One head: prototypes ``(C, N)`` and the scale of its distances."""

    prototypes: Tensor
    scale: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Logits ``(S, C)``."""
        cosine = F.normalize(z) @ F.normalize(self.prototypes).T
        # ‖a − b‖² = 2 − 2·a·b for unit vectors; the floor keeps the root's gradient finite.
        return -self.scale.abs() * (2 - 2 * cosine).clamp_min(1e-6).sqrt()


def similarity(prototypes: Tensor, earlier: Tensor) -> Tensor:
    """Mean squared cosine between prototypes ``(C, N)`` and those of ``M`` earlier members ``(M, C, N)``, by class."""
    return (F.normalize(prototypes) * F.normalize(earlier, dim=2)).sum(2).square().mean()


def fit_members(
    z: Tensor, y: Tensor, key: Tensor, num_classes: int, diversity: float, seed: int = 0, members: int = MEMBERS
) -> list[Member]:
    """Members one after the other, each on a subset with equally many examples of every value of ``key``.

    Args:
        z: features ``(S, N)``.
        y: classes ``(S,)``.
        key: classes or groups ``(S,)``.
        num_classes: number of classes.
        diversity: λ.
        seed: of the subsets and of where the prototypes start.
        members: how many.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.bincount(key)
    smallest = int(counts[counts > 0].min())
    found: list[Member] = []
    for _ in range(members):
        chosen = few_of_each_group(key, smallest, generator)
        x, labels = F.normalize(z[chosen]), y[chosen]
        prototypes = torch.randn(num_classes, z.shape[1], generator=generator).requires_grad_()
        scale = torch.ones(()).requires_grad_()
        earlier = torch.stack([m.prototypes for m in found]) if found else None
        optimizer = torch.optim.Adam((prototypes, scale), RATE)
        for _ in range(STEPS):
            loss = F.cross_entropy(SHARPNESS * Member(prototypes, scale)(x), labels)
            if earlier is not None:
                loss = loss + diversity * similarity(prototypes, earlier)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(Member(prototypes.detach(), scale.detach()))
    return found


def log_mean_probability(members: list[Member], z: Tensor) -> Tensor:
    """Logarithm of the members' mean probabilities ``(S, C)``."""
    return torch.stack([member(z).softmax(1) for member in members]).mean(0).log()


def _dpe(experiment: Experiment, use_groups: bool) -> Outcome:
    features = experiment.erm().features
    z, y = features.z["val"], features.y["val"]
    key = features.group["val"] if use_groups else y
    classes, seed = len(features.weight), experiment.seed
    first, second = halves(key, seed)

    def score(diversity: float) -> float:
        members = fit_members(z[first], y[first], key[first], classes, diversity, seed)
        return float(worst_group_accuracy(log_mean_probability(members, z[second]), y[second], key[second]))

    diversity = max(DIVERSITY, key=score)
    members = fit_members(z, y, key, classes, diversity, seed)
    logits = {split: log_mean_probability(members, features.z[split]) for split in SPLITS}
    return Outcome(logits, {"diversity": diversity, "members": MEMBERS, "head_on": experiment.held_out})


METHODS = [
    Method(
        "dpe",
        tier,
        f"λ by worst {what} on half the held-out set",
        partial(_dpe, use_groups=use_groups),
        uses_erm=True,
        grid=f"λ {DIVERSITY}",
    )
    for tier, what, use_groups in (("T0", "class", False), ("T2", "group", True))
]
