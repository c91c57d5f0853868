import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from demem.measures import activation_codes, entropy, mutual_information, mutual_information_from_codes


def gaussians(size: int, rho: float) -> torch.Tensor:
    x = torch.randn(size, 2)
    return torch.stack([x[:, 0], rho * x[:, 0] + math.sqrt(1 - rho**2) * x[:, 1]], 1)


@pytest.mark.parametrize("bins", [5, 30, 120])  # fewer and more cells than samples
@pytest.mark.parametrize("binning", ["global", "per_site", "per_unit", "quantile"])
def test_agrees_with_scikit_learn(bins, binning):
    x = {"a": torch.randn(400, 6), "b": torch.randn(400, 5).exp()}
    x["b"][:, 0] += x["a"][:, 0]
    codes = activation_codes(x, bins, binning).numpy()
    expected = np.array([[mutual_info_score(a, b) for a in codes] for b in codes])
    assert np.abs(mutual_information(x, bins, binning).numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_gaussians_of_known_correlation(rho):
    value = mutual_information(gaussians(100_000, rho), bins=40, binning="quantile")[0, 1]
    assert float(value) == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.02)


def test_independent_units_share_nothing_once_corrected():
    x = torch.randn(2000, 20)
    off = ~torch.eye(20, dtype=torch.bool)
    plain, madow, shuffled = (
        float(mutual_information(x, 20, "quantile", correction=c)[off].mean())
        for c in ("none", "miller_madow", "shuffle")
    )
    assert plain > 0.08  # the bias, (B − 1)² / 2S
    assert abs(madow) < 0.005
    assert abs(shuffled) < 0.005


def test_deterministic_and_discrete_units():
    x = (torch.arange(1200) % 6).float()
    value = mutual_information(torch.stack([x, -x, (x % 2), torch.zeros(1200)], 1), 20, "per_unit")
    six, two = math.log(6), math.log(2)
    expected = torch.tensor([[six, six, two, 0], [six, six, two, 0], [two, two, two, 0], [0, 0, 0, 0]])
    assert torch.allclose(value, expected.double(), atol=1e-12)


def test_quantile_bins_know_ranks_only():
    x = torch.randn(300, 4).double()
    moved = torch.stack([x[:, 0].exp(), x[:, 1] ** 3, 5 * x[:, 2] - 1, x[:, 3].tanh()], 1)
    assert torch.equal(mutual_information(x, 8, "quantile"), mutual_information(moved, 8, "quantile"))


@pytest.mark.parametrize("inference", [False, True])
def test_several_threads_equal_one(inference):
    x = torch.randn(500, 40)
    one = mutual_information(x, 30)
    try:
        torch.set_num_threads(3)
        with torch.inference_mode(inference):
            assert torch.equal(mutual_information(x, 30), one)
    finally:
        torch.set_num_threads(1)


def test_long_blocks_and_many_samples():
    x = torch.randn(70_000, 3)
    codes = activation_codes(x, 10, "global").numpy()
    expected = mutual_info_score(codes[0], codes[2])
    assert float(mutual_information(x, 10)[2, 0]) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 120), st.integers(0, 10_000))
def test_symmetric_non_negative_diagonal_is_entropy_and_order_does_not_matter(bins, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-9, 9, (size, 4), generator=generator).float() * torch.randn(4, generator=generator)
    value = mutual_information(x, bins)
    assert torch.equal(value, value.T)
    assert float(value.min()) >= -1e-12
    assert torch.allclose(value.diagonal(), entropy(x, bins))
    assert torch.allclose(value, mutual_information(x[torch.randperm(size, generator=generator)], bins))
    bound = torch.minimum(value.diagonal()[:, None], value.diagonal()[None, :])
    assert bool((value <= bound + 1e-9).all())


def test_low_precision_input():
    x = torch.randn(300, 4).half()
    assert torch.equal(mutual_information(x, 20), mutual_information(x.double(), 20))


def test_errors():
    with pytest.raises(ValueError, match=r"different numbers of them: \{'a': 10, 'b': 9\}"):
        mutual_information({"a": torch.randn(10, 2), "b": torch.randn(9, 2)})
    with pytest.raises(ValueError, match="Unknown correction"):
        mutual_information(torch.randn(10, 2), correction="x")
    with pytest.raises(ValueError, match="no meaning"):
        mutual_information(torch.randn(10, 2), binning="quantile", value_range=(0, 1))
    with pytest.raises(ValueError, match="integers of shape"):
        mutual_information_from_codes(torch.randn(3, 10))
    with pytest.raises(ValueError, match="site 'fc'"):
        mutual_information({"fc": torch.tensor([[1.0], [float("nan")]])})
