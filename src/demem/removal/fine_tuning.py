"""Fine-tune the whole network on a balanced subset of the held-out examples, when training is over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demem.batch import Batch, apply_model
from demem.linear import balanced_subset

RISE = 0.01  # nats; where the head is the best already, the loss stays as it is, more or less
TUNED_ON = 64  # held-out examples of each class; fewer do not say how the features should change


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning did.

    Attributes:
        before, after: cross-entropy of the first batch in nats.
        kept: whether the weights are the new ones; ``False``: they are those before it.
    """

    before: float
    after: float
    kept: bool


def tuning_subset(
    group: Tensor, y: Tensor, num_classes: int, generator: torch.Generator, fewest: int = TUNED_ON
) -> Tensor | None:
    """Draw as many examples of each group as the smallest group has, if they are enough to fine-tune on.

    One subset for all passes, not a new one for each: an example that is seen more often than others is fitted more
    closely, and the network then leans against its group where examples are new.

    Args:
        group: ``(S,)`` true or inferred groups.
        y: ``(S,)`` classes.
        num_classes: :math:`C`.
        generator: of the draw.
        fewest: examples of each class that are needed.

    Returns:
        Positions, or ``None`` if a class has fewer than ``fewest`` of them.

    Example:
        >>> y, group = torch.tensor([0, 1]).repeat(100), torch.tensor([0, 1]).repeat(100)
        >>> len(tuning_subset(group, y, 2, torch.Generator()))
        200
        >>> tuning_subset(group[:100], y[:100], 2, torch.Generator()) is None
        True
    """
    subset = balanced_subset(group, generator)
    return subset if int(torch.bincount(y[subset], minlength=num_classes).min()) >= fewest else None


def fine_tune(
    model: nn.Module,
    parameters: Sequence[Tensor],
    batches: Iterable[Batch],
    steps: int,
    lr: float = 1e-4,
    agree: Callable[[bool], bool] = bool,
) -> FineTuned:
    r"""Minimise cross-entropy by Adam, one step per batch; take it back if it did harm.

    The learning rate falls from ``lr`` to 0 by a cosine.  The step is Adam's own whatever the network was trained with:
    with frozen statistics, in evaluation mode, a learning rate that suits batch norm in training tears a network apart,
    and Adam's steps have the same size whatever the scale of the loss.  Put the model in evaluation mode first, so that
    batch-norm statistics stay and dropout is off.

    If the loss of the first batch is higher afterwards (by .01 nats or more), or not finite, the weights are put back.

    Args:
        model: gives the logits.
        parameters: what is trained; the others stay as they are.
        batches: ``steps`` of them, several passes over the same examples.
        steps: their number.
        lr: the first learning rate.
        agree: one answer for all processes of a distributed run.

    Example:
        >>> model, y = nn.Linear(2, 2), torch.tensor([0, 1])
        >>> result = fine_tune(model, list(model.parameters()), [Batch(torch.eye(2), y)] * 20, 20, lr=0.1)
        >>> result.kept, result.after < result.before
        (True, True)
    """

    def loss_of(batch: Batch) -> Tensor:
        return F.cross_entropy(apply_model(model, batch.x).float(), batch.y)

    saved = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    remaining = iter(batches)
    first = next(remaining)
    with torch.no_grad():
        before = float(loss_of(first))
    for batch in chain([first], remaining):
        optimizer.zero_grad()
        loss_of(batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    with torch.no_grad():
        after = float(loss_of(first))
    kept = agree(after < before + RISE)
    if not kept:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
    return FineTuned(before, after, kept)
