"""Estimate the mutual information of all pairs of units from binned activations.

I_ij = H_i + H_j − H_ij with the plug-in entropies of :mod:`demem.measures.entropy`.  By their bias of −(K − 1) / 2S for
K occupied cells, I_ij is biased by ((K_ij − 1) − (K_i − 1) − (K_j − 1)) / 2S = (K_ij − K_i − K_j + 1) / 2S, which the
Miller-Madow correction subtracts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from demem.measures._parallel import for_each
from demem.measures.binning import (
    Activations,
    Binning,
    as_sites,
    bin_codes,
    check_bins,
    fixed_range,
    quantile_codes,
    ranges_of,
    side_by_side,
)

MICorrection = Literal["none", "miller_madow", "shuffle"]

# Size of a block of pairs: its table of counts should stay in the second-level cache.
_BLOCK_CELLS, _BLOCK_SAMPLES = 2**17, 2**16


def mutual_information(
    activations: Activations,
    bins: int = 100,
    binning: Binning = "global",
    value_range: tuple[float, float] | None = None,
    correction: MICorrection = "none",
    seed: int = 0,
) -> Tensor:
    r"""Estimate the mutual information :math:`I_{ij} = H_i + H_j - H_{ij}` of all pairs of units, in nats.

    The plug-in estimate is biased upwards by about (occupied cells) / 2S, which at 100 bins and a few thousand examples
    exceeds the information itself.  Compare runs with few bins, a correction, or
    :func:`demem.measures.ksg_mutual_information`.

    Args:
        activations: ``(S, N)``, or ``{site: (S, N)}`` whose units are joined.
        bins: number of bins B of each unit.
        binning: as for :func:`demem.measures.entropy`; also ``"quantile"``: equally filled bins of each unit, which
            makes the estimate invariant to increasing maps of single units.
        value_range: fixed range instead of the smallest and largest activation (equal-width bins only).
        correction: ``"miller_madow"`` subtracts (K_ij − K_i − K_j + 1) / 2S with K the numbers of occupied cells;
            ``"shuffle"`` subtracts the estimate for the same units with their examples shuffled against each other.
        seed: seed of the shuffle.

    Returns:
        ``(N, N)`` float64, symmetric; without correction the diagonal holds the entropies.

    Raises:
        ValueError: wrong shape, NaN or infinity (names the site), sites with different numbers of examples, bins out of
            range, unknown choice.

    Source: Bansal et al. 2022, equation 2, by bins instead of nearest neighbours.

    Example:
        >>> x = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
        >>> mutual_information(x, bins=2)  # units 0 and 1 are equal (ln 2), unit 2 is independent of them
        tensor([[0.6931, 0.6931, 0.0000],
                [0.6931, 0.6931, 0.0000],
                [0.0000, 0.0000, 0.6931]], dtype=torch.float64)
    """
    check_bins(bins)
    return mutual_information_from_codes(
        activation_codes(activations, bins, binning, value_range), correction, seed=seed
    )


def activation_codes(
    activations: Activations, bins: int, binning: Binning, value_range: tuple[float, float] | None = None
) -> Tensor:
    """Return the bin indices of the units of all sites, ``(N, S)`` int32.

    Args:
        activations, bins, binning, value_range: see :func:`mutual_information`.

    Raises:
        ValueError: as :func:`mutual_information`.

    Example:
        >>> activation_codes(torch.tensor([[0.0], [0.2], [0.7], [9.0]]), bins=2, binning="quantile")
        tensor([[0, 0, 1, 1]], dtype=torch.int32)
    """
    sites = as_sites(activations)
    matrix = side_by_side(sites)
    if binning == "quantile":
        if value_range is not None:
            raise ValueError("value_range has no meaning for binning='quantile'.")
        return quantile_codes(matrix, bins).T.contiguous()
    if value_range is None:
        ranges = ranges_of(sites, binning).values()
        low, high = torch.cat([r[0] for r in ranges]), torch.cat([r[1] for r in ranges])
    else:
        low, high = fixed_range(value_range, matrix)
    return bin_codes(matrix, low, high, bins).T.contiguous()


def mutual_information_from_codes(codes: Tensor, correction: MICorrection = "none", seed: int = 0) -> Tensor:
    """Estimate the mutual information of all pairs of discrete variables, in nats.

    Args:
        codes: ``(N, S)`` integers from 0 up.
        correction, seed: see :func:`mutual_information`.

    Returns:
        ``(N, N)`` float64 on the device of ``codes``.

    Raises:
        ValueError: ``codes`` are not integers of that shape, or unknown correction.

    Example:
        >>> mutual_information_from_codes(torch.tensor([[0, 0, 1, 1], [2, 2, 0, 0]]))[0, 1]  # ln 2
        tensor(0.6931, dtype=torch.float64)
    """
    if codes.ndim != 2 or codes.is_floating_point() or 0 in codes.shape:
        raise ValueError(f"codes must be integers of shape (N, S), got {codes.dtype} {tuple(codes.shape)}.")
    if correction not in ("none", "miller_madow", "shuffle"):
        raise ValueError(f"Unknown correction {correction!r}; use 'none', 'miller_madow' or 'shuffle'.")
    codes = codes.to(torch.int32)
    low, high = torch.aminmax(codes, dim=1)  # global bins: most units occupy few of them
    codes, widths = (codes - low[:, None]).contiguous(), (high - low + 1).tolist()
    size = codes.shape[1]
    joint, cells = _joint_entropies(codes, codes, widths, correction == "miller_madow")
    single = joint.diagonal().clone()
    value = single[:, None] + single[None, :] - joint
    if correction == "miller_madow":
        used = cells.diagonal()
        value = value - (cells - used[:, None] - used[None, :] + 1) / (2 * size)
    if correction == "shuffle":
        generator = torch.Generator().manual_seed(seed)
        shuffled = codes[:, torch.randperm(size, generator=generator).to(codes.device)].contiguous()
        null, _ = _joint_entropies(codes, shuffled, widths, False)
        value = value - (single[:, None] + single[None, :] - null)
    return value


def _joint_entropies(a: Tensor, b: Tensor, widths: list[int], count_cells: bool) -> tuple[Tensor, Tensor]:
    """Compute the entropy of (a_i, b_j) for i ≤ j, mirrored, and (if asked for) the number of occupied cells.

    With n_c examples in cell c, H = −Σ_c (n_c / S) ln(n_c / S) = ln S − (1 / S) Σ_c n_c ln n_c.  The table of 2,500
    examples in 100 × 100 bins is nearly empty, so where it has more cells than there are examples the sum runs over
    examples instead: Σ_c n_c ln n_c = Σ_s ln n_{c(s)}, and the number of occupied cells is Σ_s 1 / n_{c(s)}.
    """
    units, size = a.shape
    joint = torch.zeros(units, units, dtype=torch.float64, device=a.device)
    cells = torch.zeros_like(joint) if count_cells else joint
    count = torch.arange(size + 1, dtype=torch.float64, device=a.device)
    log = count.clamp(min=1).log()
    by_cell, cell_used = count * log, (count > 0).double()
    by_sample, sample_used = log, 1 / count.clamp(min=1)
    cpu = a.device.type == "cpu"
    block_cells, block_samples = (_BLOCK_CELLS, _BLOCK_SAMPLES) if cpu else (2**26, 2**24)

    def one_unit(i: int) -> None:
        j = i
        while j < units:
            stop, table = j, 0
            while stop < units:  # as many pairs as keep table and codes in the cache
                wider = max(table, widths[i] * widths[stop])
                pairs = stop + 1 - j
                if pairs > 1 and (pairs * wider > block_cells or pairs * size >= block_samples):
                    break
                stop, table = stop + 1, wider
            pairs = stop - j
            start = torch.arange(pairs, dtype=torch.int32, device=a.device)[:, None] * table
            index = (b[j:stop] * widths[i]).add_(a[i]).add_(start).flatten()
            counts = torch.bincount(index, minlength=pairs * table)
            if table <= size:
                weight, used = by_cell, cell_used
            else:
                counts, weight, used = counts.index_select(0, index), by_sample, sample_used
            joint[i, j:stop] = weight.index_select(0, counts).view(pairs, -1).sum(1)
            if count_cells:
                cells[i, j:stop] = used.index_select(0, counts).view(pairs, -1).sum(1)
            j = stop

    if cpu:
        for_each(one_unit, range(units))
    else:
        for i in range(units):
            one_unit(i)
    joint = torch.triu(torch.tensor(float(size), dtype=torch.float64).log() - joint / size)
    joint = joint + joint.triu(1).T
    return joint, (cells + cells.triu(1).T if count_cells else cells)
