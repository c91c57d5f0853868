"""Mask the memorising units that the head reads and refit the head, in rounds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from demem.linear import LinearHead, average_heads, balanced_weights, crossfit, fit_balanced, fit_linear
from demem.removal.budget import FOLDS, KEPT, Plan, plan_fits
from demem.removal.joint import Examples, memorization_weight, purify
from demem.tracing import atypical_by_margin, linear_score, margins, members_of

ATYPICAL_WEIGHTS = (1.0, 3.0, 10.0, 30.0)
MASKED_SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.86, 0.9)
# Keeps a group of a handful of examples (label noise) from ruling a balanced fit.
SMOOTHING = 0.02
TRACED = 500  # training examples of each group that units and heads are traced on, where there are more
FEWEST_JUDGED = 5  # examples of a group; fewer say nothing of its accuracy
FEWEST_WEIGHED = 10  # atypical examples of a class; fewer do not say how much more they should weigh
FEWEST_ATYPICAL = 2  # examples of a class; a head balanced on fewer follows chance
ONE_SIDED = 1.645  # standard errors: 5%
LIKELY = 0.5  # standard errors: the odds are two to one
AFFORDABLE = 0.02  # of a class's typical examples may go wrong for a refit whose gain is uncertain
MISLED = 0.5  # accuracy on atypical examples; below it the network follows something else than the class
MEMORIZED = 3.0  # times more of the atypical examples missed held out than in training
NOT_MISLED, DEAR = 2 / 3, 0.1  # from there on, at most so many of a class's typical examples may be lost on balance
GAINS_MORE = "it gains the atypical examples that are alike more than it costs the others"
NOT_MEMORIZED = "the network has hardly memorised the atypical examples, and gets most of the held-out ones right"
TOO_DEAR = "the network gets most of the atypical examples right, and a refit would cost too many typical ones"
WORSE_IN_SUM = "a refit would cost the average more than it gains the worst group"
COSTS_MORE = "a refit would cost the typical examples more than it gains the atypical ones"


@dataclass(frozen=True)
class RoundRecord:
    """What is kept of a round: enough to say what was done, small enough for a checkpoint.

    Attributes:
        refitted: whether the head was refitted; not so for the network as trained.
        share: fraction of the units that are masked.
        weight: of an atypical example in the refit, where a typical one weighs 1.
        worst: cross-fitted accuracy on the worst (true or inferred) group of the held-out examples, a fraction.
        chosen: whether this round was kept.
        average: cross-fitted accuracy on all held-out examples; ``None`` in a record from before it was kept.
        why: of the round that was kept, why (:func:`explain_round`); empty of others, and in older records.
        ordinary: whether the refit counted all held-out examples alike (:func:`demem.removal.ordinary_refit`).
    """

    refitted: bool
    share: float
    worst: float
    chosen: bool
    weight: float = 1.0
    average: float | None = None
    why: str = ""
    ordinary: bool = False

    def __repr__(self) -> str:
        refit = f"head refitted, atypical examples weighing {self.weight:g}, {self.share:.0%} of its inputs masked"
        head = "head refitted, all examples alike" if self.ordinary else refit if self.refitted else "as trained"
        return f"RoundRecord({head}: worst group {self.worst:.3f}{', kept' * self.chosen})"


@dataclass(frozen=True)
class Round:
    """One round of removal, or (the first of the list) the network as trained.

    Attributes:
        share: of the units that are masked.
        weight: of an atypical example in the refit.
        gate: ``(N,)``, 0 for a masked unit and 1 for a kept one.
        score: ``(N,)`` memorization score of every unit, measured before this round's mask; zeros in round 0.
        right: ``(S,)`` whether a head that was fitted without it classifies each held-out example rightly.
        group: ``(S,)`` the (true or inferred) groups that it is judged by; with ``join`` purer ones (:func:`purify`).
        worst: accuracy on the worst of them.
        standard_error: of ``worst``.
        refit: gives the round's head.
        fold_heads: those that ``right`` comes from; none of the network as trained.
        fitted_atypical: atypical examples that the head is fitted on, of the class that has fewest of them.
        memorized: of the network as trained, with ``join``: :func:`memorization_weight`.
        ordinary: the head counts all held-out examples alike (:func:`demem.removal.ordinary_refit`).
    """

    share: float
    weight: float
    gate: Tensor
    score: Tensor
    right: Tensor
    group: Tensor
    worst: float
    standard_error: float
    refit: Callable[[], LinearHead]
    fold_heads: Sequence[LinearHead] = ()
    fitted_atypical: int = 0
    memorized: float | None = None
    ordinary: bool = False

    def __repr__(self) -> str:
        what = f"{self.share:.0%} of the head's inputs masked, atypical examples weighing {self.weight:g}"
        return f"Round({what}: worst group {self.worst:.3f})"

    def record(self, group: Tensor, chosen: bool, refitted: bool, why: str = "") -> RoundRecord:
        """What to keep of the round.

        Args:
            group: ``(S,)`` the groups as they were inferred (or given), by which the rounds of all epochs compare.
            chosen: whether the round is kept.
            refitted: whether the head is another than the network's own.
            why: the reason for which the round is kept.
        """
        average, worst = float(self.right.float().mean()), _worst(self.right, group)[0]
        return RoundRecord(refitted, self.share, worst, chosen, self.weight, average, why, self.ordinary)

    @property
    def balanced(self) -> float:
        """Mean of the accuracies on the groups: less a matter of chance than that on the worst of them."""
        accuracies = [float(right.mean()) for right in _judged(self.right.float(), self.group)]
        return sum(accuracies) / len(accuracies)

    @cached_property
    def head(self) -> LinearHead:
        """Refitted on the kept units (weight 0 on the masked ones); at the first look, as most rounds are not kept."""
        return self.refit()

    @property
    def quick_head(self) -> LinearHead:
        """The mean of the folds' heads, which are there already: a refit for a network that trains on."""
        return average_heads(self.fold_heads or [self.head])


