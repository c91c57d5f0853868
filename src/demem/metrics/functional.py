"""Accuracy by group, from two counts per group that add up over batches and processes.

A group is any partition of the examples, usually class × attribute.  Groups without examples have no accuracy (NaN) and
take no part in the worst group or in an average.  All accuracies are fractions in [0, 1].

With c_g correct ones among the n_g examples of group g:

==================  ==============================================================
group accuracy      ``a_g = c_g / n_g``
worst group         ``min_g a_g``
average             ``Σ_g c_g / Σ_g n_g``
adjusted average    ``Σ_g w_g a_g / Σ_g w_g``, with w_g the training size of group g
==================  ==============================================================
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_GROUPS = 2**20
"""Most groups that are counted where nobody states their number; a larger index is an identifier, not a group."""


def group_accuracy_update(
    preds: Tensor, target: Tensor, group: Tensor, num_groups: int | None = None
) -> tuple[Tensor, Tensor]:
    """Count the correct and all examples of each group.

    Args:
        preds: logits or probabilities ``(B, C)``, or predicted classes ``(B,)`` or ``(B, 1)``.
        target: class indices ``(B,)``.
        group: group indices ``(B,)`` in ``[0, num_groups)``.
        num_groups: number of groups G; default: one more than the largest group index of the batch.

    Returns:
        ``correct`` and ``total``, both int64 of shape ``(G,)``.  The counts of several batches add up.

    Raises:
        ValueError: shapes differ, scores are NaN or infinite, predicted classes, labels or groups are fractional, a
            label or group is out of range, or a group index without ``num_groups`` is 2²⁰ or more.

    Example:
        >>> preds, target, group = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 0, 1]])
        >>> correct, total = group_accuracy_update(preds, target, group, num_groups=2)
        >>> correct.tolist(), total.tolist()
        ([2, 0], [2, 1])
    """
    if target.ndim != 1 or group.shape != target.shape:
        raise ValueError(
            f"target and group must have the same shape (B,), got {tuple(target.shape)} and {tuple(group.shape)}."
        )
    if preds.is_floating_point() and not bool(torch.isfinite(preds).all()):
        raise ValueError("preds hold NaN or infinity: the model diverged or its inputs are broken.")
    if preds.shape[:1] != target.shape or preds.ndim > 2:
        raise ValueError(f"preds must be (B, C) or (B,) with B = {len(target)}, got {tuple(preds.shape)}.")
    last: float = torch.inf
    if preds.ndim == 2 and preds.shape[1] > 1:
        last = preds.shape[1] - 1
        preds = preds.argmax(1)
    target, group = _indices(target, "target must be class indices (B,)"), _indices(group, "group must be indices (B,)")
    preds = _indices(preds.flatten(), "preds must be class indices (B,) or scores (B, C), one column for each class")
    size = num_groups or 0
    if len(target):
        ends = torch.stack(torch.stack([target, group]).aminmax(dim=1))
        (least, lowest), (most, highest) = ends.tolist()  # one transfer from the device instead of four
        if least < 0 or most > last:
            raise ValueError(f"target must lie in 0 … {last}, got {least} … {most}.")
        if lowest < 0 or highest >= (num_groups or MAX_GROUPS):
            hint = "" if num_groups else " Number the groups 0, 1, 2 … (torch.unique(ids, return_inverse=True))."
            raise ValueError(f"group must lie in 0 … {(num_groups or MAX_GROUPS) - 1}, got {lowest} … {highest}.{hint}")
        size = num_groups or highest + 1
    total = torch.bincount(group, minlength=size)
    correct = torch.bincount(group[preds == target], minlength=size)
    return correct, total


def _indices(values: Tensor, rule: str) -> Tensor:
    if values.is_floating_point() and not bool(((values == values.round()) & (values >= 0)).all()):
        raise ValueError(f"{rule}, got fractional or negative numbers of shape {tuple(values.shape)}.")
    return values.long()


def group_accuracy_compute(correct: Tensor, total: Tensor) -> Tensor:
    """Divide the counts of :func:`group_accuracy_update`: accuracy of each group ``(G,)``, NaN for empty groups.

    Example:
        >>> group_accuracy_compute(torch.tensor([8, 3, 0]), torch.tensor([10, 4, 0]))
        tensor([0.8000, 0.7500,    nan])
    """
    return torch.where(total > 0, correct / total.clamp(min=1), torch.nan)


def worst_group_accuracy_compute(correct: Tensor, total: Tensor) -> Tensor:
    """Take the lowest accuracy among the groups that have examples (a scalar); NaN if none has.

    Example:
        >>> worst_group_accuracy_compute(torch.tensor([8, 3, 0]), torch.tensor([10, 4, 0]))
        tensor(0.7500)
    """
    accuracy = group_accuracy_compute(correct, total)
    present = accuracy[total > 0]
    return present.min() if present.numel() else accuracy.new_tensor(torch.nan)


def worst_group_accuracy(preds: Tensor, target: Tensor, group: Tensor) -> Tensor:
    """Compute the accuracy of the worst group of one set of examples.

    Args:
        preds: logits or probabilities ``(S, C)``, or predicted classes ``(S,)``.
        target: class indices ``(S,)``.
        group: group indices ``(S,)`` from 0; pass ``target`` for the worst class.

    Returns:
        A scalar, a fraction; NaN without examples.

    Raises:
        ValueError: as :func:`group_accuracy_update`.

    Example:
        >>> preds, target, group = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 1, 1]])
        >>> worst_group_accuracy(preds, target, group)  # the average is 0.75
        tensor(0.5000)
    """
    return worst_group_accuracy_compute(*group_accuracy_update(preds, target, group))


def average_accuracy_compute(correct: Tensor, total: Tensor) -> Tensor:
    """Divide the summed counts: accuracy over all examples (a scalar); NaN without any.

    Example:
        >>> average_accuracy_compute(torch.tensor([8, 1, 0]), torch.tensor([10, 2, 0]))
        tensor(0.7500)
    """
    return correct.sum() / total.sum() if int(total.sum()) else correct.new_full((), torch.nan, dtype=torch.float)


def adjusted_average_accuracy_compute(correct: Tensor, total: Tensor, weights: Tensor) -> Tensor:
    """Average the groups' accuracies with ``weights`` ``(G,)``, usually the groups' training sizes (a scalar).

    Estimates accuracy on the training distribution from a test set with other group sizes, such as that of Waterbirds.
    Empty groups are left out and the other weights rescaled.

    Raises:
        ValueError: ``weights`` has another shape, or no group with examples has a positive weight.

    Source: Sagawa et al. 2020.

    Example:
        >>> correct, total = torch.tensor([9, 5]), torch.tensor([10, 10])  # a balanced test set
        >>> adjusted_average_accuracy_compute(correct, total, weights=torch.tensor([95, 5]))
        tensor(0.8800)
    """
    if weights.shape != total.shape:
        raise ValueError(f"weights must have the shape {tuple(total.shape)}, got {tuple(weights.shape)}.")
    weights = torch.where(total > 0, weights.to(total.device, torch.float), 0.0)
    if bool((weights < 0).any()) or float(weights.sum()) == 0:
        raise ValueError("weights must be non-negative and positive for at least one group that has examples.")
    return (group_accuracy_compute(correct, total).nan_to_num() * weights).sum() / weights.sum()
