import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma
from sklearn.feature_selection._mutual_info import _compute_mi_cc

from demem.measures import TiesWarning, inspect_units, ksg_mutual_information


def written_out(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """The formula, by brute force."""
    dx, dy = np.abs(x[:, None] - x), np.abs(y[:, None] - y)
    joint = np.maximum(dx, dy)
    np.fill_diagonal(joint, np.inf)
    radius = np.nextafter(np.sort(joint, 1)[:, k - 1], 0)[:, None]
    near_x, near_y = (dx <= radius).sum(1) - 1, (dy <= radius).sum(1) - 1
    return float(digamma(len(x)) + digamma(k) - (digamma(near_x + 1) + digamma(near_y + 1)).mean())


def shapes(size: int) -> torch.Tensor:
    """Units as different as they come: normal, heavy-tailed, clustered, nearly equal to another, on another scale."""
    z = torch.randn(size, 8)
    clusters = torch.randint(0, 5, (size,)) * 10 + 0.01 * z[:, 3]
    return torch.stack(
        [
            z[:, 0],
            z[:, 1].exp() ** 3,
            z[:, 0] + 0.01 * z[:, 2],
            clusters,
            1e4 * z[:, 4] + 3e4,
            z[:, 5] ** 3,
            z[:, 6].sign() + z[:, 7],
        ],
        1,
    )


@pytest.mark.filterwarnings("ignore::demem.measures.TiesWarning")
@pytest.mark.parametrize("size", [40, 600, 1500])  # below and above the size for the fast search
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_scikit_learn(size, k, dtype):
    x = shapes(size).to(dtype)
    value = ksg_mutual_information(x, k).numpy()
    columns = x.double().numpy().T
    for i in range(7):
        for j in range(i, 7):
            assert value[i, j] == pytest.approx(_compute_mi_cc(columns[i], columns[j], k), abs=1e-9)
    assert (value == value.T).all()


def test_agrees_with_the_formula_written_out_and_may_be_negative_unclipped():
    x = torch.randn(700, 6).double()
    value = ksg_mutual_information(x, clip=False)
    for i in range(6):
        for j in range(i + 1, 6):
            assert float(value[i, j]) == pytest.approx(written_out(x[:, i].numpy(), x[:, j].numpy(), 3), abs=1e-9)
    assert float(value.min()) < 0 <= float(ksg_mutual_information(x).min())


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_gaussians_of_known_correlation(rho):
    z = torch.randn(5000, 2)
    x = torch.stack([z[:, 0], rho * z[:, 0] + math.sqrt(1 - rho**2) * z[:, 1]], 1)
    assert float(ksg_mutual_information(x)[0, 1]) == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.04)


def test_ties_are_reported_and_still_follow_the_reference():
    x = torch.randn(600, 4)
    x[:, 1].clamp_(min=0)
    x[:, 2] = 2.5
    with pytest.warns(TiesWarning, match="'relu': 1 dead and 1 with more than 1% repeated values, of 4 units"):
        value = ksg_mutual_information({"relu": x})
    columns = x.double().numpy().T
    expected = [[_compute_mi_cc(a, b, 3) for a in columns] for b in columns]
    assert np.abs(value.numpy() - np.array(expected)).max() < 1e-9
    report = inspect_units(x)
    assert report.dead.tolist() == [False, False, True, False]
    assert report.tied[2] == 1
    assert 0.4 < float(report.tied[1]) < 0.6
    assert value[2].abs().max() < 1e-9


def test_no_warning_without_ties():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ksg_mutual_information(torch.randn(100, 3))


def test_several_threads_equal_one_and_sites_are_put_side_by_side():
    x = torch.randn(600, 12)
    one = ksg_mutual_information(x)
    try:
        torch.set_num_threads(3)
        assert torch.equal(ksg_mutual_information({"a": x[:, :5], "b": x[:, 5:]}), one)
    finally:
        torch.set_num_threads(1)


@settings(max_examples=15, deadline=None)
@given(st.integers(5, 700), st.integers(0, 10_000))
def test_order_of_samples_and_common_scale_do_not_matter(size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, generator=generator)
    value = ksg_mutual_information(x)
    order = torch.randperm(size, generator=generator)
    assert torch.allclose(value, ksg_mutual_information(x[order]), atol=1e-9)
    assert torch.allclose(value, ksg_mutual_information(8 * x), atol=1e-9)


def test_errors():
    with pytest.raises(ValueError, match="more samples than k, got k=3 and 3 samples"):
        ksg_mutual_information(torch.randn(3, 2))
    with pytest.raises(ValueError, match="k=0"):
        ksg_mutual_information(torch.randn(30, 2), k=0)
    with pytest.raises(ValueError, match="site 'fc'"):
        ksg_mutual_information({"fc": torch.full((9, 2), float("inf"))})