def remove_in_rounds(
    train: Examples,
    held_out: Examples,
    trained: LinearHead,
    *,
    num_classes: int,
    shares: Sequence[float] = MASKED_SHARES,
    weights: Sequence[float] = ATYPICAL_WEIGHTS,
    typical: Tensor | None = None,
    atypical_share: float = 0.2,
    l2: float = 1e-3,
    score_units: Callable[..., Tensor] = linear_score,
    join: bool = False,
) -> list[Round]:
    r"""Refit; then trace, mask, refit, with more units masked every round.

    The first rounds refit the head with nothing masked, and atypical held-out examples weigh more from round to round:
    inferred groups are not pure, so that those that are drawn in equal numbers may still hold more typical examples.
    Of the weights the one with the best cross-fitted accuracy on the worst group stays, the smallest of equals.  Where
    a class has fewer than 10 atypical examples there is one weight.

    With ``join``, and where a class has fewer atypical examples held out than traced in training, all rounds are judged
    by purer groups of the held-out examples (:func:`purify`), as hard ones among the inferred minority hide what a
    refit gives the others.  Of the weights the one that is best on the mean of the groups stays, as on the worst of
    them a head that guesses often is, and of those that :func:`choose_round` would not call too dear.  The head is then
    the mean of two: the one with that weight, and, counting twice, another that is fitted on the training examples as
    well, in which an atypical example weighs as much as the network has memorised those of training
    (:func:`memorization_weight`) and the groups of both are purer.  Where a class has fewer than 10 atypical ones held
    out, it is the latter alone.  The first head's weight is chosen without training examples, which the network has
    fitted.  Whether they help is not asked: of the held-out minority those that are inferred are the hardest, and say
    otherwise even where they help most.

    Each later round scores the units by their impact on the atypical held-out examples under a head that was fitted on
    the *training* examples alone (:func:`demem.tracing.linear_score`: there the spurious pattern is at work), masks the
    highest-scoring share, units masked before included, and refits.  The atypical examples are chosen once, before the
    first mask.  The head that is kept is fitted on the held-out examples, group by group in equal numbers
    (:func:`demem.linear.fit_balanced`): the training examples are fitted already, minority and all, and say less
    about how the network meets new ones.

    Where the fits would take more than minutes, as with many classes, fewer and smaller subsets are drawn, and no units
    are masked if need be, with a warning (:func:`demem.removal.plan_fits`).  Beside the features of all examples,
    memory holds those of at most 20,000 three times, and two arrays of logits of the held-out examples.

    Args:
        train: examples that the network was trained on.
        held_out: examples that it was not trained on.
        trained: its head.
        num_classes: number of classes.
        shares: of the units to mask, growing, each in (0, 1).
        weights: of an atypical example in the refit, where a typical one weighs 1; growing.
        typical: ``(C,)`` the typical group of each class (:func:`demem.groups.largest_groups`); held-out examples of
            other groups are atypical.  Without it, and where a class has no others, those with the lowest margins are.
        atypical_share: of each class, by margin.
        l2: see :func:`demem.linear.fit_linear`.
        score_units: gives the score of each unit ``(N,)``, called as :func:`demem.tracing.linear_score`.
        join: training examples may take part in the refit; for inferred groups.

    Returns:
        The network as trained, then a refit for each weight with nothing masked (one where training examples take
        part), then one a share.

    Raises:
        ValueError: shares do not grow or are outside (0, 1); a class is absent from the held-out examples; features
            are not finite.

    Example:
        >>> y = torch.arange(80) % 2
        >>> examples = Examples(y[:, None] + 0.1 * torch.randn(80, 4), y, y)
        >>> trained = LinearHead(torch.zeros(2, 4), torch.zeros(2))
        >>> rounds = remove_in_rounds(examples, examples, trained, num_classes=2, shares=(0.5,))
        >>> [(round_.share, round_.weight) for round_ in rounds]  # nothing is known of atypical examples
        [(0.0, 1.0), (0.0, 1.0), (0.5, 1.0)]
    """
    check_shares(shares)
    missing = sorted(set(range(num_classes)) - set(held_out.y.tolist()))
    if missing:
        raise ValueError(
            f"The held-out examples have none of class {missing}. Units cannot be traced for a class that is not "
            "there: use a validation set with every class."
        )
    width = held_out.features.shape[1]
    atypical = None if typical is None else held_out.atypical(typical)
    fewest = 0 if typical is None else held_out.fewest_atypical(typical)
    heavier = weights if fewest >= FEWEST_WEIGHED else weights[:1]
    sizes = torch.unique(held_out.group, return_counts=True)[1]
    subset = int(sizes.clamp(max=max(8, int(sizes.min()))).sum())
    plan = plan_fits(subset, len(train.y), width, num_classes, len(heavier), shares)
    if plan.shares != tuple(shares):
        warnings.warn(
            f"No units are masked: with {num_classes} classes and {width} units that would take too long. shares=() "
            "silences this.",
            stacklevel=2,
        )
        shares = plan.shares
    affordable = plan.kept == KEPT
    few = join and affordable and typical is not None and fewest < train.fewest_atypical(typical)
    purer = purify(held_out, train, typical, l2) if few and typical is not None else held_out
    memorized = memorization_weight(trained, train, held_out, typical) if join and typical is not None else None
    rounds, joint = [replace(as_trained(purer, trained), memorized=memorized)], list[_Source]()
    gate, score = rounds[0].gate, rounds[0].score

    def judge(share: float, weight: float) -> Round:
        own = [] if joint and fewest < FEWEST_WEIGHED else [_Source(held_out, atypical, weight)]
        return _judge(share, weight, gate, score, held_out, purer.group, [*own, *joint], l2, num_classes, plan)

    tried = [judge(0.0, float(w)) for w in heavier]
    best = max(tried, key=lambda round_: round_.worst)  # the first, and smallest, of equals
    if few and typical is not None and memorized is not None:
        best = _best_on_average(tried, rounds[0], held_out, typical)
        both = purer.joined(purify(train, purer, typical, l2))
        joint = [_Source(both, both.atypical(typical), memorized)]
        tried = [judge(0.0, best.weight)]
    rounds += tried
    weight = best.weight
    if not shares:
        return rounds
    even = balanced_weights(train.group, SMOOTHING)
    traced = fit_linear(train.features, train.y, even, l2, num_classes)
    traced_on = atypical
    if traced_on is None or len(set(held_out.y[traced_on].tolist())) < num_classes:
        margin = margins(traced(held_out.features), held_out.y)
        traced_on = atypical_by_margin(margin, held_out.y, atypical_share, num_classes)
    for share in shares:
        logits = traced(held_out.features)
        score = score_units(held_out.features, traced.weight, held_out.y, traced_on, logits=logits)
        order = torch.where(gate == 0, torch.inf, score).sort(descending=True, stable=True).indices
        gate = torch.ones_like(gate)
        gate[order[: round(share * width)]] = 0
        traced = fit_linear(train.features * gate, train.y, even, l2, num_classes)
        rounds.append(judge(share, weight))
    return rounds


