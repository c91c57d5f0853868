r"""Tell a shortcut, wrong labels and hard examples apart, from the mistakes of an early probe.

A linear probe of an early layer, cross-fitted, misclassifies three kinds of examples:

- the **minority** of a shortcut: the probe follows an attribute that usually goes with the class, and here it does not;
- **wrong labels**: the probe is right and the label is not;
- **hard examples**: the probe does not know.

Two questions, each with one statistic, separate them.

*Is the probe sure of its mistakes?*  It knows nothing of what makes an example a minority or its label wrong, so it is
as sure of those as of its right answers: half of them are *confident*, above the median margin of the right answers
that name the same class.  Hard examples lie near the decision boundary.  With normal margins :math:`\mathcal N(m, 1)`
and an error :math:`h = \Phi(-m)`, the median right answer has the margin
:math:`t = m + \Phi^{-1}\bigl(\tfrac{1+h}{2}\bigr)`, and the share :math:`H(h) = \Phi(-t - m)` of all examples are
confident mistakes.  If a share :math:`\sigma` of all examples are systematic mistakes (minority or wrong labels), then
of an error :math:`e` the share

.. math:: c = \tfrac{\sigma}{2} + H(e - \sigma)

is confident: :func:`systematic_share` solves this for :math:`\sigma`.

*Does a better look side with the label?*  A second, nonlinear predictor, in which the inferred groups count alike
(:func:`second_opinion`), has not seen the example either.  Take a confident mistake with the label :math:`v` that the
probe calls :math:`c`.  If its label is merely wrong, it looks to the second predictor like any other confident example
that is called :math:`c` rightly: the label was changed without looking at the example.  Its preference
:math:`\delta = f_v - f_c` is then exchangeable with theirs, and

.. math:: p = \frac{1 + \#\{\text{right answers of the same cell with at least this } \delta\}}
                   {1 + \#\{\text{right answers of the same cell}\}}

is uniform on :math:`(0, 1]` (:func:`resemblance`; a conformal p-value).  A true minority example shows its class, so
its p is small.  Under wrong labels alone :math:`-\ln p` has mean 1 nat and variance 1 (Fisher's combination), so
:math:`z = (\sum -\ln p - n) / \sqrt n` is a test that needs no group label, Storey's estimate gives the share of wrong
labels among the confident mistakes, and the local false discovery rate says it of each example.

*A minority among wrong labels.*  Storey's estimate, of the confident mistakes and of the others, gives how many of each
have a right label.  If there are few of these, and more than half must be systematic to explain how many are confident,
they are a minority: the probe is as sure of one as of its right answers, and unsure of most hard examples, however many
wrong labels there are beside them.  And what an ordinary fit gets right anyway is counted with each mistake's
probability that its label is right, since nobody gets wrong labels right.

Nothing here is trained on the example that is judged, so memorization hides nothing; and the rule speaks for a shortcut
on positive evidence only: where the second predictor cannot read the class, wrong labels and a minority look the same,
and the verdict is not "shortcut".

Source: own.  Conformal p-values: Vovk et al. 2005; share of true nulls: Storey 2002; local false discovery rate: Efron
et al. 2001; its density estimate: Grenander 1956.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from demem.linear import balanced_weights, folds
from demem.sites import check_finite
from demem.tracing import margins

Kind = Literal["shortcut", "label noise", "hard examples", "nothing", "undecided"]

CONFIDENT = 0.5  # quantile of the margins of right answers from which on the probe is confident
CELL = 20  # right answers of a class; with fewer there is nothing to compare a mistake with
THRESHOLD = 2.5  # standard errors, of each of the two tests
BEYOND_DOUBT = 10.0  # of the second; up to there hard examples among wrong labels may look like a minority
EXCESS = 1.5  # times the confident mistakes that normal margins explain
TAIL = 3.0  # times as many confident hard examples as normal margins explain are left out of the second test
FEWEST = 5  # confident mistakes that must remain
MOSTLY = 2 / 3  # of the systematic mistakes must be a minority's; hard examples among wrong labels look like one
CLEAR = 4.0  # standard errors of the second test, and
HALF = 0.5  # of the mistakes with right labels systematic: then a shortcut all the same, if these mistakes are few
FEW_ERRORS = 0.15  # × chance's error; so few mistakes make a small minority: little is lost if they were merely hard
CONFIRMING = "a second look sides with the labels"  # in the ``why`` of a shortcut
NOISY = 0.2  # of the systematic mistakes are wrong labels
TRUSTED = 0.5  # probability up to which a label is not taken for wrong
FEWEST_WRONG = 8  # of them, to say that the labels are wrong
BLIND = 1.5  # times as often as the labels an ordinary fit disagrees with the probe, if it cannot read what that reads
FEW_OF_THEM = 1 / 3  # of the mistakes are systematic
RIGHT_ANYWAY = 0.9  # of the mistakes: if an ordinary fit gets so many right, nothing misleads it
MIN_SURPRISE = 0.2  # nats above 1: so many examples make less significant that it means nothing
FEW_MISTAKES = 0.01  # of all examples
WIDTH, RIDGE, SMOOTHING, FITTED_ON = 256, 0.1, 0.1, 3_000


@dataclass(frozen=True)
class Verdict:
    """What the mistakes of a probe are.

    Attributes:
        kind: ``"shortcut"``: act on the groups.  ``"label noise"``, ``"hard examples"``, ``"nothing"``: train as usual.
            ``"undecided"``: the evidence is too thin; train as usual, and look again later.
        confidence: probability, in [1/2, 1), that the test that decided falls on the same side again.
        why: one sentence with the figures.
        hard, noise, minority: estimated fractions of all examples, which sum to the probe's error.
        surprise: mean of −ln p over the confident mistakes, in nats; 1 if all of them are wrong labels.
        z: how far it lies above 1, in standard errors, after as many of the smallest p as hard examples explain have
            been left out.
        wrong_label: ``(S,)`` probability that the label is wrong; 0 for the probe's right answers.
        atypical: ``(S,)`` probability that the example is a mistake of the probe with a right label, a minority or a
            hard one; 0 for the probe's right answers.
    """

    kind: Kind
    confidence: float
    why: str
    hard: float
    noise: float
    minority: float
    surprise: float
    z: float
    wrong_label: Tensor
    atypical: Tensor

    @property
    def noisy(self) -> bool:
        """Whether so many of the mistakes have wrong labels that each label is to be judged."""
        return self.noise > NOISY * (self.noise + self.minority)

    def __repr__(self) -> str:
        return f"Verdict({self.kind}, confidence {self.confidence:.2f}: {self.why})"


def is_confirmed(why: str) -> bool:
    """Whether the :attr:`Verdict.why` of a shortcut says that the second opinion sides with the labels.

    >>> is_confirmed("the probe is sure of its mistakes and a second look sides with the labels (20 mistakes)")
    True
    """
    return CONFIRMING in why


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _normal_quantile(p: float) -> float:
    return float(torch.special.ndtri(torch.tensor(min(max(p, 1e-12), 1 - 1e-12), dtype=torch.float64)))


def confident_hard_share(error: float, quantile: float = CONFIDENT) -> float:
    r"""Fraction :math:`H(h)` of all examples that are confident mistakes when all mistakes are hard examples.

    Args:
        error: :math:`h`, fraction of all examples that are mistakes.
        quantile: a mistake is confident above this quantile of the right answers' margins.

    >>> round(confident_hard_share(0.1), 4), round(confident_hard_share(0.3), 4)
    (0.0036, 0.0758)
    """
    if error <= 0:
        return 0.0
    mean = -_normal_quantile(error)
    return _normal_cdf(-(mean + _normal_quantile(error + (1 - error) * quantile)) - mean)


def systematic_share(error: float, confident: float, quantile: float = CONFIDENT) -> float:
    r"""Fraction :math:`\sigma` of all examples that are mistakes for another reason than being hard.

    Solves :math:`(1 - q)\sigma + H(e - \sigma) = c` by bisection; 0 where hard examples explain all.

    Args:
        error: fraction :math:`e` of all examples that are mistakes.
        confident: fraction :math:`c` of all examples that are confident mistakes.
        quantile: :math:`q`.

    >>> round(systematic_share(0.05, 0.025), 3), systematic_share(0.1, 0.003)
    (0.05, 0.0)
    """

    def surplus(share: float) -> float:
        return (1 - quantile) * share + confident_hard_share(error - share, quantile) - confident

    low, high = 0.0, error
    if surplus(low) >= 0 or surplus(high) <= 0:
        return low if surplus(low) >= 0 else high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) < 0 else (low, middle)
    return low


def sketch(activation: Tensor, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Whole activations, positions and all, as a few numbers per example: ``(B, *shape)`` → ``(B, min(width, N))``.

    Each of the N entries is added, with a random sign, to one of ``width`` random sums, which keeps inner products in
    expectation (count sketch; Charikar et al. 2002) and needs memory for one batch only.  The same seed gives the same
    sums for every batch of the same shape.

    >>> sketch(torch.ones(3, 4, 8, 8), width=16).shape, sketch(torch.ones(3, 5), width=16).shape
    (torch.Size([3, 16]), torch.Size([3, 5]))
    """
    x = activation.flatten(1).float()
    if x.shape[1] <= width:
        return x
    generator = torch.Generator().manual_seed(seed)
    where = torch.randint(width, (x.shape[1],), generator=generator).to(x.device)
    sign = (torch.randint(2, (x.shape[1],), generator=generator) * 2 - 1).to(x)
    return x.new_zeros(len(x), width).index_add_(1, where, x * sign)


