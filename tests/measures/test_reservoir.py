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


def test_memory_is_bounded_and_rows_are_not_copied_at_every_batch():
    reservoir, held, copies = Reservoir(10), [], 0
    rows = torch.randn(1, 3)
    for position in range(200):
        before = reservoir._rows[0] if reservoir._rows else None
        reservoir.add(torch.tensor([position]), rows + position)
        copies += before is not None and reservoir._rows[0] is not before
        held.append(sum(map(len, reservoir._rows)))
    assert max(held) == 19
    assert copies == 19  # each time that ten more came after the first ten


def test_nothing_came():
    with pytest.raises(RuntimeError, match="no rows yet"):
        Reservoir(10).sample()
