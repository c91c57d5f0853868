import itertools

import pytest
import torch
from test_remover import MANY, TEST, VAL, Net, _fit, _loaders, _set, _worst
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from demem.callbacks import MemorizationRemover


class WithBatchNorm(Net):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))


def _parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_tunes_every_layer_where_there_are_enough_examples():
    still, tuned = MemorizationRemover(fine_tune=0), MemorizationRemover()
    before, _ = _fit(still, loaders=_loaders(val=MANY))
    after, _ = _fit(tuned, loaders=_loaders(val=MANY))
    groups = torch.bincount(tuned.groups.held_out)
    assert (still.fine_tuned_on, tuned.fine_tuned_on) == (0, 4 * int(groups.min()))
    assert tuned.rounds == still.rounds
    assert not torch.equal(before.net[0].weight, after.net[0].weight)
    assert not torch.equal(before.net[-1].weight, after.net[-1].weight)

    x, y, _ = MANY.tensors
    with torch.no_grad():
        loss = [float(nn.functional.cross_entropy(module.eval()(x), y)) for module in (before, after)]
    assert loss[1] < loss[0]


def test_few_examples_do_not_change_features():
    remover = MemorizationRemover()
    _fit(remover, loaders=_loaders(val=VAL))  # 30 of each group at most: fewer than 64 of a class in a balanced subset
    assert remover.fine_tuned_on == 0


def test_leaves_optimizer_and_batch_norm_as_they_were():
    plain, plain_trainer = _fit(MemorizationRemover(fine_tune=0), WithBatchNorm(), loaders=_loaders(val=MANY))
    tuned, tuned_trainer = _fit(MemorizationRemover(), WithBatchNorm(), loaders=_loaders(val=MANY))
    assert not torch.equal(_parameters(plain), _parameters(tuned))
    for a, b in zip(plain.buffers(), tuned.buffers(), strict=True):
        assert torch.equal(a, b)
    a, b = (trainer.optimizers[0].state_dict() for trainer in (plain_trainer, tuned_trainer))
    assert a["param_groups"] == b["param_groups"]
    for key, state in a["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(b["state"][key][k])) for k, v in state.items())
    assert all(p.grad is None for p in tuned.parameters())


def test_learning_rate_falls_to_zero(monkeypatch):
    seen = []
    step = torch.optim.Adam.step

    def spy(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    monkeypatch.setattr("demem.run.cure.FINE_TUNE_LR", 2e-4)
    remover = MemorizationRemover(fine_tune=3)
    _, trainer = _fit(remover, loaders=_loaders(val=MANY))
    rates = seen[trainer.global_step :]
    assert len(rates) == 3 * -(-remover.fine_tuned_on // 32)
    assert rates[0] == pytest.approx(2e-4)
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 2e-5


def test_masked_units_stay_masked(monkeypatch):
    monkeypatch.setattr("demem.callbacks.remover.choose_round", lambda rounds, *_, **__: len(rounds) - 1)
    remover = MemorizationRemover(shares=(0.5,))
    module, _ = _fit(remover, loaders=_loaders(val=MANY))
    assert remover.fine_tuned_on > 0
    assert int((module.net[-1].weight == 0).all(0).sum()) == 8
    bare = Net()
    bare.load_state_dict({k: v for k, v in module.state_dict().items() if k in bare.state_dict()})
    x = TEST.tensors[0]
    assert torch.allclose(bare.eval()(x), module.eval()(x), atol=1e-6)


def test_a_loss_that_is_not_finite_puts_the_weights_back(monkeypatch):
    plain, _ = _fit(MemorizationRemover(fine_tune=0), loaders=_loaders(val=MANY))
    losses = itertools.chain([1.0] * 3, itertools.repeat(float("nan")))
    cross_entropy = nn.functional.cross_entropy

    class Functional:
        @staticmethod
        def cross_entropy(logits, y):
            return cross_entropy(logits, y) * next(losses)

    monkeypatch.setattr("demem.removal.fine_tuning.F", Functional)
    remover = MemorizationRemover()
    with pytest.warns(UserWarning, match="to nan, so the weights are those before it"):
        module, _ = _fit(remover, loaders=_loaders(val=MANY))
    assert torch.equal(_parameters(plain), _parameters(module))
    assert remover.fine_tuned_on == 0


def test_weights_that_are_not_finite_are_put_back(monkeypatch):
    loaders = _loaders(val=MANY, batch_size=512)
    plain, _ = _fit(MemorizationRemover(fine_tune=0), loaders=loaders)
    cross_entropy = nn.functional.cross_entropy

    class Functional:
        @staticmethod
        def cross_entropy(logits, y):  # finite, but its gradient is not
            return cross_entropy(logits, y) + (0 * logits.sum()).sqrt()

    monkeypatch.setattr("demem.removal.fine_tuning.F", Functional)
    remover = MemorizationRemover(fine_tune=1)  # one step
    with pytest.warns(UserWarning, match="to nan, so the weights are those before it"):
        module, _ = _fit(remover, loaders=loaders)
    assert torch.equal(_parameters(plain), _parameters(module))
    assert remover.fine_tuned_on == 0


def test_steps_that_are_too_large_are_taken_back(monkeypatch):
    loaders = _loaders(val=MANY)
    plain, _ = _fit(MemorizationRemover(fine_tune=0), loaders=loaders)
    monkeypatch.setattr("demem.run.cure.FINE_TUNE_LR", 3.0)
    with pytest.warns(UserWarning, match="took their loss from .*, so the weights are those before it"):
        module, _ = _fit(MemorizationRemover(fine_tune=1), loaders=loaders)
    assert torch.equal(_parameters(plain), _parameters(module))


def test_a_module_that_hides_its_optimizer_is_tuned():
    class Manual(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.own = torch.optim.Adam(self.parameters(), 3e-3)

        def configure_optimizers(self):
            return None

        def training_step(self, batch, batch_idx):
            self.own.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.own.step()

    remover = MemorizationRemover()
    _fit(remover, Manual(), loaders=_loaders(val=MANY))
    assert remover.fine_tuned_on > 0


def test_iterable_held_out_data_is_not_tuned_on():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([MANY[i] for i in range(len(MANY))])

    remover = MemorizationRemover()
    loaders = {**_loaders(), "val_dataloaders": DataLoader(Stream(), batch_size=32)}
    _fit(remover, loaders=loaders)
    assert remover.rounds
    assert remover.fine_tuned_on == 0


def test_helps_where_the_features_lack_the_class(monkeypatch):
    # The class is so faint beside the shortcut that training hardly gives features for it: a refit finds none.
    train = _set(600, 0.98, 0)
    monkeypatch.setattr("demem.run.cure.FINE_TUNE_LR", 1e-3)
    worst = []
    for epochs in (0, 30):
        module, _ = _fit(MemorizationRemover(fine_tune=epochs), epochs=2, loaders=_loaders(train, MANY))
        worst.append(_worst(module))
    assert worst[1] > worst[0]
