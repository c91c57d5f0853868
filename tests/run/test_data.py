"""What a callback of one's own reads of a run."""

import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset, default_collate

from demem.run import RunData, UnevenRows, isolated_rng
from demem.sites import find_sites

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
Y, GROUP = torch.arange(50) % 2, torch.arange(50) % 4


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5), nn.BatchNorm1d(5)), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def _random_state():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def _with_data(work, train=None, held_out=None, module=None, **options):
    """What ``work(data)`` gives when training starts."""
    results = []

    class Reads(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            results.append(work(RunData(trainer, pl_module, max_examples=options.get("max_examples"))))

    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Reads()],
    )
    data = TensorDataset(X, Y, GROUP)
    train = DataLoader(data, 16, shuffle=True) if train is None else train
    trainer.fit(module or Net(), train, DataLoader(data, 16) if held_out is None else held_out)
    return results[0]


def test_rows_are_those_of_a_plain_evaluation_and_the_run_is_left_as_it_was():
    module = Net()
    state = {name: value.clone() for name, value in module.state_dict().items()}

    def read(data):
        before = _random_state()
        rows = data.train.read([*find_sites(module, "body.0"), data.head_input], logits=True)
        assert _random_state() == before
        assert module.body.training
        assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())
        for name, value in module.state_dict().items():
            assert torch.equal(value, state[name])
        return rows

    rows = _with_data(read, module=module)
    plain = Net()
    plain.load_state_dict(state)
    with torch.no_grad():
        plain.eval()
        assert torch.allclose(rows.logits, plain(X), atol=1e-6)
        assert torch.allclose(rows.activations["body.0"], plain.body[0](X), atol=1e-6)
        assert torch.allclose(rows.activations["head:input"], plain.body(X), atol=1e-6)
    assert torch.equal(rows.y, Y)
    assert torch.equal(rows.group, GROUP)
    assert torch.equal(rows.position, torch.arange(50))
    assert "50 examples with groups" in repr(rows)


class _Merging(nn.Linear):
    """Adds a low-rank part to its weight for evaluation, as some LoRA layers do, and takes it off for training."""

    merged = False

    def train(self, mode=True):
        if self.merged is mode:
            self.weight.data += -1.0 if mode else 1.0
            self.merged = not mode
        return super().train(mode)


def test_layers_that_change_with_the_mode_are_told_of_it():
    module = Net()
    module.body[0] = _Merging(6, 5)
    weight = module.body[0].weight.detach().clone()

    def read(data):
        data.train.read([data.head_input])
        assert not module.body[0].merged
        assert module.body.training
        assert torch.allclose(module.body[0].weight, weight, atol=1e-6)
        return True

    assert _with_data(read, module=module)


class _Stream(IterableDataset):
    def __iter__(self):
        return zip(X, Y, GROUP, strict=True)


