"""MemorizationTracer in a Trainer."""

import csv

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from demem.callbacks import MemorizationTracer
from demem.data import SpuriousDigits
from demem.module import Classifier


class Net(pl.LightningModule):
    """A user's own module: batch norm, dropout, (x, y) batches."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.2))
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.body(x).mean((2, 3)))

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def _loaders(train=64, val=48):
    generator = torch.Generator().manual_seed(0)
    sets = []
    for count in (train, val):
        y = torch.randint(0, 2, (count,), generator=generator)
        x = torch.randn(count, 1, 6, 6, generator=generator) + y.view(-1, 1, 1, 1) * 0.5
        sets.append(TensorDataset(x, y))
    return DataLoader(sets[0], 16, shuffle=True), DataLoader(sets[1], 10)


def _trainer(callbacks, library=pl, epochs=2, **options):
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return library.Trainer(
        max_epochs=epochs, callbacks=callbacks, enable_model_summary=False, **{**settings, **options}
    )


def _fit(callbacks, seed=0, **options):
    pl.seed_everything(seed, verbose=False)
    model = Net()
    trainer = _trainer(callbacks, **options)
    trainer.fit(model, *_loaders())
    return model, trainer


def test_nothing_changes_in_the_run_or_the_model(tmp_path):
    plain, _ = _fit([])
    tracer = MemorizationTracer(dirpath=str(tmp_path), every_n_epochs=1)
    traced, _ = _fit([tracer])
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in traced.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in traced.modules())
    assert [h["epoch"] for h in tracer.history] == [0, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=0", "epoch=1"]


class Noisy(Dataset):
    """Augmented at random, each time an example is read."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + 0.1 * torch.randn_like(x), y


def test_pictures_of_augmented_examples_do_not_change_the_run(tmp_path):
    def weights(callbacks):
        pl.seed_everything(0, verbose=False)
        model, (train, val) = Net(), _loaders()
        _trainer(callbacks).fit(model, DataLoader(Noisy(train.dataset), 16, shuffle=True), val)
        return model.out.weight

    plain = weights([])
    traced = weights([MemorizationTracer(dirpath=str(tmp_path), every_n_epochs=1)])
    assert (tmp_path / "epoch=0" / "memorised_examples.png").exists()
    assert torch.equal(plain, traced)


def test_a_module_without_a_forward_is_traced_by_the_part_with_the_head(tmp_path):
    class Wrapper(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, _):
            self.net(batch[0])

        configure_optimizers = Net.configure_optimizers

    traced = []
    for module in (Net, Wrapper):
        pl.seed_everything(0, verbose=False)
        tracer = MemorizationTracer(dirpath=str(tmp_path))
        _trainer([tracer], epochs=1).fit(module(), *_loaders())
        traced.append(tracer)
    plain, wrapped = (tracer.report.columns["two_step"] for tracer in traced)
    assert list(wrapped) == [f"net.{name}" for name in plain]
    assert all(torch.equal(wrapped[f"net.{name}"], values) for name, values in plain.items())
    assert torch.equal(*(tracer.memorised_examples.position for tracer in traced))  # the deciding head was found