def _best_on_average(tried: Sequence[Round], trained: Round, held_out: Examples, typical: Tensor) -> Round:
    """Of the rounds that are not too dear to be kept the best on the mean of the groups, the first of equals."""
    inferred, purer = held_out.atypical(typical), held_out._replace(group=trained.group).atypical(typical)

    def is_dear(right: Tensor) -> bool:
        return _is_dear(_lost(right, trained.right, held_out.y, purer), right, trained.right, inferred)

    return max([r for r in tried if not is_dear(r.right)] or tried, key=lambda r: r.balanced)


def as_trained(held_out: Examples, trained: LinearHead) -> Round:
    """The round in which nothing is done.

    Args:
        held_out: examples that the network was not trained on.
        trained: its head.

    Example:
        >>> y = torch.arange(8) % 2
        >>> as_trained(Examples(torch.eye(2)[y], y, y), LinearHead(torch.eye(2), torch.zeros(2))).worst
        1.0
    """
    gate = torch.ones(held_out.features.shape[1], device=held_out.features.device)
    right, group = trained(held_out.features).argmax(1) == held_out.y, held_out.group
    return Round(0.0, 1.0, gate, torch.zeros_like(gate), right, group, *_worst(right, group), lambda: trained)


def masked_units(rounds: Sequence[Round], chosen: int) -> list[tuple[int, float]]:
    """Units that the chosen round masks, with their memorization score when they were first masked, highest first.

    Args:
        rounds: from :func:`remove_in_rounds`.
        chosen: index of one of them.

    Example:
        >>> y = torch.arange(80) % 2
        >>> examples = Examples(y[:, None] + 0.1 * torch.randn(80, 4), y, y)
        >>> trained = LinearHead(torch.zeros(2, 4), torch.zeros(2))
        >>> rounds = remove_in_rounds(examples, examples, trained, num_classes=2, shares=(0.5,))
        >>> len(masked_units(rounds, 1)), len(masked_units(rounds, 2))
        (0, 2)
    """
    score = torch.zeros_like(rounds[0].score)
    masked = torch.zeros_like(score, dtype=torch.bool)
    for round_ in rounds[: chosen + 1]:
        new = (round_.gate == 0) & ~masked
        score[new], masked = round_.score[new].to(score), masked | new
    units = (rounds[chosen].gate == 0).nonzero()[:, 0]
    return sorted(zip(units.tolist(), score[units].tolist(), strict=True), key=lambda unit: -unit[1])


