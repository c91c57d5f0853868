import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from demem.measures import (
    ActivationEntropy,
    ActivationRange,
    HistogramEntropy,
    KSGMutualInformation,
    MutualInformation,
    entropy,
    ksg_mutual_information,
    mutual_information,
    reservoir_compact,
    reservoir_keys,
    share_ranges,
)

PAIRS = [
    (lambda **o: ActivationEntropy(bins=30, **o), lambda x: entropy(x, 30)),
    (lambda **o: MutualInformation(bins=10, **o), lambda x: mutual_information(x, 10)),
    (lambda **o: KSGMutualInformation(**o), ksg_mutual_information),
]


def sites(size: int = 90) -> dict[str, torch.Tensor]:
    return {"a": torch.randn(size, 3), "b": 2 * torch.randn(size, 2)}


@pytest.mark.parametrize(("make", "function"), PAIRS)
def test_batches_in_any_order_equal_one_shot(make, function):
    x = sites()
    metric = make()
    for part in torch.randperm(90).split(20):
        metric.update({name: rows[part] for name, rows in x.items()}, positions=part)
    value, expected = metric.compute(), function(x)
    if isinstance(expected, dict):
        assert list(value) == list(expected)
        value, expected = torch.cat(list(value.values())), torch.cat(list(expected.values()))
    assert torch.allclose(value, expected)


@pytest.mark.parametrize(("make", "function"), PAIRS)
def test_memory_is_bounded_and_the_sample_depends_on_positions_only(make, function):
    x = torch.randn(1000, 4)
    values = []
    for order in (torch.arange(1000), torch.randperm(1000)):
        metric = make(capacity=100, seed=3)
        for part in order.split(37):
            metric.update(x[part], positions=part)
            assert sum(map(len, metric.rows)) <= 200
        assert len(metric.activations()) == 100
        values.append(metric.compute())
    assert torch.equal(*values)
    _, kept = reservoir_compact(reservoir_keys(torch.arange(1000), 3), x, 100)
    assert torch.allclose(values[0], function(kept))


def test_reservoir_is_even_and_differs_by_seed():
    keys = reservoir_keys(torch.arange(20_000), seed=5)
    assert len(keys.unique()) == 20_000
    kept = keys.argsort()[:5000]
    counts = torch.histc(kept.float(), 10, 0, 20_000)
    assert float((counts - 500).abs().max()) < 100  # five standard deviations
    other = reservoir_keys(torch.arange(20_000), seed=6).argsort()[:5000]
    overlap = len(set(kept.tolist()) & set(other.tolist()))
    assert 1050 < overlap < 1450  # a quarter of 5,000, as for independent draws


def test_forward_gives_the_batch_value_and_accumulates():
    x = torch.randn(60, 3)
    metric = ActivationEntropy(bins=10)
    assert torch.equal(metric(x[:30]), entropy(x[:30], 10))
    assert torch.equal(metric(x[30:]), entropy(x[30:], 10))
    assert torch.allclose(metric.compute(), entropy(x, 10))
    metric.reset()
    metric.update(x[:30])
    assert torch.equal(metric.compute(), entropy(x[:30], 10))


def test_two_passes_of_histograms_equal_one_shot():
    x = torch.randn(500, 6)
    tracker = ActivationRange(6)
    for part in x.split(64):
        tracker.update(part)
    low, high = share_ranges({"": tracker.compute()}, "global")[""]
    metric = HistogramEntropy(low, high, bins=20)
    for part in x.split(64):
        metric.update(part)
    assert torch.equal(metric.compute(), entropy(x, 20))


def test_pickles_and_moves_to_double():
    metric = KSGMutualInformation()
    metric.update(torch.randn(30, 3))
    assert torch.equal(pickle.loads(pickle.dumps(metric)).compute(), metric.compute())


@pytest.mark.parametrize(
    ("options", "shared"), [({}, True), ({"capacity": 40}, False), ({"capacity": 90}, False), ({"seed": 1}, False)]
)
def test_a_collection_shares_only_equal_samples(options, shared):
    x = torch.randn(200, 3)
    metrics = [KSGMutualInformation(capacity=60), ActivationEntropy(**{"capacity": 60, **options})]
    collection, alone = MetricCollection(metrics), metrics[1].clone()
    for _ in range(2):
        for part in x.split(20):
            collection.update(part)
            alone.update(part)
        assert torch.equal(collection.compute()["ActivationEntropy"], alone.compute())
        assert len(collection.compute_groups) == (1 if shared else 2)
        collection.reset()
        alone.reset()


def test_errors():
    metric = MutualInformation()
    with pytest.raises(RuntimeError, match=r"call update\(\) first"):
        metric.activations()
    metric.update({"fc": torch.randn(4, 3)})
    with pytest.raises(ValueError, match="sites changed"):
        metric.update({"fc": torch.randn(4, 2)})
    with pytest.raises(ValueError, match="positions must have"):
        metric.update({"fc": torch.randn(4, 3)}, positions=torch.arange(3))
    with pytest.raises(ValueError, match="site 'fc'"):
        metric.update({"fc": torch.full((4, 3), float("nan"))})
    with pytest.raises(ValueError, match="capacity"):
        ActivationEntropy(capacity=1)
    with pytest.raises(ValueError, match="low ≤ high"):
        HistogramEntropy(torch.ones(2), torch.zeros(2))
    for by_unit in (HistogramEntropy(torch.zeros(4), torch.ones(4)), ActivationRange(4)):
        with pytest.raises(ValueError, match="must be of 4 units, got 1"):
            by_unit.update(torch.rand(9, 1))


def _one_of_two(rank: int, x: torch.Tensor) -> list[torch.Tensor]:
    mine = torch.arange(len(x))[rank::2] if rank == 0 else torch.arange(len(x))[rank::2][:30]
    values = []
    for make, _ in PAIRS:
        metric = make(capacity=50, seed=1)
        for part in mine.split(16):
            metric.update(x[part], positions=part)
        values.append(metric.compute())
    tracker = ActivationRange(x.shape[1])
    tracker.update(x[mine])
    metric = HistogramEntropy(*tracker.compute(), bins=10)
    metric.update(x[mine])
    values.append(metric.compute())
    return values


def test_two_processes_equal_one(in_two_processes):
    x = torch.randn(100, 4)
    seen = torch.cat([torch.arange(100)[0::2], torch.arange(100)[1::2][:30]]).sort().values
    values, others = in_two_processes(_one_of_two, x)
    assert all(torch.equal(value, other) for value, other in zip(values, others, strict=True))
    for (make, _), value in zip(PAIRS, values[:3], strict=True):
        metric = make(capacity=50, seed=1)
        metric.update(x[seen], positions=seen)
        assert torch.allclose(value, metric.compute())
    assert torch.allclose(values[3], entropy(x[seen], 10, "per_unit"))
