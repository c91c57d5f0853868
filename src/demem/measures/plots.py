"""The paper's figures: notched boxes of entropy, density of mutual information, curves over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from demem.measures.diversity import Diversity, mixture_density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_entropy(values: Tensor | Mapping[str, Tensor], ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Notched box plots of entropies, one box a site (or run); the notch is the 95% interval of the median."""
    figure, ax = _axes(ax)
    named = {"": values} if isinstance(values, Tensor) else dict(values)
    ax.boxplot([v.detach().cpu().double().numpy() for v in named.values()], notch=True, showfliers=False)
    ax.set_xticks(range(1, len(named) + 1), list(named), rotation=30 if len(named) > 4 else 0)
    ax.set_ylabel("entropy (nats)")
    return figure, ax


def plot_mutual_information(
    matrices: Tensor | Mapping[str, Tensor], components: int = 3, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Gaussian-mixture density of the pairs' mutual information, one curve a run."""
    figure, ax = _axes(ax)
    named = {"": matrices} if isinstance(matrices, Tensor) else dict(matrices)
    for name, matrix in named.items():
        grid, density = mixture_density(matrix, components=components)
        ax.plot(grid.numpy(), density.numpy(), label=name or None)
    ax.set_xlabel("mutual information (nats)")
    ax.set_ylabel("density")
    if any(named):
        ax.legend()
    return figure, ax


def plot_history(
    history: Mapping[str, Sequence[float]], x: Sequence[float] | None = None, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Curves over epochs, e.g. ``ActivationDiversityMonitor.history``."""
    figure, ax = _axes(ax)
    for name, values in history.items():
        ax.plot(range(len(values)) if x is None else x, values, marker=".", label=name)
    ax.set_xlabel("epoch")
    ax.set_ylabel("nats")
    if history:
        ax.legend()
    return figure, ax


def plot_diversity(runs: Mapping[str, Diversity]) -> tuple[Figure, Any]:
    """Entropy boxes and mutual-information densities of several runs side by side."""
    import torch
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    plot_entropy({name: torch.cat(list(run.entropy.values())) for name, run in runs.items()}, ax=axes[0])
    plot_mutual_information({name: run.mutual_information for name, run in runs.items()}, ax=axes[1])
    return figure, axes


def _axes(ax: Axes | None) -> tuple[Figure, Axes]:
    # Without pyplot: nothing is kept alive, and no display or backend is touched.
    if ax is not None:
        return ax.figure, ax  # type: ignore[return-value]
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    return figure, figure.subplots()