def check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    """The shares, or a :class:`ValueError` if they do not grow or are outside (0, 1).

    Example:
        >>> check_shares([0.2, 0.5])
        (0.2, 0.5)
    """
    if any(not 0 < s < 1 for s in shares) or list(shares) != sorted(shares):
        raise ValueError(f"Masked shares must grow and lie in (0, 1), got {list(shares)}.")
    return tuple(float(s) for s in shares)


def clearly_better(right: Tensor, than: Tensor, cell: Tensor) -> bool:
    r"""Whether one head is more accurate than another on average over the cells of some examples, beyond chance.

    With :math:`d_s \in \{-1, 0, 1\}` the paired differences, and :math:`\bar d_k` their mean in cell :math:`k` of
    :math:`n_k`, the mean of the :math:`\bar d_k` over :math:`K` cells lies above 0 by more than 1.645 standard errors
    :math:`\tfrac{1}{K} \sqrt{\sum_k v_k / n_k}` (one-sided, 5%).  The variance
    :math:`v_k = (2 + \sum_s (d_s - \bar d_k)^2) / (n_k + 2)` counts one more difference each way, as a few examples
    that show none prove little.  Cells of fewer than 5 examples are left out.

    Args:
        right: ``(S,)`` bool, whether the head is right on each example.
        than: the same of the other head.
        cell: ``(S,)`` indices.

    Example:
        >>> right = torch.ones(40, dtype=torch.bool)
        >>> clearly_better(right, ~right, torch.arange(40) % 2), clearly_better(right, right, torch.arange(40) % 2)
        (True, False)
    """
    return _improvement(right, than, cell) > ONE_SIDED


