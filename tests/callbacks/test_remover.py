import copy
import warnings
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import demem.run
from demem.callbacks import MemorizationRemover, WorstGroupMonitor
from demem.groups import Groups, closer_look, find_shortcut
from demem.removal import ATYPICAL_WEIGHTS, RoundRecord, choose_round, worst_group
from demem.run import Split

QUIET = dict(
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
# The work around a fit: workers for a tiny set, and one process's view of metrics.
warnings.filterwarnings("ignore", ".*does not have many workers.*")


def _set(n, share, seed, classes=2):
    """Class in faint, attribute in plain sight."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    a = torch.where(torch.rand(n, generator=generator) < share, y, torch.randint(0, classes, (n,), generator=generator))
    one_hot = nn.functional.one_hot
    x = torch.cat([one_hot(y, classes) * 1.0, one_hot(a, classes) * 3.0, torch.zeros(n, 12 - 2 * classes)], 1)
    return TensorDataset(x + 0.5 * torch.randn(n, 12, generator=generator), y, classes * y + a)


TRAIN, VAL, TEST = _set(240, 0.9, 0), _set(120, 0.0, 1), _set(400, 0.0, 2)
MANY = _set(400, 0.0, 3)  # enough held-out examples to fine-tune on


def _loaders(train=TRAIN, val=VAL, **options):
    options = {"batch_size": 32} | options
    return dict(
        train_dataloaders=DataLoader(train, shuffle=True, **options), val_dataloaders=DataLoader(val, **options)
    )


class Net(pl.LightningModule):
    def __init__(self, outputs=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, outputs))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        if logits.shape[1] == 1:
            return nn.functional.binary_cross_entropy_with_logits(logits[:, 0], batch[1].float())
        return nn.functional.cross_entropy(logits, batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 3e-3)


def _fit(remover=None, module=None, epochs=4, library=pl, callbacks=(), loaders=None, ckpt_path=None, **options):
    pl.seed_everything(0, verbose=False)
    module = module or Net()
    callbacks = [*([remover] if remover else []), *callbacks]
    trainer = library.Trainer(**QUIET | {"max_epochs": epochs, "callbacks": callbacks} | options)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*does not have many workers.*|.*number of training batches.*|.*tensorboardX.*"
        )
        trainer.fit(module, **(loaders or _loaders()), ckpt_path=ckpt_path)
    return module, trainer


class NeverSure(MemorizationRemover):
    """Takes the mistakes of every probe for those of hard examples."""

    def detect(self, features, y, num_classes):
        return find_shortcut(features, y, num_classes, min_sure=1)


class KeepsTheBest(MemorizationRemover):
    def choose(self, rounds, held_out, groups):
        return choose_round(rounds, held_out, groups.typical, tolerance=0)


def _verdicts(monkeypatch, *kinds):
    """What the verdicts on the probes' mistakes say, one after the other."""
    kinds, asked = iter(kinds), []

    def judged(*args, trained):
        asked.append(trained)
        return replace(closer_look(*args, trained=trained), kind=next(kinds), surprise=1.0)

    monkeypatch.setattr("demem.run.detection.closer_look", judged)
    return asked


def _looks_twice(monkeypatch):
    """The first probe finds no shortcut, and the second does."""
    monkeypatch.setattr("demem.groups.inferred.FEW_ERRORS", 1.0)
    monkeypatch.setattr(Groups, "open", property(lambda groups: not groups.shortcut))
    return _verdicts(monkeypatch, "label noise", "hard examples", "hard examples")


def _same_groups(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def _worst(module, dataset=TEST):
    x, y, g = dataset.tensors
    module.eval()
    with torch.no_grad():
        right = (module(x).argmax(1) == y).float()
    return min(float(right[g == k].mean()) for k in g.unique())


def test_lifts_the_worst_group_and_finds_the_attribute():
    plain, _ = _fit()
    remover = KeepsTheBest()
    module, trainer = _fit(remover)
    assert _worst(module) > _worst(plain) + 0.1
    assert sum(r.chosen for r in remover.rounds) == 1
    weights = len(ATYPICAL_WEIGHTS)
    assert [r.share for r in remover.rounds] == [0.0, *[0.0] * weights, *remover.shares]
    assert [r.weight for r in remover.rounds[: 1 + weights]] == [1, *ATYPICAL_WEIGHTS]
    assert [r.refitted for r in remover.rounds] == [False, *[True] * (weights + len(remover.shares))]
    # Inferred groups of the training set against the planted ones.
    assert float((remover.groups.index == TRAIN.tensors[2]).float().mean()) > 0.9
    assert sum(remover.groups.sizes) == len(TRAIN)
    assert "a shortcut" in repr(remover.groups)
    chosen = next(r for r in remover.rounds if r.chosen)
    assert chosen.worst == max(r.worst for r in remover.rounds if r.refitted)
    assert float(trainer.callback_metrics["removal/masked_share"]) == pytest.approx(chosen.share)


@pytest.fixture
def masks(monkeypatch):
    """The last round stays, whatever it is worth: what follows from a mask can be seen."""
    monkeypatch.setattr("demem.callbacks.remover.choose_round", lambda rounds, *_, **__: len(rounds) - 1)


def test_last_validation_sees_the_cured_network_and_nothing_of_demem_is_in_it(masks):
    remover, monitor = MemorizationRemover(shares=(0.5,)), WorstGroupMonitor()
    module, trainer = _fit(remover, callbacks=[monitor])
    assert float(trainer.callback_metrics["val/worst_group_acc"]) == pytest.approx(_worst(module, VAL))
    exported = remover.export(module)
    for network in (module, exported):
        assert not any(
            m._forward_pre_hooks or m._forward_hooks or m._load_state_dict_post_hooks for m in network.modules()
        )
        assert [name for name, _ in network.named_buffers()] == []
        assert list(network.state_dict()) == list(Net().state_dict())
    x = TEST.tensors[0]
    assert torch.equal(exported.eval()(x), module.eval()(x))


def test_leaves_the_network_as_trained_where_the_refit_has_nothing_to_go_by(monkeypatch):
    class TrainsOnly(MemorizationRemover):
        def _remove(self, data):
            self.rounds = [RoundRecord(False, 0.0, _worst_inferred(self, data.pl_module), True)]
            self._removed_at_step = data.trainer.global_step

    def _worst_inferred(remover, module):
        x, y, _ = VAL.tensors
        with torch.no_grad():
            return worst_group(module(x), y, remover.groups.held_out)[0]

    expected, _ = _fit(only := TrainsOnly())
    monkeypatch.setattr("demem.callbacks.remover.choose_round", lambda *_, **__: 0)
    remover = MemorizationRemover()
    module, trainer = _fit(remover)
    for ours, theirs in zip(module.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [r.chosen for r in remover.rounds] == [True, *[False] * (len(ATYPICAL_WEIGHTS) + len(remover.shares))]
    assert remover.rounds[0].worst == pytest.approx(only.rounds[0].worst)
    assert not remover.rounds[0].refitted
    assert float(trainer.callback_metrics["removal/masked_share"]) == 0
    assert remover.fine_tuned_on == 0
    assert remover.rounds[0].why == "choose() says so"  # another one than demem's
    assert [r.why for r in remover.rounds[1:]] == [""] * (len(remover.rounds) - 1)


def test_without_a_shortcut_training_is_left_alone(monkeypatch):
    plain, _ = _fit()
    monkeypatch.setattr("demem.removal.rounds.clearly_better", lambda *_: False)
    remover = NeverSure()
    module, _ = _fit(remover)
    assert not remover.groups.shortcut
    assert remover.groups.sizes == [*torch.bincount(3 * TRAIN.tensors[1], minlength=4).tolist()]
    assert torch.equal(remover.groups.held_out, 3 * VAL.tensors[1])
    assert not remover.rounds[0].refitted
    assert remover.rounds[0].chosen
    assert "as it was trained: there is no shortcut to go by, and a refit is not clearly better" in remover.summary()
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_a_shortcut_a_clearly_better_refit_is_kept():
    """The validation set is balanced, so a head refitted on it is better than one that follows the attribute."""
    plain, _ = _fit()
    remover = NeverSure()
    module, _ = _fit(remover)
    assert not remover.rounds[0].chosen
    assert _worst(module) > _worst(plain) + 0.1


def test_a_refit_that_would_follow_the_probe_is_not_kept_without_a_shortcut(monkeypatch):
    """The network has learned nothing, and in the slice the attribute goes with the class: any head is better."""

    class Untrained(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.0)

    _verdicts(monkeypatch, "label noise")
    remover = MemorizationRemover()
    _fit(remover, Untrained(), epochs=1, loaders=_loaders(TRAIN, _set(200, 0.9, 5)))
    kept = next(r for r in remover.rounds if r.chosen)
    assert not remover.groups.shortcut
    assert max(r.average for r in remover.rounds) > kept.average + 0.2
    assert not kept.refitted
    assert "a refit would follow the early probe" in remover.summary()


def test_wrong_labels_are_no_shortcut_and_leave_the_network_as_it_is_trained():
    """The class is in plain sight, and a tenth of the labels are wrong."""

    def noisy(n, seed):
        generator = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % 2
        x = torch.cat([3.0 * nn.functional.one_hot(y, 2), torch.zeros(n, 10)], 1)
        wrong = torch.rand(n, generator=generator) < 0.1
        labels = torch.where(wrong, 1 - y, y)
        return TensorDataset(x + 0.5 * torch.randn(n, 12, generator=generator), labels, labels)

    loaders = _loaders(noisy(600, 0), noisy(200, 1))
    plain, _ = _fit(loaders=loaders)
    remover = MemorizationRemover()
    module, _ = _fit(remover, loaders=loaders)
    assert find_shortcut({"": loaders["train_dataloaders"].dataset.tensors[0]}, noisy(600, 0).tensors[1], 2).found
    assert remover.groups.kind == "label noise"
    assert not remover.groups.shortcut
    assert not remover.rounds[0].refitted
    assert remover.rounds[0].chosen
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("limit", [20_000, 1_000])
def test_wrong_labels_beside_a_shortcut_count_as_typical(monkeypatch, limit):
    """A tenth of the labels are wrong: twice as many as there are of the minority."""

    def noisy(n, seed):  # the class is that of two bits together, which no linear probe reads
        g = torch.Generator().manual_seed(seed)
        bits, same = torch.randint(2, (n, 2), generator=g), torch.rand(n, generator=g) < 0.95
        y = bits.sum(1) % 2
        a = torch.where(same, y, 1 - y)
        x = torch.cat([2.0 * bits - 1, 3.0 * nn.functional.one_hot(a, 2), torch.zeros(n, 8)], 1)
        wrong = torch.rand(n, generator=g) < 0.1
        rows = x + 0.3 * torch.randn(n, 12, generator=g), torch.where(wrong, 1 - y, y), 2 * y + a
        return TensorDataset(*rows), wrong

    (train, wrong), (val, val_wrong) = noisy(1500, 1), noisy(600, 2)
    monkeypatch.setattr("demem.run.detection.CHOSEN_ON", limit)
    remover = MemorizationRemover()
    _fit(remover, epochs=1, loaders=_loaders(train, val))
    groups = remover.groups
    assert groups.shortcut
    for rows, mislabelled, index in ((train, wrong, groups.index), (val, val_wrong, groups.held_out)):
        _, y, true = rows.tensors
        atypical, minority = index != 3 * y, (true % 2 != true // 2) & ~mislabelled
        assert float(mislabelled[atypical].float().mean()) < 0.25  # six in ten of the probe's mistakes
        if len(y) <= limit:
            assert float(atypical[minority].float().mean()) > 0.75
    assert int((groups.index != 3 * train.tensors[1]).sum()) <= limit * 0.1


def test_groups_given_are_used_without_a_shortcut():
    remover = NeverSure(use_groups=True)
    _fit(remover)
    assert not remover.groups.shortcut
    assert torch.equal(remover.groups.held_out, VAL.tensors[2])
    assert len([n for n in remover.groups.sizes if n]) == 4


def _parity(n, share, seed):
    """Class in faint; the attribute is the parity of three bits, which a network must learn before a probe can read
    it."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    a = torch.where(torch.rand(n, generator=generator) < share, y, torch.randint(0, 2, (n,), generator=generator))
    bits = torch.randint(0, 2, (n, 2), generator=generator)
    bits = torch.cat([bits, (bits.sum(1) + a)[:, None] % 2], 1)
    x = 0.3 * torch.randn(n, 12, generator=generator)
    x[:, :3] += 4.0 * bits - 2
    x[:, 3] += 0.5 * y - 0.25
    return TensorDataset(x, y, 2 * y + a)


class _Fast(Net):
    def __init__(self):
        super().__init__(seed=1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


HARD = _parity(3000, 0.9, 0)


@pytest.mark.slow
def test_looks_again_at_a_network_that_has_learned_the_shortcut():
    truth, test = HARD.tensors[2], _parity(1000, 0.0, 2)
    minority = (truth == 1) | (truth == 2)
    remover = MemorizationRemover(probe_layers=["net.1", "net.3"], fine_tune=0)
    loaders = _loaders(HARD, _parity(200, 0.0, 1))
    module, _ = _fit(remover, _Fast(), loaders=loaders)
    plain, _ = _fit(None, _Fast(), loaders=loaders)
    assert remover.groups.epoch == 1
    assert sum(remover.groups.sizes) == len(HARD)
    assert float((remover.groups.index == truth)[minority].float().mean()) > 0.7
    assert _worst(module, test) > _worst(plain, test) + 0.05


def _drawn(remover, epochs=3, loaders=None):
    """Groups of the training examples that were drawn, epoch by epoch."""
    labels = []

    class Record(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            labels.append((trainer.current_epoch, batch[2]))

    _fit(remover, epochs=epochs, callbacks=[Record()], loaders=loaders)
    return [torch.cat([g for epoch, g in labels if epoch == e]) for e in range(epochs)]


def test_first_epoch_is_left_alone_before_a_second_look(monkeypatch):
    plain = _drawn(None)
    asked = _looks_twice(monkeypatch)
    remover = MemorizationRemover()
    drawn = _drawn(remover)
    assert asked == [False, True]  # the second probe reads a network that has trained, the second opinion does not
    assert torch.equal(drawn[0], plain[0])
    assert not torch.equal(drawn[1].bincount(), plain[1].bincount())
    assert (remover.groups.epoch, remover.groups.shortcut) == (1, True)


@pytest.mark.parametrize(
    ("kinds", "few", "epoch", "shortcut"),
    [
        (["shortcut"], 0.0, 0, True),
        (["label noise"], 0.0, 0, False),
        (["hard examples"], 1.0, 0, True),
        (["nothing"], 1.0, 0, False),
        (["undecided", "undecided"], 0.0, 1, False),
        (["hard examples", "shortcut"], 0.0, 1, False),  # by then the network sides with wrong labels
    ],
)
def test_what_the_looks_say(monkeypatch, kinds, few, epoch, shortcut):
    monkeypatch.setattr("demem.groups.inferred.FEW_ERRORS", few)
    _verdicts(monkeypatch, *kinds)
    remover = MemorizationRemover()
    _fit(remover)
    assert remover.groups.epoch == epoch
    assert remover.groups.shortcut == shortcut
    classes = 3 * TRAIN.tensors[1]
    assert torch.equal(remover.groups.index, classes) == (not shortcut)


class _Save(pl.Callback):
    def __init__(self, epoch, path):
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def test_a_network_at_chance_is_probed_again_after_the_next_epoch(monkeypatch):
    """What it says before counts for nothing."""
    epochs, look = [], MemorizationRemover._look

    def noted(self, data):
        epochs.append(data.trainer.current_epoch)
        look(self, data)

    class Slow(Net):
        def on_train_epoch_start(self):
            for group in self.optimizers().param_groups:
                group["lr"] = 0.0 if self.current_epoch < 2 else 3e-3

    monkeypatch.setattr(MemorizationRemover, "_look", noted)
    monkeypatch.setattr("demem.groups.inferred.FEW_ERRORS", 0.0)
    _verdicts(monkeypatch, *["undecided"] * 4)
    remover = MemorizationRemover(probe_layers="net.0")
    _fit(remover, Slow(), epochs=5)
    assert epochs == [0, 1, 2, 3]
    assert remover.groups.epoch == 3


def test_resumed_before_the_second_look(monkeypatch, tmp_path):
    _looks_twice(monkeypatch)
    whole, second = MemorizationRemover(), MemorizationRemover()
    straight, _ = _fit(whole, callbacks=[_Save(0, tmp_path / "first.ckpt")])
    resumed, _ = _fit(second, ckpt_path=tmp_path / "first.ckpt")
    assert _same_groups(second.groups, whole.groups)
    assert whole.groups.epoch == 1
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_masked_units_have_the_weight_0(masks):
    remover = MemorizationRemover(shares=(0.5,))
    module, _ = _fit(remover)
    chosen = next(r.share for r in remover.rounds if r.chosen)
    assert int((module.net[4].weight == 0).all(0).sum()) == round(chosen * 16) == 8


def test_state_comes_back_and_holds_only_primitives(masks, tmp_path):
    remover = MemorizationRemover(shares=(0.5,))
    _, trainer = _fit(remover)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    content = torch.load(tmp_path / "end.ckpt", weights_only=True)  # refuses anything but tensors and primitives
    state = content["callbacks"][remover.state_key]
    again = MemorizationRemover(shares=(0.5,))
    again.load_state_dict(state)
    assert again.rounds == remover.rounds
    assert _same_groups(again.groups, remover.groups)
    # A finished run that is resumed changes nothing.
    module, _ = _fit(again, epochs=4, ckpt_path=tmp_path / "end.ckpt")
    for name, value in content["state_dict"].items():
        assert torch.equal(module.state_dict()[name], value), name


def test_does_not_disturb_training_without_rebalance():
    """Up to the removal at the end, the run is the one without the callback."""
    plain, _ = _fit()
    module, _ = _fit(MemorizationRemover(rebalance=False))
    for (name, a), b in zip(plain.state_dict().items(), module.state_dict().values(), strict=True):
        if not name.startswith("net.4"):
            assert torch.equal(a, b), name
    assert module.training


def test_rebalancing_draws_inferred_groups_alike():
    loaders = _loaders()
    own = loaders["train_dataloaders"].batch_sampler.sampler
    drawn = torch.cat(_drawn(MemorizationRemover(), 20, loaders))
    assert loaders["train_dataloaders"].batch_sampler.sampler is own  # the user's loader is as it was
    share = torch.bincount(drawn, minlength=4).float() / len(drawn)
    natural = torch.bincount(TRAIN.tensors[2]).float() / len(TRAIN)
    assert natural.min() < 0.07
    assert share.min() > 2 * natural.min()


def test_a_sampler_of_ones_own_is_kept():
    sampler = torch.utils.data.WeightedRandomSampler(torch.ones(len(TRAIN)), len(TRAIN))
    loaders = dict(
        train_dataloaders=DataLoader(TRAIN, 32, sampler=sampler), val_dataloaders=DataLoader(VAL, batch_size=32)
    )
    with pytest.warns(UserWarning, match="does not rebalance"):
        pl.Trainer(**QUIET, max_epochs=1, callbacks=[MemorizationRemover()]).fit(Net(), **loaders)
    assert loaders["train_dataloaders"].batch_sampler.sampler is sampler


def test_true_groups_of_the_held_out_examples():
    remover = MemorizationRemover(use_groups=True)
    _fit(remover)
    assert torch.equal(remover.groups.held_out, VAL.tensors[2])
    with pytest.raises(ValueError, match="carry no groups"):
        _fit(
            MemorizationRemover(use_groups=True),
            loaders=_loaders(*(TensorDataset(*d.tensors[:2]) for d in (TRAIN, VAL))),
        )


def test_one_logit_and_three_classes():
    module, _ = _fit(MemorizationRemover(), Net(outputs=1))
    x, y, _ = TEST.tensors
    assert float(((module(x)[:, 0] > 0).long() == y).float().mean()) > 0.7
    train, val = _set(300, 0.9, 0, 3), _set(150, 0.0, 1, 3)
    plain, _ = _fit(None, Net(outputs=3), 12, loaders=_loaders(train, val))
    remover = MemorizationRemover()
    module, _ = _fit(remover, Net(outputs=3), epochs=12, loaders=_loaders(train, val))
    assert len(remover.groups.sizes) <= 9
    test = _set(900, 0.0, 2, 3)
    assert _worst(module, test) > _worst(plain, test) + 0.1


def test_batches_of_two_dicts_and_an_adapter():
    class Pairs(torch.utils.data.Dataset):
        def __init__(self, tensors, form):
            self.tensors, self.form = tensors, form

        def __len__(self):
            return len(self.tensors[0])

        def __getitem__(self, i):
            x, y, g = (t[i] for t in self.tensors)
            return {"dict": {"image": x, "label": y, "group": g}, "odd": (x, {"answer": y}, g, 0)}[self.form]

    class FromDict(Net):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

        def validation_step(self, batch, batch_idx):
            self(batch["image"])

    class Odd(Net):
        def unpack_batch(self, batch):
            return batch[0], batch[1]["answer"], batch[2]

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1]["answer"])

    for form, module in (("dict", FromDict()), ("odd", Odd())):
        loaders = _loaders(Pairs(TRAIN.tensors, form), Pairs(VAL.tensors, form))
        remover = MemorizationRemover()
        _fit(remover, module, epochs=1, loaders=loaders)
        assert remover.rounds
    odd = _loaders(Pairs(TRAIN.tensors, "odd"), Pairs(VAL.tensors, "odd"))
    with pytest.raises(TypeError, match="unpack_batch"):
        _fit(MemorizationRemover(), FromDict(), loaders=odd, num_sanity_val_steps=0)


def test_module_without_forward():
    class Steps(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Net().net

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.model(batch[0])

        configure_optimizers = Net.configure_optimizers

    remover = MemorizationRemover()
    _fit(remover, Steps(), epochs=1)
    assert remover.rounds


def test_model_built_in_configure_model():
    class Late(Net):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = Net().net

    remover = MemorizationRemover()
    module, _ = _fit(remover, Late(), epochs=1)
    assert remover.rounds
    assert module.net[4].in_features == 16


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_timm_classifiers(name):
    options = dict(img_size=32, patch_size=8, depth=2) if name.startswith("vit") else {}

    class Images(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model(name, num_classes=2, **options)

        def forward(self, x):
            return self.model(x)

        training_step, validation_step = Net.training_step, Net.validation_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    def images(dataset):
        x, y, g = dataset.tensors
        return TensorDataset(x.view(-1, 3, 2, 2).repeat_interleave(16, 2).repeat_interleave(16, 3)[:64], y[:64], g[:64])

    remover = MemorizationRemover(shares=(0.5,))
    module, _ = _fit(remover, Images(), epochs=1, loaders=_loaders(images(TRAIN), images(VAL)))
    x = images(TEST).tensors[0][:8]
    module.eval()
    with torch.no_grad():
        assert torch.allclose(remover.export(module)(x), module(x), atol=1e-5)


def test_a_fit_from_the_start_looks_at_its_own_data():
    used, other = MemorizationRemover(), _loaders(_set(240, 0.9, 4), _set(120, 0.0, 5))
    _fit(used, epochs=1)
    module, _ = _fit(used, epochs=1, loaders=other)
    new, _ = _fit(MemorizationRemover(), epochs=1, loaders=other)
    for (name, a), b in zip(module.state_dict().items(), new.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("changed", ["train", "val"])
def test_resumed_with_other_data_is_refused(changed, tmp_path):
    _fit(MemorizationRemover(), epochs=2, callbacks=[_Save(0, tmp_path / "half.ckpt")])
    x, y, g = (TRAIN if changed == "train" else VAL).tensors
    other = _loaders(**{changed: TensorDataset(x.flip(0), y.flip(0), g.flip(0))})
    with pytest.raises(ValueError, match="not what was there when training began"):
        _fit(MemorizationRemover(), epochs=2, loaders=other, ckpt_path=tmp_path / "half.ckpt")


def test_stopped_early_still_removes(masks):
    class Stop(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch >= 1

    remover = MemorizationRemover(shares=(0.5,))
    with pytest.warns(UserWarning, match="before its last planned step"):
        _fit(remover, epochs=10, callbacks=[Stop()])
    assert remover.rounds


def test_without_a_validation_after_it_the_removal_is_announced(masks):
    remover = MemorizationRemover(shares=(0.5,))
    with pytest.warns(UserWarning, match="without a validation after it"):
        _fit(remover, epochs=4, check_val_every_n_epoch=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without a validation after it")
        _fit(MemorizationRemover(shares=(0.5,)), epochs=3, check_val_every_n_epoch=3)


@pytest.mark.parametrize("every", [1, 3], ids=["after each epoch", "before the last one only"])
def test_a_checkpoint_from_before_the_refit_is_announced(tmp_path, every):
    class Refits(MemorizationRemover):
        def choose(self, *_):
            return 1

    keep = pl.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=every)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _fit(Refits(), callbacks=[keep], enable_checkpointing=True)
    named = [str(w.message) for w in said if "is from before the removal" in str(w.message)]
    assert len(named) == (every == 3)
    assert all(keep.best_model_path in message for message in named)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(shares=(0.5, 0.2)), "must grow"),
        (dict(fine_tune=-1), "fine_tune must be at least 0"),
        (dict(max_examples=0), "max_examples 1"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MemorizationRemover(**arguments)


def test_bad_data_is_refused_before_training():
    x, y, g = TRAIN.tensors
    trained = []

    class Step(pl.Callback):
        def on_train_batch_start(self, *_):
            trained.append(1)

    def refused(message, remover=None, loaders=None, module=None, **options):
        with pytest.raises(ValueError, match=message):
            _fit(remover or MemorizationRemover(), module, loaders=loaders, callbacks=[Step()], **options)

    refused("matches nothing.*net.0", MemorizationRemover(probe_layers="layer9"))
    ordered = {"train_dataloaders": DataLoader(TRAIN, batch_size=32)}
    refused("held-out examples", loaders=ordered)
    refused("keep training examples back", MemorizationRemover(held_out=0.2), _loaders() | ordered)
    refused("out of range", loaders=_loaders(TensorDataset(x, y + 1, g)))
    one_class = TensorDataset(*(t[VAL.tensors[1] == 0] for t in VAL.tensors))
    refused("fewer than two", loaders=_loaders(val=one_class))
    refused("NaN", loaders=_loaders(TensorDataset(x * torch.nan, y, g)))
    refused("is not an nn.Linear", MemorizationRemover(head="net.1"))
    assert not trained


class _Record(pl.Callback):
    def __init__(self, remover, path):
        self.remover, self.path = remover, path

    def on_fit_end(self, trainer, pl_module):
        state = {k: v.cpu() for k, v in pl_module.state_dict().items()}
        torch.save({"callback": self.remover.state_dict(), "model": state}, f"{self.path}.{trainer.global_rank}")


class _Frozen(Net):
    """Learns nothing below the head, so that one process and two end with the same features."""

    def __init__(self):
        super().__init__()
        for parameter in self.net[:4].parameters():
            parameter.requires_grad_(False)


@pytest.mark.parametrize("val", [VAL, MANY], ids=["few", "many"])
def test_two_processes_equal_one(tmp_path, two_processes, val):
    states = []
    for devices in (1, 2):
        remover = MemorizationRemover(shares=(0.25, 0.5))
        record = _Record(remover, str(tmp_path / f"s{devices}"))
        options = two_processes if devices == 2 else {}
        _fit(remover, _Frozen(), epochs=2, callbacks=[record], loaders=_loaders(val=val), **options)
        states += [torch.load(tmp_path / f"s{devices}.{rank}", weights_only=True) for rank in range(devices)]
    alone, first, second = states
    assert (alone["callback"]["fine_tuned_on"] > 0) == (val is MANY)
    # The gradients' sum is rounded otherwise, and an example may lie on the boundary of the head as trained.
    rounds = [{**r, "average": pytest.approx(r["average"], abs=1.5 / len(val))} for r in alone["callback"]["rounds"]]
    for state in (first, second):
        assert state["callback"]["fine_tuned_on"] == alone["callback"]["fine_tuned_on"]
        assert state["callback"]["rounds"] == rounds
        assert torch.equal(state["callback"]["groups"]["index"], alone["callback"]["groups"]["index"])
        for name, value in state["model"].items():
            assert torch.allclose(value, alone["model"][name], atol=1e-5), name


@pytest.mark.parametrize("looks", [1, 2])
def test_two_processes_end_with_the_same_network(monkeypatch, tmp_path, two_processes, looks):
    if looks == 2:
        _looks_twice(monkeypatch)
    remover = MemorizationRemover(shares=(0.5,))
    record = _Record(remover, str(tmp_path / "s"))
    _fit(remover, epochs=2, callbacks=[record], loaders=_loaders(val=MANY), **two_processes)
    first, second = (torch.load(tmp_path / f"s.{rank}", weights_only=True) for rank in range(2))
    assert first["callback"]["fine_tuned_on"] > 0
    assert first["callback"]["groups"]["epoch"] == looks - 1
    assert _same_groups(*(Groups(**state["callback"]["groups"]) for state in (first, second)))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name


class _TakeBack(pl.Callback):
    """Puts the weights of the last epoch but one back when training ends."""

    def on_train_epoch_start(self, trainer, pl_module):
        self.state = copy.deepcopy(pl_module.state_dict())

    def on_train_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.state)


def _ema(decay):
    if not hasattr(pl.callbacks, "EMAWeightAveraging"):
        pytest.skip("this version of Lightning has no EMAWeightAveraging")
    return pl.callbacks.EMAWeightAveraging(decay=decay)


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (_TakeBack, True),
        (lambda: pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=2), False),
        (lambda: _ema(decay=0.9), False),
    ],
)
def test_weights_that_another_callback_writes_at_the_end_are_treated_too(make, first, masks):
    remover, other = MemorizationRemover(), make()
    with pytest.warns(UserWarning, match="changed the weights when training ended"):
        module, _ = _fit(callbacks=[remover, other] if first else [other, remover])
    plain, _ = _fit(callbacks=[make()])
    assert _worst(module) > _worst(plain) + 0.1
    assert int((module.net[4].weight == 0).all(0).sum()) == round(0.9 * 16)


def test_averaging_before_the_remover_works_where_the_module_has_buffers():
    """Lightning pairs the buffers of a module with those of a copy in their order; the remover adds none."""

    class Weighted(Net):
        def __init__(self):
            super().__init__()
            self.loss = nn.CrossEntropyLoss(weight=torch.ones(2))  # a buffer after the head's

    for order in (1, -1):
        module, _ = _fit(module=Weighted(), callbacks=[_ema(0.9), MemorizationRemover()][::order], epochs=1)
        assert torch.equal(module.loss.weight, torch.ones(2))


class _TwoHeads(Net):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(16, 2)


def test_a_layer_that_does_not_give_the_logits_is_not_taken_for_the_head():
    with pytest.raises(ValueError, match=r"'other' does not give the logits.*Pass head='net.4'"):
        _fit(MemorizationRemover(), _TwoHeads())
    remover = MemorizationRemover(head="net.4")
    _fit(remover, _TwoHeads(), epochs=1)  # the layer that does not run is not probed
    assert remover.groups.site.startswith("net.")

    class Mean(_TwoHeads):
        def forward(self, x):
            z = self.net[:4](x)
            return (self.net[4](z) + self.other(z)) / 2

    for head in (None, "net.4"):
        with pytest.raises(ValueError, match="Let forward return the logits of one head"):
            _fit(MemorizationRemover(head=head), Mean())


@pytest.mark.parametrize(("limit", "layers"), [(100, 1), (2, 3)])
def test_the_layer_is_chosen_on_some_examples_of_a_large_set(monkeypatch, limit, layers):
    whole = MemorizationRemover()
    _fit(whole, epochs=1)
    read, read_split = [], Split.read

    def spy(self, *args, **options):
        rows = read_split(self, *args, **options)
        read.append((len(rows.activations), len(rows)))
        return rows

    monkeypatch.setattr("demem.run.detection.CHOSEN_ON", limit)
    monkeypatch.setattr(Split, "read", spy)
    remover = MemorizationRemover()
    _fit(remover, epochs=1)
    # Two examples, one of each class, are too few to choose a layer on (all are read in full) or to judge.
    assert read[:3] == [(3, limit), (layers, len(TRAIN)), (1, len(VAL))]
    assert _same_groups(*(replace(r.groups, why="", suspect=None) for r in (remover, whole)))


def test_a_limit_takes_some_of_the_examples_of_a_larger_one(monkeypatch):
    read, read_split = [], Split.read

    def spy(self, *args, **options):
        rows = read_split(self, *args, **options)
        read.append(rows.position)
        return rows

    monkeypatch.setattr("demem.run.detection.CHOSEN_ON", 70)
    monkeypatch.setattr(Split, "read", spy)
    _fit(MemorizationRemover(max_examples=113), epochs=1)
    assert [len(position) for position in read[:2]] == [70, 113]
    assert bool(torch.isin(*read[:2]).all())


def test_limits_hold_for_the_first_of_several_training_loaders():
    class First(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["first"], batch_idx)

    loaders = _loaders()
    train = loaders["train_dataloaders"]
    remover = MemorizationRemover()
    loaders["train_dataloaders"] = {"first": train, "second": DataLoader(VAL, 32, shuffle=True)}
    _fit(remover, First(), epochs=1, loaders=loaders, limit_train_batches=3)
    assert len(remover.groups.index) == 3 * 32


@pytest.mark.parametrize("known", [False, True])
def test_training_examples_take_part_in_the_refit_for_inferred_groups_only(known, monkeypatch):
    asked, rounds = [], demem.run.cure.remove_in_rounds

    def spy(*args, join=False, **options):
        asked.append(join)
        return rounds(*args, join=join, **options)

    monkeypatch.setattr("demem.run.cure.remove_in_rounds", spy)
    remover = MemorizationRemover(use_groups=known)
    _fit(remover)
    assert remover.groups.informative
    assert asked[-1] is not known
    assert not any(asked[:-1])  # a refit before a validation reads the held-out examples alone


def test_masked_units_are_told_with_their_scores_and_kept_in_checkpoints():
    class Last(MemorizationRemover):
        def choose(self, rounds, held_out, groups):
            scores.extend(round_.score for round_ in rounds)
            return len(rounds) - 1

    scores = []
    remover = Last(shares=(0.25, 0.5))
    module, _ = _fit(remover)
    units, told = zip(*remover.units, strict=True)
    assert len(units) == 8
    assert bool((module.net[-1].weight[:, list(units)] == 0).all())
    assert list(told) == sorted(told, reverse=True)
    first = scores[-2].sort(descending=True)  # before the first mask
    by_unit = dict(remover.units)
    assert [by_unit[unit] for unit in first.indices[:4].tolist()] == pytest.approx(first.values[:4].tolist())
    again = MemorizationRemover()
    again.load_state_dict(remover.state_dict())
    assert again.units == remover.units
    assert MemorizationRemover().units == []


@pytest.mark.parametrize("doubtful", [True, False])
def test_only_the_refit_of_a_doubtful_shortcut_must_be_worth_its_cost(doubtful, monkeypatch):
    monkeypatch.setattr("demem.removal.rounds._weigh", lambda *_: (False, "it is not"))
    monkeypatch.setattr(Groups, "doubtful", property(lambda groups: doubtful))
    remover = MemorizationRemover()
    _fit(remover)
    assert remover.rounds[0].chosen == doubtful
    assert ("it is not" in remover.summary()) == doubtful


class _Refuses(MemorizationRemover):
    def choose(self, rounds, held_out, groups):
        return 0


def _refused(monkeypatch, remover, better=True):
    """A run whose refits are refused, and what an ordinary head is said to do."""
    monkeypatch.setattr(demem.run.cure, "explain_round", lambda *_, **__: "refused")
    monkeypatch.setattr(demem.run.cure, "gives_back", lambda *_: better)
    module, _ = _fit(remover)
    return module


def test_an_ordinary_head_undoes_balanced_training_where_a_refit_is_refused(monkeypatch, tmp_path):
    remover = _Refuses(report=str(tmp_path / "report.html"))
    module = _refused(monkeypatch, remover)
    last = remover.rounds[-1]
    assert last.ordinary
    assert last.chosen
    assert [r.chosen for r in remover.rounds].count(True) == 1
    assert remover.fine_tuned_on == 0
    assert remover.units == []
    with remover.as_trained(module):
        before = module.net[-1].weight.detach().clone()
    assert not torch.equal(before, module.net[-1].weight)
    assert "head refitted on held-out examples, all alike: the groups are hardly a minority" in remover.summary()
    text = (tmp_path / "report.html").read_text()
    assert "The head was refitted on held-out examples, all alike: the groups are hardly a minority" in text
    assert "all examples alike (kept)" in text
    again = MemorizationRemover()
    again.load_state_dict(copy.deepcopy(remover.state_dict()))
    assert again.rounds == remover.rounds


@pytest.mark.parametrize(
    ("remover", "better"),
    [(_Refuses(), False), (_Refuses(rebalance=False), True), (_Refuses(use_groups=True), True)],
    ids=["not better", "training was ordinary", "groups are given"],
)
def test_an_ordinary_head_is_for_inferred_groups_that_were_balanced(monkeypatch, remover, better):
    module = _refused(monkeypatch, remover, better)
    assert not any(record.ordinary for record in remover.rounds)
    assert remover.rounds[0].chosen
    with remover.as_trained(module):
        before = module.net[-1].weight.detach().clone()
    assert torch.equal(before, module.net[-1].weight)


def test_a_network_that_choose_leaves_as_it_is_keeps_its_head(monkeypatch):
    monkeypatch.setattr(demem.run.cure, "gives_back", lambda *_: True)
    remover = _Refuses()
    _fit(remover)
    assert remover.rounds[0].chosen
    assert remover.rounds[0].why == "choose() says so"
