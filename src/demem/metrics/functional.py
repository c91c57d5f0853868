"""Accuracy by group, from two counts per group that add up over batches and processes.

A group is any partition of the examples, usually class × attribute.  Empty groups have no accuracy (NaN) and take no
part in the worst or in an average.  All accuracies are fractions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_accuracy_update(preds: Tensor, target: Tensor, group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Count the correct and all examples of each group.

    Args:
        preds: logits or probabilities ``(B, C)``, or predicted classes ``(B,)``.
        target: class indices ``(B,)``.
        group: group indices ``(B,)`` in ``[0, num_groups)``.
        num_groups: number of groups.

    Returns:
        ``correct`` and ``total``, both int64 of shape ``(num_groups,)``.

    Raises:
        ValueError: shapes differ, scores are NaN, or a label or group is out of range.
    """
    if target.ndim != 1 or group.shape != target.shape:
        raise ValueError(
            f"target and group must have the same shape (B,), got {tuple(target.shape)} and {tuple(group.shape)}."
        )
    if preds.ndim == 2 and not bool(torch.isfinite(preds).all()):
        raise ValueError("preds hold NaN or infinity: the model diverged or its inputs are broken.")
    if preds.shape[:1] != target.shape or preds.ndim > 2:
        raise ValueError(f"preds must be (B, C) or (B,) with B = {len(target)}, got {tuple(preds.shape)}.")
    if len(target):
        ends = torch.stack(torch.stack([target, group]).aminmax(dim=1))
        (least, lowest), (most, highest) = ends.tolist()  # a device is waited for once
        last = preds.shape[1] - 1 if preds.ndim == 2 else float("inf")
        if least < 0 or most > last:
            raise ValueError(f"target must lie in 0 … {last}, got {least} … {most}.")
        if lowest < 0 or highest >= num_groups:
            raise ValueError(f"group must lie in 0 … {num_groups - 1}, got {lowest} … {highest}.")
    if preds.ndim == 2:
        preds = preds.argmax(1)
    group = group.long()
    total = torch.bincount(group, minlength=num_groups)
    correct = torch.bincount(group[preds == target], minlength=num_groups)
    return correct, total


def group_accuracy_compute(correct: Tensor, total: Tensor) -> Tensor:
    """Accuracy of each group ``(G,)``, NaN for empty groups."""
    return torch.where(total > 0, correct / total.clamp(min=1), torch.nan)


def worst_group_accuracy_compute(correct: Tensor, total: Tensor) -> Tensor:
    """The lowest accuracy among the groups that have examples; NaN if none has."""
    accuracy = group_accuracy_compute(correct, total)
    present = accuracy[total > 0]
    return present.min() if present.numel() else accuracy.new_tensor(torch.nan)


def worst_group_accuracy(preds: Tensor, target: Tensor, group: Tensor) -> Tensor:
    """Accuracy of the worst group of one set of examples.

    Args:
        preds: logits or probabilities ``(S, C)``, or predicted classes ``(S,)``.
        target: class indices ``(S,)``.
        group: group indices ``(S,)`` from 0; pass ``target`` for the worst class.

    Returns:
        A scalar, a fraction; NaN without examples.

    Raises:
        ValueError: as :func:`group_accuracy_update`.
    """
    num_groups = int(group.max()) + 1 if group.numel() else 1
    return worst_group_accuracy_compute(*group_accuracy_update(preds, target, group, num_groups))


def average_accuracy_compute(correct: Tensor, total: Tensor) -> Tensor:
    """Plain accuracy over all examples; NaN without any."""
    return correct.sum() / total.sum() if int(total.sum()) else correct.new_full((), torch.nan, dtype=torch.float)


def adjusted_average_accuracy_compute(correct: Tensor, total: Tensor, weights: Tensor) -> Tensor:
    """Mean of the groups' accuracies, weighted by ``weights`` ``(G,)``, usually the groups' training sizes.

    Estimates accuracy on the training distribution from a test set with other group sizes (Sagawa et al. 2020).  Empty
    groups are left out and the other weights rescaled.

    Raises:
        ValueError: ``weights`` has another shape, or no group with examples has a positive weight.
    """
    if weights.shape != total.shape:
        raise ValueError(f"weights must have the shape {tuple(total.shape)}, got {tuple(weights.shape)}.")
    weights = torch.where(total > 0, weights.to(total.device, torch.float), 0.0)
    if bool((weights < 0).any()) or float(weights.sum()) == 0:
        raise ValueError("weights must be non-negative and positive for at least one group that has examples.")
    return (group_accuracy_compute(correct, total).nan_to_num() * weights).sum() / weights.sum()