def second_opinion(
    features: Sequence[Tensor],
    y: Tensor,
    attribute: Tensor,
    num_classes: int,
    ridge: float = RIDGE,
    smoothing: float = SMOOTHING,
    max_examples: int = FITTED_ON,
    k: int = 5,
    seed: int = 0,
    kernel: Tensor | None = None,
) -> Tensor:
    r"""Class scores of every example from a kernel ridge regression that was fitted without it.

    The kernel is the mean over layers of :math:`\exp(-\lVert x - x' \rVert^2 / 2N)` on standardised features.  The
    groups of class and inferred attribute weigh alike, so that the attribute says nothing of the class and the fit must
    look at something else.  With weights :math:`w` that sum to 1, :math:`W = \operatorname{diag}(w)` and one-hot
    targets :math:`T` centred by their weighted mean, the scores are
    :math:`K' W^{1/2} (W^{1/2} K W^{1/2} + \tfrac{\lambda}{S} I)^{-1} W^{1/2} T`.

    Args:
        features: ``(S, N)`` of one or several layers, best both pooled and whole (:func:`sketch`); of the network as it
            was *before* it trained on these examples.
        y: ``(S,)`` class indices.
        attribute: ``(S,)`` class that the probe names.
        num_classes: number of classes C.
        ridge: :math:`\lambda`.
        smoothing: of the groups' weights (:func:`demem.linear.balanced_weights`).
        max_examples: at most so many are fitted, drawn with the groups' weights; memory grows with their number times
            S, time with its third power.
        k: folds.
        seed: of the folds and the draw.
        kernel: ``(S, S)`` of all examples, if it is there already and all are fitted.

    Returns:
        ``(S, C)``.

    Raises:
        ValueError: no layer, a feature that is not finite, or a class with fewer than two examples.

    Example: the attribute agrees with the class for 95%, and the second opinion follows the class nevertheless.

        >>> g = torch.Generator().manual_seed(0)
        >>> y = torch.arange(400) % 2
        >>> attribute = torch.where(torch.rand(400, generator=g) < 0.05, 1 - y, y)
        >>> x = torch.stack([4.0 * attribute, 3.0 * y], 1) + torch.randn(400, 2, generator=g)
        >>> scores = second_opinion([x], y, attribute, 2)
        >>> bool((scores.argmax(1) == y)[attribute != y].float().mean() > 0.6)
        True
    """
    if not features:
        raise ValueError("second_opinion needs the features of at least one layer.")
    layers = [_standardised(layer) for layer in features]
    weights = balanced_weights(y * num_classes + attribute, smoothing)
    target = F.one_hot(y, num_classes).float()
    fitted = torch.arange(len(y), device=y.device)
    if len(y) > max_examples:
        generator = torch.Generator().manual_seed(seed)
        fitted = torch.multinomial(weights.double().cpu(), max_examples, generator=generator).sort().values.to(y.device)
        fitted = fitted[torch.bincount(y[fitted])[y[fitted]] >= 2]  # a lone one of a rare class cannot be cross-fitted
    others = torch.ones_like(y, dtype=torch.bool)
    others[fitted] = False
    # Drawn without replacement, a small group is exhausted; weights balance what came out.
    share = balanced_weights((y * num_classes + attribute)[fitted], smoothing)
    inner = kernel if kernel is not None and len(fitted) == len(y) else _kernel(layers, fitted, fitted)
    scores = torch.zeros(len(y), num_classes, device=y.device)

    def fit(used: Tensor) -> tuple[Tensor, Tensor]:
        """Dual coefficients ``(n, C)`` and prior ``(C,)`` from some of the fitted examples."""
        weight = share[used] / share[used].sum()
        root, prior = weight.sqrt()[:, None], weight @ target[fitted[used]]
        matrix = root * inner[used][:, used] * root.T
        matrix.diagonal().add_(ridge / len(used))
        return root * torch.linalg.solve(matrix, root * (target[fitted[used]] - prior)), prior

    for left_out in folds(y[fitted], k, seed):
        used = (~left_out).nonzero()[:, 0]
        dual, prior = fit(used)
        scores[fitted[left_out]] = inner[left_out][:, used] @ dual + prior
    if bool(others.any()):
        dual, prior = fit(torch.arange(len(fitted), device=y.device))
        for rows in torch.split(others.nonzero()[:, 0], max_examples):
            scores[rows] = _kernel(layers, rows, fitted) @ dual + prior
    return scores


