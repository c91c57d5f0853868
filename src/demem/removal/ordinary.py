"""An ordinary refit of the head, where the groups that training balanced turn out to be no minority.

Balanced training counts each atypical example some ten times.  Where these are merely hard, that costs the others; the
features know the class all the same, and a head that counts the held-out examples as they come gives most of it back.

Source: own (``benchmarks/NOTES.md``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from demem.linear import LinearHead, crossfit, fit_linear
from demem.removal.budget import FOLDS, OVERHEAD, WORK
from demem.removal.joint import Examples
from demem.removal.rounds import MISLED, Round, worst_group

UNDONE = "the groups are hardly a minority, and an ordinary head undoes what balancing them in training cost"


def ordinary_refit(held_out: Examples, trained: Round, num_classes: int, l2: float = 1e-3) -> Round | None:
    """The round whose head counts all held-out examples alike.

    Args:
        held_out: examples that the network was not trained on.
        trained: the round in which nothing is done (:func:`demem.removal.as_trained`).
        num_classes: number of classes C.
        l2: see :func:`demem.linear.fit_linear`.

    Returns:
        It, or ``None`` where its six fits would take more than minutes.

    Raises:
        ValueError: as :func:`demem.linear.fit_linear`.

    Example: the trained head has been moved away from the class that is more frequent.

        >>> from demem.removal import as_trained
        >>> g = torch.Generator().manual_seed(0)
        >>> y = (torch.arange(400) % 4 == 0).long()
        >>> examples = Examples(2.0 * y[:, None] + torch.randn(400, 1, generator=g), y, 3 * y)
        >>> moved = as_trained(examples, LinearHead(torch.tensor([[0.0], [1.0]]), torch.zeros(2)))
        >>> ordinary = ordinary_refit(examples, moved, 2)
        >>> int(moved.right.sum()), int(ordinary.right.sum())
        (240, 355)
    """
    x, y, group = held_out
    if (FOLDS + 1) * x.numel() * (num_classes + OVERHEAD) > WORK:
        return None

    def fit(used: Tensor) -> LinearHead:
        return fit_linear(x[used], y[used], None, l2, num_classes)

    logits = crossfit(x, y, fit, num_classes, FOLDS, group=group)
    worst, standard_error = worst_group(logits, y, trained.group)
    return replace(
        trained,
        right=logits.argmax(1) == y,
        worst=worst,
        standard_error=standard_error,
        refit=lambda: fit(torch.ones_like(y, dtype=torch.bool)),
        ordinary=True,
    )


def gives_back(ordinary: Round, trained: Round, held_out: Examples, typical: Tensor) -> bool:
    """Whether an ordinary head undoes what balanced training cost; asked where a refit over the groups is refused.

    It is what plain training stands for, so it does if no fewer held-out examples are right, cross-fitted, than under
    the head as trained.  If that gets most of the inferred atypical ones wrong, a shortcut misleads the network, and an
    ordinary head would lean on it all the more.

    Args:
        ordinary: from :func:`ordinary_refit`.
        trained, held_out: as there.
        typical: ``(C,)`` the typical group of each class (:func:`demem.groups.largest_groups`).

    Example: the first head is right for all, the second for half.

        >>> from demem.removal import as_trained
        >>> y = torch.arange(8) % 2
        >>> examples, bias = Examples(torch.eye(2)[y], y, 3 * y), torch.zeros(2)
        >>> good, poor = (as_trained(examples, LinearHead(w, bias)) for w in (torch.eye(2), torch.zeros(2, 2)))
        >>> [gives_back(a, b, examples, torch.tensor([0, 3])) for a, b in ((good, poor), (poor, good))]
        [True, False]
    """
    atypical = held_out.atypical(typical)
    misled = bool(atypical.any()) and float(trained.right[atypical].float().mean()) < MISLED
    return not misled and int(ordinary.right.sum()) >= int(trained.right.sum())