def _improvement(right: Tensor, than: Tensor, cell: Tensor) -> float:
    """By how many standard errors one head is more accurate on average over the cells (:func:`clearly_better`)."""
    cells = _judged(right.float() - than.float(), cell)
    mean = sum(float(values.mean()) for values in cells)
    variances = [(2 + float((values - values.mean()).square().sum())) / (len(values) + 2) for values in cells]
    error = math.sqrt(sum(variance / len(values) for variance, values in zip(variances, cells, strict=True)))
    return mean / error


def worth_its_cost(right: Tensor, than: Tensor, y: Tensor, atypical: Tensor, purer: Tensor | None = None) -> bool:
    """Whether a refit helps inferred atypical examples by more than it costs the typical ones, as far as can be seen.

    Where no shortcut misleads the network, the inferred atypical examples are hard ones or have wrong labels.  A head
    that counts them like all others then trades typical examples for them, and their accuracy, the worst there is,
    rises all the same.  So what counts is the mean over the typical and the atypical examples of each class, and by how
    many standard errors it rises (as in :func:`clearly_better`).  A refit is worth its cost where that is half a one;
    where it loses at most 2% of the typical examples of each class and is not clearly worse; and where the network gets
    most of the atypical examples wrong, and so is misled, and the mean does not fall by half a one.  But one that is
    not cheap is never worth it if the average over all examples loses more than the worst cell gains; or, where the
    network gets two thirds of the atypical ones right, if that average falls and a class loses more than a tenth of its
    typical ones.  Where each class has fewer than 5 atypical examples, nothing speaks against a refit.

    Args:
        right: ``(S,)`` bool, whether the refitted head is right on each example.
        than: the same of the network as trained.
        y: ``(S,)`` class indices.
        atypical: bool ``(S,)``, as inferred.
        purer: bool ``(S,)``, those of them that count as atypical where the mean is taken (:func:`purify`): hard
            examples among the others get worse by any refit.  Default all.

    Example: one atypical example in two is gained, and one typical example in a hundred lost.

        >>> y, atypical = torch.zeros(220, dtype=torch.long), torch.arange(220) < 20
        >>> than = ~atypical
        >>> right = torch.where(atypical, torch.arange(220) % 2 == 0, torch.arange(220) % 100 > 0)
        >>> worth_its_cost(right, than, y, atypical), worth_its_cost(than, right, y, atypical)
        (True, False)
    """
    return _weigh(right, than, y, atypical, atypical if purer is None else purer)[0]


