"""Who is atypical: tell the examples that go against the spurious pattern from those that go with it.

Every function takes what a network said about *held-out* examples and returns a mask ``(S,)``, ``True`` for atypical.
On examples that the network was trained on everything is fitted and the signal is gone (the memorization gap of You et
al. 2025), so use examples that it did not train on.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Atypical = Literal["margin", "loss", "error", "group"]


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """Correct-class logit minus the largest other logit; negative where the example is misclassified, 0 for a tie.

    Args:
        logits: ``(S, C)`` with ``C ≥ 2``.
        y: ``(S,)`` class indices.

    Returns:
        ``(S,)`` in the dtype of ``logits``.

    Raises:
        ValueError: shapes do not fit, a label is out of range, or a logit is NaN.
    """
    _check_logits(logits, y)
    right = logits.gather(1, y[:, None])[:, 0]
    return right - strongest_wrong(logits, y)[0]


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Where another class is predicted, bool ``(S,)``, by ``argmax`` as everywhere; errors as :func:`margins`."""
    _check_logits(logits, y)
    return logits.argmax(1) != y


def strongest_wrong(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Value and index, ``(S,)`` each, of the largest logit that is not the label's."""
    return logits.scatter(1, y[:, None], float("-inf")).max(1)


def example_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each example in nats, ``(S,)``; errors as :func:`margins`."""
    _check_logits(logits, y)
    return F.cross_entropy(logits.float(), y, reduction="none")


def atypical_by_score(score: Tensor, y: Tensor, share: float = 0.2, num_classes: int | None = None) -> Tensor:
    """The highest-scoring share within each class: loss, or a memorization score (loss lost when units are removed).

    Args:
        score: ``(S,)``, high = atypical.
        y: ``(S,)`` class indices.
        share: fraction of each class to take, in (0, 1]; at least one example a class.
        num_classes: if given, each of the classes ``0 … num_classes − 1`` must occur.

    Returns:
        bool ``(S,)``.

    Raises:
        ValueError: shapes differ, ``share`` is outside (0, 1], a score is NaN, or a class does not occur.
    """
    if score.shape != y.shape or score.ndim != 1:
        raise ValueError(f"Expected one score per label, got {tuple(score.shape)} and {tuple(y.shape)}.")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}.")
    if bool(score.isnan().any()):
        raise ValueError(
            f"{int(score.isnan().sum())} of {score.numel()} scores are NaN, so the atypical examples cannot be chosen. "
            "Look for a diverged loss or broken inputs."
        )
    mask = torch.zeros_like(y, dtype=torch.bool)
    for c in _classes(y, num_classes):
        members = (y == c).nonzero()[:, 0]
        count = max(1, round(share * len(members)))
        # Stable, so that ties break by position and every device and rank agrees.
        order = torch.sort(score[members], descending=True, stable=True).indices
        mask[members[order[:count]]] = True
    return mask


def atypical_by_margin(margins: Tensor, y: Tensor, share: float = 0.2, num_classes: int | None = None) -> Tensor:
    """The lowest-margin ``share`` of each class; arguments, result and errors as :func:`atypical_by_score`.

    Args:
        margins: ``(S,)`` from :func:`margins`.
        y: ``(S,)`` class indices.
        share: fraction of each class.
        num_classes: if given, each class must occur.
    """
    return atypical_by_score(-margins, y, share, num_classes)


def atypical_by_error(logits: Tensor, y: Tensor, num_classes: int | None = None) -> Tensor:
    """The misclassified examples, bool ``(S,)``.

    Raises:
        ValueError: as :func:`margins`; also where a class has no misclassified example, because then there is nothing
            to trace for it (use a share of the lowest margins instead).
    """
    wrong = misclassified(logits, y)
    for c in _classes(y, num_classes):
        if not bool(wrong[y == c].any()):
            raise ValueError(
                f"No example of class {c} is misclassified, so none is atypical by error. Choose a share of the lowest "
                "margins instead (atypical='margin'), and make sure that the examples were held out from training."
            )
    return wrong


def atypical_by_group(y: Tensor, group: Tensor, group_counts: Tensor | None = None) -> Tensor:
    """The examples of minority groups: groups with less than an equal share of their class's training examples.

    Args:
        y: ``(S,)`` class indices.
        group: ``(S,)`` group indices; a group belongs to one class.
        group_counts: ``(num_groups,)`` examples of each group in the TRAINING set, which decides what a minority is.
            Without it the counts of ``group`` itself are taken (wrong for balanced held-out sets such as Waterbirds').

    Returns:
        bool ``(S,)``.

    Raises:
        ValueError: shapes differ, a group spans classes, or no class has a minority group (then give ``group_counts``).
    """
    if y.shape != group.shape or y.ndim != 1:
        raise ValueError(f"Expected one group per label, got {tuple(group.shape)} and {tuple(y.shape)}.")
    if group_counts is None:
        group_counts = torch.bincount(group)
    elif group.numel() and int(group.max()) >= len(group_counts):
        raise ValueError(f"Group {int(group.max())} occurs, but group_counts has {len(group_counts)} entries.")
    minority = torch.zeros(len(group_counts), dtype=torch.bool, device=group.device)
    seen: set[int] = set()
    for c in _classes(y, None):
        groups = torch.unique(group[y == c])
        if seen.intersection(groups.tolist()):
            raise ValueError("A group holds examples of two classes; number groups within each class.")
        seen.update(groups.tolist())
        counts = group_counts.to(group.device)[groups].double()
        minority[groups[counts < counts.mean()]] = True
    if not bool(minority.any()):
        raise ValueError(
            "The groups of each class are equally large, so none is a minority. Pass the training set's group counts."
        )
    return minority[group]


def choose_atypical(
    kind: Atypical,
    logits: Tensor,
    y: Tensor,
    group: Tensor | None = None,
    *,
    share: float = 0.2,
    group_counts: Tensor | None = None,
    num_classes: int | None = None,
) -> Tensor:
    """Atypical examples by name: ``"margin"`` or ``"loss"`` tail of each class, ``"error"``, or ``"group"`` (tier T2).

    ``num_classes`` is ``logits.shape[1]`` unless given.

    Raises:
        ValueError: as the function of that kind; unknown kind; groups asked for but not there.
    """
    num_classes = logits.shape[1] if num_classes is None else num_classes
    if kind == "margin":
        return atypical_by_margin(margins(logits, y), y, share, num_classes)
    if kind == "loss":
        return atypical_by_score(example_losses(logits, y), y, share, num_classes)
    if kind == "error":
        return atypical_by_error(logits, y, num_classes)
    if kind == "group":
        if group is None:
            raise ValueError("atypical='group' needs groups in the batches: yield (x, y, group).")
        return atypical_by_group(y, group, group_counts)
    raise ValueError(f"Unknown kind of atypical examples {kind!r}; use margin, loss, error or group.")


def class_mean(values: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
    """Mean of ``values (S, ...)`` over the chosen examples of each class, averaged over the classes that have any.

    Raises:
        ValueError: nothing is chosen.
    """
    classes = torch.unique(y[chosen])
    if not len(classes):
        raise ValueError("No atypical example was given.")
    return torch.stack([values[chosen & (y == c)].mean(0) for c in classes]).mean(0)


def _classes(y: Tensor, num_classes: int | None) -> list[int]:
    present: list[int] = torch.unique(y).tolist()
    if num_classes is not None:
        if present and present[-1] >= num_classes:
            raise ValueError(f"Label {present[-1]} is out of range for {num_classes} classes.")
        missing = sorted(set(range(num_classes)) - set(present))
        if missing:
            raise ValueError(
                f"Class(es) {missing} do not occur among the examples, so their atypical examples cannot be chosen. "
                "Use a larger held-out set."
            )
    if not present:
        raise ValueError("There are no examples.")
    return present


def _check_logits(logits: Tensor, y: Tensor) -> None:
    if logits.ndim != 2 or y.shape != logits.shape[:1] or logits.shape[1] < 2:
        raise ValueError(
            f"Expected logits (S, C) with C ≥ 2 and labels (S,), got {tuple(logits.shape)} and {tuple(y.shape)}."
        )
    if y.numel() and (int(y.min()) < 0 or int(y.max()) >= logits.shape[1]):
        raise ValueError(f"Labels must be in 0 … {logits.shape[1] - 1}, got {int(y.min())} … {int(y.max())}.")
    if bool(logits.isnan().any()):
        raise ValueError("Some logits are NaN. Look for a diverged loss (lower the learning rate) or broken inputs.")
