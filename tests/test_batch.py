"""Batches in the forms that users yield."""

import pytest
import torch

from demem.batch import unpack_batch

X, Y, G = torch.randn(4, 3), torch.tensor([0, 1, 1, 0]), torch.tensor([0, 3, 2, 1])


@pytest.mark.parametrize("form", [lambda g: (X, Y[:, None], g), lambda g: {"x": X, "y": Y, "group": g}])
def test_a_column_of_groups_is_read(form):
    batch = unpack_batch(form(G[:, None]))
    assert batch.y.tolist() == Y.tolist()
    assert batch.group.tolist() == G.tolist()


def test_metadata_needs_a_grouper():
    metadata = torch.stack([G, Y], 1)
    assert unpack_batch((X, Y, metadata)).group is None
    assert unpack_batch((X, Y, G[:, None].float())).group is None
    assert unpack_batch((X, Y, metadata), grouper=lambda m: m[:, 0]).group.tolist() == G.tolist()
    assert unpack_batch((X, Y, G[:, None]), grouper=lambda m: m[:, 0] + 1).group.tolist() == (G + 1).tolist()
