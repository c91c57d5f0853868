"""Training examples in the refit, beside held-out ones that hold few examples of the minority.

Inferred groups are not pure: an example that the early probe gets wrong may be a hard one of the typical group.  The
trained network knows the attribute better than the probe did.  Within a class, a head on what it shows tells the
atypical examples from the typical ones; hard typical examples have nothing in common with each other, so that a head
that was fitted without such an example takes it for a typical one (:func:`purify`).  Nor do training examples say as
much as new ones: the network has memorised them, the minority above all (:func:`memorization_weight`).

Source: own.  Cross-fitted pruning of wrong labels: Northcutt et al. 2021; joint use of training and held-out examples:
our measurements (``benchmarks/NOTES.md``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from demem.linear import LinearHead, crossfit, fit_balanced
from demem.removal.budget import JUDGED

MOST = 10.0  # times that an atypical example weighs, of a network that has fitted those of training
FEWEST_SPLIT = 10  # inferred atypical examples of a class; fewer are all kept


class Examples(NamedTuple):
    """Ungated features ``(S, N)`` that the head reads, classes ``(S,)`` and (true or inferred) groups ``(S,)``."""

    features: Tensor
    y: Tensor
    group: Tensor

    def atypical(self, typical: Tensor) -> Tensor:
        """Which are not of their class's typical group: bool ``(S,)``.

        Args:
            typical: ``(C,)`` group of each class (:func:`demem.groups.largest_groups`).
        """
        return self.group != typical.to(self.group.device)[self.y]

    def fewest_atypical(self, typical: Tensor) -> int:
        """Atypical examples of the class that has fewest of them."""
        return int(torch.bincount(self.y[self.atypical(typical)], minlength=len(typical)).min())

    def joined(self, other: Examples) -> Examples:
        """These, then the others."""
        return Examples(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


def purify(examples: Examples, others: Examples, typical: Tensor, l2: float = 1e-3) -> Examples:
    r"""Count those inferred atypical examples as typical that do not look like the others of their class.

    In each class, a balanced head for *atypical or not* is fitted on the other folds of the examples and on all
    ``others``, and gives the log-odds of each inferred atypical example.  The two clusters of these log-odds with the
    smallest variance within (Otsu's threshold) are what is kept atypical, and what counts as typical.

    Args:
        examples: whose groups are inferred.
        others: of the same network and the same groups.
        typical: ``(C,)`` group of each class (:func:`demem.groups.largest_groups`).
        l2: see :func:`demem.linear.fit_linear`.

    Returns:
        The examples, with other groups.  A class with fewer than 10 atypical examples, or without typical ones, keeps
        its groups.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> y, group = torch.zeros(400, dtype=torch.long), torch.zeros(400, dtype=torch.long)
        >>> group[:40] = 1  # of which the last 20 are like the typical ones
        >>> x = torch.randn(400, 4, generator=g) + 6.0 * (torch.arange(400) < 20)[:, None]
        >>> both = Examples(x, y, group)
        >>> purify(both, both, torch.tensor([0])).group.sum()
        tensor(20)
    """
    group = examples.group.clone()
    atypical, known = examples.atypical(typical), others.atypical(typical)
    for c, usual in enumerate(typical.tolist()):
        here, there = examples.y == c, others.y == c
        marked = atypical[here]
        if int(marked.sum()) < FEWEST_SPLIT or bool(marked.all()):
            continue
        odds = _log_odds(examples.features[here], marked, others.features[there], known[there], l2)[marked]
        rows = here.nonzero()[:, 0][marked]
        group[rows[odds < otsu(odds)]] = usual
    return examples._replace(group=group)


def memorization_weight(head: LinearHead, train: Examples, held_out: Examples, typical: Tensor) -> float:
    r"""How many times more a head misses of the atypical held-out examples than of those that it was trained on.

    .. math:: \min\Bigl(10,\; \max\Bigl(1,\; \frac{\operatorname{mean}_{s \in H} (1 - p_s)}
       {\operatorname{mean}_{s \in T} (1 - p_s)}\Bigr)\Bigr)

    with the probability :math:`p_s` that the head gives the label of an atypical example of the training set T and of
    the held-out set H.  :math:`1 - p_s` is what the logit of the label adds to the gradient of the logistic loss, so
    a memorised example must weigh so many times more to say as much as a new one.  1 where nothing is memorised, or
    one of the two is without atypical examples.

    Args:
        head: as trained.
        train, held_out: examples with inferred groups.
        typical: ``(C,)`` group of each class (:func:`demem.groups.largest_groups`).

    Example: of two atypical examples of one class the head has fitted that of training.

        >>> head = LinearHead(torch.tensor([[1.0], [-1.0]]), torch.zeros(2))
        >>> fitted, new = (Examples(torch.tensor([[x]]), torch.tensor([0]), torch.tensor([1])) for x in (1.0, 0.0))
        >>> round(memorization_weight(head, fitted, new, torch.tensor([0, 2])), 2)  # 0.5 / 0.12
        4.19
    """
    missed = []
    for features, y, rows in ((e.features, e.y, e.atypical(typical)) for e in (train, held_out)):
        if not bool(rows.any()):
            return 1.0
        p = head(features[rows]).softmax(1).gather(1, y[rows][:, None])
        missed.append(float((1 - p).mean()))
    return min(MOST, max(1.0, missed[1] / max(missed[0], 1e-12)))


def _log_odds(x: Tensor, marked: Tensor, others: Tensor, others_marked: Tensor, l2: float) -> Tensor:
    """Cross-fitted log-odds ``(S,)`` of being marked."""
    label = marked.long()

    def fit(used: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([label[used], others_marked.long()])
        return fit_balanced(torch.cat([x[used], others]), both, both, l2, 2, subsets=JUDGED)

    logits = crossfit(x, label, fit, 2)  # type: ignore[arg-type]
    return logits[:, 1] - logits[:, 0]


def otsu(values: Tensor) -> float:
    """The threshold between the two clusters with the smallest variance within (Otsu 1979).

    Args:
        values: ``(n,)``, at least two.

    >>> otsu(torch.tensor([0.0, 1.0, 9.0, 10.0]))
    5.0
    """
    v = values.double().sort().values
    n, total = len(v), v.cumsum(0)
    left = torch.arange(1, n, dtype=v.dtype, device=v.device)
    # The sum of squares between the clusters is largest where that within is smallest.
    between = total[:-1].square() / left + (total[-1] - total[:-1]).square() / (n - left)
    cut = int(between.argmax())
    return float((v[cut] + v[cut + 1]) / 2)
