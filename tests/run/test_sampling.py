import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from demem.run import ReweightedSampler, draws_evenly
from demem.run.loaders import evenly_spaced
from demem.run.sampling import draw


def _drawn(sampler):
    return torch.tensor(list(sampler))


def test_examples_are_drawn_in_proportion_to_their_weights():
    drawn = _drawn(ReweightedSampler(torch.tensor([1.0, 3.0, 0.0]), 40_000))
    shares = torch.bincount(drawn, minlength=3) / len(drawn)
    assert torch.allclose(shares, torch.tensor([0.25, 0.75, 0.0]), atol=0.01)


def test_every_epoch_and_every_seed_has_a_draw_of_its_own():
    weights = torch.ones(50)
    sampler, other = ReweightedSampler(weights, 100), ReweightedSampler(weights, 100, seed=1)
    first, again = _drawn(sampler), _drawn(sampler)
    sampler.set_epoch(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, _drawn(sampler))
    assert not torch.equal(first, _drawn(other))


def test_processes_deal_out_one_draw():
    weights = torch.rand(20)
    whole = _drawn(ReweightedSampler(weights, 60))
    shares = [_drawn(ReweightedSampler(weights, 30, rank, 2)) for rank in range(2)]
    assert torch.equal(whole, torch.stack(shares, 1).flatten())


def test_evenly_spaced_positions_are_distinct_whatever_the_default_dtype():
    default = torch.get_default_dtype()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            chosen = evenly_spaced(torch.arange(50_001), 20_000)
        finally:
            torch.set_default_dtype(default)
        assert chosen[[0, -1]].tolist() == [0, 50_000]
        assert len(chosen.unique()) == 20_000
        assert int((chosen[1:] - chosen[:-1]).max()) == 3
    assert evenly_spaced(torch.arange(5), 1).tolist() == [0]
    assert evenly_spaced(torch.arange(5), 9).tolist() == [0, 1, 2, 3, 4]


def test_which_samplers_draw_evenly():
    data = TensorDataset(torch.arange(10))
    assert draws_evenly(DataLoader(data, shuffle=True))
    assert not draws_evenly(DataLoader(data, sampler=RandomSampler(data, replacement=True)))
    assert not draws_evenly(DataLoader(data, sampler=ReweightedSampler(torch.ones(10), 10)))


def test_more_positions_than_multinomial_takes(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    drawn = draw(torch.cat([torch.zeros(2**24), torch.tensor([1.0, 3.0, 0.0])]).double(), 4_000, generator) - 2**24
    assert torch.allclose(torch.bincount(drawn, minlength=3) / 4_000, torch.tensor([0.25, 0.75, 0.0]), atol=0.03)
    monkeypatch.setattr("demem.run.sampling.MULTINOMIAL_LIMIT", 2)
    shares = torch.bincount(_drawn(ReweightedSampler(torch.tensor([0.0, 1.0, 3.0, 0.0]), 40_000)), minlength=4) / 40_000
    assert torch.allclose(shares, torch.tensor([0.0, 0.25, 0.75, 0.0]), atol=0.01)
