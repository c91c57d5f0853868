"""Fit linear heads on fixed features: logistic regression, balanced by group, and cross-fitted.

Head refits and probes are made of these functions.  Features are ``(S, N)``, labels and groups ``(S,)`` indices from 0,
logits ``(S, C)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from demem.logistic import MOST, fit_two_classes
from demem.sites import check_finite

AT_ONCE = 2**24  # numbers that the features of subsets that are fitted together hold
MANY_CLASSES = 10  # with more, the fit of a head starts from the classes' frequencies, and its bias is rescaled


class LinearHead(NamedTuple):
    """Weight ``(C, N)`` and bias ``(C,)`` of a linear classifier for features that are not standardised."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Compute logits ``(S, C)`` of features ``(S, N)``."""
        return features @ self.weight.T + self.bias


def fit_linear(
    features: Tensor,
    y: Tensor,
    weights: Tensor | None = None,
    l2: float = 1e-3,
    num_classes: int | None = None,
    max_iter: int = 100,
) -> LinearHead:
    r"""Fit a linear classifier by multinomial logistic regression (L-BFGS).

    Minimises

    .. math:: \sum_s v_s\,\mathrm{CE}(V x_s + b, y_s) + \tfrac{\lambda N'}{2} \lVert V \rVert^2

    with :math:`x` the standardised features, :math:`v` the weights scaled to sum to 1 and :math:`N'` the number of
    features that vary.  The factor :math:`N'` gives :math:`\lambda` the same meaning at every width: it is the penalty
    for features scaled to a total variance of 1.  A feature that does not vary (a masked unit) gets the weight 0.

    It holds one standardised copy of the features, :math:`4SN` bytes, and four arrays of logits, :math:`16SC` bytes;
    each of some 10 to 100 iterations takes :math:`4SNC` operations.

    Args:
        features: ``(S, N)``, finite.
        y: ``(S,)`` class indices.
        weights: ``(S,)`` non-negative weights of the examples; equal if ``None``.
        l2: :math:`\lambda`.
        num_classes: number of classes C; ``y.max() + 1`` if ``None``.
        max_iter: maximum number of iterations of L-BFGS.

    Returns:
        A float32 head for the features before standardisation.

    Raises:
        ValueError: shapes do not fit, a value is not finite, a label is out of range, or all weights are zero.

    Example:
        >>> features = torch.tensor([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
        >>> head = fit_linear(features, torch.tensor([0, 0, 1, 1]))
        >>> head(features).argmax(1)
        tensor([0, 0, 1, 1])
        >>> head.weight[:, 1]  # this feature does not vary
        tensor([0., 0.])
    """
    classes = _check(features, y, num_classes)
    features = check_finite(features.detach().float(), "the features to fit a head on")
    share = _shares(torch.ones(len(y), device=features.device) if weights is None else weights.float(), y)

    std, mean = torch.std_mean(features, dim=0, correction=0)
    varies = std > 1e-6 * std.max().clamp_min(1e-12)
    mean, std = mean[varies], std[varies]
    x = (features - mean).div_(std) if bool(varies.all()) else features[:, varies].sub_(mean).div_(std)
    penalty = l2 * x.shape[1]
    head = torch.zeros(classes, x.shape[1] + 1, device=x.device)
    head.grad = torch.zeros_like(head)
    target = F.one_hot(y, classes).float()
    # Near p = 1/C the curvature is about λN' for V, and 1/C for the bias, which has no penalty.  With many classes that
    # is what L-BFGS spends its iterations on; for b' = b / √(λN'C) both are alike.
    many = classes > MANY_CLASSES and penalty > 0
    scale = (penalty * classes) ** 0.5 if many else 1.0
    if many:
        head[:, -1] = (share @ target).clamp_min(0.1 / len(y)).log() / scale
    optimizer = torch.optim.LBFGS(
        [head],
        max_iter=max_iter,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-6,
        tolerance_change=1e-6 if many else 1e-9,
    )

    # With p = softmax(V x + b) the gradient is Σ_s v_s (p_s − onehot(y_s)) x_sᵀ + λN' V for V, and without x for b.
    # In closed form it takes half the time of autograd.
    def closure() -> Tensor:
        v, b = head[:, :-1], scale * head[:, -1]
        log_p = (x @ v.T).add_(b).log_softmax(1)
        error = log_p.exp().sub_(target).mul_(share[:, None])
        head.grad[:, :-1] = error.T @ x + penalty * v  # type: ignore[index]
        head.grad[:, -1] = scale * error.sum(0)  # type: ignore[index]
        return penalty / 2 * v.square().sum() - log_p.mul_(target).mul_(share[:, None]).sum()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    bias = scale * head[:, -1]
    # Undo the standardisation: V (z − μ)/σ + b = (V/σ) z + (b − (V/σ) μ).
    weight = torch.zeros(classes, features.shape[1], device=x.device)
    weight[:, varies] = head[:, :-1] / std
    return LinearHead(weight, bias - weight[:, varies] @ mean)


