"""Find the shortcut without group labels: what a shallow layer already predicts of the class.

A spurious attribute is easier than the class itself, so it can be read linearly from an early layer, before the network
has learned the task.  A regularised linear probe of the class on such a layer follows the attribute, and the examples
that it gets wrong when it is cross-fitted (fitted without them) are those that go against the attribute: the minority.
The probe is not fitted on the example that it judges, so memorization does not hide the minority, as it does on the
network's own training examples, and no held-out data is needed.

Where the class is as easy to read as any attribute, the probe is nearly always right and its mistakes are merely hard
examples.  The two can be distinguished: a probe that follows an attribute is confident also where the attribute
misleads it, and on hard examples it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from demem.linear import LinearHead, balanced_weights, crossfit_logits, fit_linear
from demem.tracing import margins, members_of

PROBE_L2 = 1e-2
PROGRESS = 0.8  # from chance's error to that of the best layer
UNSURE = 0.05  # fraction of the right answers, those with the smallest margins, that count as not confident
MIN_SURE = 1 / 3  # fraction of the mistakes; up to .28 was measured for hard examples, from .42 for shortcuts


class ShortcutProbe(NamedTuple):
    """A probe of the class at one layer, and whether it follows a shortcut.

    Attributes:
        site: name of the layer that was probed.
        logits: ``(S, C)`` of each example, from a probe that was fitted without it.
        head: the probe fitted on all examples, to name the attribute of others.
        error: mean over classes of the fraction of examples that the cross-fitted probe gets wrong.
        sure: fraction of the mistakes whose margin (largest logit minus second) is at least the 5% quantile of the
            margins of the right answers in the same class; 1 if there are no mistakes.
        found: whether they can be those of a shortcut: ``sure`` is at least ``min_sure``.
    """

    site: str
    logits: Tensor
    head: LinearHead
    error: float
    sure: float
    found: bool

    @property
    def attribute(self) -> Tensor:
        """``(S,)`` class that the probe names for each example without having seen it: the inferred attribute."""
        return self.logits.argmax(1)

    def groups(self, y: Tensor, features: Tensor | None = None) -> Tensor:
        """Inferred group ``y · C + attribute`` of each example, with :math:`C` classes; without a shortcut the groups
        are the classes, ``y · C + y``.

        Args:
            y: ``(S,)`` class indices.
            features: ``(S, N)`` of other examples than those of :attr:`attribute`, at :attr:`site`.
        """
        attribute = self.attribute if features is None else self.head(features.float()).argmax(1)
        return y * len(self.head.bias) + (attribute if self.found else y)


def probe_shortcut(
    features: Tensor,
    y: Tensor,
    num_classes: int,
    site: str = "",
    l2: float = PROBE_L2,
    min_sure: float = MIN_SURE,
) -> ShortcutProbe:
    """Fit a cross-fitted (5-fold), class-balanced linear probe of the class.

    Normally distributed margins, without any shortcut, give a share of sure mistakes of .10 at an error of .01, .30 at
    .03, .46 at .05 and .66 at .1; a shortcut that is read without noise gives .95.  So that share speaks only where the
    probe is nearly always right.

    Args:
        features: ``(S, N)`` pooled activations of one layer.
        y: ``(S,)`` class indices.
        num_classes: number of classes.
        site: its name, for the report.
        l2: see :func:`demem.linear.fit_linear`.
        min_sure: minimum fraction of confident mistakes for the probe to count as following a shortcut; 0 always
            assumes one.

    Raises:
        ValueError: a class has fewer than two examples, or a feature is not finite.

    Example:
        >>> y = torch.arange(200) % 2
        >>> attribute = torch.where(torch.arange(200) < 180, y, 1 - y)  # agrees with the class in 90%
        >>> probe = probe_shortcut(4.0 * attribute[:, None] + torch.randn(200, 3), y, 2)
        >>> probe.found, round(probe.error, 1), float((probe.attribute == attribute).float().mean()) > 0.95
        (True, 0.1, True)
    """
    return find_shortcut({site: features}, y, num_classes, l2=l2, min_sure=min_sure)


def class_error(logits: Tensor, y: Tensor) -> float:
    """Mean over classes of the fraction of examples whose largest logit is another class's.

    Example:
        >>> class_error(torch.eye(2)[[0, 0, 1, 0]], torch.tensor([0, 0, 1, 1]))
        0.25
    """
    wrong = (logits.argmax(1) != y).float()
    return float(torch.stack([wrong[members].mean() for _, members in members_of(y)]).mean())


def _sure(logits: Tensor, y: Tensor) -> float:
    named = logits.argmax(1)
    margin, right = margins(logits, named), named == y
    sure = torch.ones_like(right)
    for _, members in members_of(y):
        known = margin[members[right[members]]]
        if len(known):
            sure[members] = margin[members] >= known.quantile(UNSURE)
    return float(sure[~right].float().mean()) if bool((~right).any()) else 1.0


def find_shortcut(
    features: Mapping[str, Tensor],
    y: Tensor,
    num_classes: int,
    progress: float = PROGRESS,
    l2: float = PROBE_L2,
    min_sure: float = MIN_SURE,
) -> ShortcutProbe:
    """Probe several layers and keep the earliest one that predicts the class nearly as well as the best of them.

    Deeper layers know more of the class itself, so their probes make fewer mistakes on the minority; a layer that is
    too early knows neither.  "Nearly as well" is a cross-fitted error that has come at least the fraction ``progress``
    of the way from chance, (C − 1)/C, down to the lowest.

    Args:
        features: ``{site name: (S, N)}`` in the order of the network, the first layer first.
        y: ``(S,)`` class indices.
        num_classes: number of classes C.
        progress: in [0, 1].
        l2: see :func:`demem.linear.fit_linear`.
        min_sure: see :func:`probe_shortcut`.

    Raises:
        ValueError: no site is given, or as :func:`probe_shortcut`.

    Example:
        >>> y = torch.arange(200) % 2
        >>> attribute = torch.where(torch.arange(200) < 180, y, 1 - y)
        >>> early = 4.0 * attribute[:, None] + torch.randn(200, 3)
        >>> late = torch.cat([early, y[:, None] + torch.randn(200, 3)], 1)
        >>> find_shortcut({"early": early, "late": late}, y, 2).site  # the late layer knows more of the class itself
        'early'
    """
    if not features or not 0 <= progress <= 1:
        raise ValueError("find_shortcut needs at least one layer, and progress in [0, 1].")
    weights = balanced_weights(y)
    logits = {name: crossfit_logits(values, y, weights, l2, num_classes) for name, values in features.items()}
    errors = {name: class_error(values, y) for name, values in logits.items()}
    chance, best = 1 - 1 / num_classes, min(errors.values())
    # Where even the best is no better than chance, any layer is as good as another.
    enough = max(best, chance - progress * (chance - best))
    site = next(name for name, error in errors.items() if error <= enough)
    head, sure = fit_linear(features[site], y, weights, l2, num_classes), _sure(logits[site], y)
    return ShortcutProbe(site, logits[site], head, errors[site], sure, sure >= min_sure)
