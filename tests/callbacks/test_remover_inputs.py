"""What the remover is given: loaders and samplers of all kinds, heads, weights from elsewhere."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from test_remover import MANY, TRAIN, VAL, Net, _fit, _loaders, _Save, _set, _worst, masks  # noqa: F401
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from demem.callbacks import MemorizationRemover


class _Drawn(pl.Callback):
    """How many examples of each group every epoch drew."""

    def __init__(self):
        self.epochs = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if len(self.epochs) <= trainer.current_epoch:
            self.epochs += [torch.zeros(4)] * (1 + trainer.current_epoch - len(self.epochs))
        self.epochs[trainer.current_epoch] = self.epochs[-1] + torch.bincount(batch[2], minlength=4)


@pytest.mark.slow
def test_workers_that_started_before_do_not_keep_the_first_epoch_unbalanced():
    with_workers, without = _Drawn(), _Drawn()
    _fit(MemorizationRemover(), epochs=2, callbacks=[without])
    _fit(MemorizationRemover(), epochs=2, callbacks=[with_workers], loaders=_loaders(num_workers=1))
    assert torch.equal(torch.stack(with_workers.epochs), torch.stack(without.epochs))


def test_resumed_within_an_epoch_the_rest_is_rebalanced(tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 9:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    _fit(MemorizationRemover(), epochs=2, callbacks=[Save()])
    drawn = _Drawn()
    _fit(MemorizationRemover(), epochs=2, callbacks=[drawn], ckpt_path=tmp_path / "within.ckpt")
    groups = drawn.epochs[-1]
    assert groups.sum() < len(TRAIN)
    assert groups.max() < 3 * groups.min()  # 19 : 1 as they are


@pytest.mark.parametrize("kind", ["subset", "list", "batches"])
def test_held_out_examples_are_those_that_the_sampler_draws_from(kind):
    everything = TensorDataset(*(torch.cat(pair) for pair in zip(TRAIN.tensors, VAL.tensors, strict=True)))
    part = list(range(len(TRAIN), len(everything)))
    options = {
        "subset": {"sampler": SubsetRandomSampler(part), "batch_size": 32},
        "list": {"sampler": part, "batch_size": 32},
        "batches": {"batch_sampler": BatchSampler(SubsetRandomSampler(part), 32, False)},
    }[kind]
    loaders = {"train_dataloaders": DataLoader(TRAIN, 32, shuffle=True)}
    remover, expected = MemorizationRemover(), MemorizationRemover()
    _fit(remover, epochs=1, loaders=loaders | {"val_dataloaders": DataLoader(everything, **options)})
    _fit(expected, epochs=1)
    assert torch.equal(remover.groups.held_out, expected.groups.held_out)


def test_data_sets_that_do_not_say_how_long_they_are():
    class Endless(Dataset):
        def __getitem__(self, position):
            return TRAIN[position]

    sampler, remover = SubsetRandomSampler(range(len(TRAIN))), MemorizationRemover(use_groups=True)
    with pytest.warns(UserWarning, match="does not rebalance: .* a sampler of its own"):
        _fit(remover, epochs=1, loaders=_loaders() | {"train_dataloaders": DataLoader(Endless(), 32, sampler=sampler)})
    assert remover.rounds


def test_limited_batches_of_sorted_data_hold_every_class():
    order = TRAIN.tensors[1].argsort(stable=True)
    data = TensorDataset(*(t[order] for t in TRAIN.tensors))
    remover = MemorizationRemover()
    _fit(remover, epochs=1, loaders=_loaders(data), limit_train_batches=0.5)
    groups = torch.tensor(remover.groups.sizes).view(2, 2).sum(1)
    assert groups.min() > 0.4 * groups.sum()


class _Stream(IterableDataset):
    def __init__(self, endless=False, shuffled=None):
        self.endless, self.shuffled = endless, shuffled

    def __iter__(self):
        while True:
            order = self.shuffled(len(TRAIN)) if self.shuffled else torch.arange(len(TRAIN))
            yield from (TRAIN[i] for i in order.tolist())
            if not self.endless:
                return


def _stream(**options):
    data = _Stream(**{k: options.pop(k) for k in ("endless", "shuffled") if k in options})
    return _loaders() | {"train_dataloaders": DataLoader(data, 32, **options)}


def test_an_endless_stream_is_read_up_to_max_examples():
    remover = MemorizationRemover(max_examples=100, rebalance=False)
    _, trainer = _fit(remover, epochs=-1, loaders=_stream(endless=True), max_steps=12)
    assert trainer.global_step == 12
    assert 100 <= sum(remover.groups.sizes) < 100 + 32


@pytest.mark.slow
def test_a_stream_with_persistent_workers_keeps_its_batches():
    drawn = _Drawn()
    loaders = _stream(num_workers=1, persistent_workers=True)
    _fit(MemorizationRemover(rebalance=False), epochs=2, callbacks=[drawn], loaders=loaders)
    assert [int(groups.sum()) for groups in drawn.epochs] == [len(TRAIN)] * 2


def test_a_stream_that_shuffles():
    remover = MemorizationRemover(rebalance=False)
    _fit(remover, epochs=3, loaders=_stream(shuffled=torch.randperm))
    assert remover.rounds
    own, steps = torch.Generator().manual_seed(0), _Drawn()
    with pytest.raises(ValueError, match="in the same order each time"):
        _fit(remover, epochs=2, loaders=_stream(shuffled=lambda n: torch.randperm(n, generator=own)), callbacks=[steps])
    assert not steps.epochs


def test_what_fails_after_training_costs_no_more_than_the_removal():
    class Disk(TensorDataset):
        broken = False

        def __getitem__(self, i):
            if self.broken:
                raise OSError("Stale file handle")
            return super().__getitem__(i)

    class Breaks(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            Disk.broken = trainer.current_epoch == 1

        def on_validation_start(self, *_):
            Disk.broken = False

    class Refitted(MemorizationRemover):  # breaks after the head was written
        def choose(self, rounds, held_out, groups):
            Disk.broken = True
            return 1

    for remover, val in ((MemorizationRemover(rebalance=False), VAL), (Refitted(rebalance=False), MANY)):
        with pytest.warns(UserWarning, match="as it was trained, because OSError: Stale file handle"):
            module, _ = _fit(remover, epochs=2, callbacks=[Breaks()], loaders=_loaders(val=Disk(*val.tensors)))
        trained, _ = _fit(epochs=2)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), trained.parameters(), strict=True))
        assert not remover.rounds


def test_a_head_that_another_callback_prunes_is_refused():
    module = Net()
    pruning = pl.callbacks.ModelPruning("l1_unstructured", amount=0.1)
    with pytest.raises(ValueError, match=r"ModelPruning prunes the head 'net\.4'"):
        _fit(MemorizationRemover(), module, epochs=1, callbacks=[pruning])
    others = [(module.net[0], "weight"), (module.net[2], "weight")]
    pruning = pl.callbacks.ModelPruning("l1_unstructured", parameters_to_prune=others, amount=0.1)
    remover = MemorizationRemover()
    _fit(remover, module, epochs=2, callbacks=[pruning])
    assert remover.rounds


@pytest.mark.parametrize("form", ["compiled", "two names"])
def test_a_head_of_two_names_is_not_tied(form):
    module = Net()
    if form == "compiled":
        module.net = torch.compile(module.net, backend="eager")
    else:
        module.classifier = module.net[4]
    remover = MemorizationRemover()
    _fit(remover, module, epochs=1)
    assert remover.rounds


def test_a_head_that_another_branch_joins_in_training_is_left_as_trained():
    class Residual(Net):
        def __init__(self):
            super().__init__()
            self.skip = nn.Linear(12, 2)
            nn.init.zeros_(self.skip.weight), nn.init.zeros_(self.skip.bias)

        def forward(self, x):
            return self.net(x) + self.skip(x)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.05)

    remover = MemorizationRemover(head="net.4", use_groups=True)
    with pytest.warns(UserWarning, match="no longer does by itself"):
        _fit(remover, Residual(), epochs=2)
    assert not remover.rounds


def test_a_head_with_tied_weights_is_refused():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.queries = nn.Embedding(2, 16)
            self.net[4].weight = self.queries.weight

    with pytest.raises(ValueError, match=r"shares its parameters with queries\.weight"):
        _fit(MemorizationRemover(head="net.4"), Tied(), epochs=1)


def test_augmentation_on_the_device_leaves_held_out_examples_alone():
    class Augmented(Net):
        where = ()

        def on_after_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.training:
                self.where += (torch.is_grad_enabled(),)
            return batch

    module, _ = _fit(MemorizationRemover(), Augmented(), epochs=2, loaders=_loaders(val=MANY))
    assert len(module.where) == 2 * 8  # the batches of training, and no others


class Tokens(Net):
    """The encoder reads (tokens, batch, channels)."""

    def __init__(self, encoder):
        super().__init__()
        self.net, self.embed, self.head, self.encoder = None, nn.Linear(12, 16), nn.Linear(16, 2), encoder

    def forward(self, x):
        return self.head(self.encoder(self.embed(x).expand(5, -1, -1)).mean(0))


def test_layers_that_do_not_give_a_row_for_each_example():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 16))])

        def forward(self, x):
            return self.layers[0](x)

    with pytest.raises(ValueError, match="do not give one row per example"):
        _fit(MemorizationRemover(head="head"), Tokens(Blocks()), epochs=1)
    remover = MemorizationRemover(head="head", probe_layers="embed")
    _fit(remover, Tokens(Blocks()), epochs=1)
    assert float((remover.groups.index == TRAIN.tensors[2]).float().mean()) > 0.9


def test_a_transformer_with_the_sequence_first_is_probed():
    remover = MemorizationRemover(head="head")
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0), 1, enable_nested_tensor=False)
    _fit(remover, Tokens(encoder), epochs=1)
    assert remover.groups.site.startswith("encoder.layers.0")
    assert float((remover.groups.index == TRAIN.tensors[2]).float().mean()) > 0.9


def test_one_example_of_a_class_is_refused_before_training():
    keep = torch.cat([(VAL.tensors[1] == 0).nonzero()[:, 0], (VAL.tensors[1] == 1).nonzero()[:1, 0]])
    with pytest.raises(ValueError, match=r"Of class \[1\] there are fewer than two"):
        _fit(MemorizationRemover(), loaders=_loaders(val=TensorDataset(*(t[keep] for t in VAL.tensors))))


def test_groups_that_tell_the_attribute_only_are_crossed_with_the_class():
    def attribute(data):
        x, y, group = data.tensors
        return TensorDataset(x, y, group % 2)

    crossed, expected = MemorizationRemover(use_groups=True), MemorizationRemover(use_groups=True)
    _fit(crossed, epochs=1, loaders=_loaders(attribute(TRAIN), attribute(VAL)))
    _fit(expected, epochs=1)
    assert torch.equal(crossed.groups.held_out, expected.groups.held_out)
    assert torch.equal(crossed.groups.index, expected.groups.index)


class _Headed(Net):
    def __init__(self, head):
        super().__init__()
        self.net[4] = head


class _Lora(nn.Linear):
    """A plain head until it is trained."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.ones(1, inputs)), nn.Parameter(torch.zeros(outputs, 1))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class _Cosine(nn.Linear):
    def forward(self, x):
        return 5 * F.linear(F.normalize(x), F.normalize(self.weight))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (nn.utils.parametrizations.weight_norm(nn.Linear(16, 2)), "computed from others"),
        (_Cosine(16, 2), "is not weight · x"),
        (_Lora(16, 2), "has the parameters down, up beside weight and bias"),
    ],
    ids=["weight norm", "cosine", "LoRA"],
)
def test_heads_that_cannot_be_refitted(head, reason):
    with pytest.raises(ValueError, match=reason):
        _fit(MemorizationRemover(), _Headed(head))


