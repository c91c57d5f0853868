"""Groups of the training and the held-out examples, and which of two probes they come from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from demem.groups.probe import ShortcutProbe
from demem.groups.verdict import FEW_ERRORS, TRUSTED, Kind, Verdict, is_confirmed
from demem.linear import balanced_weights, fit_linear
from demem.tracing import members_of

MANY_ERRORS = 0.25  # × chance's error; a probe that makes more is not trusted with the transfer of known groups
_KNOWN_L2 = 1e-2


@dataclass(frozen=True)
class Groups:
    r"""The group of every example, and the probe that they come from.

    Attributes:
        index: ``(S,)`` int64, group of each training example: :math:`y · C + a` with the class :math:`y`, the inferred
            attribute :math:`a` and :math:`C` classes; :math:`y · C + y` without a shortcut.
        held_out: ``(H,)`` int64, the same of each held-out example.
        y, held_out_y: ``(S,)`` and ``(H,)`` int64, their classes.
        num_classes: :math:`C`.
        site: the layer that was probed.
        error: of the cross-fitted probe, mean over classes, a fraction.
        sure: fraction of its mistakes that it is confident of.
        shortcut: whether these mistakes are those of a shortcut.
        kind: what they are, see :class:`~demem.groups.Verdict`.
        why: the figures behind it, in one sentence.
        known: whether the groups are true ones of the held-out examples, transferred to the training examples.
        epoch: epochs of training that went before.
        suspect: ``(H,)`` bool, held-out examples that the probe gets wrong; ``None`` where the groups say it.
    """

    index: Tensor
    held_out: Tensor
    y: Tensor
    held_out_y: Tensor
    num_classes: int
    site: str
    error: float
    sure: float
    shortcut: bool
    known: bool = False
    epoch: int = 0
    kind: Kind = "undecided"
    why: str = ""
    suspect: Tensor | None = None

    def __repr__(self) -> str:
        what = "known groups" if self.known else "a shortcut" if self.shortcut else f"no shortcut, {self.kind}"
        train = int((self.index != self.typical[self.y]).sum())
        held_out = int((self.held_out != self.typical[self.held_out_y]).sum())
        when = "before training" if self.epoch == 0 else f"after {self.epoch} epoch{'s' * (self.epoch != 1)}"
        return (
            f"Groups({what}; probe of {self.site!r} {when}: error {self.error:.2f}, "
            f"{self.sure:.2f} of its mistakes confident; atypical: {train} of {len(self.y)} training and {held_out} of "
            f"{len(self.held_out)} held-out examples)"
        )

    @property
    def sizes(self) -> list[int]:
        """Training examples of each group, in the order of its index."""
        return torch.bincount(self.index).tolist()

    @property
    def typical(self) -> Tensor:
        """``(C,)`` the largest group of each class in the training set."""
        return largest_groups(self.y, self.index, self.num_classes)

    @property
    def informative(self) -> bool:
        """Whether the groups say more than the classes do."""
        return self.known or self.shortcut

    @property
    def impure(self) -> bool:
        """Whether hard examples of the typical groups may be among the minority: a shortcut's groups are inferred."""
        return self.shortcut and not self.known

    @property
    def doubtful(self) -> bool:
        """Whether there may be no shortcut after all: the closer look did not side with the labels."""
        return self.impure and not is_confirmed(self.why)

    @property
    def trust(self) -> dict[str, bool]:
        """How far the groups are to be relied on: options of :func:`demem.removal.choose_round`."""
        return {"groups_known": self.informative, "doubtful": self.doubtful, "impure": self.impure}

    @property
    def many_errors(self) -> bool:
        """Whether the probe knows too little of the class to transfer known groups."""
        return self.error > MANY_ERRORS * _chance(self.num_classes)

    def without_shortcut(self) -> Groups:
        """The same, where the probe's mistakes are merely hard: groups that are inferred become the classes."""
        if self.known:
            return replace(self, shortcut=False)
        same = self.num_classes + 1
        return replace(self, shortcut=False, index=same * self.y, held_out=same * self.held_out_y)

    @property
    def few_errors(self) -> bool:
        """Whether the probe's mistakes are so few that the inferred minority is small, whatever they are."""
        return self.error <= FEW_ERRORS * _chance(self.num_classes)

    @property
    def open(self) -> bool:
        """Whether a later probe may still find a shortcut: this one found none, and no wrong labels, and makes more
        than a few mistakes."""
        if self.known:
            return self.many_errors
        waits = self.kind == "undecided" and self.epoch == 0
        return not self.shortcut and self.kind != "label noise" and (waits or not self.few_errors)

    def judged(self, verdict: Verdict) -> Groups:
        """The same, with what a verdict on the probe's mistakes says.

        ==============  =======================================  =====================================
        verdict         mistakes that the probe is sure of       result
        ==============  =======================================  =====================================
        shortcut        at least a third                         shortcut
        label noise     any                                      no shortcut
        nothing         any                                      no shortcut
        undecided       any, before training                     no shortcut, and left :attr:`open`
        another         at least a third, and few mistakes       shortcut
        another         otherwise                                no shortcut, and left :attr:`open`
        ==============  =======================================  =====================================

        A layer that shows the class as well as the attribute makes the probe less sure of the minority than of the
        rest, so a verdict misses some shortcuts.  Few mistakes make a small minority, and little is lost if they were
        merely hard; many that are not a shortcut's ruin what balancing them touches.  After an epoch of training a
        network sides with some wrong labels, so that then the first line needs few mistakes, too.  The line of few
        mistakes then needs one that is confident on a closer look: a network that knows the class makes some anyway.
        """
        if self.known:
            return replace(self, why=verdict.why)
        decided = verdict.kind == "shortcut" and self.epoch == 0
        waits = verdict.kind == "undecided" and self.epoch == 0  # wrong labels are still possible
        few = self.few_errors and (self.epoch == 0 or not math.isnan(verdict.surprise))  # NaN: no mistake is confident
        possible = verdict.kind not in ("label noise", "nothing") and few and not waits
        if self.shortcut and (decided or possible):
            few_and_sure = "" if verdict.kind == "shortcut" else "the probe makes few mistakes and is sure of many; "
            return replace(self, kind="shortcut", why=few_and_sure + verdict.why, suspect=None)
        kind = "hard examples" if verdict.kind == "shortcut" else verdict.kind  # of which the probe is not sure
        return replace(self.without_shortcut(), kind=kind, why=verdict.why)

    def without_wrong_labels(self, wrong: Tensor, held_out_wrong: Tensor) -> Groups:
        """The same, where an example whose label is probably wrong counts as typical.

        Args:
            wrong: ``(S,)`` probability that a training example's label is wrong (:func:`demem.groups.wrong_labels`).
            held_out_wrong: ``(H,)``, the same of a held-out example.
        """
        index = torch.where(wrong.cpu() <= TRUSTED, self.index, self.typical[self.y])
        held_out = torch.where(held_out_wrong.cpu() <= TRUSTED, self.held_out, self.typical[self.held_out_y])
        return replace(self, index=index, held_out=held_out)

    def state_dict(self) -> dict[str, Any]:
        """Tensors, primitives and ``None``, for a checkpoint; ``Groups(**state)`` is the opposite."""
        return asdict(self)


