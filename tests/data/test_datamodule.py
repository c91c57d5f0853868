import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from demem.data import GroupedDataModule, GroupedTensors, as_grouped, collate

N = 40
X = torch.arange(N).float()[:, None]
Y = torch.arange(N) % 2
G = 2 * Y + (torch.arange(N) % 5 == 0).long()


def _module(**options):
    sets = [TensorDataset(X, Y, G) for _ in range(3)]
    return GroupedDataModule(*sets, **{"batch_size": 8, **options})


def test_batches_are_inputs_labels_groups_and_every_example_comes_once():
    data = _module()
    data.setup("fit")
    rows = [(float(a), int(b), int(c)) for x, y, g in data.train_dataloader() for a, b, c in zip(x, y, g, strict=True)]
    assert sorted(rows) == [(float(X[i]), int(Y[i]), int(G[i])) for i in range(N)]
    assert (data.num_classes, data.num_groups) == (2, 4)
    assert data.train_group_counts.tolist() == torch.bincount(G).tolist()
    assert data.train_class_counts.tolist() == [20, 20]


def test_metadata_becomes_groups_by_the_grouper():
    metadata = torch.stack([Y, (G % 2)], 1)

    class Grouper:
        @staticmethod
        def metadata_to_group(m):
            return 2 * m[:, 0] + m[:, 1]

    sets = [TensorDataset(X, Y, metadata)] * 2
    data = GroupedDataModule(*sets, grouper=Grouper(), batch_size=N)
    for x, _, group in data.val_dataloader():
        assert torch.equal(group, G[x[:, 0].long()])
    with pytest.raises(ValueError, match="Pass `grouper`"):
        GroupedDataModule(*sets).setup()


def test_iid_slice_is_held_out_from_training_and_follows_the_seed():
    def parts(seed):
        data = _module(held_out="iid", held_out_share=0.25, seed=seed)
        seen = [
            torch.cat([x[:, 0] for x, _, _ in loader]) for loader in (data.train_dataloader(), data.val_dataloader())
        ]
        return set(seen[0].tolist()), set(seen[1].tolist())

    train, val = parts(0)
    assert len(val) == 10
    assert not train & val
    assert len(train | val) == N
    assert parts(0) == (train, val)
    assert parts(1)[1] != val


@pytest.mark.parametrize(("sampling", "key"), [("class_balanced", Y), ("group_balanced", G)])
def test_balanced_sampling(sampling, key):
    rare = torch.cat([torch.zeros(190), torch.ones(10)]).long()
    sets = [TensorDataset(torch.zeros(200, 1), rare, rare)] * 2
    data = GroupedDataModule(*sets, sampling=sampling, batch_size=50)
    drawn = torch.cat([y for _ in range(5) for _, y, _ in data.train_dataloader()])
    assert 0.4 < float(drawn.float().mean()) < 0.6


def test_example_weights_choose_what_is_drawn():
    data = _module()
    data.example_weights = (X[:, 0] < 3).float()
    drawn = torch.cat([x[:, 0] for x, _, _ in data.train_dataloader()])
    assert set(drawn.tolist()) <= {0.0, 1.0, 2.0}
    assert len(drawn) == N
    data.example_weights = torch.ones(3)
    with pytest.raises(ValueError, match="3 entries for 40"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a training data set"),
        ({"train_dataset": TensorDataset(X, Y, G)}, "no validation data set"),
        ({"train_dataset": TensorDataset(X, Y)}, "yields no groups"),
        ({"train_dataset": TensorDataset(X, Y, G), "num_classes": 1, "held_out": "iid"}, "Labels go up to 1"),
        ({"train_dataset": TensorDataset(X, Y - 1, G), "held_out": "iid"}, "labels must be indices from 0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupedDataModule(**arguments).setup()


@pytest.mark.parametrize("name", ["held_out", "sampling"])
def test_unknown_choices_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        GroupedDataModule(**{name: "nonsense"})


def test_any_map_style_data_set_is_read_once_for_its_labels():
    class Own(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, i):
            return X[i], int(Y[i]), int(G[i])

    grouped = as_grouped(Subset(Own(), [3, 1]))
    assert grouped.y.tolist() == [1, 1]
    assert grouped.group.tolist() == [2, 2]
    assert float(grouped[0][0]) == 3.0


def test_tensor_batches_are_the_same_with_our_collate_and_torchs():
    data = GroupedTensors(X, Y, G).select(torch.tensor([5, 2, 9]))
    ours = next(iter(DataLoader(data, batch_size=3, collate_fn=collate)))
    theirs = next(iter(DataLoader(data, batch_size=3)))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert ours[0][:, 0].tolist() == [5.0, 2.0, 9.0]


def test_views_are_drawn_anew_and_follow_torchs_random_state():
    data = GroupedTensors([X.half(), X.half() + 100], Y, G)
    torch.manual_seed(1)
    first = data.rows(torch.arange(N))[0]
    second = data.rows(torch.arange(N))[0]
    torch.manual_seed(1)
    assert torch.equal(first, data.rows(torch.arange(N))[0])
    assert not torch.equal(first, second)
    assert first.dtype == torch.float32
    assert set((first - X)[:, 0].tolist()) == {0.0, 100.0}