def _standardised(layer: Tensor) -> Tensor:
    x = check_finite(layer.detach().float(), "the features of the second opinion")
    std, mean = torch.std_mean(x, 0, correction=0)
    varies = std > 1e-6 * std.max().clamp_min(1e-12)
    return (x[:, varies] - mean[varies]) / std[varies]


def _kernel(layers: Sequence[Tensor], rows: Tensor, columns: Tensor) -> Tensor:
    values = torch.zeros(len(rows), len(columns), device=rows.device)
    for x in layers:
        distance = torch.cdist(x[rows], x[columns])
        values += torch.exp(-distance.square() / (2 * max(1, x.shape[1]))) / len(layers)
    return values


def confident_answers(early: Tensor, y: Tensor, quantile: float = CONFIDENT) -> tuple[Tensor, Tensor]:
    """Which answers of the probe are confident, and which can be judged at all, two bool ``(S,)``.

    An answer is confident if its margin (largest logit minus second) is at least that ``quantile`` of the margins of
    the right answers that name the same class.  A class is judged if at least 20 right answers name it, and no fewer
    than mistakes: else the probe's answer does not stand for the class.

    Args:
        early: ``(S, C)`` logits of the probe, cross-fitted.
        y: ``(S,)`` class indices.
        quantile: in [0, 1].
    """
    named = early.argmax(1)
    margin = margins(early, named)
    confident, judged = torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y, dtype=torch.bool)
    for c in range(early.shape[1]):
        cell = named == c
        right = cell & (y == c)
        if int(right.sum()) >= CELL and 2 * int(right.sum()) >= int(cell.sum()):
            judged |= cell
            confident |= cell & (margin >= margin[right].quantile(quantile))
    return confident, judged


