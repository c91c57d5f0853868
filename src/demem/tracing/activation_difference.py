"""Score units by how much more active they are where the network is wrong (NeuronTune, 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from demem.batch import Batch
from demem.sites import Site, check_finite
from demem.tracing.atypical import members_of, misclassified
from demem.tracing.capture import ALONE, Ranks, read_features


def median_difference(features: Tensor, y: Tensor, wrong: Tensor) -> Tensor:
    """Compute the median activation of the wrong minus that of the right examples of a class; take the largest class.

    Args:
        features: ``(S, N)``.
        y: ``(S,)`` class indices.
        wrong: bool ``(S,)``: misclassified (or atypical) examples.

    Returns:
        ``(N,)`` in units of the activation.

    Raises:
        ValueError: no class has both wrong and right examples.

    Source: NeuronTune, 2025.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 3.0], [1.0, 5.0]])
        >>> median_difference(features, torch.zeros(4, dtype=torch.long), torch.tensor([False, False, True, True]))
        tensor([0., 4.])
    """
    differences = []
    for _, members in members_of(y):
        bad, good = features[members[wrong[members]]], features[members[~wrong[members]]]
        if len(bad) and len(good):
            differences.append(_median(bad) - _median(good))
    if not differences:
        raise ValueError("No class has both wrong and right examples, so activations cannot be compared.")
    return torch.stack(differences).amax(0)


def _median(rows: Tensor) -> Tensor:
    # By sorting, because torch.median returns the lower of the middle two and torch.quantile refuses large inputs.
    ordered = rows.sort(0).values
    return (ordered[(len(rows) - 1) // 2] + ordered[len(rows) // 2]) / 2


def activation_difference_score(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    atypical: Tensor | None = None,
    ranks: Ranks = ALONE,
    **_: object,
) -> dict[str, Tensor]:
    """Score units by :func:`median_difference` of the reduced activations of every site, in one pass.

    Args:
        model: any module; left as it was.
        sites: from :func:`demem.sites.find_sites`.
        batches: examples, both typical and atypical.
        atypical: bool ``(S,)``; the misclassified examples if ``None`` (the paper's choice).
        ranks: processes of a distributed run.

    Returns:
        ``{site: (N,)}`` in units of the activation.

    Raises:
        ValueError: as :func:`median_difference`; activations that are not finite, or more than one row per example.

    Example:
        >>> from demem.sites import find_sites
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> x, y = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 3.0], [1.0, 5.0]]), torch.zeros(4, dtype=torch.long)
        >>> atypical = torch.tensor([False, False, True, True])
        >>> activation_difference_score(model, find_sites(model, "0:input"), [Batch(x, y)], atypical=atypical)
        {'0:input': tensor([0., 4.])}
    """
    features, logits, y = read_features(model, sites, batches)
    for name, rows in features.items():
        if len(rows) != len(y):
            raise ValueError(
                f"Site {name!r} has {len(rows)} rows for {len(y)} examples, so its activations cannot be assigned to "
                "examples. Name layers that run once in a forward pass."
            )
    wrong = misclassified(logits, y) if atypical is None else atypical.to(y.device)
    y, wrong = ranks.gather(y), ranks.gather(wrong)
    return {
        name: median_difference(check_finite(ranks.gather(rows), f"site {name!r}"), y, wrong)
        for name, rows in features.items()
    }
