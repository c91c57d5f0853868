"""What goes wrong once training has begun costs no run, and what would go wrong then is refused before."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from test_remover import MANY, TRAIN, VAL, Net, NeverSure, _fit, _loaders, _looks_twice, _verdicts
from torch.utils.data import DataLoader, TensorDataset

import demem.callbacks.remover
from demem.callbacks import MemorizationRemover

METRIC = "val/worst_inferred_group_acc"


@pytest.mark.parametrize("keep", [ModelCheckpoint, EarlyStopping])
@pytest.mark.parametrize("held_out", ["none", "a share, and no shortcut"])
def test_its_metric_is_there_whatever_is_held_out(keep, held_out, tmp_path, monkeypatch):
    if held_out != "none":
        _verdicts(monkeypatch, "hard examples")
    options = {"monitor": METRIC, "mode": "max"} | ({"dirpath": tmp_path} if keep is ModelCheckpoint else {})
    loaders = _loaders() | ({"val_dataloaders": None} if held_out == "none" else {})
    remover, seen = MemorizationRemover(held_out=None if held_out == "none" else 0.2), keep(**options)
    _, trainer = _fit(
        remover, epochs=2, callbacks=[seen], loaders=loaders, enable_checkpointing=keep is ModelCheckpoint
    )
    assert 0 <= float(trainer.callback_metrics[METRIC]) <= 1


def test_without_validations_a_callback_that_comes_too_early_is_named_before_training():
    with pytest.raises(ValueError, match=r"too late for EarlyStopping.*Put EarlyStopping after it"):
        _fit(
            None,
            callbacks=[EarlyStopping(METRIC, mode="max"), MemorizationRemover()],
            loaders=_loaders() | {"val_dataloaders": None},
        )


class _Diverges(Net):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e20)


def test_a_network_that_diverges_ends_its_run_with_warnings(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor=METRIC, mode="max")
    with pytest.warns(UserWarning, match="NaN or infinite") as told:
        _, trainer = _fit(NeverSure(), _Diverges(), epochs=3, callbacks=[keep], enable_checkpointing=True)
    said = " ".join(str(warning.message) for warning in told)
    assert trainer.global_step == 3 * 8
    assert "another callback changed the weights" not in said


def test_a_second_look_that_fails_costs_no_run(monkeypatch):
    _looks_twice(monkeypatch)
    real, looks = demem.callbacks.remover.infer_groups_of_run, []

    def look(*args):
        looks.append(1)
        if len(looks) > 1:
            raise OSError("Stale file handle")
        return real(*args)

    monkeypatch.setattr("demem.callbacks.remover.infer_groups_of_run", look)
    with pytest.warns(UserWarning, match="keeps to its earlier look, because OSError: Stale file handle"):
        _, trainer = _fit(MemorizationRemover(), epochs=2)
    assert trainer.global_step == 2 * 8


@pytest.mark.parametrize("change", ["fewer examples", "another order"])
def test_training_data_that_are_loaded_anew_and_differ_are_not_rebalanced(change):
    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            rows = torch.arange(len(TRAIN))
            if self.trainer.current_epoch > 0:
                rows = rows[:100] if change == "fewer examples" else rows.roll(1)
            return DataLoader(TensorDataset(*(t[rows] for t in TRAIN.tensors)), 32, shuffle=True)

        def val_dataloader(self):
            return DataLoader(VAL, 32)

    class Samplers(pl.Callback):
        def __init__(self):
            self.kinds = []

        def on_train_batch_end(self, trainer, *_):
            if trainer.is_last_batch:
                self.kinds.append(type(trainer.train_dataloader.batch_sampler.sampler).__name__)

    seen, options = Samplers(), {"reload_dataloaders_every_n_epochs": 1}
    with pytest.warns(UserWarning, match="does not rebalance an epoch"):
        _fit(
            MemorizationRemover(use_groups=True), epochs=3, callbacks=[seen], loaders={"datamodule": Data()}, **options
        )
    assert seen.kinds == ["ReweightedSampler", "RandomSampler", "RandomSampler"]


def test_an_interrupt_in_the_removal_leaves_the_network_as_trained(monkeypatch):
    class Keeps(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def interrupted(model, parameters, *args, **kwargs):
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr("demem.run.cure.fine_tune", interrupted)
    module, kept = Net(), Keeps()
    with pytest.raises(SystemExit):
        _fit(None, module, epochs=2, callbacks=[kept, MemorizationRemover(use_groups=True)], loaders=_loaders(val=MANY))
    assert all(torch.equal(value, kept.state[name]) for name, value in module.state_dict().items())


def test_what_it_took_from_one_module_is_not_put_in_another():
    class Keeps(pl.Callback):
        first = None

        def on_train_batch_start(self, trainer, pl_module, *_):
            self.first = self.first or {name: value.clone() for name, value in pl_module.state_dict().items()}

    remover, other, kept = MemorizationRemover(use_groups=True), Net(seed=1), Keeps()
    state = {name: value.clone() for name, value in other.state_dict().items()}
    _, trainer = _fit(remover, epochs=2)
    assert remover._trained
    trainer.fit_loop.max_epochs = 3
    trainer.callbacks.append(kept)
    trainer.fit(other, **_loaders())
    assert all(torch.equal(value, kept.first[name]) for name, value in state.items())
