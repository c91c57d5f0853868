"""``python -m benchmarks papers measures``: the experiments of Bansal et al. 2022, and the measures over epochs.

Every trained network appends a row to ``runs.jsonl`` as soon as it is measured; a second start goes on from there.
``papers.jsonl``, the tables and the figures are made from those rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.options import Parser
from benchmarks.papers import language
from benchmarks.papers.measures_report import report
from benchmarks.papers.training import accuracy_of, fit, shuffled
from benchmarks.results import append_jsonl, read_jsonl
from demem.linear import few_of_each_group
from demem.measures import TiesWarning, collect_activations, mean_mi, measure_diversity, mutual_information
from demem.metrics import group_accuracy_compute, group_accuracy_update


@dataclass(frozen=True)
class Series:
    """One of the paper's series: networks that differ in how much there is to memorise.

    Attributes:
        kind: which memorization the levels add.
        levels: of the third feature's agreement, the colour's flips, or the shuffled share.
        sites: where activations are read.
        bins: of the entropy.
        paper_tau: Kendall τ in the paper's table 2.
        train: (level, seed, options) to network, activations' inputs, row.
    """

    name: str
    kind: str
    levels: tuple[float, ...]
    sites: tuple[str, ...]
    bins: int
    paper_tau: dict[str, float]
    train: Callable[[float, int, argparse.Namespace], tuple[nn.Module, Tensor, dict[str, Any]]]
    reads: str = "MNIST"  # below ``--data-root``; "" for nothing
    batch: int = 2000  # examples read at once


def main(argv: list[str]) -> int:
    parser = Parser("papers measures", __doc__)
    parser.add_argument("--data-root", type=Path, help="folder with MNIST and waterbirds_v1.0; circles need none")
    parser.add_argument("--out", type=Path, default=Path("results/papers_measures"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=[*(s.name for s in SERIES), "waterbirds_epochs"])
    parser.add_argument("--epochs", type=int, default=20, help="of the MNIST networks (shuffled: three times as many)")
    parser.add_argument("--train-size", type=int, default=50_000, help="training images of Colored MNIST")
    parser.add_argument("--shuffled-train-size", type=int, default=20_000, help="training images of Shuffled MNIST")
    parser.add_argument("--circles-epochs", type=int, default=200, help="on 1,000 points (shuffled: 20 × on 100)")
    parser.add_argument("--mi-units", type=int, default=192, help="units in the KSG matrix, drawn with the seed")
    parser.add_argument("--mi-samples", type=int, default=2_500)
    parser.add_argument("--waterbirds-epochs", type=int, default=10)
    parser.add_argument("--per-group", type=int, default=400, help="Waterbirds images of a group and split, at most")
    parser.add_argument("--cache", type=Path, help="folder for Waterbirds' frozen-layer outputs")
    parser.add_argument("--weights", type=Path, help="MobileNetV2 weights (default: below --data-root)")
    options = parser.parse_args(argv)

    rows = options.out / "runs.jsonl"
    known = {(r["experiment"], r["level"], r["seed"]) for r in read_jsonl(rows)}
    for series in SERIES:
        if options.only and series.name not in options.only:
            continue
        if series.reads and (options.data_root is None or not (options.data_root / series.reads).is_dir()):
            print(f"{series.name}: skipped, it reads {series.reads}: pass --data-root with the folder above it.")
            continue
        for seed in range(options.seeds):
            for level in series.levels:
                if (series.name, level, seed) not in known:
                    row = run(series, level, seed, options)
                    append_jsonl(rows, row)
                    print(json.dumps(row), flush=True)
    if (not options.only or "waterbirds_epochs" in options.only) and options.data_root is not None:
        if not (options.data_root / "waterbirds_v1.0").is_dir():
            print("waterbirds_epochs: skipped, there is no waterbirds_v1.0 below --data-root.")
        else:
            for seed in range(options.seeds):
                if ("waterbirds_epochs", None, seed) not in known:
                    append_jsonl(rows, waterbirds_epochs(seed, options))
    report(options.out, SERIES)
    return 0


def run(series: Series, level: float, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one network and measure it on unlabelled examples."""
    start = time.perf_counter()
    model, inputs, row = series.train(level, seed, options)
    x = collect_activations(model, inputs.split(series.batch), series.sites, max_samples=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TiesWarning)  # the circles are read after their ReLU, as in the paper
        d = measure_diversity(x, series.bins, max_units=options.mi_units, max_mi_samples=options.mi_samples, seed=0)
    chosen = {name: x[name][: options.mi_samples, units] for name, units in d.mi_units.items()}
    h, off = torch.cat(list(d.entropy.values())), ~torch.eye(len(d.mutual_information), dtype=torch.bool)
    if seed == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        torch.save(
            {"entropy": d.entropy, "mi": d.mutual_information, "units": d.mi_units, "samples": d.num_samples},
            options.out / f"{series.name}_{level}.pt",
        )
    return {
        "experiment": series.name,
        "level": level,
        "seed": seed,
        **row,
        "mean_h": d.mean_entropy,
        "median_h": float(h.median()),
        "mean_mi": d.mean_mi,
        "median_mi": float(d.mutual_information[off].median()),
        "mean_binned_mi": float(mean_mi(mutual_information(chosen, series.bins))),
        "mean_quantile_mi": float(
            mean_mi(mutual_information(chosen, 16, "quantile", correction="miller_madow"), False)
        ),
        "site_h": {name: float(v.mean()) for name, v in d.entropy.items()},
        "mi_units": len(d.mutual_information),
        "samples": len(inputs),
        "mi_samples": d.num_samples,
        "seconds": round(time.perf_counter() - start, 2),
    }


