"""Mask the memorising units that the head reads and refit the head, in rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from demem.linear import LinearHead, balanced_weights, crossfit, fit_balanced, fit_linear
from demem.tracing import atypical_by_margin, linear_score, margins

MASKED_SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.86, 0.9)
# Keeps a group of a handful of examples (label noise) from ruling a balanced fit.
SMOOTHING = 0.02
JUDGED_SUBSETS = 5  # for each of the heads that only judge a round


class Examples(NamedTuple):
    """Ungated features ``(S, N)`` that the head reads, classes ``(S,)`` and (true or inferred) groups ``(S,)``."""

    features: Tensor
    y: Tensor
    group: Tensor


@dataclass(frozen=True)
class Round:
    """One round of removal.

    Attributes:
        share: of the units that are masked.
        gate: ``(N,)``, 0 for a masked unit and 1 for a kept one.
        score: ``(N,)`` memorization score of every unit, measured before this round's mask; zeros in round 0.
        worst: accuracy on the worst (true or inferred) group of the held-out examples, each judged by a head that was
            fitted without it.
        standard_error: of ``worst``.
        refit: fits the round's head.
    """

    share: float
    gate: Tensor
    score: Tensor
    worst: float
    standard_error: float
    refit: Callable[[], LinearHead]

    @cached_property
    def head(self) -> LinearHead:
        """Refitted on the kept units (weight 0 on the masked ones); at the first look, as most rounds are not kept."""
        return self.refit()


def remove_in_rounds(
    train: Examples,
    held_out: Examples,
    *,
    num_classes: int,
    shares: Sequence[float] = MASKED_SHARES,
    trace_on: Literal["group", "margin"] = "group",
    atypical_share: float = 0.2,
    l2: float = 1e-3,
) -> list[Round]:
    r"""Trace, mask, refit; with more units masked every round.

    Each round scores the units by their impact on the atypical held-out examples under a head that was fitted on the
    *training* examples alone (:func:`demem.tracing.linear_score`: there the spurious pattern is at work), masks the
    highest-scoring share, units masked before included, and refits.  The atypical examples are chosen once, before the
    first mask.  The head that is kept is fitted on the held-out examples, group by group in equal numbers
    (:func:`demem.linear.fit_balanced`): the training examples are fitted already, minority and all, and say little
    about how the network meets new ones.

    Args:
        train: examples that the network was trained on.
        held_out: examples that it was not trained on.
        num_classes: number of classes.
        shares: of the units to mask, growing, each in (0, 1).
        trace_on: which held-out examples are atypical: ``"group"``, those of all groups but the largest of their class
            in the training set; or ``"margin"`` (also where a class has no others), the ``atypical_share`` with the
            lowest margins in each class.
        atypical_share: see there.
        l2: see :func:`demem.linear.fit_linear`.

    Returns:
        Round 0 (nothing masked), then one a share.

    Raises:
        ValueError: shares do not grow or are outside (0, 1); a class is absent from the held-out examples; features
            are not finite.
    """
    check_shares(shares)
    missing = sorted(set(range(num_classes)) - set(held_out.y.tolist()))
    if missing:
        raise ValueError(
            f"The held-out examples have none of class {missing}. Units cannot be traced for a class that is not "
            "there: use a validation set with every class."
        )
    width = train.features.shape[1]
    weights = balanced_weights(train.group, SMOOTHING)
    gate, score = torch.ones(width, device=train.features.device), torch.zeros(width, device=train.features.device)
    rounds: list[Round] = []
    traced: LinearHead | None = None
    atypical: Tensor | None = None
    for share in (0.0, *shares):
        if traced is not None and atypical is not None:
            logits = traced(held_out.features)
            score = linear_score(held_out.features, traced.weight, held_out.y, atypical, logits=logits)
            order = torch.where(gate == 0, torch.inf, score).sort(descending=True, stable=True).indices
            gate = torch.ones_like(gate)
            gate[order[: round(share * width)]] = 0
        traced = fit_linear(train.features * gate, train.y, weights, l2, num_classes)
        if atypical is None:
            atypical = minority(train, held_out)
            if trace_on == "margin" or len(set(held_out.y[atypical].tolist())) < num_classes:
                logits = traced(held_out.features)
                atypical = atypical_by_margin(margins(logits, held_out.y), held_out.y, atypical_share, num_classes)
        rounds.append(_judge(share, gate, score, held_out, l2, num_classes))
    return rounds


def check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """The shares, or a :class:`ValueError` if they do not grow or are outside (0, 1)."""
    if any(not 0 < s < 1 for s in shares) or list(shares) != sorted(shares):
        raise ValueError(f"Masked shares must grow and lie in (0, 1), got {list(shares)}.")
    return tuple(float(s) for s in shares)


def minority(train: Examples, held_out: Examples) -> Tensor:
    """Which held-out examples are not of their class's largest group in the training set: bool ``(S,)``."""
    largest = [int(train.group[train.y == c].mode().values) for c in range(int(held_out.y.max()) + 1)]
    return held_out.group != torch.tensor(largest, device=held_out.y.device)[held_out.y]


def best_round(rounds: Sequence[Round], tolerance: float = 1.0) -> int:
    """Index of the first round whose worst-group accuracy on held-out examples is within ``tolerance`` standard errors
    of the best.

    What a small set cannot tell apart is settled by masking less (the one-standard-error rule of Breiman et al. 1984).
    """
    best = max(rounds, key=lambda r: r.worst)
    return next(i for i, r in enumerate(rounds) if r.worst >= best.worst - tolerance * best.standard_error)


def _judged(group: Tensor, smallest: int = 5) -> list[int]:
    """Groups with enough examples to judge; all, if none has."""
    counts = torch.bincount(group)
    return (counts >= smallest).nonzero()[:, 0].tolist() or (counts > 0).nonzero()[:, 0].tolist()


def worst_group(logits: Tensor, y: Tensor, group: Tensor) -> tuple[float, float]:
    """Accuracy on the worst group and its standard error; groups of fewer than 5 examples are too few to judge and left
    out, unless there are no others."""
    right = (logits.argmax(1) == y).float()
    worst = min((right[group == g] for g in _judged(group)), key=lambda values: float(values.mean()))
    return float(worst.mean()), _standard_error(float(worst.mean()), len(worst))


def _standard_error(accuracy: float, count: int) -> float:
    # Agresti and Coull's centre: a perfect score on a few examples is not certain.
    p = (accuracy * count + 2) / (count + 4)
    return float((p * (1 - p) / (count + 4)) ** 0.5)


def _judge(share: float, gate: Tensor, score: Tensor, held_out: Examples, l2: float, num_classes: int) -> Round:
    x, y, group = held_out.features * gate, held_out.y, held_out.group

    def fit(used: Tensor) -> LinearHead:
        return fit_balanced(x[used], y[used], group[used], l2, num_classes, subsets=JUDGED_SUBSETS)

    def refit() -> LinearHead:  # masks anew: a masked copy of the features for each round would be much to keep
        return fit_balanced(held_out.features * gate, y, group, l2, num_classes)

    return Round(share, gate, score, *worst_group(crossfit(x, y, fit, num_classes, group=group), y, group), refit)