def infer_groups(
    probe: ShortcutProbe, y: Tensor, held_out_features: Tensor, held_out_y: Tensor, epoch: int = 0
) -> Groups:
    """Cross the class with what the probe says.

    Args:
        probe: from :func:`demem.groups.find_shortcut` on the training examples.
        y: ``(S,)`` their classes.
        held_out_features: ``(H, N)`` activations of the held-out examples at ``probe.site``.
        held_out_y: ``(H,)`` their classes.
        epoch: epochs of training that went before.

    Example:
        >>> from demem.groups import probe_shortcut
        >>> x, y = torch.tensor([[0.0], [0.1], [1.0], [0.9]]).repeat(8, 1), torch.tensor([0, 0, 1, 1]).repeat(8)
        >>> y[3] = 0  # goes against the rest: its feature says class 1
        >>> infer_groups(probe_shortcut(x, y, 2), y, x, y).sizes
        [16, 1, 0, 15]
    """
    groups = _groups(probe, probe.groups(y), probe.groups(held_out_y, held_out_features), y, held_out_y, False, epoch)
    return replace(groups, suspect=(probe.head(held_out_features).argmax(1) != held_out_y).cpu())


def known_groups(
    probe: ShortcutProbe,
    features: Tensor,
    y: Tensor,
    held_out_features: Tensor,
    held_out_y: Tensor,
    held_out_group: Tensor,
    epoch: int = 0,
) -> Groups:
    """Take the true groups of the held-out examples, and infer those of the training examples from them.

    A class-balanced linear probe of the group is fitted on the held-out examples; a training example can only be of a
    group that its class has there.

    Args:
        probe: from :func:`demem.groups.find_shortcut`; names the layer and is recorded.
        features, held_out_features: ``(S, N)`` and ``(H, N)`` activations at ``probe.site``.
        y, held_out_y: ``(S,)`` and ``(H,)`` classes.
        held_out_group: ``(H,)`` true groups; those that span classes (attributes) are crossed with the class.
        epoch: epochs of training that went before.

    Example:
        >>> from demem.groups import probe_shortcut
        >>> x, y = torch.tensor([[0.0], [1.0]]).repeat(8, 1), torch.tensor([0, 0, 1, 1]).repeat(4)
        >>> attribute = torch.tensor([0, 1]).repeat(8)  # known of the held-out examples, here the same as the others
        >>> known_groups(probe_shortcut(x, y, 2), x, y, x, y, attribute).sizes
        [4, 4, 4, 4]
    """
    group = _within_classes(held_out_y, held_out_group)
    logits = fit_linear(held_out_features, group, balanced_weights(group), _KNOWN_L2)(features)
    possible = torch.zeros(int(max(y.max(), held_out_y.max())) + 1, logits.shape[1], dtype=torch.bool, device=y.device)
    possible[held_out_y, group] = True
    index = logits.masked_fill(~possible[y], -torch.inf).argmax(1)
    return _groups(probe, index, group, y, held_out_y, True, epoch)