def _weigh(right: Tensor, than: Tensor, y: Tensor, inferred: Tensor, atypical: Tensor) -> tuple[bool, str]:
    """:func:`worth_its_cost`, and why."""
    if max(torch.bincount(y[inferred]).tolist(), default=0) < FEWEST_JUDGED:
        return True, "too few atypical examples are held out to weigh its cost"
    cell = 2 * y + atypical
    improvement, lost = _improvement(right, than, cell), _lost(right, than, y, atypical)
    if lost <= AFFORDABLE:
        cheap = "it costs the typical examples hardly anything"
        return (True, cheap) if improvement > -ONE_SIDED else (False, COSTS_MORE)
    if _is_dear(lost, right, than, inferred):
        return False, TOO_DEAR
    if _worst(right, cell)[0] - _worst(than, cell)[0] < float(than.float().mean()) - float(right.float().mean()):
        return False, WORSE_IN_SUM
    if improvement >= LIKELY:
        return True, GAINS_MORE
    if improvement <= -LIKELY:
        return False, COSTS_MORE
    if float(than[inferred].float().mean()) < MISLED:
        return True, "the network as trained gets most of the atypical examples wrong"
    return False, "a refit would cost typical examples, and hardly gain more than that"


def _lost(right: Tensor, than: Tensor, y: Tensor, atypical: Tensor) -> float:
    """Fraction of the typical examples that a refit gets wrong beyond what it gains, of the class that loses most."""
    change = than.float() - right.float()
    parts = [change[~atypical & (y == c)] for c, _ in members_of(y)]
    return max((float(part.mean()) for part in parts if len(part)), default=0.0)


def _is_dear(lost: float, right: Tensor, than: Tensor, inferred: Tensor) -> bool:
    """Whether a network that gets most of the inferred atypical examples right would lose many typical ones, and more
    of all held-out examples than it gains: where the atypical ones are many, their gain may well be worth that."""
    falls = int(right.sum()) < int(than.sum())
    return falls and lost > DEAR and _gets_most_right(than, inferred)


def _gets_most_right(right: Tensor, inferred: Tensor) -> bool:
    """Whether two thirds of the inferred atypical examples are right, so that nothing misleads the network much."""
    return float(right[inferred].float().mean()) >= NOT_MISLED


def choose_round(
    rounds: Sequence[Round],
    held_out: Examples,
    typical: Tensor,
    tolerance: float = 1.0,
    groups_known: bool = True,
    doubtful: bool = False,
    impure: bool = False,
) -> int:
    """Index of the round to keep.

    Of the refits with nothing masked it is the one with the best worst-group accuracy on held-out examples, and one
    with units masked only where that is worse by more than ``tolerance`` standard errors than the best of all: where a
    small set cannot distinguish rounds, the smaller mask is kept (the one-standard-error rule of Breiman et al. 1984).

    The network stays as trained (index 0) where the refit has nothing new to go by and is not clearly better
    (:func:`clearly_better`, over the typical and the atypical examples of each class): the groups are unknown, or the
    atypical examples of a class are fewer than two, training ones that take part included, or spread over several
    groups, most of which have fewer than 5, as where many classes share few held-out examples.  Where the groups are
    unknown, no class may lose by it, either.  It also stays so where it is clearly better itself, over those examples:
    a head that turns the shortcut round helps the atypical ones by less than it costs the typical ones.

    Inferred groups may be wrong.  A network that gets two thirds of the atypical examples right is not misled much.  It
    stays if it misses less than three times as many of them as of those that it was trained on
    (:func:`memorization_weight`), as it has then memorised no minority; and, where a class has ten of them, if a refit
    would lose more than a tenth of a class's typical examples, and lower the average over all.  Where the shortcut is
    doubtful, that the refit helps must be likely, or cheap (:func:`worth_its_cost`).

    Args:
        rounds: from :func:`remove_in_rounds`.
        held_out: as there.
        typical: ``(C,)`` the typical group of each class.
        tolerance: see above.
        groups_known: the held-out examples' groups say more than their classes.
        doubtful: the atypical examples may be hard ones or have wrong labels, as the shortcut is not confirmed.
        impure: the groups are inferred.

    Example:
        >>> y = torch.arange(80) % 2
        >>> examples = Examples(y[:, None] + 0.1 * torch.randn(80, 4), y, 2 * y + (torch.arange(80) < 20))
        >>> trained = LinearHead(torch.zeros(2, 4), torch.zeros(2))
        >>> rounds = remove_in_rounds(examples, examples, trained, num_classes=2, shares=(0.5,))
        >>> choose_round(rounds, examples, torch.tensor([0, 2]))  # refitted, and nothing masked
        1
    """
    return _decide(rounds, held_out, typical, tolerance, groups_known, doubtful, impure)[0]


