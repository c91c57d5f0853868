"""Detect atypical examples: those on which the spurious pattern fails.

Every function takes a network's outputs on *held-out* examples and returns a boolean mask ``(S,)``, ``True`` for
atypical.  Training examples carry no signal, because the network fits all of them (the memorization gap of You et al.
2025).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Atypical = Literal["margin", "loss", "error", "group"]


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """Compute margins: the label's logit minus the largest other logit.

    They are negative where the example is misclassified, and 0 for a tie.

    Args:
        logits: ``(S, C)`` with ``C ≥ 2``.
        y: ``(S,)`` class indices.

    Returns:
        ``(S,)`` in the dtype of ``logits``.

    Raises:
        ValueError: shapes do not fit, a label is out of range, or a logit is NaN.

    Example:
        >>> margins(torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]]), torch.tensor([0, 1]))
        tensor([ 1., -2.])
    """
    _check_logits(logits, y)
    right = logits.gather(1, y[:, None])[:, 0]
    return right - strongest_wrong(logits, y)[0]


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Return where ``argmax`` predicts another class, bool ``(S,)``; errors as :func:`margins`."""
    _check_logits(logits, y)
    return logits.argmax(1) != y


def strongest_wrong(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return value and index, ``(S,)`` each, of the largest logit of another class than the label."""
    return logits.scatter(1, y[:, None], float("-inf")).max(1)


def example_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Compute the cross-entropy of each example in nats, ``(S,)``; arguments and errors as :func:`margins`.

    Example:
        >>> example_losses(torch.tensor([[0.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0]))
        tensor([0.6931, 5.0067])
    """
    _check_logits(logits, y)
    return F.cross_entropy(logits.float(), y, reduction="none")


def atypical_by_score(score: Tensor, y: Tensor, share: float = 0.2, num_classes: int | None = None) -> Tensor:
    """Take the fraction of each class with the highest score, e.g. the loss or a memorization score.

    Args:
        score: ``(S,)``, high = atypical.
        y: ``(S,)`` class indices.
        share: fraction of each class to take, in (0, 1]; at least one example per class.
        num_classes: if given, each of the classes ``0 … num_classes − 1`` must occur.

    Returns:
        bool ``(S,)``.

    Raises:
        ValueError: shapes differ, ``share`` is outside (0, 1], a score is NaN, or a class does not occur.

    Example:
        >>> losses, y = torch.tensor([0.1, 2.0, 0.3, 9.0]), torch.tensor([0, 0, 1, 1])
        >>> atypical_by_score(losses, y, share=0.5)
        tensor([False,  True, False,  True])
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
    _classes(y, num_classes)
    for _, members in members_of(y):
        count = max(1, round(share * len(members)))
        # A stable sort breaks ties by position, the same on every device and rank.
        order = torch.sort(score[members], descending=True, stable=True).indices
        mask[members[order[:count]]] = True
    return mask


def atypical_by_margin(margins: Tensor, y: Tensor, share: float = 0.2, num_classes: int | None = None) -> Tensor:
    """Take the fraction of each class with the lowest margins.

    Args:
        margins: ``(S,)`` from :func:`margins`.
        y, share, num_classes: see :func:`atypical_by_score`, as are result and errors.

    Example:
        >>> y = torch.tensor([0, 0, 1, 1])
        >>> atypical_by_margin(torch.tensor([3.0, -1.0, 2.0, 0.5]), y, share=0.5)
        tensor([False,  True, False,  True])
    """
    return atypical_by_score(-margins, y, share, num_classes)


def atypical_by_error(logits: Tensor, y: Tensor, num_classes: int | None = None) -> Tensor:
    """Take the misclassified examples, bool ``(S,)``.

    Args:
        logits: ``(S, C)``.
        y: ``(S,)`` class indices.
        num_classes: see :func:`atypical_by_score`.

    Raises:
        ValueError: as :func:`margins`; also if a class has no misclassified example, because then there is nothing to
            trace for it (use :func:`atypical_by_margin` instead).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 2.0], [3.0, 1.0]])
        >>> atypical_by_error(logits, torch.tensor([0, 0, 1, 1]))
        tensor([False,  True, False,  True])
    """
    wrong = misclassified(logits, y)
    found = set(y[wrong].tolist())
    for c in _classes(y, num_classes):
        if c not in found:
            raise ValueError(
                f"No example of class {c} is misclassified, so none is atypical by error. Choose a share of the lowest "
                "margins instead (atypical='margin'), and make sure that the examples were held out from training."
            )
    return wrong


def atypical_by_group(y: Tensor, group: Tensor, group_counts: Tensor | None = None) -> Tensor:
    """Take the examples of minority groups: those with less than an equal share of their class's training examples.

    Args:
        y: ``(S,)`` class indices.
        group: ``(S,)`` group indices; a group belongs to one class.
        group_counts: ``(G,)`` number of *training* examples of each group.  Without it the counts of ``group`` itself
            are used, which is wrong for balanced held-out sets such as that of Waterbirds.

    Returns:
        bool ``(S,)``.

    Raises:
        ValueError: shapes differ, a group spans classes, or no class has a minority group (then give ``group_counts``).

    Example:
        >>> y, group = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 3])
        >>> atypical_by_group(y, group, group_counts=torch.tensor([90, 10, 5, 95]))
        tensor([False,  True,  True, False])
    """
    if y.shape != group.shape or y.ndim != 1:
        raise ValueError(f"Expected one group per label, got {tuple(group.shape)} and {tuple(y.shape)}.")
    if group_counts is None:
        _, group, group_counts = torch.unique(group, return_inverse=True, return_counts=True)
    elif group.numel() and int(group.max()) >= len(group_counts):
        raise ValueError(f"Group {int(group.max())} occurs, but group_counts has {len(group_counts)} entries.")
    minority = torch.zeros(len(group_counts), dtype=torch.bool, device=group.device)
    seen: set[int] = set()
    for _, members in members_of(y):
        groups = torch.unique(group[members])
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
    """Choose atypical examples by the name of a method.

    Args:
        kind: ``"margin"`` for the lowest margins of each class, ``"loss"`` for the highest losses, ``"error"`` for the
            misclassified examples, ``"group"`` for the minority groups (which needs group labels, tier T2).
        logits: ``(S, C)``.
        y: ``(S,)`` class indices.
        group: ``(S,)`` group indices, for ``"group"`` only.
        share: fraction of each class, for ``"margin"`` and ``"loss"``; default 0.2.
        group_counts: see :func:`atypical_by_group`.
        num_classes: see :func:`atypical_by_score`.

    Returns:
        bool ``(S,)``.

    Raises:
        ValueError: as the function of that kind; unknown kind; groups are needed but missing.

    Example:
        >>> logits, y = torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0, 1, 1])
        >>> choose_atypical("margin", logits, y)
        tensor([False,  True,  True, False])
    """
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
    """Average over the chosen examples of each class, then over the classes that have any.

    Args:
        values: ``(S, ...)``.
        y: ``(S,)`` class indices.
        chosen: bool ``(S,)``.

    Returns:
        ``(...)``.

    Raises:
        ValueError: nothing is chosen.

    Example:
        >>> y, everything = torch.tensor([0, 0, 0, 1]), torch.ones(4, dtype=torch.bool)
        >>> class_mean(torch.tensor([1.0, 1.0, 1.0, 5.0]), y, everything)
        tensor(3.)
    """
    rows = chosen.nonzero()[:, 0]
    if not len(rows):
        raise ValueError("No atypical example was given.")
    return torch.stack([values[rows[members]].mean(0) for _, members in members_of(y[rows])]).mean(0)


def members_of(key: Tensor) -> list[tuple[int, Tensor]]:
    """The positions of each value that occurs, ascending, by one sort rather than one search for each value.

    Args:
        key: ``(S,)`` class or group indices.

    Example:
        >>> members_of(torch.tensor([5, 2, 5]))
        [(2, tensor([1])), (5, tensor([0, 2]))]
    """
    values, counts = torch.unique(key, return_counts=True)
    return list(zip(values.tolist(), torch.split(key.argsort(stable=True), counts.tolist()), strict=True))


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
