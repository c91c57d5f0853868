"""Every validation and every checkpoint sees the cured network, and training goes on from the trained one."""

from dataclasses import replace
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from test_remover import QUIET, TEST, VAL, Net, _fit, _loaders, _set, _worst

from demem.callbacks import MemorizationRemover
from demem.callbacks import remover as remover_module
from demem.removal import ATYPICAL_WEIGHTS

HEAD = ("net.4.weight", "net.4.bias")


class _Seen(pl.Callback):
    """The head and the other weights after each validation and before each epoch's first step."""

    def __init__(self):
        self.validated, self.trained = [], []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.validated.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.trained.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def _keep(folder, **options):
    return ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", **options)


def _states(keep):
    paths = sorted(Path(keep.dirpath).glob("*.ckpt"))
    return [torch.load(path, weights_only=True)["state_dict"] for path in paths]


@pytest.mark.parametrize("options", [{}, {"save_weights_only": True}, {"save_on_train_epoch_end": True}])
def test_every_checkpoint_holds_what_validation_saw(tmp_path, options):
    keep, seen = _keep(tmp_path, **options), _Seen()
    remover = MemorizationRemover()
    module, _ = _fit(remover, callbacks=[seen, keep], enable_checkpointing=True)
    assert remover.groups.shortcut
    saved = _states(keep)
    assert len(saved) == len(seen.validated) == 4
    for state, validated in zip(saved, seen.validated, strict=True):
        assert all(torch.equal(state[name], value) for name, value in validated.items())
    for name, value in module.state_dict().items():
        assert torch.equal(saved[-1][name], value)
    # In between the head is a refitted one, and training goes on from the trained one.
    for validated, trained in zip(seen.validated[:-1], seen.trained[1:], strict=True):
        assert not torch.equal(validated[HEAD[0]], trained[HEAD[0]])
        assert all(torch.equal(validated[name], value) for name, value in trained.items() if name not in HEAD)