def _check(features: Tensor, y: Tensor, num_classes: int | None) -> int:
    """The number of classes, if shapes and labels fit."""
    if features.ndim != 2 or y.shape != features.shape[:1] or len(y) == 0:
        raise ValueError(f"Expected features (S, N) and labels (S,), got {tuple(features.shape)} and {tuple(y.shape)}.")
    if y.dtype.is_floating_point or y.dtype == torch.bool:
        raise ValueError(f"Labels are class indices, integers from 0, and not of {y.dtype}.")
    classes = int(y.max()) + 1 if num_classes is None else num_classes
    if int(y.min()) < 0 or int(y.max()) >= classes:
        wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
        raise ValueError(f"Label {wrong} is out of range for {classes} classes.")
    return classes


def _shares(weights: Tensor, y: Tensor) -> Tensor:
    """Weights ``(..., S)``, scaled so that those of each set sum to 1."""
    total = weights.sum(-1, keepdim=True)
    if weights.shape != y.shape or bool((weights < 0).any()) or not bool(((total > 0) & total.isfinite()).all()):
        raise ValueError("`weights` must be one finite, non-negative number per example, not all zero.")
    return weights / total


def balanced_weights(key: Tensor, smoothing: float = 0.0) -> Tensor:
    """Weight examples so that every class or group k counts the same: ``1 / (n_k + smoothing · S)``.

    Args:
        key: ``(S,)`` class or group indices from 0.
        smoothing: fraction of the set that is added to every count, so that a few examples of a rare group do not
            dominate; default 0.

    Returns:
        ``(S,)`` float32, not normalised.

    Example:
        >>> balanced_weights(torch.tensor([0, 0, 0, 0, 1]))
        tensor([0.2500, 0.2500, 0.2500, 0.2500, 1.0000])
    """
    # Not by bincount, which would allocate as many numbers as the largest key.
    _, index, counts = torch.unique(key, return_inverse=True, return_counts=True)
    weights: Tensor = 1.0 / (counts.float() + smoothing * len(key)).clamp_min(1e-12)
    return weights[index]