def resemblance(early: Tensor, deep: Tensor, y: Tensor, quantile: float = CONFIDENT) -> Tensor:
    """How often an ordinary example resembles the label of each of the probe's mistakes as much as the mistake does.

    The p-value of the module's docstring, within the cell of examples that the probe calls by the same class and is
    equally (confident or not) sure of.

    Args:
        early: ``(S, C)`` logits of the probe.
        deep: ``(S, C)`` class scores of a predictor that has not seen the example.
        y: ``(S,)`` class indices.
        quantile: see :func:`confident_answers`.

    Returns:
        ``(S,)`` in (0, 1] for the probe's mistakes in classes that can be judged, elsewhere NaN.
    """
    named = early.argmax(1)
    confident, judged = confident_answers(early, y, quantile)
    p = torch.full((len(y),), torch.nan, device=y.device)
    for c, v in {(c, v) for c, v in zip(named[judged].tolist(), y[judged].tolist(), strict=True) if c != v}:
        preference = deep[:, v] - deep[:, c]
        for half in (confident, ~confident):
            cell = half & (named == c)
            mistakes, others = cell & (y == v), preference[cell & (y == c)].sort().values
            as_much = len(others) - torch.searchsorted(others, preference[mistakes].contiguous())
            p[mistakes] = (1 + as_much.float()) / (1 + len(others))
    return p