def test_report_files(tmp_path):
    tracer = MemorizationTracer(
        layers="body.0",
        scores=["taylor", "ablation", "magnitude", "gradient", "activation_difference"],
        memorised=5,
        dirpath=str(tmp_path),
    )
    _fit([tracer])
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"units.csv", "units.png", "memorised_examples.csv", "memorised_examples.png"}
    with (tmp_path / "units.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {"site", "unit", "taylor", "ablation", "magnitude", "gradient", "activation_difference"} <= set(rows[0])
    with (tmp_path / "memorised_examples.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5
    assert len(tracer.history) == 1
    assert [r[2] for r in tracer.history[0]["top"]] == sorted((r[2] for r in tracer.history[0]["top"]), reverse=True)


@pytest.mark.slow
def test_it_finds_the_minority_on_digits(tmp_path):
    pl.seed_everything(0, verbose=False)
    data = SpuriousDigits(seed=0)
    tracer = MemorizationTracer(dirpath=str(tmp_path), memorised=20)
    _trainer([tracer], epochs=12).fit(Classifier(lr=0.05), datamodule=data)
    groups = data.train_eval_dataset.group[tracer.memorised_examples.position]
    assert float(torch.isin(groups, torch.tensor([1, 2])).float().mean()) > 0.5  # 5% of the training set
    by_group = MemorizationTracer(atypical="group", dirpath=str(tmp_path / "group"), memorised=0)
    _trainer([by_group], epochs=1).fit(Classifier(lr=0.05), datamodule=SpuriousDigits(seed=0))
    assert by_group.report is not None


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true", "64-true"])
def test_precision_and_mapping_batches(tmp_path, precision):
    class Maps(Net):
        def unpack_batch(self, batch):
            return batch["pixels"], batch["answer"], None

        def training_step(self, batch, _):
            return super().training_step((batch["pixels"], batch["answer"]), _)

        def validation_step(self, batch, _):
            pass

    def collate(rows):
        return {"pixels": torch.stack([r[0] for r in rows]), "answer": torch.stack([r[1] for r in rows])}

    train, val = (DataLoader(loader.dataset, 16, collate_fn=collate) for loader in _loaders())
    tracer = MemorizationTracer(dirpath=str(tmp_path))
    _trainer([tracer], epochs=1, precision=precision).fit(Maps(), train, val)
    assert tracer.report is not None


def test_limits_are_kept_and_examples_capped(tmp_path):
    tracer = MemorizationTracer(layers="body.0", scores="taylor", dirpath=str(tmp_path), max_examples=12, memorised=0)
    _fit([tracer])
    assert tracer.report.impacts["taylor"]["body.0"].shape == (12, 6)
    assert repr(tracer.report) == "UnitReport(taylor of 6 units at body.0)"
    tracer = MemorizationTracer(layers="body.0", scores="taylor", dirpath=str(tmp_path), memorised=0)
    _fit([tracer], limit_val_batches=2)
    assert tracer.report.impacts["taylor"]["body.0"].shape == (20, 6)


def test_errors_come_before_training(tmp_path):
    with pytest.raises(ValueError, match="Unknown scores"):
        MemorizationTracer(scores=["magic"])
    for bad in ({"share": 0.0}, {"atypical": "odd"}, {"top_k": 0}, {"every_n_epochs": 0}, {"max_examples": 1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            MemorizationTracer(**bad)
    with pytest.raises(ValueError, match="matches nothing"):
        _fit([MemorizationTracer(layers="layer9", dirpath=str(tmp_path))])
    trainer = _trainer([MemorizationTracer(dirpath=str(tmp_path))])
    with pytest.raises(ValueError, match="validation"):
        trainer.fit(Net(), _loaders()[0])
    file = tmp_path / "taken"
    file.write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        _fit([MemorizationTracer(dirpath=str(file), memorised=0)])
    with pytest.raises(ValueError, match="needs groups"):
        _fit([MemorizationTracer(atypical="group", dirpath=str(tmp_path))])


def test_training_batches_that_cannot_be_read_cost_only_the_ranking(tmp_path):
    def collate(rows):
        x, y = (torch.stack(v) for v in zip(*rows, strict=True))
        return x, 0.8 * F.one_hot(y, 2) + 0.1  # soft labels, as mixup makes them

    train, val = _loaders()
    tracer = MemorizationTracer(dirpath=str(tmp_path))
    with pytest.warns(UserWarning, match=r"training examples are not ranked. Labels must be class indices"):
        _trainer([tracer], epochs=1).fit(Net(), DataLoader(train.dataset, 16, collate_fn=collate), val)
    assert tracer.memorised_examples is None
    assert (tmp_path / "units.csv").exists()


class Still(Net):
    """Does not learn, so that runs on other batches trace the same network."""

    def __init__(self) -> None:
        super().__init__()
        self.body[1].momentum = 0.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def _run(**options) -> None:
    pl.seed_everything(0, verbose=False)
    model = Still()
    tracer = MemorizationTracer(
        layers=["body.0", "out:input"],
        scores=["taylor", "two_step", "gradient", "activation_difference", "ablation"],
        memorised=6,
    )
    trainer = _trainer([tracer], epochs=1, limit_train_batches=1, **options)
    trainer.fit(model, *_loaders(val=47))


def test_two_processes_equal_one(tmp_path, two_processes):
    tables = []
    for devices, options in ((1, {}), (2, two_processes)):
        _run(default_root_dir=tmp_path / str(devices), **options)
        folder = tmp_path / str(devices) / "memorization"
        with (folder / "units.csv").open() as file:
            tables.append({(r["site"], r["unit"]): r for r in csv.DictReader(file)})
    assert tables[0].keys() == tables[1].keys()
    for key, row in tables[0].items():
        for column, value in row.items():
            if column not in ("site", "unit"):
                assert float(tables[1][key][column]) == pytest.approx(float(value), rel=1e-3, abs=1e-6), (key, column)
    assert (folder / "units.png").exists()


@pytest.mark.slow
def test_layers_that_do_not_run_and_heads_that_do_not_decide(tmp_path):
    class Projector(Net):
        """A layer for another loss, which the logits do not pass through."""

        def __init__(self):
            super().__init__()
            self.projector = nn.Linear(6, 2)

    class Averaged(Projector):
        def forward(self, x):
            z = self.body(x).mean((2, 3))
            return (self.out(z) + self.projector(z)) / 2

    def traced(module):
        pl.seed_everything(0, verbose=False)
        tracer = MemorizationTracer(dirpath=str(tmp_path))
        _trainer([tracer], epochs=1).fit(module(), *_loaders())
        return tracer

    plain, tracer = traced(Net), traced(Projector)
    assert list(tracer.report.columns["taylor"]) == list(plain.report.columns["taylor"])
    assert tracer.memorised_examples is not None
    with pytest.warns(UserWarning, match="'projector' does not give the logits by itself"):
        tracer = traced(Averaged)
    assert "projector:input" in tracer.report.columns["taylor"]
    assert tracer.memorised_examples is None


class Inference(Net):
    """Trains by its parts; forward is for inference."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)

    def training_step(self, batch, _):
        return F.cross_entropy(self.out(self.body(batch[0]).mean((2, 3))), batch[1])


def test_a_network_that_cannot_be_traced_is_refused_before_it_is_trained(tmp_path):
    trainer = _trainer([MemorizationTracer(dirpath=str(tmp_path))])
    with pytest.raises(ValueError, match=r"MemorizationTracer: .*torch.no_grad"):
        trainer.fit(Inference(), *_loaders())
    assert trainer.global_step == 0


def test_what_fails_after_training_warns(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("demem.tracing.UnitReport.to_csv", full)
    with pytest.warns(UserWarning, match=r"writes no report, because .*No space left"):
        _, trainer = _fit([MemorizationTracer(dirpath=str(tmp_path))])
    assert trainer.global_step == 8


def test_a_report_that_fails_half_way_leaves_the_earlier_one_whole(tmp_path, monkeypatch):
    folder = tmp_path / "trace"
    folder.mkdir()
    (folder / "units.csv").write_text("earlier")
    monkeypatch.setattr("demem.tracing.UnitReport.to_csv", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.warns(UserWarning, match="disk full"):
        _fit([MemorizationTracer(dirpath=str(folder))])
    assert (folder / "units.csv").read_text() == "earlier"
    assert [path.name for path in folder.iterdir()] == ["units.csv"]
