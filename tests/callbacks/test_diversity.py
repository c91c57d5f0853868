import warnings

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from demem.callbacks import ActivationDiversityMonitor
from demem.measures import collect_activations, mean_mi, measure_diversity

QUIET = dict(
    accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False
)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 12), nn.ReLU())
        self.fc = nn.Linear(12, 2)

    def forward(self, x):
        return self.fc(self.net(x))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def data(size: int = 101) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 6, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


def loaders() -> dict:
    return dict(
        train_dataloaders=DataLoader(data(), 20, shuffle=True), val_dataloaders=DataLoader(data(), batch_size=16)
    )


def fit(*callbacks, seed: int = 0, trainer_class=pl.Trainer, **options):
    pl.seed_everything(seed, verbose=False)
    model = Net()
    trainer = trainer_class(**{**QUIET, "max_epochs": 2, **options}, callbacks=list(callbacks))
    trainer.fit(model, **loaders())
    return model, trainer


def test_logs_what_the_measures_give_on_the_validation_set():
    monitor = ActivationDiversityMonitor()
    model, trainer = fit(monitor)
    x = collect_activations(model, [data().tensors[0]], max_samples=None)
    assert list(x) == ["net.0", "net.3", "fc:input"]
    expected = measure_diversity(
        x, estimator="binned", mi_bins=16, mi_binning="quantile", mi_correction="miller_madow", max_units=128
    )
    logged = trainer.callback_metrics
    for site, h in expected.entropy.items():
        assert float(logged[f"diversity/entropy/{site}"]) == pytest.approx(float(h.mean()), abs=1e-5)
    for site, block in expected.site_mi().items():
        assert float(logged[f"diversity/mi/{site}"]) == pytest.approx(float(mean_mi(block, False)), abs=1e-5)
    assert float(logged["diversity/entropy"]) == pytest.approx(expected.mean_entropy, abs=1e-5)
    total = float(mean_mi(expected.mutual_information, False))
    assert float(logged["diversity/mi"]) == pytest.approx(total, abs=1e-5)


def test_history_has_a_row_a_validation_without_the_sanity_check():
    monitor = ActivationDiversityMonitor()
    _, trainer = fit(monitor, max_epochs=3, num_sanity_val_steps=2)
    assert [(row["epoch"], row["step"], row["num_examples"]) for row in monitor.history] == [
        (0, 6, 101), (1, 12, 101), (2, 18, 101)
    ]  # fmt: skip
    assert monitor.history[-1]["diversity/mi"] == pytest.approx(float(trainer.callback_metrics["diversity/mi"]))


def test_training_is_the_same_with_and_without():
    plain, _ = fit()
    watched, _ = fit(ActivationDiversityMonitor())
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())


def test_drives_model_checkpoint_and_early_stopping(tmp_path):
    monitor = ActivationDiversityMonitor(mi_bins=4)
    checkpoint = ModelCheckpoint(tmp_path, monitor="diversity/entropy", mode="max", filename="{epoch}")
    stop = EarlyStopping("diversity/mi", min_delta=1e9, patience=1)
    _, trainer = fit(checkpoint, stop, monitor, max_epochs=6, enable_checkpointing=True)
    assert trainer.current_epoch == 2  # the first epoch sets the mark, the second is not better
    best = max(monitor.history, key=lambda row: row["diversity/entropy"])
    assert checkpoint.best_model_path.endswith(f"epoch={best['epoch']}.ckpt")
    assert float(checkpoint.best_model_score) == pytest.approx(best["diversity/entropy"])