def null_share(p: Tensor) -> float:
    """Storey's estimate of the share of uniform p-values: twice the fraction above 1/2, at most 1; 0 without any.

    >>> null_share(torch.tensor([0.01, 0.02, 0.4, 0.9]))
    0.5
    """
    return min(1.0, 2 * float((p > 0.5).float().mean())) if len(p) else 0.0


def null_probability(p: Tensor) -> Tensor:
    r"""Probability that each p-value is one of the uniform ones: :math:`\pi_0 / f(p)`, the local false discovery rate.

    :math:`\pi_0` is :func:`null_share`; the density :math:`f`, which falls with p as small ones are in excess, is the
    Grenander estimate: the slopes of the least concave majorant of the empirical distribution.

    >>> [round(v, 2) for v in null_probability(torch.tensor([0.02, 0.02, 0.6, 0.9])).tolist()]
    [0.04, 0.04, 1.0, 1.0]
    """
    if len(p) == 0:
        return p
    values, where, counts = torch.unique(p.double(), return_inverse=True, return_counts=True)
    blocks: list[tuple[float, float, int]] = []  # (probability, width, values in it), slopes falling
    for width, count in zip(torch.diff(values, prepend=values.new_zeros(1)).tolist(), counts.tolist(), strict=True):
        block = (count / len(p), width, 1)
        while blocks and blocks[-1][0] * block[1] <= block[0] * blocks[-1][1]:
            last = blocks.pop()
            block = (last[0] + block[0], last[1] + block[1], last[2] + block[2])
        blocks.append(block)
    slopes = [probability / width for probability, width, size in blocks for _ in range(size)]
    return (null_share(p) / torch.tensor(slopes, device=p.device)).clamp(max=1).to(p)[where]


def closer_look(
    early: Tensor, features: Sequence[Tensor], y: Tensor, num_classes: int, trained: bool = False
) -> Verdict:
    """:func:`judge` what a probe gets wrong, by two second opinions on what the layers show.

    One is balanced over class and probe's answer, the other is an ordinary fit.

    Args:
        early: ``(S, C)`` cross-fitted logits of the probe.
        features: ``(S, N)`` of one or several layers, see :func:`second_opinion`.
        y: ``(S,)`` class indices.
        num_classes: number of classes C.
        trained: see :func:`judge`.

    Raises:
        ValueError: as :func:`second_opinion`.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> y = torch.arange(600) % 2
        >>> x = torch.randn(600, 4, generator=g) + 8 * y[:, None]
        >>> wrong = torch.rand(600, generator=g) < 0.08
        >>> early = torch.stack([4 - x[:, 0], x[:, 0] - 4], 1)
        >>> closer_look(early, [x], torch.where(wrong, 1 - y, y), 2).kind
        'label noise'
    """
    kernel = None  # the same for both opinions, and a good part of their time
    if features and len(y) <= FITTED_ON:
        everyone = torch.arange(len(y), device=y.device)
        kernel = _kernel([_standardised(layer) for layer in features], everyone, everyone)
    attributes = early.argmax(1), y
    balanced, plain = (second_opinion(features, y, a, num_classes, kernel=kernel) for a in attributes)
    return judge(early, balanced, y, plain, trained=trained)