# The paper's data and networks


def circles(size: int, agreement: float, generator: Any) -> tuple[Tensor, Tensor]:
    """Two circles, and a third feature ±1 that agrees with the label for a share of the points."""
    from sklearn.datasets import make_circles

    x, y = make_circles(size, noise=0.2, factor=0.4, random_state=generator)
    agrees = generator.random_sample(size) < agreement
    third = torch.from_numpy((2 * y - 1) * (2 * agrees - 1))
    return torch.cat([torch.from_numpy(x), third[:, None]], 1).float(), torch.from_numpy(y)


def train_circles_artefact(level: float, seed: int, options: argparse.Namespace) -> Any:
    import numpy as np

    generator = np.random.RandomState(seed)
    x, y = circles(1000, level, generator)
    model = mlp([3, 16, 16, 2], seed)
    accuracy, epochs = fit(model, x, y, epochs=options.circles_epochs, batch=100, seed=seed, lr=1e-2)
    same, plain = circles(2000, level, generator), circles(2000, 0.5, generator)
    row = {"train_acc": accuracy, "extrinsic": accuracy_of(model, *plain), "iid_acc": accuracy_of(model, *same)}
    return model, same[0], {**row, "epochs": epochs}


def train_circles_shuffle(level: float, seed: int, options: argparse.Namespace) -> Any:
    import numpy as np

    generator = np.random.RandomState(seed)
    x, y = (t for t in circles(100, 0.5, generator))
    noisy = shuffled(y, level, seed)
    model = mlp([2, 16, 16, 2], seed)
    accuracy, epochs = fit(model, x[:, :2], noisy, epochs=20 * options.circles_epochs, batch=100, seed=seed, lr=1e-2)
    xt, yt = circles(2000, 0.5, generator)
    row = {"train_acc": accuracy, "extrinsic": accuracy_of(model, xt[:, :2], yt), "epochs": epochs}
    return model, xt[:, :2], row


def train_colored_mnist(level: float, seed: int, options: argparse.Namespace, penalty: float = 0.002) -> Any:
    x, y = mnist(options)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    part, held = order[: options.train_size], order[-10_000:]
    train = colour(x[part], y[part], level, generator)
    model = mlp([392, 256, 256, 256, 2], seed)
    accuracy, epochs = fit(model, *train, epochs=options.epochs, batch=512, seed=seed, penalty=penalty)
    state = generator.get_state()
    shifted = colour(x[held], y[held], 0.5, generator)
    generator.set_state(state)
    same = colour(x[held], y[held], level, generator)
    row = {"train_acc": accuracy, "extrinsic": accuracy_of(model, *shifted), "iid_acc": accuracy_of(model, *same)}
    return model, same[0], {**row, "epochs": epochs, "penalty": penalty, "train_size": len(part)}


def train_shuffled_mnist(level: float, seed: int, options: argparse.Namespace) -> Any:
    x, y = mnist(options)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    part, held = order[: options.shuffled_train_size], order[-10_000:]
    model = mlp([784, 256, 256, 256, 10], seed)
    accuracy, epochs = fit(
        model, x[part].flatten(1), shuffled(y[part], level, seed, 10), epochs=3 * options.epochs, batch=512, seed=seed
    )
    row = {"train_acc": accuracy, "extrinsic": accuracy_of(model, x[held].flatten(1), y[held])}
    return model, x[held].flatten(1), {**row, "epochs": epochs, "train_size": len(part)}