def few_of_each_group(group: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw at most ``size`` random examples of each group; returns positions, group by group.

    Example:
        >>> group = torch.tensor([0, 0, 0, 0, 1])
        >>> group[few_of_each_group(group, 2, torch.Generator().manual_seed(0))]
        tensor([0, 0, 1])
    """
    _, counts = torch.unique(group, return_counts=True)
    members = torch.split(group.argsort(stable=True), counts.tolist())
    return torch.cat([m[torch.randperm(len(m), generator=generator)[:size].to(m.device)] for m in members])


def draw_evenly(group: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Draw at most ``most`` examples: all of the small groups, and equally many of each of the others.

    Args:
        group: ``(S,)`` indices from 0.
        most: number of examples; where there are no more all are taken, and where there are more groups than that, one
            example of some.
        generator: source of the draw.

    Returns:
        Positions, ascending.

    Example:
        >>> group = torch.tensor([0] * 20 + [1] * 10 + [2] * 3)
        >>> torch.bincount(group[draw_evenly(group, 15, torch.Generator().manual_seed(0))])
        tensor([6, 6, 3])
    """
    if len(group) <= most:
        return torch.arange(len(group), device=group.device)
    sizes = torch.unique(group, return_counts=True)[1].sort().values
    # All of the k smallest groups and q of each of the rest are at most `most` examples.
    rest = torch.arange(len(sizes), 0, -1, device=group.device)
    quota = int(((most - sizes.cumsum(0) + sizes) // rest).max())
    drawn = few_of_each_group(group, max(1, quota), generator)
    if len(drawn) > most:
        drawn = drawn[torch.randperm(len(drawn), generator=generator)[:most].to(drawn.device)]
    return drawn.sort().values


def balanced_subset(group: Tensor, generator: torch.Generator, smallest: int = 8, most: int | None = None) -> Tensor:
    """Draw as many random examples of each group as the smallest group has; returns positions, group by group.

    Args:
        group: ``(S,)`` indices from 0.
        generator: source of the draw.
        smallest: draw at least this many of each group; a group that has fewer contributes all of them.
        most: draw at most this many examples in all (but one of each group).

    Example:
        >>> group = torch.tensor([0] * 20 + [1] * 10 + [2] * 3)
        >>> chosen = balanced_subset(group, torch.Generator().manual_seed(0))
        >>> torch.bincount(group[chosen])
        tensor([8, 8, 3])
    """
    _, counts = torch.unique(group, return_counts=True)
    size = max(smallest, int(counts.min()))
    if most is not None:
        size = min(size, max(1, most // len(counts)))
    return few_of_each_group(group, size, generator)


def fit_balanced(
    features: Tensor,
    y: Tensor,
    group: Tensor,
    l2: float = 1e-3,
    num_classes: int | None = None,
    subsets: int = 20,
    smallest: int = 8,
    seed: int = 0,
    weights: Tensor | None = None,
    used: Tensor | None = None,
    gate: Tensor | None = None,
    most: int | None = None,
) -> LinearHead:
    """Average heads that are each fitted on a random subset with equally many examples of every group.

    A fit with weights instead overfits the few examples of a small group, and the head then fails on new examples of
    it; in a subset no group is easier to fit than the others.

    Small subsets of two classes are fitted together (:func:`demem.logistic.fit_two_classes`), others one by one by
    :func:`fit_linear`.

    Args:
        features, y, l2, num_classes: see :func:`fit_linear`.
        group: ``(S,)`` indices from 0, true or inferred.
        subsets: number of heads.
        smallest: see :func:`balanced_subset`.
        seed: seed of the draws.
        weights: ``(S,)`` of the examples within a subset; equal if ``None``.
        used: ``(S,)`` bool, the examples to draw from; default all.
        gate: ``(N,)`` that the features of each subset are multiplied with; default ones.
        most: see :func:`balanced_subset`; memory grows with this and not with S.

    Returns:
        The head whose weight and bias are the means over the heads.

    Raises:
        ValueError: as :func:`fit_linear`.

    Source: Kirichenko et al. 2023, who average heads in this way for deep feature reweighting with true groups.

    Example:
        >>> y = torch.tensor([0, 1]).repeat(60)
        >>> spurious = torch.where(torch.arange(120) < 100, y, 1 - y)  # fails on 20 examples
        >>> features = torch.stack([y + 0.5 * torch.randn(120), spurious.float()], 1)
        >>> plain, fair = fit_linear(features, y), fit_balanced(features, y, group=2 * y + spurious)
        >>> right = [head(features).argmax(1) == y for head in (plain, fair)]
        >>> [round(float(r[spurious != y].float().mean()), 2) for r in right]  # where the spurious feature fails
        [0.6, 0.85]
    """
    classes = _check(features, y, num_classes)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(len(y), device=y.device) if used is None else used.nonzero()[:, 0]
    drawn = torch.stack([rows[balanced_subset(group[rows], generator, smallest, most)] for _ in range(subsets)])
    weights = torch.ones(len(y), device=features.device) if weights is None else weights.float()
    together = classes == 2 and drawn.shape[1] <= MOST
    heads: list[LinearHead] = []
    at_once = max(1, AT_ONCE // max(1, drawn.shape[1] * features.shape[1])) if together else 1
    for chosen in torch.split(drawn, at_once):
        x = features[chosen] if gate is None else features[chosen] * gate
        if together:
            x = check_finite(x.detach().float(), "the features to fit a head on")
            fitted = fit_two_classes(x, y[chosen], _shares(weights[chosen], y[chosen]), l2)
            heads += map(LinearHead, *fitted)
        else:
            heads.append(fit_linear(x[0], y[chosen[0]], weights[chosen[0]], l2, classes))
    return average_heads(heads)


def average_heads(heads: Sequence[LinearHead]) -> LinearHead:
    """The head whose weight and bias, and so whose logits, are the means over some heads.

    Example:
        >>> average_heads([LinearHead(torch.eye(2), torch.zeros(2)), LinearHead(torch.eye(2), torch.ones(2))]).bias
        tensor([0.5000, 0.5000])
    """
    weight, bias = (torch.stack(parts).mean(0) for parts in zip(*heads, strict=True))
    return LinearHead(weight, bias)


def folds(y: Tensor, k: int, seed: int = 0, group: Tensor | None = None) -> Iterator[Tensor]:
    """Split examples at random into ``k`` folds with equal shares of each class (and group).

    Args:
        y: ``(S,)`` class indices.
        k: number of folds.
        seed: seed of the split.
        group: ``(S,)`` indices that are split evenly within the classes; ignored if ``None``.

    Yields:
        ``k`` disjoint boolean masks ``(S,)`` that together cover all examples.

    Raises:
        ValueError: a class has fewer than two examples, so it would be missing when its fold is left out.

    Example:
        >>> y = torch.tensor([0] * 4 + [1] * 2)
        >>> [torch.bincount(y[fold]).tolist() for fold in folds(y, 2)]
        [[2, 1], [2, 1]]
    """
    counts = torch.bincount(y)
    if bool(((counts > 0) & (counts < 2)).any()):
        raise ValueError(f"Cross-fitting needs two examples of every class, got counts {counts.tolist()}.")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(y.device)
    for key in (y,) if group is None else (group, y):
        order = order[key[order].argsort(stable=True)]
    fold = torch.empty_like(y)
    fold[order] = torch.arange(len(y), device=y.device) % k
    for i in range(k):
        yield fold == i


def crossfit(
    features: Tensor,
    y: Tensor,
    fit: Callable[[Tensor], LinearHead],
    num_classes: int,
    k: int = 5,
    seed: int = 0,
    group: Tensor | None = None,
) -> Tensor:
    """Compute logits of every example with a head that was fitted without it.

    Args:
        features: ``(S, N)``.
        y: ``(S,)`` class indices.
        fit: takes the boolean mask ``(S,)`` of the examples to fit on and returns a head.
        num_classes: number of classes C.
        k, seed, group: see :func:`folds`.

    Returns:
        ``(S, C)``, each row from the head that was fitted on the other folds.

    Raises:
        ValueError: as :func:`folds` and ``fit``.

    Example:
        >>> y = torch.arange(40) % 2
        >>> features = y[:, None] + 0.3 * torch.randn(40, 3)
        >>> logits = crossfit(features, y, lambda used: fit_linear(features[used], y[used]), num_classes=2)
        >>> float((logits.argmax(1) == y).float().mean()) > 0.9
        True
    """
    logits = torch.zeros(len(y), num_classes, device=features.device)
    for left_out in folds(y, k, seed, group):
        logits[left_out] = fit(~left_out)(features[left_out].float())
    return logits


def crossfit_logits(
    features: Tensor,
    y: Tensor,
    weights: Tensor | None = None,
    l2: float = 1e-3,
    num_classes: int | None = None,
    k: int = 5,
    seed: int = 0,
) -> Tensor:
    """Compute logits of every example with a :func:`fit_linear` head that was fitted without it.

    Args:
        features, y, weights, l2, num_classes: see :func:`fit_linear`.
        k, seed: see :func:`folds`.

    Returns:
        ``(S, C)``.

    Raises:
        ValueError: as :func:`fit_linear` and :func:`folds`.

    Example:
        >>> y = torch.arange(40) % 2
        >>> noise = torch.randn(40, 60)  # as many features as it takes to fit any labels
        >>> bool((fit_linear(noise, y)(noise).argmax(1) == y).all())
        True
        >>> float((crossfit_logits(noise, y).argmax(1) == y).float().mean()) < 0.8
        True
    """
    classes = int(y.max()) + 1 if num_classes is None else num_classes

    def fit(used: Tensor) -> LinearHead:
        return fit_linear(features[used], y[used], None if weights is None else weights[used], l2, classes)

    return crossfit(features, y, fit, classes, k, seed)
