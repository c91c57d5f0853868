"""Logistic regression on fixed features: the tool behind head refits and probes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from demem.sites import check_finite


class LinearHead(NamedTuple):
    """``weight (C, N)`` and ``bias (C,)`` for features as they are (not standardised)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Logits ``(S, C)``."""
        return features @ self.weight.T + self.bias


def fit_linear(
    features: Tensor,
    y: Tensor,
    weights: Tensor | None = None,
    l2: float = 1e-3,
    num_classes: int | None = None,
    max_iter: int = 100,
) -> LinearHead:
    r"""Multinomial logistic regression by L-BFGS.

    Minimises :math:`\sum_s v_s\,\mathrm{CE}(V x_s + b, y_s) + \tfrac{\lambda N'}{2} \lVert V \rVert^2` with :math:`x`
    the standardised features, :math:`v` the weights scaled to sum to 1 and :math:`N'` the number of features that vary.
    The factor :math:`N'` gives :math:`\lambda` the same meaning at every width: it is the penalty for features scaled
    to a total variance of 1.  A feature that does not vary (a masked unit) gets the weight 0.

    Args:
        features: ``(S, N)``, finite.
        y: ``(S,)`` class indices.
        weights: ``(S,)`` non-negative; default all the same.
        l2: :math:`\lambda`.
        num_classes: rows of the head; default ``y.max() + 1``.
        max_iter: of L-BFGS.

    Returns:
        A head for the features as they are, in float32.

    Raises:
        ValueError: shapes do not fit, a value is not finite, a label is out of range, or all weights are zero.
    """
    if features.ndim != 2 or y.shape != features.shape[:1] or len(y) == 0:
        raise ValueError(f"Expected features (S, N) and labels (S,), got {tuple(features.shape)} and {tuple(y.shape)}.")
    classes = int(y.max()) + 1 if num_classes is None else num_classes
    if int(y.max()) >= classes:
        raise ValueError(f"Label {int(y.max())} is out of range for {classes} classes.")
    features = check_finite(features.detach().float(), "the features to fit a head on")
    share = torch.ones(len(y), device=features.device) if weights is None else weights.float()
    if share.shape != y.shape or bool((share < 0).any()) or not float(share.sum()) > 0:
        raise ValueError("`weights` must be one non-negative number per example, not all zero.")
    share = share / share.sum()

    std, mean = torch.std_mean(features, dim=0, correction=0)
    varies = std > 1e-6 * std.max().clamp_min(1e-12)
    mean, std = mean[varies], std[varies]
    x = (features[:, varies] - mean) / std
    penalty = l2 * x.shape[1]
    head = torch.zeros(classes, x.shape[1] + 1, device=x.device)
    head.grad = torch.zeros_like(head)
    optimizer = torch.optim.LBFGS(
        [head], max_iter=max_iter, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )
    target = F.one_hot(y, classes).float()

    def closure() -> Tensor:  # the gradient in closed form takes half of autograd's time
        v, b = head[:, :-1], head[:, -1]
        log_p = (x @ v.T + b).log_softmax(1)
        error = (log_p.exp() - target) * share[:, None]
        head.grad[:, :-1] = error.T @ x + penalty * v  # type: ignore[index]
        head.grad[:, -1] = error.sum(0)  # type: ignore[index]
        return penalty / 2 * v.square().sum() - (log_p * target * share[:, None]).sum()

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    weight = torch.zeros(classes, features.shape[1], device=x.device)
    weight[:, varies] = head[:, :-1] / std
    return LinearHead(weight, head[:, -1] - weight[:, varies] @ mean)


def balanced_weights(key: Tensor, smoothing: float = 0.0) -> Tensor:
    """Weights under which every value of ``key`` (class or group) counts the same: ``1 / (n_k + smoothing · S)``.

    Args:
        key: ``(S,)`` indices from 0.
        smoothing: keeps a handful of examples of a rare value from being drawn all the time.
    """
    counts = torch.bincount(key).float()
    return (1.0 / (counts + smoothing * len(key)).clamp_min(1e-12))[key]


def few_of_each_group(group: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Positions of at most ``size`` random examples of each group, group by group."""
    members = [(group == g).nonzero()[:, 0] for g in sorted(set(group.tolist()))]
    return torch.cat([m[torch.randperm(len(m), generator=generator)[:size].to(m.device)] for m in members])


def balanced_subset(group: Tensor, generator: torch.Generator, smallest: int = 8) -> Tensor:
    """Positions of as many random examples of each group as the smallest group has, but of at least ``smallest`` (a
    group that has fewer gives all)."""
    counts = torch.bincount(group)
    return few_of_each_group(group, max(smallest, int(counts[counts > 0].min())), generator)


def fit_balanced(
    features: Tensor,
    y: Tensor,
    group: Tensor,
    l2: float = 1e-3,
    num_classes: int | None = None,
    subsets: int = 20,
    smallest: int = 8,
    seed: int = 0,
) -> LinearHead:
    """Mean of heads that are each fitted on a random subset with equally many examples of every group.

    With weights instead, the examples of a small group are fitted closely again and again, and the head leans against
    that group where the examples are new; a subset has no group that is easier to fit than the others.

    Args:
        features, y, l2, num_classes: see :func:`fit_linear`.
        group: ``(S,)`` indices, true or inferred.
        subsets: how many.
        smallest: see :func:`balanced_subset`.
        seed: of the draws.

    Source: Kirichenko et al. 2023, who average heads in this way for deep feature reweighting (with true groups).
    """
    classes = int(y.max()) + 1 if num_classes is None else num_classes
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for _ in range(subsets):
        chosen = balanced_subset(group, generator, smallest)
        heads.append(fit_linear(features[chosen], y[chosen], None, l2, classes))
    weight, bias = (torch.stack(parts).mean(0) for parts in zip(*heads, strict=True))
    return LinearHead(weight, bias)


def folds(y: Tensor, k: int, seed: int = 0, group: Tensor | None = None) -> Iterator[Tensor]:
    """``k`` disjoint boolean masks ``(S,)`` that cover everything, each class (and group) split evenly and at random.

    Raises:
        ValueError: a class has fewer than two examples, so it would be missing when its fold is left out.
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
    """Logits ``(S, C)`` of every example from a head that ``fit`` made of the other folds (:func:`folds`).

    Args:
        fit: takes the boolean mask ``(S,)`` of the examples to use.
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
    """Logits ``(S, C)`` of every example from a head fitted on the other folds (arguments: :func:`fit_linear`)."""
    classes = int(y.max()) + 1 if num_classes is None else num_classes

    def fit(used: Tensor) -> LinearHead:
        return fit_linear(features[used], y[used], None if weights is None else weights[used], l2, classes)

    return crossfit(features, y, fit, classes, k, seed)