def mnist(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import MNIST

    data = MNIST(str(options.data_root), train=True)
    return data.data.float() / 255, data.targets


def colour(x: Tensor, y: Tensor, flips: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """2×14×14 images whose colour is the noisy label, flipped for a share of them (Arjovsky et al. 2019)."""
    label = (y < 5) ^ (torch.rand(len(y), generator=generator) < 0.25)
    red = label ^ (torch.rand(len(y), generator=generator) < flips)
    images = x[:, None, ::2, ::2].repeat(1, 2, 1, 1)
    images[torch.arange(len(y)), 1 - red.long()] = 0
    return images.flatten(1), label.long()


def mlp(widths: list[int], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


SERIES = (
    Series(
        "circles_artefact",
        "heuristic",
        (0.5, 0.65, 0.75, 0.9, 1.0),
        ("1", "3"),
        20,
        {},
        train_circles_artefact,
        "",
    ),
    Series(
        "circles_shuffle",
        "example-level",
        (0.0, 0.25, 0.5, 0.75, 1.0),
        ("1", "3"),
        20,
        {},
        train_circles_shuffle,
        "",
    ),
    Series(
        "colored_mnist",
        "heuristic",
        (0.5, 0.375, 0.25, 0.125, 0.0),
        ("0", "2", "4"),
        100,
        {"mean_h": 1.0, "mean_mi": 1.0},
        train_colored_mnist,
    ),
    # The penalty keeps the network from fitting single examples; without it both kinds of memorization compete.
    Series(
        "colored_mnist_no_penalty",
        "heuristic",
        (0.5, 0.375, 0.25, 0.125, 0.0),
        ("0", "2", "4"),
        100,
        {},
        partial(train_colored_mnist, penalty=0.0),
    ),
    Series(
        "shuffled_mnist",
        "example-level",
        (0.0, 0.25, 0.5, 0.75, 1.0),
        ("0", "2", "4"),
        100,
        {"mean_h": 1.0, "mean_mi": 0.88},
        train_shuffled_mnist,
    ),
    Series(
        "sentiment_planted",
        "heuristic",
        (0.5, 0.65, 0.75, 0.9, 1.0),
        language.SITES,
        100,
        {"mean_h": 0.8, "mean_mi": 0.8},
        language.train_planted,
        "rt-polarity",
        language.READ,
    ),
    Series(
        "sentiment_shuffled",
        "example-level",
        (0.0, 0.25, 0.5, 0.75, 1.0),
        language.SITES,
        100,
        {"mean_h": 0.6, "mean_mi": 0.8},
        language.train_shuffled,
        "rt-polarity",
        language.READ,
    ),
)


# What the paper did not do: the epochs of one run


def waterbirds_epochs(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """ERM on Waterbirds with both measures on validation images after each epoch, beside the memorization gap."""
    import pytorch_lightning as pl

    from benchmarks.experiment import TASKS, Experiment, Settings
    from demem.callbacks import ActivationDiversityMonitor

    class Groups(pl.Callback):
        """Accuracy by group on training, validation and test data after each epoch."""

        def __init__(self) -> None:
            self.rows: list[dict[str, list[float]]] = []

        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            data = trainer.datamodule
            splits = {"train": data.train_eval_dataset, "val": data.val_dataset, "test": data.test_dataset}
            row = {}
            for split, dataset in splits.items():
                few = (
                    few_of_each_group(dataset.group, options.per_group, torch.Generator().manual_seed(0)).sort().values
                )
                correct, total = 0, 0
                for part in few.split(256):
                    x, y, group = dataset.rows(part)
                    counts = group_accuracy_update(pl_module(x), y, group, data.num_groups)
                    correct, total = correct + counts[0], total + counts[1]
                row[split] = group_accuracy_compute(correct, total).tolist()
            self.rows.append(row)

    start = time.perf_counter()
    monitor, groups = ActivationDiversityMonitor(max_examples=2000), Groups()
    experiment = Experiment(TASKS["waterbirds"], Settings(options.data_root, options.weights, options.cache), seed)
    experiment.fit(callbacks=[monitor, groups], epochs=options.waterbirds_epochs)
    return {
        "experiment": "waterbirds_epochs",
        "level": None,
        "seed": seed,
        "epochs": [
            {**measured, **{f"{split}_group_acc": acc for split, acc in row.items()}}
            for measured, row in zip(monitor.history, groups.rows, strict=True)
        ],
        "seconds": round(time.perf_counter() - start, 1),
    }
