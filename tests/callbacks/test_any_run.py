"""Draw Trainer options, batches, networks, callbacks and faults: a run is refused before training or ends as it should.

Each draw is fitted once without callbacks and once with them, from the same random state.
"""

import random
import traceback
import warnings
from collections import UserDict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import demem
from demem.callbacks import ActivationDiversityMonitor, MemorizationRemover, MemorizationTracer, WorstGroupMonitor

OWN = str(Path(demem.__file__).parent)
READERS = {"worst_group": WorstGroupMonitor, "diversity": ActivationDiversityMonitor, "tracer": MemorizationTracer}


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Fault(RuntimeError):
    """What the drawn fault raises."""


def _rows(count, seed):
    """Two classes that feature 0 tells, and feature 1 tells more easily for nine of ten examples."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    shortcut = torch.where(torch.arange(count) % 20 < 18, y, 1 - y)
    x = torch.randn(count, 6, generator=generator)
    x[:, 0] += 2 * y
    x[:, 1] += 5 * shortcut
    return x, y, 2 * y + shortcut


class Lstm(nn.Module):
    """Reads the features as a sequence, time first."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(1, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.rnn(x.T[..., None])[0][-1])


class Named(nn.Module):
    """Calls its layers by keyword."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())]
        )
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(input=x)
        return self.out(input=x)


class Tied(nn.Module):
    """Its head is its first layer, too."""

    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.out.weight = self.first.weight

    def forward(self, x):
        return self.out(self.first(x).relu())[:, :2]


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)),
    "norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(True), nn.Dropout(0.3), nn.Linear(8, 2)),
    "one_logit": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0)),
    "no_bias": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2, bias=False)),
    "linear": lambda: nn.Linear(6, 2),
    "no_head": lambda: nn.Conv1d(6, 2, 1),
    "lstm": Lstm,
    "named": Named,
    "tied": Tied,
}


class Net(pl.LightningModule):
    def __init__(self, model, fault):
        super().__init__()
        self.model, self.fault = MODELS[model](), fault
        self.model_name = model

    def forward(self, x):
        if self.model_name == "no_head":
            return self.model(x[..., None])[..., 0]
        return self.model(x)

    def loss(self, batch):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, Mapping) else batch[:2]
        z = self(x)
        y = y if y.is_floating_point() and y.ndim == 2 else y.long()
        return F.binary_cross_entropy_with_logits(z, y.to(z)) if z.ndim == 1 else F.cross_entropy(z, y)

    def training_step(self, batch, i):
        if self.fault == f"step {self.global_step}":
            raise Fault
        return self.loss(batch)

    def validation_step(self, batch, i):
        if self.fault == "validation" and not self.trainer.sanity_checking and self.global_step > 0:
            raise Fault
        self.log("loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


class Breaks(TensorDataset):
    """Cannot be read any more after so many reads."""

    reads = None

    def __getitem__(self, i):
        if self.reads is not None:
            self.reads -= 1
            if self.reads < 0:
                raise Fault
        return super().__getitem__(i)


def _collate(form):
    def collate(samples):
        x, y, group, index = (torch.stack(part) for part in zip(*samples, strict=True))
        return {
            "pair": (x, y),
            "triple": (x, y, group),
            "list": [x, y, group],
            "dict": {"x": x, "y": y, "group": group},
            "encoding": UserDict({"x": x, "y": y}),  # as a tokenizer gives
            "named": Pair(x, y),
            "float labels": (x, y.float()),
            "index": (x, y, index),
            "large ids": (x, y, group + 2**61),
            "drops one": (x[1:], y[1:]),
            "nan": (x + torch.nan, y),
        }[form]

    return collate


FORMS = [
    "pair",
    "triple",
    "list",
    "dict",
    "encoding",
    "named",
    "float labels",
    "index",
    "large ids",
    "drops one",
    "nan",
]
RUNS = st.fixed_dictionaries(
    {
        "callbacks": st.sets(st.sampled_from([*READERS, "remover"]), min_size=1),
        "model": st.sampled_from(sorted(MODELS)),
        "form": st.sampled_from(FORMS),
        "fault": st.sampled_from([None, None, "step 0", "step 3", "validation", "reads 150", "reads 700"]),
        "batch_size": st.sampled_from([7, 16]),
        "options": st.fixed_dictionaries(
            {"max_epochs": st.integers(1, 2)},
            optional={
                "accumulate_grad_batches": st.just(2),
                "gradient_clip_val": st.just(0.5),
                "precision": st.sampled_from(["bf16-mixed", "bf16-true", "64-true"]),
                "limit_train_batches": st.sampled_from([0.5, 4]),
                "limit_val_batches": st.sampled_from([0, 0.5, 2]),
                "val_check_interval": st.just(0.5),
                "check_val_every_n_epoch": st.just(2),
                "num_sanity_val_steps": st.just(2),
                "reload_dataloaders_every_n_epochs": st.just(1),
                "max_steps": st.just(5),
                "fast_dev_run": st.just(True),
                "deterministic": st.just(True),
                "overfit_batches": st.just(3),
            },
        ),
    }
)


def _fit(run, folder, callbacks):
    torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002 (the state that is compared)
    net = Net(run["model"], run["fault"])
    sets = [Breaks(*_rows(80, 0), torch.arange(80)), Breaks(*_rows(40, 1), torch.arange(40))]
    if (run["fault"] or "").startswith("reads") and callbacks:
        sets[0].reads = int(run["fault"].split()[1])
    options = {"batch_size": run["batch_size"], "collate_fn": _collate(run["form"])}
    loaders = [DataLoader(sets[0], shuffle=True, **options), DataLoader(sets[1], **options)]
    trainer = pl.Trainer(
        callbacks=[made() for made in callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **({"num_sanity_val_steps": 0} | run["options"]),
    )
    error = None
    try:
        trainer.fit(net, *loaders)
    except Exception as raised:
        error = raised
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    return net, trainer, loaders[0], error, states


def _made_by_demem(error):
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(OWN)


def _check(run, folder):
    made = READERS | {"remover": lambda: MemorizationRemover(shares=(0.5,), fine_tune=1)}
    callbacks = [made[name] for name in sorted(run["callbacks"])]
    plain, plain_trainer, _, plain_error, plain_states = _fit(run, folder, [])
    net, trainer, loader, error, states = _fit(run, folder, callbacks)
    if error is not None and not isinstance(error, Fault):
        if plain_error is not None:
            assert type(error) is type(plain_error) or _made_by_demem(error)
        else:
            assert _made_by_demem(error), "".join(traceback.format_exception(error))
            early = trainer.global_step == 0 or trainer.fast_dev_run or run["form"] == "nan"  # that diverges later
            assert early, "".join(traceback.format_exception(error))
            assert len(str(error)) > 30
    elif error is None:
        assert plain_error is None
        assert trainer.global_step == plain_trainer.global_step
        if all(p.isfinite().all() for p in plain.parameters()):
            assert all(p.isfinite().all() for p in net.parameters())
    # Nothing of demem is left, whatever happened.
    assert net.state_dict().keys() == plain.state_dict().keys()
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.requires_grad and not p._backward_hooks for p in net.parameters())
    assert type(loader.batch_sampler.sampler) is RandomSampler
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    if type(error) is type(plain_error):
        modes = [module.training for module in net.modules()]
        assert modes == [module.training for module in plain.modules()]
        if "remover" not in run["callbacks"]:  # monitors change nothing at all
            for mine, its in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
                assert torch.equal(mine, its) or not its.isfinite().all()
            assert torch.equal(states[0], plain_states[0])
            assert states[1:] == plain_states[1:]


def _fuzz(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


@given(run=RUNS)
@_fuzz(20)
@pytest.mark.filterwarnings("ignore")
def test_a_run_is_refused_before_training_or_ends_as_it_should(run, tmp_path):
    _check(run, tmp_path)


@pytest.mark.slow
@given(run=RUNS)
@_fuzz(300)
@pytest.mark.filterwarnings("ignore")
def test_many_runs(run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _check(run, tmp_path)