class _Drawn(torch.utils.data.Sampler):
    """Draws with a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def __iter__(self):
        return iter(torch.randperm(50, generator=self.generator).tolist())

    def __len__(self):
        return 50


@pytest.mark.parametrize("kind", ["stream", "batches by the data set", "sampler"])
def test_generators_of_the_loader_and_its_samplers_are_left_alone(kind):
    data, own = TensorDataset(X, Y, GROUP), torch.Generator().manual_seed(2)
    sampler = _Drawn()
    loader = {
        "stream": lambda: DataLoader(_Stream(), 16, generator=own),
        "batches by the data set": lambda: DataLoader(
            data, None, sampler=BatchSampler(RandomSampler(data, generator=own), 16, False)
        ),
        "sampler": lambda: DataLoader(data, 16, sampler=sampler),
    }[kind]()

    def read(loaded):
        before = own.get_state(), sampler.generator.get_state()
        y = [loaded.held_out.read().y for _ in range(2)]
        assert all(
            torch.equal(*pair) for pair in zip(before, (own.get_state(), sampler.generator.get_state()), strict=True)
        )
        return y

    first, second = _with_data(read, held_out=loader)
    assert torch.equal(first, second)


def test_a_data_set_that_is_read_by_other_keys_than_integers_is_refused_with_the_way_out():
    class Pairs(_Drawn):
        def __iter__(self):
            return ((position, 6) for position in super().__iter__())

    class Cropped(torch.utils.data.Dataset):
        def __getitem__(self, key):
            position, size = key
            return X[position][:size], Y[position]

        def __len__(self):
            return 50

    with pytest.raises(ValueError, match=r"Cropped cannot be read by .* sampler Pairs may draw other keys"):
        _with_data(lambda data: data.train.read(), train=DataLoader(Cropped(), 16, sampler=Pairs()))


def test_validation_data_without_examples_are_none():
    with pytest.raises(ValueError, match="demem needs held-out examples"):
        _with_data(lambda data: data.held_out, held_out=DataLoader(TensorDataset(X[:0], Y[:0]), 16))


def test_single_examples_and_evenly_spaced_ones():
    only = torch.tensor([3, 4, 30, 49])
    rows, few, most = _with_data(
        lambda data: (data.held_out.read(only=only), data.train.read(limit=5), data.train.read()), max_examples=10
    )
    assert torch.equal(rows.position, only)
    assert torch.equal(rows.y, Y[only])
    assert few.position.tolist() == [0, 11, 27, 38, 49]  # evenly spaced among those ten that are read at most
    assert len(most) == 10
    assert bool(torch.isin(few.position, most.position).all())


def test_a_stream_is_read_no_further_than_asked():
    only = torch.tensor([2, 17])

    def read(data):
        Counted.given = 0
        some, first = data.held_out.read(only=only), data.held_out.read(limit=20)
        assert Counted.given == 64
        return some, first

    class Counted(IterableDataset):
        given = 0

        def __iter__(self):
            for row in zip(X, Y, strict=True):
                Counted.given += 1
                yield row

    rows, first = _with_data(read, held_out=DataLoader(Counted(), 16))
    assert torch.equal(rows.position, only)
    assert torch.equal(rows.y, Y[only])
    assert rows.group is None
    assert torch.equal(first.position, torch.arange(32))  # whole batches


@pytest.mark.parametrize("lengths", [[6], [3, 6, 5, 4]], ids=["one", "several"])
def test_sketches_are_of_whole_activations_of_one_shape(lengths):
    class Tokens(Net):
        calls = 0

        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(1, 8)

        def forward(self, x):
            length = lengths[Tokens.calls % len(lengths)]
            Tokens.calls += 1
            return super().forward(self.embed(x[:, :length, None]).mean(1)[:, :6])

    def read(data):
        return data.train.read(find_sites(data.pl_module, "embed"), sketches=True)

    rows = _with_data(read, module=Tokens())
    assert rows.activations["embed"].shape == (50, 8)
    shapes = {name: tuple(values.shape) for name, values in rows.sketches.items()}
    assert shapes == ({"embed": (50, 48)} if len(lengths) == 1 else {})


def test_what_a_function_makes_of_each_batch():
    def total(batch, logits, seen):
        return {"sum": batch.x.sum(1), "norm": seen["head:input"].norm(dim=1)}

    position, rows = _with_data(lambda data: data.train.map(total, [data.head_input]))
    assert torch.equal(position, torch.arange(50))
    assert torch.allclose(rows["sum"], X.sum(1), atol=1e-5)
    assert rows["norm"].shape == (50,)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: [*b, b[0]]], ids=["leaves out", "doubles"])
def test_rows_that_cannot_be_told_apart_by_position_are_refused(change):
    loader = DataLoader(TensorDataset(X, Y), 16, collate_fn=lambda samples: default_collate(change(samples)))
    with pytest.raises(ValueError, match="its collate function or unpack_batch leaves out, doubles or merges rows"):
        _with_data(lambda data: data.train.read(), train=loader)


def test_layers_that_run_twice_are_named():
    class Twice(Net):
        def forward(self, x):
            self.body[0](x)
            return super().forward(x)

    with pytest.raises(UnevenRows, match=r"body\.0 do not give one row per example"):
        _with_data(lambda data: data.train.read(find_sites(data.pl_module, "body.0")), module=Twice())


def test_random_state_comes_back_after_an_exception():
    before = _random_state()

    def breaks():
        with isolated_rng():
            torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        breaks()
    assert _random_state() == before