def explain_round(
    chosen: int,
    rounds: Sequence[Round],
    held_out: Examples,
    typical: Tensor,
    tolerance: float = 1.0,
    groups_known: bool = True,
    doubtful: bool = False,
    impure: bool = False,
) -> str:
    """Why :func:`choose_round` keeps this round, in a few words; empty where it keeps another.

    Args:
        chosen: index of the round that is kept.
        rounds, held_out, typical, tolerance, groups_known, doubtful, impure: see :func:`choose_round`.

    Example:
        >>> y = torch.arange(80) % 2
        >>> examples = Examples(y[:, None] + 0.1 * torch.randn(80, 4), y, y)
        >>> knows = LinearHead(torch.tensor([[0.0] * 4, [1.0] * 4]), torch.tensor([2.0, 0.0]))
        >>> rounds = remove_in_rounds(examples, examples, knows, num_classes=2, shares=())
        >>> explain_round(0, rounds, examples, torch.tensor([0, 1]), groups_known=False)
        'there is no shortcut to go by, and a refit is not clearly better'
    """
    decided, why = _decide(rounds, held_out, typical, tolerance, groups_known, doubtful, impure)
    return why if decided == chosen else ""


def _decide(
    rounds: Sequence[Round],
    held_out: Examples,
    typical: Tensor,
    tolerance: float,
    groups_known: bool,
    doubtful: bool,
    impure: bool,
) -> tuple[int, str]:
    """:func:`choose_round`, and why."""
    best = max(rounds[1:], key=lambda r: r.worst)
    enough = best.worst - tolerance * best.standard_error
    candidates = [i for i, r in enumerate(rounds) if i > 0 and r.worst >= enough]
    smallest = min(rounds[i].share for i in candidates)
    refit = max((i for i in candidates if rounds[i].share == smallest), key=lambda i: rounds[i].worst)
    atypical = held_out.atypical(typical)
    sizes = torch.bincount(held_out.group[atypical])
    sizes = sizes[sizes > 0].float()
    scattered = len(sizes) > len(typical) and float(sizes.quantile(0.5)) < FEWEST_JUDGED
    fewest = held_out.fewest_atypical(typical)
    new, old = rounds[refit].right, rounds[0].right
    purer = held_out._replace(group=rounds[0].group).atypical(typical)
    cell = 2 * held_out.y + purer
    known_enough = max(fewest, rounds[refit].fitted_atypical) >= FEWEST_ATYPICAL
    if groups_known and known_enough and not scattered:
        gap = rounds[0].memorized
        if gap is not None and gap < MEMORIZED and _gets_most_right(old, atypical):
            return 0, NOT_MEMORIZED
        if doubtful:
            worth, why = _weigh(new, old, held_out.y, atypical, purer)
            return (refit if worth else 0), why
        if fewest >= FEWEST_JUDGED and clearly_better(old, new, cell):
            return 0, COSTS_MORE
        many = max(torch.bincount(held_out.y[atypical]).tolist(), default=0) >= FEWEST_WEIGHED
        if impure and many and _is_dear(_lost(new, old, held_out.y, purer), new, old, atypical):
            return 0, TOO_DEAR
        return refit, "it is not clearly worse on average over the groups"
    better = clearly_better(new, old, cell)
    loses = any(int(new[members].sum()) < int(old[members].sum()) for _, members in members_of(cell))
    if better and (groups_known or not loses):
        return refit, f"it is clearly better on average over the {'groups' if groups_known else 'classes'}"
    little = "there are too few atypical examples to go by" if groups_known else "there is no shortcut to go by"
    return 0, f"{little}, and a {'class would lose by a refit' if better else 'refit is not clearly better'}"


