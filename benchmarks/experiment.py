"""What every arm of the comparison is given: one data set, one seed, one way to train, one way to be judged."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks import sentiment, solar, waterbirds
from benchmarks.backbones import make_backbone, weights_file
from benchmarks.results import HELD_OUT
from demem.batch import apply_model
from demem.callbacks import ActivationDiversityMonitor
from demem.data import ColoredMNIST, Dominoes, GroupedDataModule, SpuriousDigits, WildsDataModule
from demem.metrics import (
    adjusted_average_accuracy_compute,
    average_accuracy_compute,
    group_accuracy_compute,
    group_accuracy_update,
    worst_group_accuracy_compute,
)
from demem.module import Classifier
from demem.sites import find_head

SPLITS = ("train", "val", "test")
_MOBILENET, _LITE0 = "mobilenetv2", "efficientnet_lite0"


@dataclass(frozen=True)
class Settings:
    """What the user gives to a run: where files are, and whom to tell how far it has come.

    Attributes:
        data_root, weights, cache: folders and files named by the user.
        on_epoch: called with the number of epochs done and in all.
        on_caching: called with (file, images done, images in all) while frozen layers are computed.
    """

    data_root: Path | None = None
    weights: Path | None = None
    cache: Path | None = None
    on_epoch: Callable[[int, int], None] | None = None
    on_caching: Callable[[str, int, int], None] | None = None

    def root(self, task: str) -> Path:
        if self.data_root is None:
            raise ValueError(f"--data {task} reads a local folder: pass --data-root.")
        return self.data_root


def selected_on(held_out: str) -> str:
    """What the validation loader reads: ``"iid"`` or ``"val"``.  With the held-out source ``none`` it is the validation
    set, whose labels then select and train nothing; the training set is the whole one, as with ``val``."""
    return "iid" if held_out == "iid" else "val"


@dataclass
class Shared:
    """What the experiments of one comparison leave for each other.

    Attributes:
        choices: hyper-parameters that an arm chose on its first seed, by (data, arm, :func:`selected_on`); later seeds
            keep them.
        runs: ERM networks by :attr:`Experiment.erm_key`, so that arms that only refit a head share one.
        outcomes: of this seed's arms that train on no held-out label, with their seconds, by (arm, tier): their rows on
            ``none`` and ``val`` are of one run.
    """

    choices: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)
    runs: dict[tuple[str, int, str, int], Run] = field(default_factory=dict)
    outcomes: dict[tuple[str, str], tuple[Outcome, float]] = field(default_factory=dict)

    def start_seed(self) -> None:
        """Forget the networks of the seed before; what was chosen is kept."""
        self.runs.clear()
        self.outcomes.clear()


@dataclass(frozen=True)
class Task:
    """A data set of the comparison with its network and training schedule."""

    name: str
    epochs: int
    data: Callable[..., GroupedDataModule]  # (settings, seed=, held_out=, **options)
    module: Callable[..., Classifier]  # (settings, **options), under a fixed seed
    files: tuple[str, ...] = ()  # what must be below --data-root
    threads: int | None = None  # a small network runs faster on one thread, above all on a busy machine
    check: Callable[[Settings], Any] | None = None  # raises if a package or weights are missing
    sources: Callable[[Settings], list[str]] | None = None  # where data and weights come from, and their licences
    gpu: bool = False  # takes one, and so is no part of ``--data all``


@dataclass
class Features:
    """What the head reads (before any gate), labels and groups: ``train`` (plain view), ``val``, ``test``."""

    z: dict[str, Tensor]
    y: dict[str, Tensor]
    group: dict[str, Tensor]
    weight: Tensor
    bias: Tensor

    def outcome(self, head: tuple[Tensor, Tensor], config: dict[str, Any]) -> Outcome:
        """The result of putting another head on these features."""
        return Outcome({split: self.z[split] @ head[0].T + head[1] for split in SPLITS}, config)


@dataclass
class Run:
    """A trained network."""

    module: Classifier
    data: GroupedDataModule
    seconds: float
    callbacks: Sequence[pl.Callback] = ()

    @cached_property
    def features(self) -> Features:
        head = find_head(self.module)[1]
        z, _ = zip(*(self.read(split) for split in SPLITS), strict=True)
        sets = self._sets()
        return Features(
            dict(zip(SPLITS, z, strict=True)),
            {split: sets[split].y for split in SPLITS},
            {split: sets[split].group for split in SPLITS},
            head.weight.detach().cpu(),
            head.bias.detach().cpu(),
        )

    @cached_property
    def logits(self) -> dict[str, Tensor]:
        return {split: self.read(split)[1] for split in SPLITS}

    def extras(self) -> dict[str, list[dict[str, Any]]]:
        """What the callbacks recorded for the figures: ``diversity``, a row an epoch."""
        rows = [
            {
                "epoch": record["epoch"] + 1,
                "entropy": record["diversity/entropy"],
                "mutual_information": record.get("diversity/mi"),
            }
            for callback in self.callbacks
            if isinstance(callback, ActivationDiversityMonitor)
            for record in callback.history
        ]
        return {"diversity": rows} if rows else {}

    def _sets(self) -> dict[str, Any]:
        return {
            "train": self.data.train_eval_dataset,
            "val": self.data.val_dataset,
            "test": self.data.test_dataset,
        }

    def read(self, split: str) -> tuple[Tensor, Tensor]:
        """What the head reads of a split, before any gate, ``(S, N)``, and the logits ``(S, C)``."""
        loader = {
            "train": self.data.train_eval_dataloader,
            "val": self.data.val_dataloader,
            "test": self.data.test_dataloader,
        }[split]()
        rows: list[Tensor] = []
        logits: list[Tensor] = []
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module = self.module.to(device).eval()
        handle = find_head(module)[1].register_forward_pre_hook(
            lambda _, args: rows.append(args[0].detach().cpu()),
            prepend=True,  # before any gate
        )
        try:
            with torch.no_grad():
                for x, _, _ in loader:
                    logits.append(apply_model(module, x.to(device)).cpu())
        finally:
            handle.remove()
            module.cpu()
        return torch.cat(rows), torch.cat(logits)


@dataclass
class Outcome:
    """What an arm hands back: logits ``(S, C)`` for each split, what it chose, and extras for the figures."""

    logits: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One arm.

    Attributes:
        name: in the table and in ``results.jsonl``; arms of other tiers or held-out sources may share it.
        tier: group labels seen: T0 none … T3 training groups.
        selection: how hyper-parameters and epoch are chosen, in a few words.
        run: the arm itself.
        held_out: the held-out sources (:data:`HELD_OUT`) that it has a row on.  One that lists ``none`` beside ``val``
            trains on no held-out label, so that both rows are of the same run.
        uses_erm: whether it starts from the shared ERM run, whose time then counts as its own.
        grid: what is tuned, for the reader.
    """

    name: str
    tier: str
    selection: str
    run: Callable[[Experiment], Outcome]
    held_out: tuple[str, ...] = ("val", "iid")
    uses_erm: bool = False
    grid: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} {self.tier}"


