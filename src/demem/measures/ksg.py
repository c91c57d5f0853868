"""Estimate mutual information by nearest neighbours (Kraskov, Stögbauer and Grassberger 2004, first estimator).

Derivation.  Let P be the probability mass within the distance ε of a point to its k-th neighbour among S − 1 others.
Its mean logarithm does not depend on the density: ⟨ln P⟩ = ψ(k) − ψ(S).  In the plane of two units, with the maximum
norm, P ≈ p(x, y) (2ε)², so that

    H(x, y) = −⟨ln p⟩ = ψ(S) − ψ(k) + 2 ⟨ln 2ε⟩.

Along one unit the same ε reaches to the (n_x + 1)-th neighbour, where n_x counts the other points closer than ε:

    H(x) = ψ(S) − ⟨ψ(n_x + 1)⟩ + ⟨ln 2ε⟩.

In H(x) + H(y) − H(x, y) the terms with ε cancel, and with them most of the error of assuming a constant density:

    I = ψ(S) + ψ(k) − ⟨ψ(n_x + 1) + ψ(n_y + 1)⟩.

The work is to find ε and to count neighbours for every pair of units.  Both are exact here: distances are searched in
strips of one unit (:func:`_kth_distance`), and every distance that is not proven to be the smallest is left to a k-d
tree.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from demem.measures._parallel import for_each
from demem.measures.binning import Activations, as_sites, side_by_side

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

_PAIRS = 16  # per block: large enough that threads seldom wait for the interpreter, small enough for the cache
_MAX_FAST_K = 5
_MIN_FAST_SAMPLES = 500


class TiesWarning(UserWarning):
    """Some units repeat values, which biases the nearest-neighbour estimate."""


@dataclass(frozen=True)
class UnitTies:
    """Repeated values of each unit, which a nearest-neighbour estimate assumes not to exist.

    Attributes:
        dead: ``(N,)`` bool, units that are constant.
        tied: ``(N,)`` float64, fraction of a unit's examples whose value occurs more than once (1 for a dead unit).
    """

    dead: Tensor
    tied: Tensor


def inspect_units(activations: Activations) -> UnitTies:
    """Find dead units and repeated values (zeros of a ReLU, half precision).

    Args:
        activations: ``(S, N)``, or ``{site: (S, N)}`` whose units are joined.

    Example:
        >>> inspect_units(torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 2.0], [0.0, 3.0, 3.0], [0.0, 4.0, 4.0]]))
        UnitTies(dead=tensor([ True, False, False]), tied=tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64))
    """
    values = side_by_side(as_sites(activations)).float().T.contiguous().sort(1).values
    same = values[:, 1:] == values[:, :-1]
    no = same.new_zeros(len(values), 1)
    tied = torch.cat([no, same], 1) | torch.cat([same, no], 1)
    return UnitTies(dead=values[:, 0] == values[:, -1], tied=tied.double().mean(1))


def ksg_mutual_information(activations: Activations, k: int = 3, clip: bool = True) -> Tensor:
    r"""Estimate the mutual information of all pairs of units by nearest neighbours (KSG-1), in nats.

    .. math:: I = \psi(S) + \psi(k) - \langle \psi(n_x + 1) \rangle - \langle \psi(n_y + 1) \rangle

    with ε the distance to the k-th neighbour in the plane of the two units (maximum norm) and :math:`n_x, n_y` the
    numbers of other examples closer than ε in one unit alone.  This is scikit-learn's estimator for continuous
    variables, without its scaling and noise.

    Args:
        activations: ``(S, N)``, or ``{site: (S, N)}`` whose units are joined; S > k.
        k: number of the neighbour; a larger k has less variance and more bias.
        clip: replace negative estimates by 0, as scikit-learn does.

    Returns:
        ``(N, N)`` float64, symmetric; the diagonal holds the estimate of a unit with itself.

    Raises:
        ValueError: k < 1, S ≤ k, wrong shape, NaN or infinity.

    Warns:
        TiesWarning: units repeat values (see :func:`inspect_units`), so that their estimates are biased.  Read the
            layer before its ReLU, in float32, or use :func:`demem.measures.mutual_information`.

    Source: Kraskov et al. 2004, equation 8, as used by Bansal et al. 2022.

    Example:
        >>> x = torch.randn(2000, 3)
        >>> x[:, 1] = 0.8 * x[:, 0] + 0.6 * x[:, 1]  # correlation 0.8, so I = −½ ln(1 − 0.64) = 0.51 nats
        >>> matrix = ksg_mutual_information(x)
        >>> [round(float(matrix[0, j]), 1) for j in (1, 2)]
        [0.5, 0.0]
    """
    sites = as_sites(activations)
    matrix = side_by_side(sites)
    size, units = matrix.shape
    if k < 1 or size <= k:
        raise ValueError(f"KSG needs k ≥ 1 and more samples than k, got k={k} and {size} samples.")
    _warn_of_ties(sites)
    device = matrix.device
    values = np.ascontiguousarray(matrix.T.double().cpu().numpy())
    prepared = _prepare(values)
    psi = torch.digamma(torch.arange(size + 1, dtype=torch.float64).clamp(min=1)).numpy()
    fast = k <= _MAX_FAST_K and size >= _MIN_FAST_SAMPLES
    out = np.zeros((units, units))

    def one_unit(i: int) -> None:
        strips = _strips(values[i][prepared.order[i]], k) if fast else []
        for first in range(i, units, _PAIRS):
            js = slice(first, min(first + _PAIRS, units))
            mean = _mean_psi(prepared, i, js, k, strips, psi)
            out[i, js] = psi[size] + psi[k] - mean

    for_each(one_unit, range(units))
    result = torch.from_numpy(out)
    result = result.triu() + result.triu(1).T
    return (result.clamp(min=0) if clip else result).to(device)


def _warn_of_ties(sites: dict[str, Tensor]) -> None:
    notes = []
    for name, x in sites.items():
        report = inspect_units(x)
        dead, tied = int(report.dead.sum()), int(((report.tied > 0.01) & ~report.dead).sum())
        if dead or tied:
            notes.append(f"{name!r}: {dead} dead and {tied} with more than 1% repeated values, of {x.shape[1]} units")
    if notes:
        warnings.warn(
            f"KSG assumes that no value repeats ({'; '.join(notes)}). Their estimates are biased: read the layer "
            "before its ReLU and in float32, or use binned mutual information.",
            TiesWarning,
            stacklevel=3,
        )


@dataclass(frozen=True)
class _Prepared:
    """Order and search grid of every unit, computed once; all arrays have one row per unit."""

    values: Floats  # in the order of the examples
    order: Ints  # numbers of the examples by increasing value
    rank: Ints  # its inverse
    sorted: Floats  # padded with inf, so that a search may step past the end
    cell_start: Ints  # number of values before each cell of a regular grid over the unit's range
    low: Floats
    scale: Floats
    steps: list[int]  # halving steps that find a value inside the fullest three cells


def _prepare(values: Floats) -> _Prepared:
    units, size = values.shape
    order = np.argsort(values, 1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(size), order.shape), 1)
    ordered = np.take_along_axis(values, order, 1)
    cells = 2 * size
    low = ordered[:, 0].copy()
    width = ordered[:, -1] - low
    scale = np.divide(cells - 1, width, out=np.zeros(units), where=width > 0)
    cell = ((ordered - low[:, None]) * scale[:, None]).astype(np.intp)
    starts = np.zeros((units, cells + 1), np.intp)
    steps = []
    for i in range(units):
        filled = np.bincount(cell[i], minlength=cells)
        np.cumsum(filled, out=starts[i, 1:])
        # A cell with its neighbours, because rounding can put a sum into the next cell.
        steps.append(int(np.convolve(filled, [1, 1, 1]).max()).bit_length())
    padded = np.full((units, size + 2 ** max(steps)), np.inf)
    padded[:, :size] = ordered
    return _Prepared(values, order, rank, padded, starts, low, scale, steps)


def _count_below(p: _Prepared, units: int | slice, x: Floats, offset: Floats, inclusive: bool) -> Ints:
    """Count the values v of a unit with v − x < offset (or ≤), ``(J, S)``; ``units`` is one index or a slice of J.

    The grid cell of x + offset gives a lower bound of the count, halving steps inside three cells the rest.  The
    difference v − x is compared, as in the definition of the neighbourhood, because v < x + offset may round otherwise.
    """
    many = isinstance(units, slice)
    low, scale = (p.low[units, None], p.scale[units, None]) if many else (p.low[units], p.scale[units])
    rows = np.arange(units.start, units.stop)[:, None] if isinstance(units, slice) else units
    steps = max(p.steps[units]) if isinstance(units, slice) else p.steps[units]
    cell = (x + offset - low) * scale
    np.clip(cell - 1, 0, p.cell_start.shape[1] - 2, out=cell)
    index = cell.astype(np.intp)
    index += rows * p.cell_start.shape[1]
    before_row = rows * p.sorted.shape[1] - 1
    at = p.cell_start.ravel().take(index)
    at += before_row
    flat = p.sorted.ravel()
    compare = np.less_equal if inclusive else np.less
    for bit in range(steps - 1, -1, -1):
        jump = 1 << bit
        found = flat.take(at + jump)
        found -= x
        at += compare(found, offset).astype(np.intp) * jump
    result: Ints = at - before_row
    return result


@dataclass(frozen=True)
class _Strips:
    """Examples divided into strips by their rank in one unit.

    Attributes:
        strip: ``(S,)`` number of the strip, by rank.
        edge: ``(S,)`` distance to the nearest example outside of the strip, by rank.
    """

    strip: npt.NDArray[np.uint16]
    edge: Floats


def _strips(x: Floats, k: int) -> list[_Strips]:
    """Divide the sorted values twice, shifted by half a strip: every example is far from the edge in one of the two.

    The k nearest of S points of two independent units fill k / S of the mass, hence about sqrt(k / S) of the ranks of
    each unit, which is sqrt(k S) ranks; a strip is a few times wider.
    """
    size = len(x)
    half = max(8, round(1.7 * (k * size) ** 0.5))
    ends = np.concatenate([[-np.inf], x, [np.inf]])  # x[r] is ends[r + 1]
    parts = []
    for shift in (0, half):
        strip = (np.arange(size) + shift) // (2 * half)
        first = np.maximum(strip * 2 * half - shift, 0)
        last = np.minimum((strip + 1) * 2 * half - shift, size)
        parts.append(_Strips(strip.astype(np.uint16), np.minimum(x - ends[first], ends[last + 1] - x)))
    return parts


def _mean_psi(p: _Prepared, i: int, js: slice, k: int, strips: list[_Strips], psi: Floats) -> Floats:
    """Compute ⟨ψ(n_x + 1) + ψ(n_y + 1)⟩ of unit i with units js, ``(J,)``."""
    size = p.values.shape[1]
    x = p.sorted[i, :size]
    y = np.take(p.values[js], p.order[i], axis=1)
    radius = _kth_distance(x, y, p.rank[i][p.order[js]], k, strips)
    radius = np.nextafter(radius, 0)  # excludes the k-th neighbour itself
    near_x = _count_below(p, i, x, radius, True) - _count_below(p, i, x, -radius, False)
    near_y = _count_below(p, js, y, radius, True) - _count_below(p, js, y, -radius, False)
    return np.asarray((psi.take(near_x) + psi.take(near_y)).mean(1))


def _kth_distance(x: Floats, y: Floats, by_y: Ints, k: int, strips: list[_Strips]) -> Floats:
    """Compute the maximum-norm distance to the k-th neighbour of the points (x[s], y[j, s]), ``(J, S)``.

    Inside a strip of x the points are sorted by y, and each is compared with a fixed number of points on both sides.
    The k-th smallest distance found is the true one if no other point can be closer: if it is no larger than the
    distance in x to the strip's edge, and in y to the next point in the strip.  The few remaining points are left to a
    k-d tree.
    """
    from scipy.spatial import cKDTree

    best = np.full(y.shape, np.inf)
    proven = np.full(y.shape, -np.inf)
    row_start = np.arange(len(y))[:, None] * y.shape[1]
    for part in strips:
        within = np.argsort(part.strip.take(by_y), 1, kind="stable")  # a radix sort: linear in S
        at = by_y.ravel().take(within + row_start)
        flat = at + row_start
        kth, bound = _look_around(x.take(at), y.ravel().take(flat), part.strip.take(at), k)
        np.minimum(bound, part.edge.take(at), out=bound)
        found, limit = np.empty_like(kth), np.empty_like(bound)
        found.ravel()[flat], limit.ravel()[flat] = kth, bound
        np.minimum(best, found, out=best)
        np.maximum(proven, limit, out=proven)
    for j, open_ in enumerate(best > proven):
        if open_.any():
            points = np.column_stack([x, y[j]])
            tree = cKDTree(points, leafsize=16, balanced_tree=False, compact_nodes=False)
            best[j, open_] = tree.query(points[open_], k=[k + 1], p=np.inf)[0][:, 0]
    return best


def _look_around(x: Floats, y: Floats, strip: npt.NDArray[np.uint16], k: int) -> tuple[Floats, Floats]:
    """Compare each point with the next ones along its row, which holds strips one after the other, each sorted by y.

    Returns:
        The k-th smallest maximum-norm distance found, and the smallest y-distance of the points not compared, both
        ``(J, S)``.
    """
    reach = 5 + 2 * k
    nearest = [np.full(x.shape, np.inf) for _ in range(k)]
    distance, spare, other = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    for step in range(1, reach + 1):
        d, s = distance[:, step:], spare[:, step:]
        np.subtract(x[:, step:], x[:, :-step], out=d)
        np.abs(d, out=d)
        np.subtract(y[:, step:], y[:, :-step], out=s)
        np.abs(s, out=s)
        np.maximum(d, s, out=d)
        for side in (slice(step, None), slice(None, -step)):
            # Insert into the k smallest so far: `new` starts as the distance and then carries what it displaced.
            new, buffers = d, (spare[:, step:], other[:, step:])
            for m, kept in enumerate(nearest):
                held = kept[:, side]
                pushed = np.maximum(held, new, out=buffers[m % 2]) if m < k - 1 else new
                np.minimum(held, new, out=held)
                new = pushed
    skip = reach + 1
    bound = np.full(x.shape, np.inf)
    gap = np.where(strip[:, skip:] == strip[:, :-skip], y[:, skip:] - y[:, :-skip], np.inf)
    np.minimum(bound[:, skip:], gap, out=bound[:, skip:])
    np.minimum(bound[:, :-skip], gap, out=bound[:, :-skip])
    return nearest[-1], bound
