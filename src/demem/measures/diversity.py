"""Compute both measures of a network, summarise them, and compare networks.

Heuristic memorization (of a spurious feature) lowers the entropy of units and raises their mutual information;
example-level memorization (of mislabelled or rare examples) does the reverse (Bansal et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from demem.measures.binning import Activations, Binning, as_sites
from demem.measures.entropy import Correction, entropy
from demem.measures.ksg import ksg_mutual_information
from demem.measures.mutual_information import MICorrection, mutual_information

Estimator = Literal["ksg", "binned"]
Lean = Literal["heuristic", "example-level", "unclear"]


@dataclass(frozen=True)
class Diversity:
    """Diversity of a network's activations on one set of examples.

    Attributes:
        entropy: ``{site: (N_site,)}`` nats.
        mutual_information: ``(M, M)`` nats, of the units in ``mi_units``, site after site.
        mi_units: ``{site: (M_site,)}`` indices of the units in the matrix.
        num_samples: number of examples S behind the estimate that has the fewest.
    """

    entropy: dict[str, Tensor]
    mutual_information: Tensor
    mi_units: dict[str, Tensor]
    num_samples: int

    def __repr__(self) -> str:
        sites = ", ".join(f"{site}: {len(values)}" for site, values in self.entropy.items())
        return f"{type(self).__name__}(units {{{sites}}}, {self.num_samples} samples)"

    @property
    def mean_entropy(self) -> float:
        """Mean entropy over all units of all sites, in nats."""
        return float(torch.cat(list(self.entropy.values())).mean())

    @property
    def mean_mi(self) -> float:
        """Mean over the whole matrix including the diagonal (as in the paper), in nats."""
        return float(mean_mi(self.mutual_information))

    def site_mi(self) -> dict[str, Tensor]:
        """Return the blocks of single sites, ``{site: (M_site, M_site)}``."""
        blocks, start = {}, 0
        for site, units in self.mi_units.items():
            blocks[site] = self.mutual_information[start : start + len(units), start : start + len(units)]
            start += len(units)
        return blocks


@dataclass(frozen=True)
class Summary:
    """Mean, and median with the 95% interval (``low``, ``high``) of a notched box plot (McGill et al. 1978)."""

    mean: float
    median: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Verdict:
    """Kind of memorization that the change from a reference to another network indicates.

    Attributes:
        lean: ``"heuristic"`` (entropy down, mutual information up), ``"example-level"`` (the reverse), else
            ``"unclear"``.
        confidence: fraction of bootstrap resamples in which both measures moved that way.
        entropy_change, mi_change: (estimate, lower, upper end of the 95% bootstrap interval) in nats.
    """

    lean: Lean
    confidence: float
    entropy_change: tuple[float, float, float]
    mi_change: tuple[float, float, float]


def measure_diversity(
    activations: Activations,
    bins: int = 100,
    binning: Binning = "global",
    correction: Correction = "none",
    estimator: Estimator | None = "ksg",
    k: int = 3,
    mi_bins: int | None = None,
    mi_binning: Binning | None = None,
    mi_correction: MICorrection = "none",
    max_units: int | None = None,
    max_mi_samples: int | None = None,
    seed: int = 0,
) -> Diversity:
    """Compute the entropy of every unit and the mutual information of all pairs, or of a random subset of units.

    Args:
        activations: ``(S, N)`` or ``{site: (S, N)}``.
        bins, binning, correction: see :func:`demem.measures.entropy`.
        estimator: ``"ksg"`` (the paper's), ``"binned"``, or ``None`` for entropy alone (the matrix is then empty).
        k: number of the neighbour in the KSG estimate.
        mi_bins, mi_binning, mi_correction: see :func:`demem.measures.mutual_information`; bins and binning default to
            those of the entropy.
        max_units: use at most this many units for mutual information, see :func:`choose_units`; all if ``None``.
        max_mi_samples: use at most this many random examples for mutual information; all if ``None``.
        seed: seed of both draws.

    Raises:
        ValueError: unknown estimator, or as the two measures.

    Example:
        >>> x = torch.randn(1000, 1)
        >>> d = measure_diversity({"fc": torch.cat([x, x + 0.1 * torch.randn(1000, 1), torch.randn(1000, 1)], 1)})
        >>> d
        Diversity(units {fc: 3}, 1000 samples)
        >>> [round(value, 1) for value in d.mutual_information[0, 1:].tolist()]  # a near copy, and another unit
        [2.3, 0.0]
    """
    sites = as_sites(activations)
    values = entropy(sites, bins, binning, correction=correction)
    if estimator is None:
        return Diversity(values, torch.empty(0, 0), {}, min(len(x) for x in sites.values()))
    units = choose_units({name: x.shape[1] for name, x in sites.items()}, max_units, seed)
    size = min(len(x) for x in sites.values())
    rows = torch.arange(size)
    if max_mi_samples is not None and max_mi_samples < size:
        rows = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:max_mi_samples].sort().values
    chosen = {n: x[:, units[n].to(x.device)] for n, x in sites.items()}
    if len(rows) < size:
        chosen = {name: x[rows.to(x.device)] for name, x in chosen.items()}
    if estimator == "ksg":
        matrix = ksg_mutual_information(chosen, k)
    elif estimator == "binned":
        matrix = mutual_information(chosen, mi_bins or bins, mi_binning or binning, correction=mi_correction, seed=seed)
    else:
        raise ValueError(f"Unknown estimator {estimator!r}; use 'ksg' or 'binned'.")
    return Diversity(values, matrix, units, len(rows))


def choose_units(num_units: Mapping[str, int], max_units: int | None, seed: int = 0) -> dict[str, Tensor]:
    """Draw at most ``max_units`` units, evenly from all sites; what a small site cannot fill goes to the others.

    Args:
        num_units: ``{site: N}``.
        max_units: number of units to draw in all; all units if ``None``.
        seed: seed of the draw.

    Returns:
        ``{site: (M_site,)}`` sorted int64; at least two units of a site that has two.

    Raises:
        ValueError: ``max_units`` is below 2.

    Example:
        >>> {site: len(units) for site, units in choose_units({"conv": 64, "fc": 3}, max_units=10).items()}
        {'conv': 7, 'fc': 3}
    """
    if max_units is None or sum(num_units.values()) <= max_units:
        return {name: torch.arange(n) for name, n in num_units.items()}
    if max_units < 2:
        raise ValueError(f"max_units must be at least 2, got {max_units}.")
    share, left = {}, max_units
    by_size = sorted(num_units, key=lambda name: num_units[name])
    for position, name in enumerate(by_size):
        share[name] = min(num_units[name], max(2, left // (len(by_size) - position)))
        left -= share[name]
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randperm(size, generator=generator)[: share[n]].sort().values for n, size in num_units.items()}


def mean_mi(matrix: Tensor, diagonal: bool = True) -> Tensor:
    """Average a mutual-information matrix ``(N, N)``, with its diagonal (as in the paper) or without (NaN for N = 1).

    Example:
        >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
        >>> mean_mi(matrix), mean_mi(matrix, diagonal=False)
        (tensor(2.), tensor(1.))
    """
    if diagonal:
        return matrix.mean()
    n = len(matrix)
    return (matrix.sum() - matrix.diagonal().sum()) / (n * (n - 1)) if n > 1 else matrix.new_tensor(float("nan"))


def summarize(values: Tensor) -> Summary:
    """Summarise values of any shape by mean, median and the median's 95% interval, ± 1.57 × interquartile range / √n.

    Raises:
        ValueError: there are no values.

    Source: McGill et al. 1978.

    Example:
        >>> summarize(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        Summary(mean=2.5, median=2.5, low=1.3225, high=3.6775, count=4)
    """
    x = values.detach().flatten().double().cpu()
    if len(x) == 0:
        raise ValueError("There is nothing to summarize.")
    low, median, high = torch.quantile(x, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    notch = 1.57 * (high - low) / len(x) ** 0.5
    return Summary(float(x.mean()), median, median - notch, median + notch, len(x))


def mixture_density(
    values: Tensor, grid: Tensor | None = None, components: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Estimate the density of mutual information by a mixture of Gaussians, as in the paper's figures.

    Args:
        values: a matrix ``(N, N)``, of which each pair is used once and the diagonal is not, or a vector; in nats.
        grid: ``(G,)`` points at which to evaluate the density; 200 points over the range of the values if ``None``.
        components: number of Gaussians.
        seed: seed of the fit.

    Returns:
        ``grid`` and the density on it, both ``(G,)`` float64.

    Raises:
        ValueError: fewer values than components.

    Source: Bansal et al. 2022.

    Example:
        >>> grid, density = mixture_density(torch.cat([torch.randn(200), torch.randn(200) + 5]), components=2)
        >>> round(float(torch.trapezoid(density, grid)), 1)
        1.0
    """
    from sklearn.mixture import GaussianMixture

    values = values.detach().double().cpu()
    if values.ndim == 2:
        values = values[torch.ones_like(values, dtype=torch.bool).triu(1)]
    if len(values) < components:
        raise ValueError(f"{components} components need as many values, got {len(values)}.")
    if grid is None:
        grid = torch.linspace(float(values.min()), float(values.max()), 200, dtype=torch.float64)
    mixture = GaussianMixture(components, random_state=seed, reg_covar=1e-6).fit(values[:, None].numpy())
    return grid, torch.from_numpy(mixture.score_samples(grid[:, None].cpu().numpy())).exp()


def compare(
    reference: Diversity | Sequence[Diversity],
    other: Diversity | Sequence[Diversity],
    resamples: int = 1000,
    seed: int = 0,
) -> Verdict:
    """Judge which kind of memorization the change from ``reference`` to ``other`` indicates, and with what confidence.

    Runs, and units inside each run, are resampled with replacement.  With one run per side the confidence refers to
    these two networks only; pass several seeds per side to cover the variation between seeds.  Compare only networks
    that were measured with the same examples, sites and settings.

    Args:
        reference, other: one network, or several runs of it (e.g. seeds).
        resamples: number of bootstrap resamples.
        seed: seed of the bootstrap.

    Raises:
        ValueError: a side is empty.

    Source: Bansal et al. 2022 for the two directions.

    Example:
        >>> common, noise = torch.randn(500, 1), torch.randn(500, 8)
        >>> diverse, alike = measure_diversity(noise), measure_diversity(common + 0.3 * noise)
        >>> verdict = compare(diverse, alike)
        >>> verdict.lean, verdict.mi_change[0] > 0.5  # nats
        ('heuristic', True)
    """
    before = [reference] if isinstance(reference, Diversity) else list(reference)
    after = [other] if isinstance(other, Diversity) else list(other)
    if not before or not after:
        raise ValueError("Give at least one Diversity on each side.")
    generator = torch.Generator().manual_seed(seed)
    h0, mi0 = _bootstrap(before, resamples, generator)
    h1, mi1 = _bootstrap(after, resamples, generator)
    h, mi = h1 - h0, mi1 - mi0
    heuristic = float(((h < 0) & (mi > 0)).double().mean())
    example = float(((h > 0) & (mi < 0)).double().mean())
    lean: Lean = "heuristic" if heuristic > example else "example-level"
    if max(heuristic, example) <= 0.5:
        lean = "unclear"
    h_now = _mean([d.mean_entropy for d in after]) - _mean([d.mean_entropy for d in before])
    mi_now = _mean([float(mean_mi(d.mutual_information, False)) for d in after]) - _mean(
        [float(mean_mi(d.mutual_information, False)) for d in before]
    )
    return Verdict(lean, max(heuristic, example), (h_now, *_interval(h)), (mi_now, *_interval(mi)))


def compare_runs(
    runs: Mapping[str, Diversity | Sequence[Diversity]],
    reference: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Verdict]:
    """:func:`compare` every run with one of them, e.g. the checkpoints of a training run.

    Args:
        runs: ``{name: one network or several runs of it}``.
        reference: name of the run to compare with; the first if ``None``.
        resamples, seed: see :func:`compare`.

    Raises:
        ValueError: fewer than two runs, or there is no run ``reference``.

    Example:
        >>> common, noise = torch.randn(500, 1), torch.randn(500, 8)
        >>> epochs = {f"epoch {e}": measure_diversity(0.5 * e * common + noise) for e in (0, 1, 4)}
        >>> {epoch: round(verdict.mi_change[0], 2) for epoch, verdict in compare_runs(epochs).items()}  # nats
        {'epoch 1': 0.01, 'epoch 4': 0.49}
    """
    if len(runs) < 2:
        raise ValueError("Give at least two runs to compare.")
    reference = next(iter(runs)) if reference is None else reference
    if reference not in runs:
        raise ValueError(f"There is no run {reference!r}; there are {list(runs)}.")
    return {n: compare(runs[reference], run, resamples, seed) for n, run in runs.items() if n != reference}


def _bootstrap(runs: list[Diversity], resamples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return resampled mean entropy and mean off-diagonal mutual information, each ``(resamples,)``.

    A resample that draws unit i w_i times contains w_i w_j pairs of the units i ≠ j and w_i (w_i − 1) pairs of unit i
    with a copy of itself, which carry no information.  So the mean over pairs of different units is

        Σ_{i≠j} w_i w_j M_ij / Σ_{i≠j} w_i w_j = (wᵀMw − Σ_i w_i² M_ii) / ((Σ_i w_i)² − Σ_i w_i²).
    """
    h, mi = [], []
    for run in runs:
        values = torch.cat([v.double().cpu() for v in run.entropy.values()])
        h.append(_weights(len(values), resamples, generator) @ values / len(values))
        matrix = run.mutual_information.double().cpu()
        w = _weights(len(matrix), resamples, generator)
        total = ((w @ matrix) * w).sum(1) - w.square() @ matrix.diagonal()
        pairs = w.sum(1).square() - w.square().sum(1)
        mi.append(total / pairs.clamp(min=1))
    which = torch.randint(len(runs), (resamples, len(runs)), generator=generator)
    return torch.stack(h, 1).gather(1, which).mean(1), torch.stack(mi, 1).gather(1, which).mean(1)


def _weights(n: int, resamples: int, generator: torch.Generator) -> Tensor:
    """Count how often each of n units is in each resample, ``(resamples, n)``."""
    drawn = torch.randint(n, (resamples, n), generator=generator)
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


def _interval(x: Tensor) -> tuple[float, float]:
    low, high = torch.quantile(x, torch.tensor([0.025, 0.975], dtype=x.dtype)).tolist()
    return low, high


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