def test_refits_in_between_do_not_change_training(monkeypatch):
    with_refits, _ = _fit(MemorizationRemover())
    monkeypatch.setattr(MemorizationRemover, "on_validation_start", lambda *_: None)
    without, _ = _fit(MemorizationRemover())
    for a, b in zip(with_refits.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_best_checkpoint_lifts_the_worst_group(tmp_path):
    def best(remover, monitor):
        keep = ModelCheckpoint(tmp_path / str(monitor)[:3], monitor=monitor, mode="max", filename="best")
        module, _ = _fit(remover, callbacks=[keep], enable_checkpointing=True)
        module.load_state_dict(torch.load(keep.best_model_path, weights_only=True)["state_dict"])
        return _worst(module)

    assert best(MemorizationRemover(), "val/worst_inferred_group_acc") > best(None, None) + 0.1


def test_metric_is_the_cross_fitted_accuracy_on_the_worst_inferred_group():
    remover = MemorizationRemover()
    _, trainer = _fit(remover)
    kept = next(record for record in remover.rounds if record.chosen)
    assert float(trainer.callback_metrics["val/worst_inferred_group_acc"]) == pytest.approx(kept.worst)


@pytest.mark.parametrize("ends", ["first", "last"])
def test_training_goes_on_from_the_trained_network(tmp_path, ends):
    """Resumed from a checkpoint within the run, or with more epochs from the last one."""
    epochs = 2 if ends == "last" else 4
    keep = _keep(tmp_path)
    before = _Seen()
    _fit(MemorizationRemover(), epochs=epochs, callbacks=[before, keep], enable_checkpointing=True)
    path = tmp_path / ("epoch=1.ckpt" if ends == "last" else "epoch=0.ckpt")
    trained = torch.load(path, weights_only=True)["callbacks"][MemorizationRemover().state_key]["trained"]
    assert set(HEAD) <= set(trained)
    after = _Seen()
    _fit(MemorizationRemover(), epochs=4, callbacks=[after], ckpt_path=path)
    for name, value in trained.items():
        assert torch.equal(after.trained[0][name], value)
    if ends == "first":
        for name, value in after.trained[0].items():
            assert torch.equal(before.trained[1][name], value)


def test_without_a_shortcut_validation_sees_the_network_as_it_is(monkeypatch):
    monkeypatch.setattr("demem.removal.rounds.clearly_better", lambda *_: False)
    monkeypatch.setattr("demem.groups.inferred.FEW_ERRORS", 0.0)
    judge = remover_module.infer_groups_of_run
    without = lambda *args: (lambda found: (found[0].without_shortcut(), *found[1:]))(judge(*args))  # noqa: E731
    monkeypatch.setattr(remover_module, "infer_groups_of_run", without)
    seen, plain = _Seen(), _Seen()
    _fit(MemorizationRemover(), callbacks=[seen])
    _fit(None, callbacks=[plain])
    for ours, theirs in zip(seen.validated, plain.validated, strict=True):
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_refit_that_fails_warns_once_and_training_goes_on(monkeypatch):
    def fails(*_):
        raise RuntimeError("no space left")

    monkeypatch.setattr(remover_module, "refit_for_now", fails)
    trainer = pl.Trainer(**QUIET, max_epochs=3, callbacks=[MemorizationRemover()])
    with pytest.warns(UserWarning, match="no refitted head in validations.*no space left") as record:
        trainer.fit(Net(), **_loaders())
    assert sum("no refitted head" in str(w.message) for w in record) == 1
    assert trainer.current_epoch == 3


class _Drawn(pl.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.append(batch[0])


LARGE = _set(800, 0.9, 4)


def _positions(rows):
    return {int((LARGE.tensors[0] == row).all(1).nonzero()[0]) for row in torch.cat(rows)}


@pytest.mark.parametrize("held_out", [None, 0.3])
@pytest.mark.parametrize("rebalance", [True, False])
def test_examples_that_are_kept_back_are_not_trained_on(held_out, rebalance, tmp_path, monkeypatch):
    monkeypatch.setattr("demem.callbacks.remover.choose_round", lambda *_, **__: 1)  # whatever a few examples say
    loaders = _loaders(LARGE)
    if held_out is None:
        del loaders["val_dataloaders"]
    drawn, keep = _Drawn(), _keep(tmp_path, save_on_train_epoch_end=True)
    remover = MemorizationRemover(held_out=held_out, rebalance=rebalance)
    module, _ = _fit(remover, callbacks=[drawn, keep], loaders=loaders, enable_checkpointing=True)
    plain, _ = _fit(None, loaders=_loaders(LARGE))
    share = 0.2 if held_out is None else held_out
    kept_back = set(remover._kept_back.tolist())
    assert len(kept_back) == len(remover.groups.held_out) == round(share * len(LARGE))
    assert len(remover.groups.index) == len(LARGE) - len(kept_back)
    assert not kept_back & _positions(drawn.rows)
    assert _worst(module, TEST) > _worst(plain, TEST) + 0.05
    trained = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["callbacks"][remover.state_key]["trained"]
    assert set(trained) == set(HEAD)  # a checkpoint is cured without validations, too


def test_without_a_shortcut_nothing_is_kept_back(monkeypatch):
    judge = remover_module.infer_groups_of_run
    without = lambda *args: (lambda found: (found[0].without_shortcut(), *found[1:]))(judge(*args))  # noqa: E731
    monkeypatch.setattr(remover_module, "infer_groups_of_run", without)
    monkeypatch.setattr("demem.groups.inferred.FEW_ERRORS", 1.0)
    remover = MemorizationRemover(held_out=0.2)
    module, _ = _fit(remover)
    plain, _ = _fit(None)
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [record.refitted for record in remover.rounds] == [False]


def test_validation_data_are_used_where_there_are_any():
    remover = MemorizationRemover()
    _fit(remover)
    assert remover._kept_back is None
    assert len(remover.groups.held_out) == len(VAL)


def test_another_fold_starts_anew():
    """Of the first fold neither the weight of atypical examples nor a failure nor an accuracy is left."""
    remover = MemorizationRemover()
    _fit(remover)
    remover._weight, remover._refits, remover._worst = 30.0, False, 0.123
    again, fresh = _Seen(), _Seen()
    _fit(remover, callbacks=[again])
    _fit(MemorizationRemover(), callbacks=[fresh])
    for ours, theirs in zip(again.validated, fresh.validated, strict=True):
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_a_resumed_run_refits_with_the_weight_that_was_chosen(tmp_path, monkeypatch):
    weights, refit = [], remover_module.refit_for_now

    def noted(data, groups, choose, asked):
        weights.append(tuple(asked))
        head, record = refit(data, groups, choose, asked)
        return head, replace(record, weight=3.0)

    monkeypatch.setattr(remover_module, "refit_for_now", noted)
    _fit(MemorizationRemover(), callbacks=[_keep(tmp_path)], enable_checkpointing=True)
    assert weights == [ATYPICAL_WEIGHTS, (3.0,), (3.0,)]
    weights.clear()
    _fit(MemorizationRemover(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert set(weights) == {(3.0,)}


class _ChoosesNone(MemorizationRemover):
    def choose(self, rounds, held_out, groups):
        return len(rounds)


def test_a_round_that_is_not_there_is_not_kept():
    trainer = pl.Trainer(**QUIET, max_epochs=2, callbacks=[_ChoosesNone()])
    with pytest.warns(UserWarning, match="no refitted head in validations.*must return the index of one of the"):
        trainer.fit(Net(), **_loaders())
