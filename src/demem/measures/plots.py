"""Draw the paper's figures: notched boxes of entropy, density of mutual information, curves over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from demem.measures.diversity import Diversity, mixture_density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_entropy(values: Tensor | Mapping[str, Tensor], ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw notched box plots of entropies, one box per site (or run); the notch is the 95% interval of the median.

    Args:
        values: ``(N,)`` nats, or ``{name: (N,)}``.
        ax: axes to draw on; a new figure if ``None``.

    Returns:
        Figure and axes.

    Example:
        >>> figure, ax = plot_entropy({"conv": torch.rand(64), "fc": torch.rand(10)})
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['conv', 'fc']
    """
    figure, ax = _axes(ax)
    named = {"": values} if isinstance(values, Tensor) else dict(values)
    ax.boxplot([v.detach().cpu().double().numpy() for v in named.values()], notch=True, showfliers=False)
    ax.set_xticks(range(1, len(named) + 1), list(named), rotation=30 if len(named) > 4 else 0)
    ax.set_ylabel("entropy (nats)")
    return figure, ax


def plot_mutual_information(
    matrices: Tensor | Mapping[str, Tensor], components: int = 3, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Draw the Gaussian-mixture density of the pairs' mutual information, one curve per run.

    Args:
        matrices: ``(N, N)`` nats, or ``{run: (N, N)}``.
        components: number of Gaussians, see :func:`~demem.measures.mixture_density`.
        ax: axes to draw on; a new figure if ``None``.

    Returns:
        Figure and axes.

    Example:
        >>> figure, ax = plot_mutual_information({"start": torch.rand(8, 8), "end": torch.rand(8, 8)}, components=1)
        >>> len(ax.lines)
        2
    """
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
    """Draw curves over epochs.

    Args:
        history: ``{measure: one value per epoch}``, e.g. ``ActivationDiversityMonitor.history``.
        x: epochs; counted from 0 if ``None``.
        ax: axes to draw on; a new figure if ``None``.

    Returns:
        Figure and axes.

    Example:
        >>> figure, ax = plot_history({"entropy": [2.0, 1.8, 1.7], "mutual information": [0.1, 0.2, 0.4]})
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('epoch', 'nats')
    """
    figure, ax = _axes(ax)
    for name, values in history.items():
        ax.plot(range(len(values)) if x is None else x, values, marker=".", label=name)
    ax.set_xlabel("epoch")
    ax.set_ylabel("nats")
    if history:
        ax.legend()
    return figure, ax


def plot_diversity(runs: Mapping[str, Diversity]) -> tuple[Figure, Any]:
    """Draw entropy boxes and mutual-information densities of several runs side by side.

    Args:
        runs: ``{name: network}``, see :func:`~demem.measures.measure_diversity`.

    Returns:
        Figure and its two axes.

    Example:
        >>> from demem.measures import measure_diversity
        >>> runs = {f"epoch {e}": measure_diversity(torch.randn(200, 6)) for e in (1, 2)}
        >>> figure, axes = plot_diversity(runs)
        >>> figure.savefig("diversity.png")
    """
    import torch
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    plot_entropy({name: torch.cat(list(run.entropy.values())) for name, run in runs.items()}, ax=axes[0])
    plot_mutual_information({name: run.mutual_information for name, run in runs.items()}, ax=axes[1])
    return figure, axes


def _axes(ax: Axes | None) -> tuple[Figure, Axes]:
    # Without pyplot no figure is kept alive, and no display or backend is touched.
    if ax is not None:
        return ax.figure, ax  # type: ignore[return-value]
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    return figure, figure.subplots()
