r"""How much a unit knows about an attribute within each class: Gaussian mutual information and its gradient.

Of one class and one unit let :math:`\bar h_a` be the mean activation of the examples with attribute a, k the number of
attributes that occur, B the variance of these k means and v the variance of the examples around them.  If activations
are Gaussian around their group's mean and the groups are equally frequent, the mutual information between unit and
attribute within the class is about

.. math:: I = \tfrac12 \ln\Bigl(1 + \frac{B}{V}\Bigr), \qquad V = v + (\varepsilon s)^2,
   \qquad B = \frac1k \sum_a (\bar h_a - \bar h)^2 = d^2/4 \text{ for two attributes a distance } d \text{ apart},

in nats.  The floor :math:`(\varepsilon s)^2`, with s the unit's standard deviation over all examples, keeps a unit that
is nearly constant within a group from counting without bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 0.1
_TINY = 1e-12  # keeps dead units at 0 / _TINY = 0


class Moments(NamedTuple):
    """Sums over the examples of each class and attribute.

    Attributes:
        counts: ``(C, A)`` examples.
        totals: ``(C, A, N)`` sum of the activations of N units.
        squares: ``(C, A, N)`` sum of their squares.
    """

    counts: Tensor
    totals: Tensor
    squares: Tensor

    def mean(self) -> Tensor:
        """``(C, A, N)`` mean activation of each group; 0 where there are no examples."""
        return self.totals / self.counts.clamp_min(_TINY)[..., None]

    def deviation(self) -> Tensor:
        """``(N,)`` standard deviation of each unit over all examples."""
        count = self.counts.sum().clamp_min(_TINY)
        mean = self.totals.sum((0, 1)) / count
        return (self.squares.sum((0, 1)) / count - mean.square()).clamp_min(0).sqrt()


def group_moments(rows: Tensor, y: Tensor, attribute: Tensor, num_classes: int, num_attributes: int) -> Moments:
    """Sum up the activations of each class and attribute.

    Args:
        rows: ``(B, N)`` activations.  A row with a value that is not finite is left out, as is one whose class or
            attribute is out of range.
        y: ``(B,)`` classes in 0 … C − 1.
        attribute: ``(B,)`` attributes in 0 … A − 1.
        num_classes: C.
        num_attributes: A.

    >>> rows = torch.tensor([[1.0], [3.0], [10.0]])
    >>> group_moments(rows, torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]), 2, 2).mean()[..., 0]
    tensor([[ 2.,  0.],
            [ 0., 10.]])
    """
    valid = _valid(rows, y, attribute, num_classes, num_attributes)
    group = torch.where(valid, y * num_attributes + attribute, 0)
    values = torch.where(valid[:, None], rows, 0)
    groups = num_classes * num_attributes

    def summed(what: Tensor) -> Tensor:  # (B, M) → (C, A, M)
        sums = what.new_zeros(groups, what.shape[1]).index_add_(0, group, what)
        return sums.view(num_classes, num_attributes, -1)

    return Moments(summed(valid[:, None].to(rows.dtype))[..., 0], summed(values), summed(values.square()))


def attribute_information(moments: Moments, deviation: Tensor | None = None, floor: float = FLOOR) -> Tensor:
    """Mutual information ``(C, N)`` in nats between each unit and the attribute within each class.

    Args:
        moments: from :func:`group_moments`; differentiable with respect to the rows.
        deviation: ``(N,)`` the units' standard deviations s; default those of ``moments``.
        floor: ε, as a fraction of s.

    Returns:
        0 for a class in which fewer than two attributes occur.

    Two groups half a standard deviation to either side of their mean:

    >>> rows = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
    >>> moments = group_moments(rows, torch.zeros(4).long(), torch.tensor([0, 0, 1, 1]), 1, 2)
    >>> attribute_information(moments, floor=0.0)
    tensor([[0.1116]])
    """
    between, within, _, _ = _variances(moments)
    spread = moments.deviation() if deviation is None else deviation
    return 0.5 * torch.log1p(between / (within + (floor * spread).square()).clamp_min(_TINY))


def information_gradient(
    rows: Tensor,
    y: Tensor,
    attribute: Tensor,
    num_classes: int,
    num_attributes: int,
    deviation: Tensor,
    floor: float = FLOOR,
) -> tuple[Tensor, Tensor]:
    r"""Mutual information averaged over the classes that have two attributes in the batch, and its gradient.

    Args:
        rows, y, attribute, num_classes, num_attributes: see :func:`group_moments`.
        deviation: ``(N,)`` s, a constant.
        floor: ε.

    Returns:
        information ``(N,)`` in nats, and ``(B, N)`` its gradient with respect to ``rows``.

    >>> rows, attribute = torch.tensor([[0.0], [2.0], [1.0], [3.0]]), torch.tensor([0, 0, 1, 1])
    >>> information, gradient = information_gradient(rows, torch.zeros(4).long(), attribute, 1, 2, torch.ones(1))
    >>> gradient[:, 0]  # a step against it moves the groups together
    tensor([-0.0501, -0.1483,  0.1483,  0.0501])
    """
    # For row i, of class c and attribute a, with n_a rows like it, n in its class and h̄ the mean of the k group means:
    #   I = ½ [ln(V + B) − ln V],  so  ∂I/∂B = ½ / (V + B)  and  ∂I/∂v = −½ B / (V (V + B));
    #   B = 1/k Σ_a (h̄_a − h̄)²,   so  ∂B/∂h_i = 2 (h̄_a − h̄) / (k n_a), as the deviations from h̄ sum to 0;
    #   v = 1/n Σ_i (h_i − h̄_a)²,  so  ∂v/∂h_i = 2 (h_i − h̄_a) / n, as the deviations from h̄_a sum to 0.
    # Together  ∂I/∂h_i = [(h̄_a − h̄) / (k n_a) − B (h_i − h̄_a) / (n V)] / (V + B).
    valid = _valid(rows, y, attribute, num_classes, num_attributes)[:, None]
    rows = torch.where(valid, rows, 0)
    rows = rows - rows.mean(0)  # I does not change with it, and squares lose less to rounding
    rows = torch.where(valid, rows, torch.nan)
    moments = group_moments(rows, y, attribute, num_classes, num_attributes)
    between, within, centre, occurs = _variances(moments)  # (C, N), (C, N), (C, N), (C, A)
    total = (within + (floor * deviation).square()).clamp_min(_TINY)
    kinds = occurs.sum(1)
    counted = kinds >= 2  # (C,)
    per_class = counted.to(rows.dtype) / counted.sum().clamp_min(1)
    information = (per_class[:, None] * 0.5 * torch.log1p(between / total)).sum(0)

    y, attribute = (torch.where(valid[:, 0], index, 0) for index in (y, attribute))
    mean = moments.mean()
    pull = (mean - centre[:, None]) / (kinds[:, None] * moments.counts).clamp_min(1)[..., None]  # (C, A, N)
    shrink = between / (moments.counts.sum(1).clamp_min(1)[:, None] * total)  # (C, N)
    scale = per_class[:, None] / (total + between)  # (C, N)
    gradient = (pull[y, attribute] - shrink[y] * (rows - mean[y, attribute])) * scale[y]
    return information, torch.where(valid, gradient, 0)


def _valid(rows: Tensor, y: Tensor, attribute: Tensor, num_classes: int, num_attributes: int) -> Tensor:
    """``(B,)`` whether a row counts; without waiting for an accelerator."""
    known = (y >= 0) & (y < num_classes) & (attribute >= 0) & (attribute < num_attributes)
    return known & torch.isfinite(rows).all(1)


def _variances(moments: Moments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Between and within variance and the mean of the groups' means, ``(C, N)`` each; which groups occur ``(C, A)``."""
    occurs = moments.counts > 0
    share = (occurs / occurs.sum(1, keepdim=True).clamp_min(1)).to(moments.totals.dtype)[..., None]  # (C, A, 1)
    mean = moments.mean()
    centre = (share * mean).sum(1)
    between = (share * (mean - centre[:, None]).square()).sum(1)
    residual = moments.squares - moments.counts[..., None] * mean.square()
    within = residual.sum(1).clamp_min(0) / moments.counts.sum(1).clamp_min(_TINY)[:, None]
    return between, within, centre, occurs