def wrong_labels(
    early: Tensor, features: Sequence[Tensor], y: Tensor, num_classes: int, sizes: Sequence[int]
) -> Tensor:
    """Probability ``(S,)`` that the label of each example is wrong, see :attr:`Verdict.wrong_label`.

    :func:`closer_look` says it of as many examples as a verdict needs, this of any number.

    Args:
        early, features, y, num_classes: see :func:`closer_look`.
        sizes: of the parts (training and held-out examples) that the rows consist of, as their shares of wrong labels
            and of the minority may differ.

    Raises:
        ValueError: as :func:`second_opinion`.

    Example:
        >>> x = torch.linspace(-4, 4, 600)[:, None]  # its sign is the class
        >>> wrong = torch.arange(600) % 20 == 0
        >>> label = ((x[:, 0] > 0) ^ wrong).long()
        >>> found = wrong_labels(torch.cat([-x, x], 1), [x], label, 2, [400, 200]) > 0.5
        >>> float((found == wrong).float().mean()) > 0.99
        True
    """
    mistake = early.argmax(1) != y
    confident, _ = confident_answers(early, y)
    p = resemblance(early, second_opinion(features, y, early.argmax(1), num_classes), y)
    parts = zip(*(torch.split(rows, list(sizes)) for rows in (p, mistake, confident)), strict=True)
    return torch.cat([_wrong_label_probability(*part) for part in parts])


def _wrong_label_probability(p: Tensor, mistake: Tensor, confident: Tensor) -> Tensor:
    """That of each mistake, confident and other ones apart: a half where there is no p-value; 0 of right answers."""
    probability = torch.where(mistake, 0.5, 0.0).to(p)
    for rows in (confident, ~confident):
        rows = rows & mistake & ~p.isnan()
        probability[rows] = null_probability(p[rows])
    return probability


def _surprise(p: Tensor) -> float:
    """Fisher's combination of p-values, in standard errors above its mean."""
    return float((-p.log() - 1).sum()) / math.sqrt(max(1, len(p)))