def second_look(first: Groups, second: Groups) -> Groups:
    """Decide between a probe made before training that left the question open, and one made after an epoch.

    Once trained, a network leans on the shortcut itself and soon knows the class, so its mistakes are fewer: the second
    probe counts.  Known groups are transferred by the first one, unless the second makes at most half its mistakes.

    Args:
        first: before training.
        second: after an epoch.

    Example:
        >>> groups = torch.zeros(2, dtype=torch.long)
        >>> first = Groups(groups, groups, groups, groups, 2, "layer1", 0.3, 0.9, True)
        >>> second_look(first, replace(first, error=0.05, epoch=1)).epoch
        1
    """
    if second.known and not second.few_errors:
        return first if second.error > first.error / 2 else second.without_shortcut()
    return second


def largest_groups(y: Tensor, group: Tensor, num_classes: int) -> Tensor:
    """``(C,)`` the largest group of each class; :math:`-1` for a class without examples.

    Example:
        >>> largest_groups(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 2]), 2)
        tensor([1, 2])
    """
    largest = group.new_full((num_classes,), -1)
    for c, members in members_of(y):
        if c < num_classes:
            largest[c] = group[members].mode().values
    return largest


def _groups(
    probe: ShortcutProbe, index: Tensor, held_out: Tensor, y: Tensor, held_out_y: Tensor, known: bool, epoch: int
) -> Groups:
    return Groups(
        index.cpu(),
        held_out.cpu(),
        y.cpu(),
        held_out_y.cpu(),
        len(probe.head.bias),
        probe.site,
        probe.error,
        probe.sure,
        probe.found,
        known,
        epoch,
        "shortcut" if probe.found else "hard examples",
    )


def _within_classes(y: Tensor, group: Tensor) -> Tensor:
    """Groups that do not span classes: those given, or class and attribute crossed where they name an attribute."""
    groups = int(group.max()) + 1
    crossed = y * groups + group
    return group if len(set(crossed.tolist())) == len(set(group.tolist())) else crossed


def _chance(num_classes: int) -> float:
    return 1 - 1 / num_classes