class _Epochs(pl.Callback):
    def __init__(self, report: Callable[[int, int], None], epochs: int) -> None:
        self.report, self.epochs = report, epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.report(trainer.current_epoch + 1, self.epochs)


class Experiment:
    """One data set, seed and held-out source.

    Initialisation, the order of the examples, the ``iid`` slice and the made data follow from the seed alone, and are
    the same for every arm.

    Args:
        task: the data set, its network and its schedule.
        settings: where files are, and whom to tell about progress.
        seed: of everything random.
        held_out: held-out source, one of :data:`HELD_OUT`.
        epochs: default those of the task.
        watched: record what the figures need.
        shared: what the other experiments of the comparison left; default nothing.
    """

    def __init__(
        self,
        task: Task,
        settings: Settings,
        seed: int,
        held_out: str = "val",
        epochs: int | None = None,
        watched: bool = False,
        shared: Shared | None = None,
    ) -> None:
        if held_out not in HELD_OUT:
            raise ValueError(f"held_out must be one of {', '.join(HELD_OUT)}, got {held_out!r}.")
        self.task, self.settings, self.seed, self.held_out = task, settings, seed, held_out
        self.epochs = epochs or task.epochs
        self.watched = watched
        self.shared = shared or Shared()

    def watch(self) -> list[pl.Callback]:
        """Callbacks that record diversity for the figures, in runs that are watched."""
        return [ActivationDiversityMonitor()] if self.watched else []

    def data(self, **options: Any) -> GroupedDataModule:
        """A fresh data module."""
        data = self.task.data(self.settings, **{"seed": self.seed, "held_out": selected_on(self.held_out), **options})
        if not isinstance(data, GroupedDataModule):
            raise ValueError(
                f"The data of {self.task.name} must be a demem.data.GroupedDataModule, got {type(data).__name__}."
            )
        data.setup()
        return data

    def module(self, **options: Any) -> Classifier:
        """A freshly initialised network."""
        pl.seed_everything(self.seed, verbose=False)
        module = self.task.module(self.settings, **options)
        if not isinstance(module, Classifier):
            raise ValueError(
                f"The network of {self.task.name} must be a demem.module.Classifier, got {type(module).__name__}."
            )
        return module

    def fit(
        self,
        module: Classifier | None = None,
        data: GroupedDataModule | None = None,
        callbacks: Sequence[pl.Callback] = (),
        epochs: int | None = None,
        validate: bool | None = None,
    ) -> Run:
        """Train by the task's schedule.

        Args:
            module: default :meth:`module`.
            data: default :meth:`data`.
            callbacks: of the Trainer.
            epochs: default those of the experiment.
            validate: run validation after each epoch; default: if there are callbacks.
        """
        start = time.perf_counter()
        module, data = module or self.module(), data or self.data()
        epochs = epochs or self.epochs
        validate = bool(callbacks) if validate is None else validate
        own = [_Epochs(self.settings.on_epoch, epochs)] if self.settings.on_epoch else []
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="auto",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=None if validate else 0,
            callbacks=[*callbacks, *own],
        )
        pl.seed_everything(self.seed, verbose=False)
        trainer.fit(module, datamodule=data)
        return Run(module, data, time.perf_counter() - start, callbacks)

    def erm(self, held_out: str | None = None) -> Run:
        """The ERM run of this seed, trained once; ``held_out`` names the source if not this experiment's."""
        other = Experiment(
            self.task, self.settings, self.seed, held_out or self.held_out, self.epochs, self.watched, self.shared
        )
        if other.erm_key not in self.shared.runs:
            self.shared.runs[other.erm_key] = other.fit(callbacks=other.watch())
        return self.shared.runs[other.erm_key]

    @property
    def erm_key(self) -> tuple[str, int, str, int]:
        """What the ERM run of this experiment is kept under (:class:`Shared`)."""
        return self.task.name, self.seed, selected_on(self.held_out), self.epochs

    def choose(self, arm: str, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Hyper-parameters of an expensive arm, tuned on the first seed of the run and kept for the others."""
        key = (self.task.name, arm, selected_on(self.held_out))
        if key not in self.shared.choices:
            self.shared.choices[key] = choose()
        return self.shared.choices[key]


def judge(outcome: Outcome, data: GroupedDataModule) -> dict[str, Any]:
    """The accuracies of a row, on the test set and, by group, on the training set."""
    missing = [split for split in ("train", "test") if split not in outcome.logits]
    if missing:
        raise ValueError(f"The outcome has no logits of the split {' and '.join(missing)}.")
    groups, sizes = data.num_groups, data.train_group_counts
    sets = {"train": data.train_eval_dataset, "test": data.test_dataset}
    counts = {
        split: group_accuracy_update(outcome.logits[split], rows.y, rows.group, groups)
        for split, rows in sets.items()
        if rows is not None
    }
    correct, total = counts["test"]
    return {
        "worst_group_acc": float(worst_group_accuracy_compute(correct, total)),
        "group_acc": _by_group(correct, total),
        "avg_acc": float(average_accuracy_compute(correct, total)),
        "adjusted_avg_acc": float(adjusted_average_accuracy_compute(correct, total, sizes)),
        "train_group_acc": _by_group(*counts["train"]),
    }


def _by_group(correct: Tensor, total: Tensor) -> list[float | None]:
    accuracy = group_accuracy_compute(correct, total).tolist()
    return [None if n == 0 else a for a, n in zip(accuracy, total.tolist(), strict=True)]


# The data sets


def _digits(settings: Settings, **options: Any) -> GroupedDataModule:
    return SpuriousDigits(**options)


def _digits_balanced(settings: Settings, **options: Any) -> GroupedDataModule:
    return SpuriousDigits(correlation=0.5, **options)


def _colored_mnist(settings: Settings, **options: Any) -> GroupedDataModule:
    return ColoredMNIST(str(settings.root("colored_mnist")), **options)


def _dominoes(correlation: float, **pairs: Any) -> Callable[..., GroupedDataModule]:
    def make(settings: Settings, **options: Any) -> GroupedDataModule:
        return Dominoes(str(settings.root("dominoes")), correlation, **pairs, **options)

    return make


def _waterbirds_full(settings: Settings, **options: Any) -> GroupedDataModule:
    half, workers = (0.5, 0.5, 0.5), min(8, os.cpu_count() or 1)
    options = {"resize": 180, "crop": 180, "mean": half, "std": half, "num_workers": workers, **options}
    return WildsDataModule("waterbirds", str(settings.root("waterbirds_full")), **options)


def _waterbirds_full_module(settings: Settings, **options: Any) -> Classifier:
    network = make_backbone(_MOBILENET, weights_file(_MOBILENET, settings))
    network.classifier = torch.nn.Linear(1280, 2)
    return Classifier(network, freeze_batchnorm=True, **{"lr": 3e-3, **options})


def _cnn(in_chans: int) -> Callable[..., Classifier]:
    def make(settings: Settings, **options: Any) -> Classifier:
        return Classifier("small_cnn", in_chans=in_chans, **{"lr": 0.05, **options})

    return make


def _vit(settings: Settings, **options: Any) -> Classifier:
    """A small ViT from scratch on dominoes: 7×7 patches of 56×28 pixels, 6 blocks of width 96."""
    shape = {"img_size": (56, 28), "patch_size": 7, "embed_dim": 96, "depth": 6, "num_heads": 4}
    options = {"lr": 1e-3, "optimizer": "adam", "weight_decay": 0.05, **options}
    return Classifier("vit_tiny_patch16_224", in_chans=1, model_kwargs=shape, **options)


def _resnet(settings: Settings, **options: Any) -> Classifier:
    """A small ResNet from scratch on dominoes: four stages of one basic block each."""
    shape = {"channels": (16, 32, 64, 128), "layers": (1, 1, 1, 1), "stem_width": 16}
    return Classifier("resnet10t", in_chans=1, model_kwargs=shape, **{"lr": 0.05, **options})


def _digits_sources(settings: Settings) -> list[str]:
    return ["data: scikit-learn's load_digits (Optical Recognition of Handwritten Digits, UCI; CC BY 4.0)"]


def _mnist_sources(settings: Settings) -> list[str]:
    return [f"data: {settings.data_root}/MNIST/raw (MNIST; CC BY-SA 3.0)"]


def _pair_sources(settings: Settings) -> list[str]:
    fashion = f"data: {settings.data_root}/FashionMNIST/raw (Fashion-MNIST; MIT)"
    return [*_mnist_sources(settings), fashion]


_PAIR = ("MNIST/raw", "FashionMNIST/raw")
_BIRDS = ("waterbirds_v1.0/metadata.csv",)


def _waterbirds_task(name: str, backbone: str) -> Task:
    return Task(
        name,
        10,
        partial(waterbirds.make_data, backbone),
        partial(waterbirds.make_module, backbone),
        _BIRDS,
        check=partial(weights_file, backbone),
        sources=partial(waterbirds.sources, backbone),
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("digits", 20, _digits, _cnn(3), threads=1, sources=_digits_sources),
        Task("digits_balanced", 20, _digits_balanced, _cnn(3), threads=1, sources=_digits_sources),
        Task("colored_mnist", 10, _colored_mnist, _cnn(3), ("MNIST/raw",), sources=_mnist_sources),
        Task("dominoes", 10, _dominoes(0.95), _resnet, _PAIR, sources=_pair_sources),
        Task("dominoes99", 10, _dominoes(0.99), _resnet, _PAIR, sources=_pair_sources),
        Task(
            "dominoes_shirts",
            10,
            _dominoes(0.95, mnist_classes=(3, 8), fashion_classes=(2, 6)),
            _resnet,
            _PAIR,
            sources=_pair_sources,
        ),
        Task("dominoes_vit", 15, _dominoes(0.95), _vit, _PAIR, sources=_pair_sources),
        _waterbirds_task("waterbirds", _MOBILENET),
        _waterbirds_task("waterbirds_lite0", _LITE0),
        Task(
            "waterbirds_full",
            30,
            _waterbirds_full,
            _waterbirds_full_module,
            _BIRDS,
            check=partial(weights_file, _MOBILENET),
            sources=partial(waterbirds.sources, _MOBILENET),
            gpu=True,
        ),
        Task("solar", 10, solar.make_data, solar.make_module, check=solar.check, sources=solar.sources),
        Task(
            "sentiment",
            3,
            sentiment.make_data,
            sentiment.make_module,
            sentiment.FILES,
            check=sentiment.check,
            sources=sentiment.sources,
        ),
    )
}
"""The data sets by name; ``--data all`` is all that need no GPU."""
BACKBONES = {_MOBILENET: "waterbirds", _LITE0: "waterbirds_lite0"}
"""What ``--data waterbirds --backbone NAME`` means."""


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of one data set asks for."""
    parser.add_argument("--data", choices=list(TASKS), default="digits")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--epochs", type=int, help="default: the data set's own")
