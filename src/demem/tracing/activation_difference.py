"""Units that are more active where the network is wrong than where it is right (NeuronTune, 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from demem.batch import Batch
from demem.sites import Site, check_finite
from demem.tracing.atypical import misclassified
from demem.tracing.capture import ALONE, Ranks, read_features


def median_difference(features: Tensor, y: Tensor, wrong: Tensor) -> Tensor:
    """Median activation of the wrong minus the right examples of each class; the largest over the classes.

    Args:
        features: ``(S, N)``.
        y: ``(S,)`` class indices.
        wrong: bool ``(S,)``: misclassified (or atypical) examples.

    Returns:
        ``(N,)``.

    Raises:
        ValueError: no class has both wrong and right examples.
    """
    differences = []
    for c in torch.unique(y).tolist():
        bad, good = features[(y == c) & wrong], features[(y == c) & ~wrong]
        if len(bad) and len(good):
            differences.append(_median(bad) - _median(good))
    if not differences:
        raise ValueError("No class has both wrong and right examples, so activations cannot be compared.")
    return torch.stack(differences).amax(0)


def _median(rows: Tensor) -> Tensor:
    # By sorting: torch.median takes the lower of the middle two, torch.quantile refuses large inputs.
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
    """:func:`median_difference` of the reduced activations of every site, in one pass.

    Args:
        model: any module; left as it was.
        sites: any sites.
        batches: examples, both typical and atypical.
        atypical: bool ``(S,)``; the misclassified examples if ``None`` (the paper's choice).
        ranks: of a distributed run.

    Returns:
        ``{site: (N,)}`` in units of the activation.

    Raises:
        ValueError: as :func:`median_difference`; activations that are not finite or not one row an example.
    """
    features, logits, y = read_features(model, sites, batches)
    for name, rows in features.items():
        if len(rows) != len(y):
            raise ValueError(
                f"Site {name!r} has {len(rows)} rows for {len(y)} examples, so its activations cannot be told apart by "
                "example. Name layers that run once in a forward pass."
            )
    wrong = misclassified(logits, y) if atypical is None else atypical.to(y.device)
    y, wrong = ranks.gather(y), ranks.gather(wrong)
    return {
        name: median_difference(check_finite(ranks.gather(rows), f"site {name!r}"), y, wrong)
        for name, rows in features.items()
    }