def judge(
    early: Tensor,
    deep: Tensor,
    y: Tensor,
    plain: Tensor | None = None,
    quantile: float = CONFIDENT,
    trained: bool = False,
) -> Verdict:
    """Say what the mistakes of an early probe are.

    Args:
        early: ``(S, C)`` cross-fitted logits of the early probe.
        deep: ``(S, C)`` class scores of a better predictor that has not seen the example either:
            :func:`second_opinion` on the training examples before training, or on held-out examples a head that is
            balanced over the inferred groups and cross-fitted.
        y: ``(S,)`` class indices.
        plain: ``(S, C)`` scores of the same predictor without the groups' weights (:func:`second_opinion` with
            ``attribute=y``).  Where it gets nine in ten of the probe's mistakes right, a network will, too: nothing
            misleads it, and these are hard examples.
        quantile: see :func:`confident_answers`.
        trained: the probe reads a network that has trained, and the others what it was before.  Where ``plain`` differs
            from the probe 1.5 times as often as the labels do, it cannot read what the probe reads; few confident
            mistakes, from which less than a third of all mistakes can be wrong labels, are then called undecided.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> y = torch.arange(1000) % 2
        >>> sign = 2.0 * y - 1
        >>> minority = torch.rand(1000, generator=g) < 0.05  # the attribute goes against the class
        >>> attribute = torch.where(minority, -sign, sign)
        >>> logits = lambda s: torch.stack([-s, s], 1)
        >>> early = logits(3 * attribute + torch.rand(1000, generator=g))
        >>> deep = logits(2 * sign + torch.randn(1000, generator=g))
        >>> judge(early, deep, y).kind
        'shortcut'
        >>> judge(early, logits(torch.randn(1000, generator=g) + 2 * attribute), y).kind  # nobody sides with the label
        'label noise'
    """
    if early.ndim != 2 or early.shape != deep.shape or y.shape != early.shape[:1]:
        raise ValueError(
            "Expected logits (S, C) twice and labels (S,), got "
            f"{tuple(early.shape)}, {tuple(deep.shape)} and {tuple(y.shape)}."
        )
    size = len(y)
    mistake = early.argmax(1) != y
    confident, judged = confident_answers(early, y, quantile)
    p = resemblance(early, deep, y, quantile)
    sure, unsure = mistake & confident & judged, mistake & ~confident & judged
    count, error = int(sure.sum()), float(mistake.float().mean())

    # 1. Are there more confident mistakes than hard examples explain?
    explained = confident_hard_share(error, quantile) * size
    above = (count - explained) / math.sqrt(max(explained, 1.0))
    systematic = systematic_share(error, count / size, quantile)
    hard = error - systematic
    # 2. Of the systematic ones, how many look like their label?  Hard ones do, too, and real margins have heavier tails
    # than normal ones: the smallest p are left out, three times as many as hard examples explain.
    hard_and_sure = confident_hard_share(hard, quantile) * size
    ordered = p[sure].sort().values
    tested = ordered[math.ceil(TAIL * hard_and_sure) :]
    z, z_of_all = _surprise(tested), _surprise(ordered)
    recovered = (1 - null_share(p[sure])) * count - hard_and_sure
    minority = systematic * max(0.0, recovered) / max(count, 1)
    wrong_label = _wrong_label_probability(p, mistake, confident)

    # 3. Is the probe as sure of those that look like their label as of its right answers?  Of a minority it is, of hard
    # examples among wrong labels it is not.
    recovered_sure, recovered_unsure = (float((1 - null_share(p[rows])) * rows.sum()) / size for rows in (sure, unsure))
    rightly_labelled = recovered_sure + recovered_unsure
    few = rightly_labelled <= FEW_ERRORS * (1 - 1 / early.shape[1])
    alike = few and systematic_share(rightly_labelled, recovered_sure, quantile) > HALF * rightly_labelled

    figures = f"{count} confident mistakes, {explained:.0f} if all were hard; z = {z:.1f} for their labels"
    kind: Kind
    right = torch.zeros_like(mistake) if plain is None else plain.argmax(1) == y
    anyway = float(right[mistake].float().mean())  # NaN without mistakes
    trusted = (1 - wrong_label)[mistake]
    anyway_but_for_noise = float((right[mistake] * trusted).sum() / trusted.sum())
    # A network may have learned what its features did not show before: then nobody sides with the labels.  If what may
    # be wrong labels are also few of the mistakes, that is not what these are.
    apart = 0.0 if plain is None else float((plain.argmax(1) != early.argmax(1)).float().mean())
    blind = trained and apart > BLIND * error and systematic < FEW_OF_THEM * error
    if anyway >= RIGHT_ANYWAY:
        kind, why, beyond = "nothing", "an ordinary fit gets right what the probe gets wrong", 0.0
    elif error < FEW_MISTAKES and above < THRESHOLD:
        kind, why, beyond = "nothing", "the probe makes hardly any mistakes", THRESHOLD - above
    elif above < THRESHOLD or count < EXCESS * explained:
        kind, why = "hard examples", "the probe is unsure of its mistakes"
        beyond = max(THRESHOLD - above, (EXCESS * explained - count) / math.sqrt(max(explained, 1.0)))
    elif len(tested) < FEWEST:
        kind, why, beyond = "hard examples", "hard examples may explain the mistakes that it is sure of", 0.0
    elif anyway_but_for_noise >= RIGHT_ANYWAY and systematic - minority > NOISY * systematic:
        kind, why, beyond = "label noise", "but for labels that look wrong an ordinary fit gets the mistakes right", 0.0
    elif THRESHOLD <= z < BEYOND_DOUBT and minority < MOSTLY * systematic and not (z >= CLEAR and alike):
        kind, why, beyond = "undecided", "a second look sides with some labels, but most look wrong", 0.0
    elif z >= max(THRESHOLD, MIN_SURPRISE * math.sqrt(len(tested))):
        kind, why = "shortcut", f"the probe is sure of its mistakes and {CONFIRMING}"
        beyond = z - THRESHOLD
    elif z >= THRESHOLD / 2 or z_of_all >= THRESHOLD or len(tested) < FEWEST_WRONG:
        kind, why, beyond = "undecided", "a second look does not say clearly what the mistakes are", 0.0
    elif blind:
        kind, why, beyond = "undecided", "a second look cannot read what the probe reads", 0.0
    else:
        kind, why = "label noise", "the probe is sure of its mistakes and a second look agrees with it"
        beyond = THRESHOLD - z
    return Verdict(
        kind=kind,
        confidence=_normal_cdf(beyond),
        why=f"{why} ({figures})",
        hard=hard,
        noise=systematic - minority,
        minority=minority,
        surprise=float(-p[sure].log().mean()) if count else math.nan,
        z=z,
        wrong_label=wrong_label,
        atypical=torch.where(mistake, 1 - wrong_label, 0.0),
    )