def test_history_survives_a_checkpoint(tmp_path):
    monitor = ActivationDiversityMonitor("net.0")
    _, trainer = fit(monitor)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"][monitor.state_key]
    assert saved["history"] == monitor.history
    again = ActivationDiversityMonitor("net.0")
    trainer = pl.Trainer(**QUIET, max_epochs=3, callbacks=[again, ActivationDiversityMonitor("net.3")])
    trainer.fit(Net(), **loaders(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert again.history[:2] == monitor.history
    assert [row["epoch"] for row in again.history] == [0, 1, 2]
    assert again.state_key != trainer.callbacks[1].state_key


def test_bounded_sample_of_examples_and_units():
    monitors = [ActivationDiversityMonitor(max_examples=50, max_units=8, seed=s) for s in (0, 0, 1)]
    for monitor in monitors:
        fit(monitor, max_epochs=1)
    one, same, other = (m.history[0] for m in monitors)
    assert one == same
    assert one["num_examples"] == 50
    assert one["diversity/mi"] != other["diversity/mi"]
    assert sum(map(len, monitors[0].latest.mi_units.values())) == 8


def test_entropy_alone_and_every_second_epoch():
    monitor = ActivationDiversityMonitor(mi=None, every_n_epochs=2, binning="per_site")
    fit(monitor, max_epochs=3)
    assert [row["epoch"] for row in monitor.history] == [0, 2]
    assert not [name for name in monitor.history[0] if name.startswith("diversity/mi")]


def test_epochs_are_counted_from_the_last_measurement(tmp_path):
    monitor = ActivationDiversityMonitor(mi=None, every_n_epochs=2)
    model, trainer = fit(monitor, max_epochs=4, check_val_every_n_epoch=2)
    assert [row["epoch"] for row in monitor.history] == [1, 3]
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = ActivationDiversityMonitor(mi=None, every_n_epochs=2)
    trainer = pl.Trainer(**QUIET, max_epochs=8, callbacks=[again])
    trainer.fit(model, **loaders(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert [row["epoch"] for row in again.history] == [1, 3, 5, 7]
    logged = trainer.validate(model, loaders()["val_dataloaders"], verbose=False)
    assert "diversity/entropy" in logged[0]


@pytest.mark.filterwarnings("ignore::demem.measures.TiesWarning")
def test_ksg():
    monitor = ActivationDiversityMonitor("net.0", mi="ksg")
    model, _ = fit(monitor, max_epochs=1)
    x = collect_activations(model, [data().tensors[0]], "net.0", max_samples=None)
    expected = float(mean_mi(measure_diversity(x).mutual_information, False))
    assert monitor.history[0]["diversity/mi"] == pytest.approx(expected, abs=1e-5)


def test_limited_validation_and_only_the_first_loader():
    monitor = ActivationDiversityMonitor()
    trainer = pl.Trainer(**QUIET, max_epochs=1, limit_val_batches=3, callbacks=[monitor])
    trainer.fit(Net(), DataLoader(data(), 20), [DataLoader(data(), 16), DataLoader(data(), 16)])
    assert monitor.history[0]["num_examples"] == 48


def test_runs_in_a_lightning_pytorch_trainer():
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        __init__ = lambda self: (lightning.LightningModule.__init__(self), setattr(self, "fc", nn.Linear(6, 2)))[0]  # noqa: E731
        forward = lambda self, x: self.fc(x)  # noqa: E731
        training_step = Net.training_step
        validation_step = Net.validation_step
        configure_optimizers = Net.configure_optimizers

    monitor = ActivationDiversityMonitor()
    trainer = lightning.Trainer(**QUIET, max_epochs=1, callbacks=[monitor])
    trainer.fit(Module(), **loaders())
    assert "diversity/entropy/fc:input" in trainer.callback_metrics


def test_nan_is_named_with_its_site_and_costs_no_run(tmp_path):
    pl.seed_everything(0, verbose=False)
    model = Net()
    with torch.no_grad():
        model.net[3].weight[0, 0] = float("nan")
    model.training_step = lambda batch, batch_idx: None
    keep = ModelCheckpoint(tmp_path, monitor="diversity/mi")
    options = QUIET | {"enable_checkpointing": True}
    trainer = pl.Trainer(**options, max_epochs=1, callbacks=[ActivationDiversityMonitor(), keep])
    with pytest.warns(UserWarning, match=r"measures nothing, because .* site 'net\.3' are NaN or infinite"):
        trainer.fit(model, **loaders())
    with pytest.raises(ValueError, match=r"site 'net\.3' are NaN or infinite"):
        trainer.validate(model, loaders()["val_dataloaders"], verbose=False)


def test_batches_that_a_step_leaves_out():
    class Skips(Net):
        def validation_step(self, batch, batch_idx):
            return None if batch_idx == 3 else super().validation_step(batch, batch_idx)

    monitor = ActivationDiversityMonitor()
    pl.Trainer(**QUIET, max_epochs=1, callbacks=[monitor]).fit(Skips(), **loaders())
    assert monitor.history[0]["num_examples"] == 101 - 16


class Sets(Net):
    """An example is a set of three rows, of which the body reads one at a time."""

    def forward(self, x):
        return self.fc(self.net(x.view(-1, 2).repeat(1, 3)).view(len(x), 3, -1).mean(1))


@pytest.mark.parametrize("sanity", [2, 0])
def test_layers_that_have_not_one_row_for_each_example_are_left_out_unless_named(sanity):
    def watched(layers=None):
        monitor = ActivationDiversityMonitor(layers)
        trainer = pl.Trainer(**QUIET, max_epochs=1, num_sanity_val_steps=sanity, callbacks=[monitor])
        trainer.fit(Sets(), **loaders())
        return monitor

    assert list(watched().latest.entropy) == ["fc:input"]
    expected = (
        pytest.warns(UserWarning, match="different numbers of rows")
        if sanity == 0
        else pytest.raises(ValueError, match="different numbers of rows")
    )
    with expected:
        watched(["net.0", "fc:input"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_units": 1}, "at least 2"),
        ({"every_n_epochs": 0}, "at least 1"),
        ({"reduce": "positions"}, "positions"),
        ({"binning": "quantile"}, "Unknown binning"),
        ({"mi": "exact"}, "Unknown mi"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ActivationDiversityMonitor(**arguments)


def test_a_layer_that_does_not_exist():
    with pytest.raises(ValueError, match="matches nothing"):
        fit(ActivationDiversityMonitor("layer9"), num_sanity_val_steps=0)


class Record(pl.Callback):
    """Writes what rank 0 ended up with."""

    def __init__(self, monitor: ActivationDiversityMonitor, path: str) -> None:
        self.monitor, self.path = monitor, path

    def on_fit_end(self, trainer, pl_module):
        torch.save(self.monitor.history, f"{self.path}.{trainer.global_rank}")


@pytest.mark.parametrize("max_examples", [1000, 40])
def test_two_processes_equal_one(tmp_path, two_processes, max_examples):
    histories = []
    for devices in (1, 2):
        monitor = ActivationDiversityMonitor(max_examples=max_examples)
        options = two_processes if devices == 2 else dict(devices=1)
        # No learning: the processes see other training batches than one process does.
        pl.seed_everything(0, verbose=False)
        warnings.filterwarnings("error", ".*sync_dist=True.*")  # also in the other process, which is a fork
        model = Net()
        for p in model.parameters():
            p.requires_grad_(p is model.fc.bias)
        record = Record(monitor, str(tmp_path / "h"))
        trainer = pl.Trainer(**QUIET | options, max_epochs=1, num_sanity_val_steps=2, callbacks=[monitor, record])
        trainer.fit(model, **loaders())
        histories += [torch.load(tmp_path / f"h.{rank}") for rank in range(devices)]
    alone, first, second = (history[0] for history in histories)
    assert first == second
    for name, value in alone.items():
        if name != "step":
            assert first[name] == pytest.approx(value, abs=1e-5)


def test_layers_that_do_not_run_are_left_out_unless_named():
    class Projector(Net):
        def __init__(self):
            super().__init__()
            self.projector = nn.Linear(12, 4)

    def watched(**options):
        monitor = ActivationDiversityMonitor(**options)
        pl.Trainer(**QUIET, max_epochs=1, callbacks=[monitor]).fit(Projector(), **loaders())
        return monitor

    assert list(watched().latest.entropy) == ["net.0", "net.3", "fc"]
    with pytest.raises(RuntimeError, match=r"did not run in the forward pass.*projector"):
        watched(layers=["net.0", "projector"])


@pytest.mark.parametrize("layers", [None, "no_such_layer"])
def test_layers_that_are_not_there_are_refused_before_training(layers):
    class Headless(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight, self.steps = nn.Parameter(torch.randn(4, 2)), 0

        def forward(self, x):
            return x @ self.weight

        def training_step(self, batch, batch_idx):
            self.steps += 1
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(8, 4), torch.arange(8) % 2), batch_size=4
    )
    module = Headless()
    trainer = pl.Trainer(**QUIET, max_epochs=1, callbacks=[ActivationDiversityMonitor(layers=layers)])
    with pytest.raises(ValueError, match="ActivationDiversityMonitor"):
        trainer.fit(module, loader, loader)
    assert module.steps == 0