def test_a_new_head_of_zeros_is_told_from_another_layer():
    class Auxiliary(Net):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.net[4].weight), nn.init.zeros_(self.net[4].bias)
            self.aux = nn.Linear(16, 2)

        def forward(self, x):
            z = self.net[:4](x)
            self.aux(z)
            return self.net[4](z)

    with pytest.raises(ValueError, match=r"Pass head='net\.4', which does"):
        _fit(MemorizationRemover(), Auxiliary())
    _fit(MemorizationRemover(head="net.4"), Auxiliary(), epochs=1)


def test_weights_from_elsewhere_are_not_masked(masks):  # noqa: F811
    module, _ = _fit(MemorizationRemover(shares=(0.5,)), epochs=1)
    other = Net(seed=3)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module.eval()(VAL.tensors[0]), other.eval()(VAL.tensors[0]))


def test_resumed_to_train_longer_the_checkpoint_still_needs_no_demem(masks, tmp_path, monkeypatch):  # noqa: F811
    _, trainer = _fit(MemorizationRemover(shares=(0.5,)), epochs=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    monkeypatch.setattr("demem.callbacks.remover.choose_round", lambda *_, **__: 0)  # as trained, under the first mask
    module, _ = _fit(MemorizationRemover(shares=(0.5,)), epochs=3, ckpt_path=tmp_path / "end.ckpt")
    plain = Net()
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.allclose(plain.eval()(VAL.tensors[0]), module.eval()(VAL.tensors[0]), atol=1e-6)


def test_weights_put_back_when_training_ends_on_another_device():
    """Lightning takes the module to the CPU before ``on_fit_end``."""

    class Away(Net):
        away = False

        def cpu(self):
            self.away = True
            return super().cpu()

        def to(self, *args, **kwargs):
            self.away = False
            return super().to(*args, **kwargs)

        def forward(self, x):
            if self.away:
                raise RuntimeError("Expected all tensors to be on the same device.")
            return super().forward(x)

    class Restore(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}

        def on_train_end(self, trainer, pl_module):
            pl_module.load_state_dict(self.state)

    remover = MemorizationRemover()
    with pytest.warns(UserWarning, match="removed anew"):
        module, _ = _fit(remover, Away(), epochs=2, callbacks=[Restore()])
    assert remover._written is None
    assert _worst(module.to("cpu")) > 0.5


def test_weights_that_are_not_trained_are_not_fine_tuned():
    class HeadOnly(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.net[4].parameters(), 3e-3)

    remover = MemorizationRemover()
    module, _ = _fit(remover, HeadOnly(), epochs=2, loaders=_loaders(_set(240, 0.9, 0), MANY))
    assert remover.fine_tuned_on > 0
    assert torch.equal(module.net[0].weight, Net().net[0].weight)


def test_many_held_out_examples_are_capped_and_the_small_groups_kept(monkeypatch):
    from demem.run import cure

    seen = []

    class Watching(MemorizationRemover):
        def choose(self, rounds, held_out, groups):
            seen.append((torch.bincount(held_out.group).tolist(), torch.bincount(groups.held_out).tolist()))
            return super().choose(rounds, held_out, groups)

    monkeypatch.setattr(cure, "HELD_OUT", 50)
    _fit(Watching(shares=(0.5,)), epochs=1)
    assert seen
    for kept, all_of_them in seen:
        quota = max(kept)
        assert sum(kept) <= 50 < sum(all_of_them)
        assert kept == [min(n, quota) for n in all_of_them]
