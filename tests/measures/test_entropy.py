import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from demem.measures import entropy, entropy_from_counts, histogram, share_ranges, unit_ranges


def plug_in(x: np.ndarray, bins: int, low: float, high: float) -> float:
    p = np.histogram(x, bins, (low, high))[0] / len(x)
    return float(-sum(q * math.log(q) for q in p if q > 0))


def test_global_bins_agree_with_numpy_histograms():
    x = {"a": torch.randn(500, 70), "b": 5 * torch.randn(500, 3)}
    low, high = (float(f(torch.stack([f(x["a"]), f(x["b"])]))) for f in (torch.min, torch.max))
    values = entropy(x, bins=40)
    for name in x:
        expected = [plug_in(column.double().numpy(), 40, low, high) for column in x[name].T]
        assert values[name].tolist() == pytest.approx(expected, abs=1e-12)


def test_range_is_shared_by_site_or_by_none():
    x = {"a": torch.randn(300, 4), "b": 100 * torch.randn(300, 4)}
    scaled = {"a": 7 * x["a"], "b": x["b"]}
    assert torch.equal(entropy(x, binning="per_site")["a"], entropy(scaled, binning="per_site")["a"])
    assert not torch.equal(entropy(x)["a"], entropy(scaled)["a"])
    per_unit = entropy(x["a"] * torch.tensor([1.0, 2, 4, 8]), binning="per_unit")
    assert torch.equal(per_unit, entropy(x["a"], binning="per_unit"))


def test_uniform_discrete_and_constant_units():
    x = torch.stack([(torch.arange(1000) % 10 + 0.5) / 10, (torch.arange(1000) % 2).float(), torch.zeros(1000)], 1)
    assert entropy(x, bins=10, value_range=(0, 1)).tolist() == pytest.approx([math.log(10), math.log(2), 0], abs=1e-12)
    assert entropy(torch.full((50, 2), 3.0), bins=10, binning="per_unit").tolist() == [0, 0]


def test_gaussian_has_its_differential_entropy_minus_log_bin_width():
    x = torch.randn(200_000, 1)
    width = float(x.max() - x.min()) / 100
    assert float(entropy(x)) == pytest.approx(0.5 * math.log(2 * math.pi * math.e) - math.log(width), abs=0.01)


def test_miller_madow_removes_most_of_the_bias():
    x = torch.rand(500, 200)
    plain, corrected = (entropy(x, bins=50, value_range=(0, 1), correction=c).mean() for c in ("none", "miller_madow"))
    assert abs(float(corrected) - math.log(50)) < 0.1 * abs(float(plain) - math.log(50))


def test_counts_of_parts_add_up_and_outliers_go_to_the_end_bins():
    x = torch.randn(5000, 130)
    low, high = share_ranges(unit_ranges(x), "per_unit")["activations"]
    whole = histogram(x, low, high, 30)
    assert torch.equal(whole, histogram(x[:1234], low, high, 30) + histogram(x[1234:], low, high, 30))
    assert whole.sum(1).tolist() == [5000] * 130
    ends = histogram(torch.tensor([[-9.0], [0.5], [9.0]]), torch.zeros(1), torch.ones(1), 4)
    assert ends.tolist() == [[1, 0, 1, 1]]


@pytest.mark.parametrize("inference", [False, True])
def test_several_threads_count_like_one(inference):
    x = torch.randn(3000, 300)
    one = entropy(x)
    try:
        torch.set_num_threads(3)
        with torch.inference_mode(inference):
            assert torch.equal(entropy(x), one)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_empty_histogram_has_no_entropy():
    assert entropy_from_counts(torch.zeros(2, 5, dtype=torch.long)).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_equals_its_float32_copy(dtype):
    x = torch.randn(400, 5).to(dtype)
    assert torch.equal(entropy(x), entropy(x.double()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_values_are_refused_with_the_name_of_the_site(bad):
    x = torch.randn(10, 3)
    x[4, 1] = bad
    with pytest.raises(ValueError, match=r"1 of 30 values at site 'layer4\.1'"):
        entropy({"fc": torch.randn(10, 2), "layer4.1": x})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bins": 1}, "bins must be between"),
        ({"binning": "unit"}, "Unknown binning 'unit'"),
        ({"correction": "mm"}, "Unknown correction 'mm'"),
        ({"value_range": (1.0, 1.0)}, "low < high"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        entropy(torch.randn(10, 2), **arguments)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(samples, units\), got \(10, 2, 2\)"):
        entropy(torch.randn(10, 2, 2))
    with pytest.raises(TypeError, match="mapping"):
        entropy({})


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(2, 200), st.integers(0, 10_000))
def test_bounds_permutation_and_affine_invariance(bins, size, seed):
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/8 and a power of two keep the affine map exact.
    x = torch.randint(-40, 40, (size, 3), generator=generator).double() / 8
    value = entropy(x, bins, "per_unit")
    assert bool((value >= 0).all())
    assert float(value.max()) <= math.log(min(bins, size)) + 1e-9
    assert torch.allclose(value, entropy(x[torch.randperm(size, generator=generator)], bins, "per_unit"))
    assert torch.allclose(value, entropy(4 * x + 3, bins, "per_unit"))
