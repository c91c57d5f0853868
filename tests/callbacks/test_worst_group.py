import warnings
from datetime import timedelta

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

from demem.callbacks import ActivationDiversityMonitor, MemorizationRemover, WorstGroupMonitor
from demem.data import GroupedDataModule
from demem.module import Classifier

N = 60
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(1))
Y = (X[:, 0] > 0).long()
G = 2 * Y + (X[:, 1] > 0.8).long()


class OwnModule(pl.LightningModule):
    """A user's module; ``style`` says how its validation step comes to its logits."""

    def __init__(self, style="forward"):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        self.style = style

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if self.style == "inner":
            self.net(batch[0])
        elif self.style == "outputs":
            with torch.no_grad():  # something else runs last; what the step returns is meant
                logits = self.net(batch[0])
                self.net(torch.zeros_like(batch[0]))
            return {"logits": logits}
        elif self.style == "blind":
            return None
        else:
            self(batch[0])
        return None

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def _trainer(library=pl, **options):
    options = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    return library.Trainer(**options)


def _loader(*tensors, shuffle=False):
    return DataLoader(TensorDataset(*tensors), batch_size=7, shuffle=shuffle)


def _truth(model):
    """Accuracy by group in plain Python, after the fit."""
    with torch.no_grad():
        right = model(X).argmax(1) == Y
    return [float(right[g == G].float().mean()) for g in range(4)]


def _share_right(model, size):
    with torch.no_grad():
        return float((model(X[:size]).argmax(1) == Y[:size]).float().mean())


@pytest.mark.parametrize("style", ["forward", "inner", "outputs"])
def test_logs_what_a_loop_over_groups_gives(style):
    model, monitor = OwnModule(style), WorstGroupMonitor()
    trainer = _trainer(callbacks=[monitor])
    trainer.fit(model, _loader(X, Y, G, shuffle=True), _loader(X, Y, G))
    logged, truth = trainer.callback_metrics, _truth(model)
    assert float(logged["val/worst_group_acc"]) == pytest.approx(min(truth))
    for g, accuracy in enumerate(truth):
        assert float(logged[f"val/group_acc/{g}"]) == pytest.approx(accuracy)
    sizes = torch.bincount(G)  # the same set serves for training
    assert float(logged["val/adjusted_avg_acc"]) == pytest.approx(
        float((torch.tensor(truth) * sizes).sum() / sizes.sum())
    )
    with torch.no_grad():
        right = (model(X).argmax(1) == Y).float()
    assert float(logged["val/avg_acc"]) == pytest.approx(float(right.mean()))
    assert float(logged["val/worst_class_acc"]) == pytest.approx(min(float(right[c == Y].mean()) for c in (0, 1)))
    assert [name for name in trainer.progress_bar_metrics if "acc" in name] == ["val/worst_group_acc"]
    assert [record["epoch"] for record in monitor.history] == [0, 1]  # the sanity check left no trace
    assert not model._forward_hooks
    assert not model.net[2]._forward_hooks


def test_train_and_test_stages_and_sizes_from_the_data_module():
    data = GroupedDataModule(*[TensorDataset(X, Y, G)] * 3, batch_size=16)
    monitor = WorstGroupMonitor(train=True, per_group=False)
    model = OwnModule()
    trainer = _trainer(callbacks=[monitor], val_check_interval=0.5)
    trainer.fit(model, datamodule=data)
    assert "train/worst_group_acc" in trainer.callback_metrics
    train_records = [r for r in monitor.history if r["stage"] == "train"]
    assert [r["epoch"] for r in train_records] == [0, 1]
    trainer.test(model, datamodule=data, verbose=False)
    assert float(trainer.callback_metrics["test/worst_group_acc"]) == pytest.approx(min(_truth(model)))
    assert "test/adjusted_avg_acc" in trainer.callback_metrics
    assert "test/group_acc/0" not in trainer.callback_metrics