def _judged(values: Tensor, group: Tensor) -> list[Tensor]:
    """The values of each group with enough examples to judge; of all groups, if none has."""
    parts = [values[members] for _, members in members_of(group)]
    return [part for part in parts if len(part) >= FEWEST_JUDGED] or parts


def worst_group(logits: Tensor, y: Tensor, group: Tensor) -> tuple[float, float]:
    """Accuracy on the worst group and its standard error, both fractions.

    Groups of fewer than 5 examples are too few to judge and left out, unless there are no others.

    Example:
        >>> y, group = torch.zeros(20, dtype=torch.long), torch.arange(20) // 10
        >>> logits = torch.eye(2)[group]  # the second group is taken for another class
        >>> worst_group(logits, y, group)[0]
        0.0
    """
    return _worst(logits.argmax(1) == y, group)


def _worst(right: Tensor, group: Tensor) -> tuple[float, float]:
    worst = min(_judged(right.float(), group), key=lambda values: float(values.mean()))
    return float(worst.mean()), _standard_error(float(worst.mean()), len(worst))


def _standard_error(accuracy: float, count: int) -> float:
    # Agresti and Coull's centre: a perfect score on a few examples is not certain.
    p = (accuracy * count + 2) / (count + 4)
    return float((p * (1 - p) / (count + 4)) ** 0.5)


class _Source(NamedTuple):
    """Examples to fit a head on, held-out ones first, and how much an atypical one weighs."""

    examples: Examples
    atypical: Tensor | None
    weight: float

    def fewest_atypical(self, num_classes: int) -> int:
        """Atypical examples of the class that has fewest of them; 0 where nothing is known of it."""
        if self.atypical is None:
            return 0
        return int(torch.bincount(self.examples.y[self.atypical], minlength=num_classes).min())

    def head(
        self, used: Tensor, gate: Tensor | None, l2: float, num_classes: int, subsets: int, most: int
    ) -> LinearHead:
        """Fitted on the ``used`` held-out examples, and on all others, with some units masked."""
        x, y, group = self.examples
        used = F.pad(used, (0, len(y) - len(used)), value=True)
        heavier = self.atypical is not None and self.weight != 1
        weights = torch.where(self.atypical, self.weight, 1.0) if heavier else None  # type: ignore[arg-type]
        return fit_balanced(
            x, y, group, l2, num_classes, subsets=subsets, weights=weights, used=used, gate=gate, most=most
        )


def _judge(
    share: float,
    weight: float,
    gate: Tensor,
    score: Tensor,
    held_out: Examples,
    judged_by: Tensor,
    sources: Sequence[_Source],
    l2: float,
    num_classes: int,
    plan: Plan,
) -> Round:
    heads: list[LinearHead] = []
    masked = gate if bool((gate == 0).any()) else None

    def fit(subsets: int, used: Tensor) -> LinearHead:  # masks its subsets, and no copy of everything
        fitted = [source.head(used, masked, l2, num_classes, subsets, plan.most) for source in sources]
        return average_heads(fitted + fitted[1:])  # a second head, of many more examples, counts twice

    def judged(used: Tensor) -> LinearHead:
        heads.append(fit(plan.judged, used))
        return heads[-1]

    # A head's weight is 0 at masked units, so that it may read features that are not masked.
    features, y, group = held_out
    right = crossfit(features, y, judged, num_classes, FOLDS, group=group).argmax(1) == y
    refit = partial(fit, plan.kept, torch.ones_like(y, dtype=torch.bool))
    fitted = max(source.fewest_atypical(num_classes) for source in sources)
    return Round(share, weight, gate, score, right, judged_by, *_worst(right, judged_by), refit, heads, fitted)
