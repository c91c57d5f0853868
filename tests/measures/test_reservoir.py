import pytest
import torch

from demem.measures import Reservoir, reservoir_keys


@pytest.mark.parametrize("size", [5, 10, 19, 20, 57])
@pytest.mark.parametrize("batch", [1, 4, 25])
def test_the_rows_with_the_smallest_keys_in_the_order_in_which_they_came(size, batch):
    positions = torch.randperm(1000)[:size]
    rows = torch.randn(size, 3)
    reservoir = Reservoir(10, seed=3)
    for part in torch.arange(size).split(batch):
        reservoir.add(positions[part], rows[part])
    kept = reservoir_keys(positions, 3).argsort()[:10].sort().values
    for _ in range(2):  # asking changes nothing
        found = reservoir.sample()
        assert torch.equal(found[0], positions[kept])
        assert torch.equal(found[1], rows[kept])


def test_rows_are_written_in_place():
    reservoir, rows = Reservoir(10), torch.randn(1, 3)
    reservoir.add(torch.tensor([0]), rows)
    storage, written = reservoir._rows.data_ptr(), 0
    for position in range(1, 200):
        before = reservoir._rows[: min(position, 10)].clone()
        reservoir.add(torch.tensor([position]), rows + position)
        written += int((reservoir._rows[: len(before)] != before).any(1).sum())
        assert len(reservoir._rows) == 10
    assert reservoir._rows.data_ptr() == storage
    assert 0 < written < 60  # a new row enters with a chance of 10 in `position`: 30 in all


def test_nothing_came():
    with pytest.raises(RuntimeError, match="no rows yet"):
        Reservoir(10).sample()