def test_train_accuracy_counts_every_batch_although_validation_runs_in_between():
    class Frozen(OwnModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    model, monitor = Frozen(), WorstGroupMonitor(train=True)
    trainer = _trainer(callbacks=[monitor], val_check_interval=0.5, max_epochs=1)
    trainer.fit(model, _loader(X, Y, G), [_loader(X[:20], Y[:20], G[:20]), _loader(X, 1 - Y, G)])
    assert all(r["avg_acc"] == pytest.approx(_share_right(model, 20)) for r in monitor.history if r["stage"] == "val")
    record = next(r for r in monitor.history if r["stage"] == "train")
    assert [record[f"group_acc/{g}"] for g in range(4)] == pytest.approx(_truth(model))


def test_each_training_epoch_is_counted_by_itself():
    class RightThenWrong(OwnModule):
        def training_step(self, batch, batch_idx):
            right = batch[1] if self.current_epoch == 0 else 1 - batch[1]
            return {"loss": super().training_step(batch, batch_idx), "preds": right}

    monitor = WorstGroupMonitor(train=True)
    _trainer(callbacks=[monitor]).fit(RightThenWrong(), _loader(X, Y, G))
    assert [record["avg_acc"] for record in monitor.history] == [1.0, 0.0]


def test_history_survives_a_resume(tmp_path):
    monitor = WorstGroupMonitor()
    trainer = _trainer(callbacks=[monitor], max_epochs=1)
    trainer.fit(OwnModule(), _loader(X, Y, G), _loader(X, Y, G))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = WorstGroupMonitor()
    _trainer(callbacks=[again], max_epochs=2).fit(
        OwnModule(), _loader(X, Y, G), _loader(X, Y, G), ckpt_path=tmp_path / "last.ckpt"
    )
    assert [record["epoch"] for record in again.history] == [0, 1]
    assert again.history[0] == monitor.history[0]


def test_two_monitors_live_in_one_trainer():
    trainer = _trainer(callbacks=[WorstGroupMonitor(), WorstGroupMonitor(per_group=False)], max_epochs=1)
    trainer.fit(OwnModule(), _loader(X, Y, G), _loader(X, Y, G))


def test_runs_in_a_lightning_pytorch_trainer():
    lightning = pytest.importorskip("lightning.pytorch")
    import types

    body = {k: v for k, v in vars(OwnModule).items() if isinstance(v, types.FunctionType) and k != "__init__"}

    class Other(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.style = nn.Linear(6, 2), "forward"

    for name, function in body.items():
        setattr(Other, name, function)
    model, monitor = Other(), WorstGroupMonitor()
    trainer = _trainer(lightning, callbacks=[monitor], max_epochs=1)
    trainer.fit(model, _loader(X, Y, G), _loader(X, Y, G))
    assert float(trainer.callback_metrics["val/worst_group_acc"]) == pytest.approx(min(_truth(model)))


def test_without_groups_it_reports_classes_and_says_so_once(caplog):
    model, monitor = OwnModule(), WorstGroupMonitor(train=True)
    trainer = _trainer(callbacks=[monitor])
    with caplog.at_level("INFO"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, _loader(X, Y), _loader(X, Y))
    assert sum("the val batches have no groups" in r.getMessage() for r in caplog.records) == 1
    assert not any("WorstGroupMonitor" in str(w.message) for w in caught)  # there is nothing to do about it
    right = (model(X).argmax(1) == Y).float()
    assert monitor.history[-2]["stage"] == "val"
    assert {k: v for k, v in monitor.history[-2].items() if "acc" in k} == pytest.approx(
        {"avg_acc": float(right.mean()), "worst_class_acc": min(float(right[c == Y].mean()) for c in (0, 1))}
    )
    assert {k for k in trainer.callback_metrics if "acc" in k} == {
        f"{stage}/{name}" for stage in ("train", "val") for name in ("avg_acc", "worst_class_acc")
    }
    assert set(trainer.progress_bar_metrics) == {"train/worst_class_acc", "val/worst_class_acc"}


def test_groups_that_are_no_integers():
    loader = DataLoader([(x, y, "abcd"[g]) for x, y, g in zip(X, Y, G, strict=True)], batch_size=20)
    with pytest.raises(ValueError, match=r"integers of shape \(B,\): each is .* Tensor, tuple of str"):
        _trainer(callbacks=[WorstGroupMonitor()]).fit(OwnModule(), loader, loader)


@pytest.mark.parametrize("sampler", [None, WeightedRandomSampler(torch.ones(N), N)])
def test_training_batches_that_cannot_be_read_leave_the_sizes_out(sampler):
    def collate(rows):  # the last batch cannot be read
        x, y, g = (torch.stack(v) for v in zip(*rows, strict=True))
        return (x, y, g) if len(x) == 7 else (x, y, g, torch.arange(len(x)))

    loader = DataLoader(TensorDataset(X, Y, G), batch_size=7, sampler=sampler, collate_fn=collate)
    monitor = WorstGroupMonitor()
    _trainer(callbacks=[monitor]).fit(OwnModule(), loader, _loader(X, Y, G))
    assert len(monitor.history) == 2
    assert not any("adjusted_avg_acc" in record for record in monitor.history)
    with pytest.raises(TypeError, match="Cannot read"):
        _trainer(callbacks=[WorstGroupMonitor(train=True)]).fit(OwnModule(), loader, _loader(X, Y, G))


def test_a_training_step_that_skips_batches():
    class Skips(OwnModule):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    model, monitor = Skips(), WorstGroupMonitor(train=True)
    _trainer(callbacks=[monitor], max_epochs=1).fit(model, _loader(X, Y, G))
    kept = torch.cat([torch.arange(7), torch.arange(14, N)])
    assert monitor.history[-1]["avg_acc"] == pytest.approx(float((model(X).argmax(1) == Y)[kept].float().mean()))


def test_a_validation_step_that_skips_batches():
    class Skips(OwnModule):
        def validation_step(self, batch, batch_idx):
            return None if batch_idx == 3 else super().validation_step(batch, batch_idx)

    model, monitor = Skips(), WorstGroupMonitor()
    _trainer(callbacks=[monitor], max_epochs=1).fit(model, _loader(X, Y, G), _loader(X, Y, G))
    kept = torch.cat([torch.arange(21), torch.arange(28, N)])
    assert monitor.history[-1]["avg_acc"] == pytest.approx(float((model(X).argmax(1) == Y)[kept].float().mean()))


@pytest.mark.parametrize("form", [lambda z: z, lambda z: z[:, :1], lambda z: z.argmax(1).float() + z[:, 0] * 0])
def test_predictions_that_are_not_finite_count_as_wrong(form):
    class Diverges(OwnModule):
        def validation_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            logits = torch.where((batch[0][:, 2] > 0)[:, None], logits * torch.nan, logits)
            return {"preds" if form(logits).ndim == 1 else "logits": form(logits)}

    model, monitor = Diverges(), WorstGroupMonitor()
    with pytest.warns(UserWarning, match="count as wrong"):
        _trainer(callbacks=[monitor], max_epochs=1).fit(model, _loader(X, Y, G), _loader(X, Y, G))
    z = form(model(X))
    right = ((z[:, 0] > 0).long() if z.ndim == 2 and z.shape[1] == 1 else z.argmax(1) if z.ndim == 2 else z) == Y
    assert monitor.history[-1]["avg_acc"] == pytest.approx(float((right & (X[:, 2] <= 0)).float().mean()))


class Returns(OwnModule):
    """``form`` makes of two logits what the validation step returns as ``preds``."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def validation_step(self, batch, batch_idx):
        return {"preds": self.form(self.net(batch[0]))}


def test_forms_of_preds():
    def fit(form):
        model = Returns(form)
        trainer = _trainer(callbacks=[WorstGroupMonitor()], max_epochs=1)
        trainer.fit(model, _loader(X, Y, G), _loader(X, Y, G))
        assert float(trainer.callback_metrics["val/worst_group_acc"]) == pytest.approx(min(_truth(model)))

    fit(lambda logits: logits.softmax(1))
    fit(lambda logits: logits[:, 1:] > logits[:, :1])
    fit(lambda logits: logits.argmax(1).float())
    with pytest.raises(ValueError, match=r"class indices \(B,\) or scores \(B, C\)"):
        fit(lambda logits: logits.softmax(1)[:, 1])


@pytest.mark.parametrize("squash", [torch.sigmoid, lambda z: z])
def test_a_forward_that_returns_the_probability_of_class_one(squash):
    class One(OwnModule):
        def __init__(self):
            super().__init__()
            self.net[2] = nn.Linear(8, 1)

        def forward(self, x):
            return squash(self.net(x)[:, 0])

        def training_step(self, batch, batch_idx):
            return nn.functional.binary_cross_entropy_with_logits(self.net(batch[0])[:, 0], batch[1].float())

    model, monitor = One(), WorstGroupMonitor()
    _trainer(callbacks=[monitor], max_epochs=3).fit(model, _loader(X, Y, G), _loader(X, Y, G))
    right = (model.net(X)[:, 0] > 0) == Y
    assert monitor.history[-1]["avg_acc"] == pytest.approx(float(right.float().mean()))


def test_predictions_that_cannot_be_seen():
    with pytest.raises(RuntimeError, match="saw no predictions"):
        _trainer(callbacks=[WorstGroupMonitor()]).fit(OwnModule("blind"), _loader(X, Y, G), _loader(X, Y, G))


def test_group_sizes_differ_between_train_and_validation():
    # Group 3 occurs in validation only, group 4 in training only.
    rare = torch.where(G == 3, 4, G)
    trainer = _trainer(callbacks=[WorstGroupMonitor()], max_epochs=1)
    trainer.fit(OwnModule(), _loader(X, Y, rare), _loader(X, Y, G))
    assert 0 <= float(trainer.callback_metrics["val/adjusted_avg_acc"]) <= 1


def test_classifier_names_labels_out_of_range_and_a_diverged_loss():
    bad = torch.where(Y == 1, 5, 0)
    model = Classifier(nn.Linear(6, 2), cosine=False)
    with pytest.raises(ValueError, match=r"class 5, but the model has 2 outputs"):
        _trainer().fit(model, _loader(X, bad, G))
    with pytest.raises(ValueError, match=r"training loss is nan .* learning rate"):
        _trainer().fit(Classifier(nn.Linear(6, 2)), _loader(X * torch.nan, Y, G))


def _biased(n, share, seed):
    """The class in faint, and an attribute that mostly agrees with it in plain sight."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    a = torch.where(torch.rand(n, generator=generator) < share, y, 1 - y)
    x = nn.functional.one_hot(y, 6) + 3.0 * nn.functional.one_hot(2 + a, 6)
    return TensorDataset(x + 0.5 * torch.randn(n, 6, generator=generator), y, 2 * y + a)


@pytest.mark.parametrize("sampled", ["by the remover", "by the user", "in batches of the user's own"])
def test_sizes_are_those_of_the_data_set_however_it_is_sampled(sampled):
    def fit(callbacks):
        pl.seed_everything(0, verbose=False)
        train, held_out = _biased(240, 0.95, 0), _biased(120, 0.5, 1)
        g = train.tensors[2]
        options = {"batch_size": 20, "shuffle": True}
        if sampled == "by the user":
            options = {"batch_size": 20, "sampler": WeightedRandomSampler(1.0 + 9.0 * (g % 3 > 0), 240)}
        elif sampled != "by the remover":
            options = {"batch_sampler": [[*range(20)], [*range(10), *range(20, 30)]]}
        model = OwnModule()
        _trainer(callbacks=callbacks, max_epochs=1).fit(model, DataLoader(train, **options), _loader(*held_out.tensors))
        return model, torch.bincount(g)

    others, monitor = [MemorizationRemover()] if sampled == "by the remover" else [], WorstGroupMonitor()
    model, sizes = fit([*others, monitor])
    assert monitor.train_sizes.tolist() == sizes.tolist()
    if not others:  # the pass leaves the run as it is
        assert torch.equal(fit([])[0].net[0].weight, model.net[0].weight)


def test_outputs_of_the_removers_own_passes_are_not_kept():
    class Held(pl.Callback):
        most = 0

        def on_train_batch_end(self, *args):
            self.most = max(self.most, *map(len, monitor._predictions._seen.values()))

    monitor, held = WorstGroupMonitor(train=True), Held()
    trainer = _trainer(callbacks=[MemorizationRemover(), held, monitor])
    trainer.fit(OwnModule(), _loader(X, Y, G, shuffle=True), _loader(X, Y, G))
    assert held.most == 1


def test_a_named_head_comes_before_an_embedding():
    class Embeds(OwnModule):
        def forward(self, x):
            return self.net[:2](x)

        def validation_step(self, batch, batch_idx):
            self.net[2](self(batch[0]))

    model, monitor = Embeds(), WorstGroupMonitor(head="net.2")
    _trainer(callbacks=[monitor], max_epochs=1).fit(model, _loader(X, Y, G), _loader(X, Y, G))
    assert monitor.history[-1]["worst_group_acc"] == pytest.approx(min(_truth(model.net)))


@pytest.mark.parametrize("form", ["an embedding", "an embedding and logits"])
def test_an_embedding_that_the_head_reads_is_not_taken_for_logits(form):
    class Embeds(OwnModule):
        def forward(self, x):
            z = self.net[:2](x)
            return z if form == "an embedding" else (z, self.net[2](input=z))

        def validation_step(self, batch, batch_idx):
            seen = self(batch[0])
            if form == "an embedding":
                self.net[2](seen)

    model, monitor = Embeds(), WorstGroupMonitor()
    _trainer(callbacks=[monitor], max_epochs=1).fit(model, _loader(X, Y, G), _loader(X, Y, G))
    assert monitor.history[-1]["worst_group_acc"] == pytest.approx(min(_truth(model.net)))


class _Write(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_fit_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save({k: float(v) for k, v in trainer.callback_metrics.items() if "acc" in k}, self.path)


def test_two_processes_report_what_one_does(tmp_path, two_processes):
    results = []
    for options in ({}, two_processes):
        torch.manual_seed(0)
        model = Classifier(nn.Linear(X.shape[1], 2), lr=0.0)
        callbacks = [WorstGroupMonitor(train=True), _Write(tmp_path / "acc.pt")]
        warnings.filterwarnings("error", ".*sync_dist=True.*")  # also in the other processes, which are forks
        trainer = _trainer(callbacks=callbacks, max_epochs=1, **options)
        trainer.fit(model, _loader(X[:40], Y[:40], G[:40]), _loader(X[:40], Y[:40], G[:40]))
        results.append(torch.load(tmp_path / "acc.pt"))
    del results[0]["val/acc"], results[1]["val/acc"]  # the module's own, which is rank 0's
    assert "val/adjusted_avg_acc" in results[0]
    assert results[0] == pytest.approx(results[1])


# Resuming and fitting again


class Frozen(OwnModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


class Stream(IterableDataset):
    def __init__(self, tensors, on_rank=None):
        self.rows, self.on_rank = list(zip(*tensors, strict=True)), on_rank

    def __iter__(self):
        if self.on_rank is None or torch.distributed.get_rank() == self.on_rank:
            yield from self.rows


class _Save(pl.Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def _interrupted(tmp_path, loader, step=3, **options):
    """The monitor of a run that was saved in the middle of its first epoch, and of the one that took it up again."""
    torch.manual_seed(0)
    model, whole, rest = Frozen(), WorstGroupMonitor(train=True), WorstGroupMonitor(train=True)
    trainer = _trainer(callbacks=[whole, _Save(tmp_path / "mid.ckpt", step)], max_epochs=1)
    trainer.fit(model, loader, _loader(X, Y, G))
    trainer = _trainer(callbacks=[rest], **{"max_epochs": 1, **options})
    trainer.fit(model, loader, _loader(X, Y, G), ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    return model, whole, rest


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_resume_in_the_middle_of_an_epoch(tmp_path):
    model, whole, rest = _interrupted(tmp_path, _loader(X, Y, G))
    assert rest.train_sizes.tolist() == whole.train_sizes.tolist() == torch.bincount(G).tolist()
    # Lightning starts a loader without a state from its front: 3 of 9 batches, and then the first 6.
    seen = torch.cat([torch.arange(21), torch.arange(42)])
    right = (model(X).argmax(1) == Y)[seen].float()
    train = [record for record in rest.history if record["stage"] == "train"]
    assert [record["avg_acc"] for record in train] == [pytest.approx(float(right.mean()))]
    for g in range(4):
        assert train[0][f"group_acc/{g}"] == pytest.approx(float(right[g == G[seen]].mean()))
    val = [record for record in rest.history if record["stage"] == "val"]
    assert val[-1] == pytest.approx([record for record in whole.history if record["stage"] == "val"][-1])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_sizes_of_a_stream_are_counted_over_the_next_whole_epoch(tmp_path):
    loader = DataLoader(Stream((X, Y, G)), batch_size=7)
    _, _, rest = _interrupted(tmp_path, loader, max_epochs=3)
    assert rest.train_sizes.tolist() == torch.bincount(G).tolist()
    known = ["adjusted_avg_acc" in record for record in rest.history if record["stage"] == "val"]
    assert known[0] is False
    assert all(known[1:])


def test_a_second_fit_counts_its_own_data():
    monitor = WorstGroupMonitor()
    for part in (Y == 0, Y == 1):
        _trainer(callbacks=[monitor], max_epochs=1).fit(
            OwnModule(), _loader(X[part], Y[part], G[part]), _loader(X, Y, G)
        )
        assert monitor.train_sizes.tolist() == torch.bincount(G[part]).tolist()


def test_sizes_that_the_data_module_knows_come_before_those_of_a_checkpoint(tmp_path):
    class Own(pl.LightningDataModule):
        train_group_counts = (1, 1, 1, 7)

        def train_dataloader(self):
            return _loader(X, Y, G)

        val_dataloader = train_dataloader

    trainer = _trainer(callbacks=[WorstGroupMonitor()], max_epochs=1)
    trainer.fit(OwnModule(), _loader(X, Y, G), _loader(X, Y, G))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model, monitor = OwnModule(), WorstGroupMonitor()
    trainer = _trainer(callbacks=[monitor], max_epochs=2)
    trainer.fit(model, datamodule=Own(), ckpt_path=tmp_path / "last.ckpt")
    truth = torch.tensor(_truth(model))
    assert monitor.history[-1]["adjusted_avg_acc"] == pytest.approx(
        float((truth * torch.tensor([1, 1, 1, 7])).sum()) / 10
    )
    monitor = WorstGroupMonitor()
    _trainer(callbacks=[monitor]).validate(model, _loader(X, Y, G), verbose=False)
    assert "adjusted_avg_acc" not in monitor.history[-1]
    own = Own()
    _trainer(callbacks=[monitor]).validate(model, datamodule=own, verbose=False)
    assert "adjusted_avg_acc" in monitor.history[-1]


# What is no group


def test_an_index_in_the_place_of_groups_is_refused_before_an_epoch_is_spent():
    n = 120
    loader = DataLoader(TensorDataset(X.repeat(2, 1), Y.repeat(2), torch.arange(n)), batch_size=n)
    model = OwnModule()
    model.training_step = lambda batch, batch_idx: pytest.fail("training began")
    with pytest.raises(ValueError, match="rather than a group"):
        _trainer(callbacks=[WorstGroupMonitor()]).fit(model, loader, loader)
    with pytest.raises(ValueError, match="rather than a group"):
        _trainer(callbacks=[WorstGroupMonitor()]).test(model, loader, verbose=False)


def test_training_sizes_are_unknown_where_the_training_batches_hold_an_index():
    n = 120
    loader = DataLoader(TensorDataset(X.repeat(2, 1), Y.repeat(2), torch.arange(n)), batch_size=20)
    monitor = WorstGroupMonitor()
    _trainer(callbacks=[monitor]).fit(OwnModule(), loader, _loader(X, Y, G))
    assert monitor.train_sizes.tolist() == []
    assert "adjusted_avg_acc" not in monitor.history[-1]


def test_identifiers_in_the_place_of_groups():
    ids = _loader(X, Y, 2**61 + G)
    monitor = WorstGroupMonitor()
    _trainer(callbacks=[monitor]).fit(OwnModule(), ids, _loader(X, Y, G))  # of training nothing is needed but sizes
    assert monitor.train_sizes.tolist() == []
    with pytest.raises(ValueError, match=r"group must lie in 0 … 1048575.*torch\.unique"):
        _trainer(callbacks=[WorstGroupMonitor()]).fit(OwnModule(), ids, ids)


@pytest.mark.parametrize("group", [0, 8])
def test_a_single_group_is_said_and_not_listed(group):
    monitor, lengths = WorstGroupMonitor(), torch.full((N,), group)
    with pytest.warns(UserWarning, match="all of one group"):
        _trainer(callbacks=[monitor], max_epochs=1).fit(OwnModule(), _loader(X, Y, lengths), _loader(X, Y, lengths))
    assert monitor.history[-1]["worst_group_acc"] == monitor.history[-1]["avg_acc"]
    assert monitor.train_sizes.tolist() == [0] * group + [N]
    assert not any(name.startswith("group_acc") for name in monitor.history[-1])


@pytest.mark.parametrize(
    ("third", "refused"),
    [
        ({"group": "a"}, True),
        ({"metadata": torch.zeros(3, 2)}, True),
        ({"metadata": "a.png"}, False),
        ({}, False),
        ((torch.zeros(3, 2).int(),), True),
        (({"path": "a.png"},), False),
        ((None,), False),
    ],
)
def test_what_is_in_the_place_of_groups(third, refused):
    batch = (X[:3], Y[:3], *third) if isinstance(third, tuple) else {"x": X[:3], "y": Y[:3], **third}

    class Step(OwnModule):
        def validation_step(self, batch, batch_idx):
            self(X[:3])

        test_step = validation_step

    loader = DataLoader([batch], batch_size=None)
    monitor = WorstGroupMonitor()
    if refused:
        with pytest.raises(ValueError, match="needs groups that are integers"):
            _trainer(callbacks=[monitor]).test(Step(), loader, verbose=False)
    else:
        _trainer(callbacks=[monitor]).test(Step(), loader, verbose=False)
        assert set(monitor.history[-1]) == {"stage", "epoch", "avg_acc", "worst_class_acc"}


def test_a_module_that_unpacks_its_batches_may_have_no_groups():
    class Own(OwnModule):
        def unpack_batch(self, batch):
            return batch[0], batch[1], None

    monitor = WorstGroupMonitor()
    _trainer(callbacks=[monitor]).test(Own(), _loader(X, Y, torch.rand(N)), verbose=False)
    assert "worst_class_acc" in monitor.history[-1]
    with pytest.raises(ValueError, match="unpack_batch"):
        _trainer(callbacks=[monitor]).test(OwnModule(), _loader(X, Y, torch.rand(N)), verbose=False)


@pytest.mark.parametrize(("part", "told"), [(1, "second part of .* the labels"), (2, "third part of .* the groups")])
def test_a_network_that_reads_what_is_taken_for_labels_or_groups_is_told_of(part, told):
    class Two(OwnModule):
        def forward(self, x, kind):
            return self.net(x) + kind[:, None]

        def validation_step(self, batch, batch_idx):
            self(batch[0], batch[part])

    with pytest.warns(UserWarning, match=told):
        _trainer(callbacks=[WorstGroupMonitor()], max_epochs=1).fit(Two(), _loader(X, Y, G), _loader(X, Y, G))


def test_validation_batches_of_a_loader_of_another_kind():
    class Halves:
        def __iter__(self):
            return iter([(X[::2], Y[::2], G[::2]), (X[1::2], Y[1::2], G[1::2])])

        def __len__(self):
            return 2

    model, monitor = OwnModule(), WorstGroupMonitor()
    _trainer(callbacks=[monitor], max_epochs=1, num_sanity_val_steps=0).fit(model, _loader(X, Y, G), Halves())
    assert monitor.history[-1]["worst_group_acc"] == pytest.approx(min(_truth(model)))


def test_a_step_that_fails_leaves_no_hooks():
    class Fails(OwnModule):
        def validation_step(self, batch, batch_idx):
            raise KeyError("x")

        test_step = validation_step

    model = Fails()
    with pytest.raises(KeyError):
        _trainer(callbacks=[WorstGroupMonitor()]).test(model, _loader(X, Y, G), verbose=False)
    assert not any(module._forward_hooks for module in model.modules())


# Processes that do not see the same


class _Uneven(Frozen):
    """Rank 0 validates on everything, rank 1 on nothing."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def train_dataloader(self):
        mine = torch.arange(N) % 2 == self.trainer.global_rank
        return _loader(X[mine], Y[mine], G[mine])

    def val_dataloader(self):
        if self.kind == "a stream":
            return DataLoader(Stream((X, Y, G), on_rank=0), batch_size=7)
        size = N if self.trainer.global_rank == 0 else 0
        return _loader(X[:size], Y[:size], G[:size])


class _WriteHistory(pl.Callback):
    def __init__(self, path, *monitors):
        self.path, self.monitors = path, monitors

    def on_fit_end(self, trainer, pl_module):
        torch.save([monitor.history for monitor in self.monitors], f"{self.path}.{trainer.global_rank}")


@pytest.mark.parametrize("kind", ["a stream", "an empty loader"])
def test_a_process_without_validation_batches(tmp_path, two_processes, kind):
    monitor, diversity = WorstGroupMonitor(train=True), ActivationDiversityMonitor(mi=None)
    model = _Uneven(kind)
    start_method = two_processes["strategy"].removeprefix("ddp_")
    strategy = DDPStrategy(start_method=start_method, process_group_backend="gloo", timeout=timedelta(seconds=60))
    options = two_processes | {"strategy": strategy, "use_distributed_sampler": False, "max_epochs": 2}
    write = _WriteHistory(tmp_path / "h", monitor, diversity)
    _trainer(callbacks=[monitor, diversity, write], **options).fit(model)
    truth = _truth(model)
    (accuracy, measured), (other, _) = (torch.load(tmp_path / f"h.{rank}") for rank in range(2))
    val = [record for record in accuracy if record["stage"] == "val"]
    assert [record["epoch"] for record in val] == [0, 1]
    for record in val:
        assert [record[f"group_acc/{g}"] for g in range(4)] == pytest.approx(truth)
    sizes = torch.bincount(G)  # of both processes, known after the first epoch
    assert val[1]["adjusted_avg_acc"] == pytest.approx(float((torch.tensor(truth) * sizes).sum() / N))
    train = [record for record in accuracy if record["stage"] == "train"]
    assert [record["worst_group_acc"] for record in train] == pytest.approx([min(truth)] * 2)
    if kind == "a stream":
        assert other == accuracy
        assert [row["num_examples"] for row in measured] == [N, N]
    else:  # Lightning runs no validation hooks there
        assert other == train
        assert measured == []


def test_what_cannot_be_read_is_refused_before_training_without_a_sanity_check():
    loader = _loader(X, Y, 2**61 + G)
    model = OwnModule()
    model.training_step = lambda batch, batch_idx: pytest.fail("training began")
    with pytest.raises(ValueError, match=r"WorstGroupMonitor: group must lie in"):
        _trainer(callbacks=[WorstGroupMonitor()], num_sanity_val_steps=0).fit(model, loader, loader)
